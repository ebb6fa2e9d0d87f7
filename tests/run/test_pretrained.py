"""Networks that start from a pretrained one, and frozen convolutions that are run once."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file
from support import digits_config

import bpnjax
from bpnjax import pretrain
from bpnjax.data import load_sequence
from bpnjax.models import EfficientNetLite0, ResNet18, SmallAlexNet, pretrained
from bpnjax.run import frozen_features, train
from bpnjax.training.experiment import make_experiment
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

SMALL = {
    "model__name": "small_alexnet", "model__channels": (4, 4, 6, 4, 4), "model__hidden": (12, 12),
    "train__epochs": 1,
}  # fmt: skip
FROZEN = SMALL | {
    "train__rates": "conv_.*=0;output=2", "bd__layers": "fc6|fc7|output",
    "psp__layers": "fc6|fc7|output", "sequence__heads": "multi",
}  # fmt: skip


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    config = digits_config("sgd", sequence__num_tasks=1, sequence__classes_per_task=10, **SMALL)
    folder = tmp_path_factory.mktemp("pretrained")
    train.train_and_evaluate(config, folder)
    return str(folder / "model.safetensors")


def test_all_layers_but_the_output_start_from_the_file(model_file):
    config = digits_config("sgd", model__pretrained=model_file, **SMALL)
    experiment = make_experiment(config, load_sequence(config))
    params, _ = experiment.learner.network.init(jax.random.key(1))
    given = load_file(model_file)
    for layer in ("conv_0", "conv_4", "fc6", "fc7"):
        for name, value in params[layer].items():
            np.testing.assert_array_equal(value, given[f"params/{layer}/{name}"])
    assert params["output"]["kernel"].shape == (12, 6)


@pytest.mark.parametrize("method", ["bd_ewc", pytest.param("psp", marks=pytest.mark.slow)])
def test_features_computed_once_train_the_same_network(model_file, method, tmp_path):
    fields = FROZEN | {"model__pretrained": model_file}
    whole = train.train_and_evaluate(digits_config(method, **fields), tmp_path / "whole")
    config = digits_config(method, train__features_once=True, **fields)
    once = train.train_and_evaluate(config, tmp_path / "once")
    assert once["config"]["train"]["rates"] == FROZEN["train__rates"]
    for kind, accuracy in whole["accuracy"].items():
        np.testing.assert_allclose(once["accuracy"][kind], accuracy, atol=0.01, err_msg=kind)
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "once"))
    b = {name.replace("extractor/", "params/"): array for name, array in b.items()}
    assert a.keys() == b.keys()  # with the convolutions
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=2e-4, err_msg=name)
    # The model reads images, and answers as the run counted.
    predictor, sequence = bpnjax.load(tmp_path / "once"), load_sequence(config)
    for task in range(3):
        rows = sequence.test.index[task, : sequence.test.count[task]]
        labels = sequence.columns[task, sequence.test.labels[rows]]
        right = np.mean(predictor(sequence.test.images[rows], task) == labels)
        assert right == pytest.approx(once["accuracy"]["task_masked"][0][-1][task], abs=0.01)


def test_statistics_of_features_infer_the_task_of_images(model_file, tmp_path):
    fields = FROZEN | {"model__pretrained": model_file, "evaluate__rule": "statistics",
                       "evaluate__statistics": 3}  # fmt: skip
    config = digits_config("bd_ewc", train__features_once=True, **fields)
    found = train.train_and_evaluate(config, tmp_path)["inference"]["task_accuracy"][0, -1]
    predictor, split = bpnjax.load(tmp_path), load_sequence(config).test
    for task in range(3):
        rows = split.index[task, : split.count[task]]
        right = np.mean(predictor.infer(split.images[rows]).task == task)
        assert right == pytest.approx(found[task], abs=0.02)


def test_a_model_of_features_is_a_whole_model_to_others(model_file, tmp_path):
    """Its convolutions are in it: to start from, and for later tasks of the whole network."""
    fields = FROZEN | {"model__pretrained": model_file, "sequence__num_tasks": 2}
    config = digits_config("bd_psp", train__features_once=True, **fields)
    train.train_and_evaluate(config, tmp_path / "once")
    ours = pretrained.read(tmp_path / "once" / "model.safetensors")
    for name, array in pretrained.read(model_file).items():
        if name.startswith("conv_"):
            np.testing.assert_array_equal(ours[name], array)
    longer = digits_config("bd_psp", resume_from=str(tmp_path / "once"),
                           **fields | {"sequence__num_tasks": 3})  # fmt: skip
    found = train.train_and_evaluate(longer, tmp_path / "longer")
    after = pretrained.read(tmp_path / "longer" / "model.safetensors")
    np.testing.assert_array_equal(after["conv_0/kernel"], ours["conv_0/kernel"])
    assert not np.isnan(found["accuracy"]["task_told"][0, 2]).any()


def random_weights(path, model, shape):
    """A model of this package with random parameters and statistics."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *shape), np.float32))
    rng, found = np.random.default_rng(3), {}
    for name, leaf in flatten_dict(shapes, sep="/").items():
        array = rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        array = 1 + array**2 if name.endswith(("scale", "var")) else array
        found[name.replace("batch_stats/", "variables/batch_stats/")] = array.astype(np.float32)
    save_file(found, path, {"format": "bpnjax-3"})
    return str(path)


def test_the_running_statistics_of_frozen_norms_go_along(tmp_path):
    file = random_weights(tmp_path / "w.safetensors", ResNet18(6, width=2), (8, 8, 1))
    fields = {
        "model__name": "resnet18", "model__options": "width=2", "model__pretrained": file,
        "train__epochs": 1, "train__rates": "(?!output).*=0;output=3", "psp__layers": "output",
        "sequence__num_tasks": 2, "sequence__heads": "multi",
    }  # fmt: skip
    with pytest.raises(UserError, match="model.batch_statistics: with 'task' the norms before"):
        frozen_features.load(digits_config("psp", train__features_once=True, **fields))
    fields |= {"model__batch_statistics": "frozen"}
    whole = train.train_and_evaluate(digits_config("psp", **fields), tmp_path / "whole")
    config = digits_config("psp", train__features_once=True, **fields)
    assert frozen_features.load(config)[0].train.rates == "output=3.0"
    once = train.train_and_evaluate(config, tmp_path / "once")
    np.testing.assert_allclose(
        once["accuracy"]["task_told"], whole["accuracy"]["task_told"], atol=0.02
    )
    images = load_sequence(config).test.images[:20]
    logits = [bpnjax.load(tmp_path / run).logits(images, 1) for run in ("whole", "once")]
    np.testing.assert_allclose(*logits, atol=1e-3)
    found, given = (pretrained.read(f) for f in (tmp_path / "once" / "model.safetensors", file))
    assert found.keys() == given.keys()
    name = "batch_stats/block_3_1/norm_1/var"
    np.testing.assert_array_equal(found[name], given[name])


def sequence_of_images(config, training):
    """What the network gets of a split."""
    sequence = load_sequence(config)
    return sequence.normalise((sequence.train if training else sequence.test).images)


def test_features_of_any_cut_are_kept_by_content(tmp_path, monkeypatch):
    model = EfficientNetLite0(6, folded=True, cut="block_14")
    file = random_weights(tmp_path / "w.safetensors", model, (8, 8, 1))
    config = digits_config(
        "bd_ewc", model__name="efficientnet_lite0", model__pretrained=file,
        model__options="folded=True, cut='block_14'", dataset__cache_dir=str(tmp_path / "cache"),
        train__features_once=True, train__rates="stem|block_([0-9]|1[0-3])/.*=0;output=2",
        bd__layers="block_1[45]/.*|head|output", dataset__normalize="unit",
    )  # fmt: skip
    trained, sequence = frozen_features.load(config)
    assert trained.train.rates == "output=2.0"
    images = load_sequence(config).normalise(load_sequence(config).test.images[:40])
    given = unflatten_dict(pretrained.read(file), sep="/")
    expected = jax.jit(lambda p, x: model.apply({"params": p}, x, features=True))(given, images)
    np.testing.assert_allclose(sequence.test.images[:40], expected, atol=1e-5)
    layers = list(make_experiment(trained, sequence).learner.network.layers)
    assert layers[0] == "block_14/expand" and layers[-1] == "output"

    def computed(*_):
        raise AssertionError("the features are there")

    monkeypatch.setattr(frozen_features, "_in_batches", computed)
    np.testing.assert_array_equal(frozen_features.load(config)[1].test.images, sequence.test.images)
    # A part of the set, in another order, finds its own.
    config.dataset.validation, config.evaluate.on = 0.2, "validation"
    part = frozen_features.load(config)[1]
    assert len(part.train.images) < len(sequence.train.images)
    for split in (part.train, part.test):
        wanted = jax.jit(lambda p, x: model.apply({"params": p}, x, features=True))(
            given, sequence_of_images(config, split is part.train)[:9]
        )
        np.testing.assert_allclose(split.images[:9], wanted, atol=1e-5)
    config.model.options = "folded=True"
    message = r"block_14/.* learns; freeze it with --config.train.rates='\(\?!output\)\.\*=0'"
    with pytest.raises(UserError, match=message):
        frozen_features.load(config)
    config.train.rates = "(?!output).*=0"
    with pytest.raises(UserError, match="head.* frozen layer block_14/.*bd.layers='output'"):
        frozen_features.load(config)
    config.bd.layers = "output"
    with pytest.raises(AssertionError, match="the features are there"):  # others: another cut
        frozen_features.load(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train__rates": ""}, "train.features_once: conv_0 learns; freeze it"),
        ({"bd__layers": ".*"}, "train.features_once: bd.layers='.*' includes the frozen layer"),
        ({"model__pretrained": ""}, "train.features_once: model.pretrained is empty"),
        ({"sequence__kind": "permuted"}, "train.features_once: with permuted pixels"),
        (
            {"model__name": "mlp", "bd__layers": ".*", "train__rates": ""},
            "train.features_once: model.name=mlp on (8, 8, 1) has no features; it is for networks "
            "on images whose __call__ takes features=True: convnet, alexnet, small_alexnet, ",
        ),
        (
            {"model__name": "vit", "model__options": "dropout=0.5", "train__rates": ""},
            "model.name: vit: with dropout=0.5 its features differ from step to step",
        ),
        ({"model__channels": (5, 4, 6, 4, 4)}, "model.pretrained: conv_0/"),
    ],
)  # fmt: skip
def test_refusals(model_file, fields, message):
    given = FROZEN | {"model__pretrained": model_file} | fields
    config = digits_config("bd_ewc", train__features_once=True, **given)
    with pytest.raises(UserError) as error:
        frozen_features.load(config)
    assert str(error.value).startswith(message)


def test_a_file_of_others_is_refused(tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"params/fc6/bias": np.zeros(1, np.float32)}, file)
    config = digits_config("sgd", model__pretrained=str(file), **SMALL)
    message = (
        r"model.pretrained: conv_0/bias \(4,\) is missing, conv_0/kernel .* and 11 more; the file "
        r"has fc6/bias \(1,\)$"
    )
    with pytest.raises(UserError, match=message):
        make_experiment(config, load_sequence(config))
    save_file({"core/fc6/bias": np.zeros(1, np.float32)}, file, {"format": "bpnjax-2"})
    with pytest.raises(UserError, match=r"a model of another version of this package \(bpnjax-2"):
        make_experiment(config, load_sequence(config))
    with pytest.raises(ValueError, match="no model of this package; train one"):
        pretrained.read(tmp_path)


def test_small_images_are_refused():
    with pytest.raises(ValueError, match="at least 8 x 8 pixels, not 7 x 9"):
        SmallAlexNet(2).init(jax.random.key(0), np.zeros((1, 7, 9, 1), np.float32))


def test_pretraining_takes_one_task(capsys):
    assert pretrain.run(["--config=configs/digits.py"]) == 2
    assert "sequence.num_tasks: 5 tasks" in capsys.readouterr().err
    assert pretrain.run(["--help"]) == 0
