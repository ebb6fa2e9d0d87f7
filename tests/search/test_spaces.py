"""What is searched: ranges that stand beside the settings, and what a user adds."""

import pytest

from bpnjax import config as configuration
from bpnjax import search
from bpnjax.config.fields import entries
from bpnjax.methods import REGISTRY
from bpnjax.utils.errors import UserError


def configured(method, **fields):
    config = configuration.default()
    config.method = method
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


@pytest.mark.parametrize("method", REGISTRY)
def test_ranges_hold_the_defaults_and_allowed_values(method):
    axes = search.space(configured(method))
    assert "train.learning_rate" in [axis.field for axis in axes]
    for axis in axes:
        assert axis.low <= axis.default <= axis.high and axis.low < axis.high
        assert axis.scale == "linear" or axis.low > 0
        setting = entries()[axis.field].setting
        for value in (axis.low, axis.high, axis.default):
            assert setting.complaint(value, axis.default) is None
        assert axis.field in REGISTRY[method].fields or axis.field == "train.learning_rate"


def test_a_range_is_that_of_the_form_in_use():
    def strength(form):
        axes = {axis.field: axis for axis in search.space(configured("ewc", ewc__form=form))}
        return axes["ewc.strength"]

    assert (strength("relative").high, strength("relative").default) == (1.0, 0.02)
    assert (strength("proximal").high, strength("proximal").default) == (1e6, 2000.0)
    bd = {a.field: a for a in search.space(configured("bd", bd__step="absolute"))}
    assert bd["bd.epsilon"].high == 0.5


def test_a_range_is_widened_to_the_configuration():
    axes = {a.field: a for a in search.space(configured("bd_ewc", bd__epsilon=7.0))}
    assert axes["bd.epsilon"].high == axes["bd.epsilon"].default == 7.0


def test_what_a_user_adds():
    more = {
        "train.learning_rate": "1e-5:1e-2:log", "bd.hidden_dim": "10:200:log",
        "bd.step": "relative,absolute", "ewc.strength": "fixed", "replay.alpha": "0.1:2:log",
    }  # fmt: skip
    axes = {axis.field: axis for axis in search.space(configured("bd_ewc"), more)}
    assert list(axes) == ["bd.epsilon", "bd.hidden_dim", "bd.step", "train.learning_rate"]
    assert axes["bd.hidden_dim"].whole and not axes["bd.hidden_dim"].traced
    assert axes["bd.step"].choices == ("relative", "absolute")
    assert axes["train.learning_rate"].low == 1e-5 and axes["train.learning_rate"].traced
    assert "out of relative, absolute" in axes["bd.step"].described()


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("bd.epsilom", "0.1:1", "bd.epsilom: unknown config field; did you mean bd.epsilon"),
        ("bd", "0.1:1", "bd: is a group of fields"),
        ("bd.epsilon", "1:0.1:log", "'1:0.1:log' is empty; the first number must be below"),
        ("bd.epsilon", "0.2:0.2:log", "is empty"),
        ("bd.epsilon", "0:1:log", "a log scale begins above 0; raise 0"),
        ("bd.epsilon", "0.1:1:cubic", "the scale is log or linear; write low:high:log"),
        ("bd.epsilon", "a:1", "'a' is not a number; give one"),
        ("bd.epsilon", "0.3:1", "does not hold 0.2, the configuration's value"),
        ("bd.epsilon", "-1:1", "-1.0 is not above 0; give a larger number"),
        ("bd.epsilon", "0.2", "is not a range; write low:high:log"),
        ("bd.epsilon", "0.1,0.3", "does not hold 0.2"),
        ("bd.hidden_dim", "10:200.5", "'200.5' is not a whole number; give one"),
        ("bd.step", "relative,upwards", "unknown value 'upwards'"),
        ("bd.layers", "0:1", "which is not a number"),
        ("bd.epsilon", "0.1:nan", "'nan' is not finite"),
    ],
)
def test_wrong_ranges_are_refused(field, text, message):
    with pytest.raises(UserError) as caught:
        search.space(configured("bd_ewc"), {field: text})
    assert message in str(caught.value)


def test_two_phases_learn_other_tasks():
    config = configured("bd_ewc")
    two = search.protocol(config)
    assert two.name == "two_phase"
    assert two.tune.sequence.order_seed == 1000 and two.report.sequence.order_seed == -1
    assert two.tune.evaluate.on == "validation" and two.report.evaluate.on == "test"
    assert two.tune.dataset.validation == 0.1 and two.report.dataset.validation == 0
    assert (two.tune.seed, two.tune.num_seeds) == (1000, 1)

    config.search.protocol = "one_phase"
    one = search.protocol(config)
    assert one.name == "one_phase" and one.tune.sequence.order_seed == -1


def test_phases_of_sequences_that_cannot_be_drawn_again():
    config = configured("bd_ewc", sequence__classes="0,1;2,3")
    with pytest.raises(UserError, match=r"sequence.classes spells them out.*or set one_phase"):
        search.protocol(config)
    config.search.tune = "sequence.classes=4,5|6,7".replace("|", ",")
    assert search.protocol(config).tune.sequence.classes == "4,5,6,7"
    config = configured("bd_ewc", sequence__kind="datasets")
    assert search.protocol(config).name == "two_phase, same tasks"
    config = configured("bd_ewc", sequence__kind="permuted")
    assert search.protocol(config).tune.seed == 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train.epochs",
            "search.tune: 'train.epochs' is not a change of a field; write field=value",
        ),
        ("train.epoch=1", "search.tune: train.epoch: unknown config field"),
        ("train.epochs=many", "search.tune: train.epochs=many is not of type int; give one"),
        ("train.epochs=0", "train.epochs: 0 is below 1"),
    ],
)
def test_wrong_changes_are_refused(text, message):
    with pytest.raises(UserError) as caught:
        search.protocol(configured("bd_ewc", search__tune=text))
    assert message in str(caught.value)
