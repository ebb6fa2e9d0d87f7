"""Every method against its reference in `reference.py`, after every step of three tasks.

The package computes in single precision, the reference in double precision and example by example.
Batches have 7, 7 and 5 examples, the last one padded to 7 with weights of 0, in a new order in each
epoch. Tasks either have classes of their own ("split") or share them while their inputs are
permuted ("permuted").
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from reference import HIDDEN, LAYERS, OUTPUT, Adam, Sgd

import bpnjax
from bpnjax import methods, modes, networks
from bpnjax.methods.ewc import DEFAULT_STRENGTH

pytestmark = pytest.mark.usefixtures("compile_once")

TASKS, EXAMPLES, BATCH, EPOCHS = 3, 19, 7, 2
INPUTS, UNITS, CLASSES = 5, 6, 6
RATE = 0.05
SPLIT = np.repeat(np.eye(TASKS, dtype=bool), CLASSES // TASKS, axis=1)
TOLERANCE = 1e-5
# The defaults of relative steps and of EWC's relative form.
EPSILON, KAPPA = methods.bd.fields["bd.epsilon"].default, DEFAULT_STRENGTH["relative"]


class Perceptron(nn.Module):
    """The network of `reference.Network`."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(UNITS, name=HIDDEN)(x))
        return nn.Dense(CLASSES, name=OUTPUT)(x)


def make_tasks(kind):
    """Three tasks of 19 examples."""
    draws = np.random.default_rng(7)
    centres = 1.5 * draws.normal(size=(CLASSES, INPUTS))
    tasks = []
    for task in range(TASKS):
        own = np.flatnonzero(SPLIT[task]) if kind == "split" else np.arange(CLASSES)
        y = own[draws.integers(len(own), size=EXAMPLES)]
        x = centres[y] + draws.normal(size=(EXAMPLES, INPUTS))
        if kind == "permuted":
            x = x[:, draws.permutation(INPUTS)]
        tasks.append((x.astype(np.float32), y.astype(np.int32)))
    return tasks


def make_batches(x, y, task):
    """The batches of all epochs of a task, and its examples in the order of the last one."""
    draws, batches = np.random.default_rng(100 + task), []
    for _ in range(EPOCHS):
        order = draws.permutation(len(x))
        for start in range(0, len(x), BATCH):
            rows = order[start : start + BATCH]
            weight = (np.arange(BATCH) < len(rows)).astype(np.float32)
            # The padding holds other examples, which must not count.
            rows = np.concatenate([rows, order[: BATCH - len(rows)]])
            batches.append((x[rows], y[rows], weight))
    return batches, (x[order], y[order])


def same(ours, expected, what, tolerance=TOLERANCE):
    """Two arrays agree relative to the largest element."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected)
    assert ours.shape == expected.shape, what
    difference, size = np.abs(ours - expected).max(), np.abs(expected).max()
    assert difference <= tolerance * size, f"{what}: {difference:.2e} of {size:.2e}"


def same_answers(ours, expected, what, tolerance=TOLERANCE):
    """Outputs agree, apart from those that a mask puts far below."""
    ours, masked = np.asarray(ours), expected == reference.FAR_BELOW
    assert (ours[masked] < -1e8).all(), what
    same(ours[~masked], expected[~masked], what, tolerance)


class Watcher:
    """What a test does while a method is followed. The defaults do nothing."""

    def started(self, state, ours, ref):
        """After the initial state was made."""

    def begun(self, state, ref, task):
        """After a task was begun."""

    def before_step(self, state, ref):
        """With our state before a step, which the step consumes."""

    def stepped(self, state, ref, batch):
        """With our state after a step; the reference has not made it yet."""

    def compared(self, state, ref, batch):
        """After both made a step and their parameters agreed."""

    def ended(self, state, ref, task, data):
        """After both ended a task."""


def follow(
    method,
    protection=None,
    parts=(),
    *,
    kind="split",
    heads="single",
    optimizer=None,
    ref_optimizer=None,
    watcher=None,
    mask=None,
    reset=True,
    end_examples=EXAMPLES,
    tolerance=TOLERANCE,
    seed=0,
):
    """Trains our learner and the reference side by side.

    Args:
      method: ours.
      protection: of the reference.
      parts: of the reference.
      kind: of the tasks.
      heads: as of `bpnjax.learner`.
      optimizer: ours; gradient descent by default.
      ref_optimizer: a function that makes the reference's.
      watcher: `Watcher`.
      mask: of the reference.
      reset: whether optimizers start afresh with each task.
      end_examples: how many examples of the last epoch the end of a task is given.
      tolerance: of parameters and answers.
      seed: of our learner.

    Returns:
      Our last state and the reference.
    """
    tasks, watcher = make_tasks(kind), watcher or Watcher()
    classes = SPLIT if kind == "split" else np.ones_like(SPLIT)
    ours = bpnjax.learner(
        networks.from_linen(Perceptron(), tasks[0][0][:1]),
        method,
        optimizer or optax.sgd(RATE),
        num_tasks=TASKS,
        classes=classes,
        heads=heads,
        reset_optimizer=reset,
    )
    state = ours.init(jax.random.key(seed))
    net = reference.Network(INPUTS, UNITS, CLASSES)
    ref = reference.Learner(
        net,
        net.pack(state.params),
        ref_optimizer or (lambda: Sgd(RATE)),
        parts,
        protection,
        heads=classes if heads == "multi" else None,
        mask=mask,
        reset=reset,
    )
    watcher.started(state, ours, ref)
    for task, (x, y) in enumerate(tasks):
        state = ours.begin_task(state, task)
        ref.begin_task(task)
        watcher.begun(state, ref, task)
        batches, data = make_batches(x, y, task)
        for i, batch in enumerate(batches):
            where = f"task {task}, step {i}"
            watcher.before_step(state, ref)
            state, metrics = ours.step(state, batch)
            watcher.stepped(state, ref, batch)
            loss, right = ref.step(*batch)
            same_params(state, ref, where, tolerance)
            same(metrics["loss"], loss, f"loss in {where}", tolerance)
            same(metrics["accuracy"] + 1.0, right + 1.0, f"accuracy in {where}")
            assert metrics["examples"] == batch[2].sum()
            watcher.compared(state, ref, batch)
        same_answers(ours.apply(state, x, task), ref.answer(x, task), where, tolerance)
        if task == TASKS - 1 and ours.method.told_task:
            same_mixed(ours, state, ref, x, tolerance)
        data = tuple(part[:end_examples] for part in data)
        state = ours.end_task(state, data)
        ref.end_task(*data)
        watcher.ended(state, ref, task, data)
        same_params(state, ref, f"end of task {task}", tolerance)
        for k in range(task + 1):
            outputs, expected = ours.apply(state, tasks[k][0], k), ref.answer(tasks[k][0], k)
            same_answers(outputs, expected, f"answers of task {k} after task {task}", tolerance)
    if ours.method.told_task:
        same_mixed(ours, state, ref, tasks[0][0], tolerance)
    return state, ref


def same_mixed(ours, state, ref, x, tolerance):
    """Answers agree where each example has a task of its own."""
    ids = np.arange(len(x)) % TASKS
    expected = np.concatenate([ref.answer(x[[i]], task) for i, task in enumerate(ids)])
    same_answers(ours.apply(state, x, ids), expected, "answers of mixed tasks", tolerance)


def same_params(state, ref, where, tolerance):
    """The shared parameters agree, leaf by leaf."""
    for (layer, leaf), expected in ref.network.unpack(ref.theta).items():
        same(state.params[layer][leaf], expected, f"{layer}/{leaf} in {where}", tolerance)


def momentum():
    """Both optimizers with momentum."""
    return {
        "optimizer": optax.sgd(RATE, momentum=0.9),
        "ref_optimizer": lambda: Sgd(RATE, momentum=0.9),
    }


def layer_rates():
    """Both optimizers with a rate for each layer."""
    net = reference.Network(INPUTS, UNITS, CLASSES)
    each = {HIDDEN: optax.sgd(0.03), OUTPUT: optax.sgd(0.3)}
    return {
        "optimizer": optax.multi_transform(
            each, lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, tree)
        ),
        "ref_optimizer": lambda: Sgd(net.of_layer(**{HIDDEN: 0.03, OUTPUT: 0.3})),
    }


class Observed(Watcher):
    """Tells the reference which step was made, so that it finds the draw."""

    def stepped(self, state, ref, batch):
        ref.protection.after = ref.network.pack(state.params)


# Bounds: fine-tuning, single-task learning, joint training.


@pytest.mark.parametrize(("kind", "heads"), [("permuted", "single"), ("split", "multi")])
def test_sgd(kind, heads):
    follow(methods.sgd(), kind=kind, heads=heads)


@pytest.mark.parametrize("reset", [True, False])
def test_momentum_and_adam(reset):
    follow(methods.sgd(), reset=reset, **momentum())
    follow(
        methods.sgd(),
        reset=reset,
        optimizer=optax.adam(0.01),
        ref_optimizer=lambda: Adam(0.01),
        tolerance=5e-5,  # Adam divides small gradients by their size, and their rounding with them
    )


@pytest.mark.parametrize(
    "method",
    [
        methods.ewc(5.0, form="proximal"),
        methods.ewc(0.5),
        methods.bd(hidden_dim=4),
        methods.gd_matched(hidden_dim=4),
        methods.plain_bias(step="relative"),
    ],
    ids=["proximal", "relative", "bd", "gd_matched", "plain_bias"],
)
def test_batches_of_other_sizes(method):
    """A smaller last batch is the same as one that is padded."""
    tasks = make_tasks("split")
    network = networks.from_linen(Perceptron(), tasks[0][0][:1])
    ours = bpnjax.learner(network, method, optax.sgd(RATE), 3)
    ends = []
    for padded in (True, False):
        state = ours.init(jax.random.key(0))
        for task, (x, y) in enumerate(tasks):
            state = ours.begin_task(state, task)
            batches, data = make_batches(x, y, task)
            for x, y, weight in batches:
                real = weight > 0
                batch = (x, y, weight) if padded else (x[real], y[real])
                state, _ = ours.step(state, batch)
            state = ours.end_task(state, data)
        ends.append(jax.tree.leaves((state.params, state.method)))
    for one, other in zip(*ends, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


class Fresh(Watcher):
    """Gives the reference the fresh parameters of each task."""

    def __init__(self):
        self.starts = []

    def begun(self, state, ref, task):
        ref.theta = ref.network.pack(state.params)
        self.starts.append(ref.theta)


def test_stl():
    watcher = Fresh()
    follow(methods.stl(), reference.Stl(), watcher=watcher, **momentum())
    kernels = slice(0, INPUTS * UNITS)
    for one, other in itertools.combinations(watcher.starts, 2):
        assert (one[kernels] != other[kernels]).all(), "each task starts from a network of its own"


@pytest.mark.parametrize("heads", ["single", "multi"])
def test_joint(heads):
    """One task, whose batches hold the examples of all tasks, each within its own head."""
    tasks = make_tasks("split")
    x, y = (np.concatenate(part) for part in zip(*tasks, strict=True))
    ids = np.repeat(np.arange(TASKS, dtype=np.int32), EXAMPLES)
    ours = bpnjax.learner(
        networks.from_linen(Perceptron(), x[:1]),
        methods.joint(),
        optax.sgd(RATE),
        num_tasks=TASKS,
        classes=SPLIT,
        heads=heads,
    )
    state = ours.begin_task(ours.init(jax.random.key(0)), 0)
    net = reference.Network(INPUTS, UNITS, CLASSES)
    ref = reference.Learner(
        net, net.pack(state.params), lambda: Sgd(RATE), heads=SPLIT if heads == "multi" else None
    )
    ref.begin_task(0)
    order = np.random.default_rng(3).permutation(len(x))
    for start in range(0, len(x) - BATCH, BATCH):
        rows = order[start : start + BATCH]
        weight = np.array([1] * 5 + [0] * 2, np.float32)
        state, metrics = ours.step(state, (x[rows], y[rows], weight, ids[rows]))
        loss, right = ref.step(x[rows], y[rows], weight, ids[rows])
        same_params(state, ref, f"batch at {start}", TOLERANCE)
        same(metrics["loss"], loss, "loss")
        same(metrics["accuracy"] + 1.0, right + 1.0, "accuracy")
    state = ours.end_task(state, (x, y))
    for task in range(TASKS):
        same_answers(ours.apply(state, x, task), ref.answer(x, task), f"task {task}")


# Anchors.


def own_state(state):
    """What the part of the method that protects weights keeps: the last one of a composition."""
    return state.method[-1] if type(state.method) is tuple else state.method


class Anchored(Watcher):
    """Compares importance and the minimum of the penalty at the end of each task."""

    def __init__(self, tolerance=TOLERANCE):
        self.tolerance = tolerance

    def ended(self, state, ref, task, data):
        kept, protection = own_state(state), ref.protection
        if isinstance(protection, reference.Slnid):
            expected = protection.units
            same(kept.importance[HIDDEN], expected, f"units after task {task}", self.tolerance)
            kept, protection = kept.anchored, protection.anchors
        for (layer, leaf), expected in ref.network.unpack(protection.importance()).items():
            where = f"importance of {layer}/{leaf} after task {task}"
            same(kept.importance[layer][leaf], expected, where, self.tolerance)


EWC_VARIANTS = {
    "plain": ({}, {}, {}),
    "true": ({"fisher": "true"}, {"kind": "true"}, {"kind": "permuted"}),
    "per task": ({"anchors": "per_task"}, {"anchors": "per_task"}, {}),
    "gradient": ({"form": "gradient"}, {"proximal": False}, {"kind": "permuted"}),
    "gradient, per task": (
        {"form": "gradient", "anchors": "per_task", "fisher": "true"},
        {"proximal": False, "anchors": "per_task", "kind": "true"},
        {},
    ),
    "heads": ({}, {}, {"heads": "multi"}),
    "true within heads": ({"fisher": "true"}, {"kind": "true"}, {"heads": "multi"}),
    "rates": ({}, {}, layer_rates()),
    "momentum": ({"form": "gradient"}, {"proximal": False}, momentum()),
    "proximal with momentum": ({}, {}, momentum()),
}


@pytest.mark.parametrize("variant", EWC_VARIANTS)
def test_ewc(variant):
    ours, theirs, options = EWC_VARIANTS[variant]
    ours = {"form": "proximal"} | ours
    strength = 5.0 if ours.get("form") == "gradient" else 100.0
    watcher = Anchored()
    follow(
        methods.ewc(strength, **ours), reference.Ewc(strength, **theirs), watcher=watcher, **options
    )


RELATIVE_VARIANTS = {
    "plain": ({}, {}, {}),
    "permuted": ({}, {}, {"kind": "permuted"}),
    "true": ({"fisher": "true"}, {"kind": "true"}, {"kind": "permuted"}),
    "per task": ({"anchors": "per_task"}, {"anchors": "per_task"}, {}),
    "heads": ({}, {}, {"heads": "multi"}),
    "rates": ({}, {}, layer_rates()),
    "momentum": ({}, {}, momentum()),
}


@pytest.mark.parametrize("strength", [None, 0.5])
@pytest.mark.parametrize("variant", RELATIVE_VARIANTS)
def test_ewc_relative(variant, strength):
    """The default form, at its default strength and at one that holds every parameter."""
    ours, theirs, options = RELATIVE_VARIANTS[variant]
    follow(
        methods.ewc(strength, **ours),
        reference.RelativeEwc(KAPPA if strength is None else strength, **theirs),
        watcher=Anchored(),
        **options,
    )


def test_ewc_relative_under_adam():
    follow(
        methods.ewc(0.1),
        reference.RelativeEwc(0.1),
        optimizer=optax.adam(0.01),
        ref_optimizer=lambda: Adam(0.01),
        tolerance=5e-5,  # as above
    )


@pytest.mark.parametrize(("form", "strength"), [("proximal", 1e5), ("relative", 100.0)])
def test_ewc_does_not_diverge_under_rates_of_layers(form, strength):
    """At a strength at which the gradient's form would diverge at once."""
    theirs = {"proximal": reference.Ewc, "relative": reference.RelativeEwc}[form]
    follow(methods.ewc(strength, form=form), theirs(strength), **layer_rates())


@pytest.mark.parametrize("name", ["decay", "warm-up"])
@pytest.mark.parametrize("method", ["ewc", "ewc relative", "ewc_kfac"])
def test_anchors_under_a_schedule(name, method):
    """The pull uses the rate of its step, and with a warm-up it cannot diverge either.

    The relative pull has no rate.
    """
    if name == "decay":
        schedule = optax.exponential_decay(RATE, transition_steps=1, decay_rate=0.7)
    else:
        schedule = optax.linear_schedule(0.0, RATE, transition_steps=6)
    if method == "ewc":
        both = methods.ewc(100.0, form="proximal"), reference.Ewc(100.0)
    elif method == "ewc relative":
        both = methods.ewc(0.1), reference.RelativeEwc(0.1)
    else:
        both = methods.ewc_kfac(20.0, every=1), reference.EwcKfac(20.0, 1)
    follow(
        *both,
        optimizer=optax.sgd(schedule),
        ref_optimizer=lambda: Sgd(lambda step: float(schedule(step))),
        tolerance=5e-5,
    )


def test_ewc_of_some_examples():
    """The Fisher information is the mean over the first examples of the last epoch."""
    first = 8
    follow(
        methods.ewc(100.0, examples=first, form="proximal"),
        reference.Ewc(100.0, examples=first),
        watcher=Anchored(),
    )
    follow(
        methods.ewc(0.1, examples=first),
        reference.RelativeEwc(0.1, examples=first),
        watcher=Anchored(),
    )


def test_ewc_online():
    follow(
        methods.ewc_online(100.0, decay=0.6, form="proximal"),
        reference.Ewc(100.0, decay=0.6),
        watcher=Anchored(),
    )


@pytest.mark.parametrize("settings", [{}, {"strength": 0.5, "decay": 0.6, "fisher": "true"}])
def test_ewc_online_relative(settings):
    """The importance of earlier tasks decays, each of mean 1 when it is added."""
    strength, decay = settings.get("strength", KAPPA), settings.get("decay", 0.9)
    kind = settings.get("fisher", "empirical")
    _, ref = follow(
        methods.ewc_online(**settings),
        reference.RelativeEwc(strength, decay=decay, kind=kind),
        watcher=Anchored(),
    )
    means = [g.mean() for g, _ in ref.protection.pairs]
    np.testing.assert_allclose(means, [decay**2, decay, 1.0])


@pytest.mark.parametrize("every", [1, 4, 7])
def test_ewc_kfac(every):
    """Six steps a task: pulls after each, after four and at the end, and at the end only."""
    follow(
        methods.ewc_kfac(20.0, every=every),
        reference.EwcKfac(20.0, every),
        tolerance=3e-5,  # eigenvectors in single precision
    )


def test_ewc_kfac_with_rates_of_layers():
    follow(
        methods.ewc_kfac(20.0, every=4),
        reference.EwcKfac(20.0, 4),
        kind="permuted",
        heads="multi",
        tolerance=5e-5,
        **layer_rates(),
    )


@pytest.mark.parametrize(
    ("form", "kind", "heads"), [("proximal", "split", "multi"), ("gradient", "permuted", "single")]
)
def test_si(form, kind, heads):
    follow(
        methods.si(0.5, damping=0.01, form=form),
        reference.Si(0.5, 0.01, "sum", proximal=form == "proximal"),
        kind=kind,
        heads=heads,
        watcher=Anchored(),
    )


class Shrinking(Anchored):
    """Counts the parameters whose importance falls, and those where it is negative."""

    def __init__(self):
        super().__init__()
        self.before, self.falls, self.negative = 0.0, 0, 0

    def ended(self, state, ref, task, data):
        super().ended(state, ref, task, data)
        omega = ref.protection.omega
        self.falls += (omega < self.before).sum()
        self.negative += (omega < 0).sum()
        self.before = omega


@pytest.mark.parametrize("clamp", ["sum", "increment", "none"])
def test_si_under_momentum(clamp):
    """A velocity that goes on from task to task moves against the gradient, and w falls below 0."""
    watcher = Shrinking()
    follow(
        methods.si(0.1, damping=0.05, clamp=clamp, form="gradient"),
        reference.Si(0.1, 0.05, clamp, proximal=False),
        watcher=watcher,
        reset=False,
        optimizer=optax.sgd(0.2, momentum=0.9),
        ref_optimizer=lambda: Sgd(0.2, momentum=0.9),
    )
    # So the three clamps differ.
    assert (watcher.falls > 0) == (clamp != "increment")
    assert (watcher.negative > 0) == (clamp == "none")


@pytest.mark.parametrize("options", [{}, {"heads": "multi"}, momentum(), layer_rates()])
def test_mas(options):
    follow(methods.mas(0.02), reference.Mas(0.02), watcher=Anchored(), **options)


@pytest.mark.parametrize(
    ("scale", "discount", "on"), [(0.0, "sum", "ewc"), (6.0, "max", "ewc"), (6.0, "sum", "mas")]
)
def test_slnid(scale, discount, on):
    anchors = reference.Mas(0.02) if on == "mas" else reference.Ewc(20.0)
    follow(
        methods.slnid(
            0.01,
            scale=scale,
            discount=discount,
            on=on,
            anchor_strength=0.02 if on == "mas" else 20.0,
        ),
        reference.Slnid(0.01, scale, discount, anchors),
        watcher=Anchored(),
    )


# Merged networks, and answers of the last one.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "permuted"},
        {"heads": "multi"},
        {"l2": 0.5, **layer_rates()},
        {"columns": "own"},
        {"columns": "all", "heads": "multi"},
    ],
)
def test_imm_mean(options):
    options = dict(options)
    l2, columns = options.pop("l2", 0.0), options.pop("columns", "auto")
    own = columns == "own" or (columns == "auto" and options.get("heads") == "multi")
    follow(
        methods.imm_mean(l2=l2, columns=columns),
        reference.Imm(l2, columns=SPLIT if own else None),
        **options,
    )


def test_imm_drop_transfer():
    """Each step is the one at some draw of the hidden units to drop."""
    _, ref = follow(
        methods.imm_mean(l2=0.1, drop=0.4),
        reference.DropTransfer(0.4, l2=0.1),
        watcher=Observed(),
    )
    assert len(set(ref.protection.chosen)) > 3


class Sampled(Watcher):
    """Finds the labels that a sampled Fisher was taken of; there must be some."""

    def __init__(self):
        self.labels = []

    def ended(self, state, ref, task, data):
        found = {
            layer: {leaf: np.asarray(value)[task] - 1e-8 for leaf, value in leaves.items()}
            for layer, leaves in state.method.fishers.items()
        }
        target = ref.network.pack(found)
        head = ref.head(task)
        allowed = np.arange(CLASSES) if head is None else np.flatnonzero(head)
        squares = [
            [reference.fisher(ref, x[None], [label]) / len(data[0]) for label in allowed]
            for x in data[0]
        ]
        draws = np.array(list(itertools.product(range(len(allowed)), repeat=len(squares))))
        sums = sum(np.array(each)[draws[:, i]] for i, each in enumerate(squares))
        best = draws[np.argmin(((sums - target) ** 2).sum(-1))]
        expected = sum(each[c] for each, c in zip(squares, best, strict=True))
        same(target, expected, f"Fisher of task {task}", 1e-5)
        self.labels.append((allowed[best], data[1]))
        ref.protection.fishers.append(expected)


@pytest.mark.parametrize("heads", ["single", "multi"])
def test_imm_mode(heads):
    watcher = Sampled()
    follow(
        methods.imm_mode(l2=0.0),
        reference.Imm(columns=SPLIT if heads == "multi" else None),
        heads=heads,
        watcher=watcher,
        end_examples=5,
        tolerance=3e-5,  # quotients of Fishers
    )
    assert any((drawn != given).any() for drawn, given in watcher.labels), "labels are drawn"


def heads_of(kind):
    """The heads of LwF: those of earlier tasks, one by one or all in one."""
    return lambda task: list(SPLIT[:task]) if kind == "tasks" else [SPLIT[:task].any(0)]


@pytest.mark.parametrize(
    ("heads", "warmup", "training"),
    [("tasks", 0, "single"), ("tasks", 2, "multi"), ("seen", 2, "single"), ("seen", 0, "multi")],
)
def test_lwf(heads, warmup, training):
    follow(
        methods.lwf(1.5, temperature=3.0, heads=heads, warmup_steps=warmup),
        reference.Lwf(1.5, 3.0, heads_of(heads), warmup),
        heads=training,
    )


class Encoders(Watcher):
    """Gives the reference the encoders that were fitted, or fits them again."""

    def __init__(self, fit=None):
        self.fit = fit

    def ended(self, state, ref, task, data):
        kept = [np.asarray(part[task], np.float64) for part in state.method.encoders]
        if self.fit:
            code, size, epochs, rate, weight = self.fit
            parts = initial_autoencoder(state.key, task, code)
            again = reference.fit_autoencoder(ref, *data, parts, epochs, size, rate, weight)
            for ours, start, expected in zip(kept, parts, again, strict=False):
                same(ours, expected, f"encoder of task {task}", 1e-4)
                assert np.abs(expected - start).max() > 1e-3, "it was trained"
        ref.protection.encoders.append(kept)


def initial_autoencoder(key, task, code):
    """A, a, D and d as the package draws them at the end of a task."""
    from bpnjax.utils import prng

    first, second = jax.random.split(prng.fold(key, prng.ENDED, task))
    draw = jax.nn.initializers.glorot_uniform()
    return (
        draw(first, (UNITS, code)),
        np.zeros(code),
        draw(second, (code, UNITS)),
        np.zeros(UNITS),
    )


@pytest.mark.parametrize("heads", ["tasks", "seen"])
def test_ebll(heads):
    follow(
        methods.ebll(
            code=3, strength=2.0, epochs=20, learning_rate=0.05, distillation=1.5, heads=heads
        ),
        reference.Ebll(2.0, 1.5, 2.0, heads_of(heads)),
        watcher=Encoders(),
    )


def test_ebll_autoencoder():
    follow(
        methods.ebll(
            code=3, strength=2.0, epochs=4, learning_rate=0.05, reconstruction=0.3, batch_size=8,
            warmup_steps=2,
        ),
        reference.Ebll(2.0, 1.0, 2.0, heads_of("tasks"), 2),
        watcher=Encoders(fit=(3, 8, 4, 0.05, 0.3)),
    )  # fmt: skip


# Memories.


@pytest.mark.parametrize(
    ("margin", "per", "kind", "heads"),
    [
        (0.0, "task", "split", "single"),
        (0.5, "task", "permuted", "single"),
        (0.5, "class", "split", "multi"),
        (0.0, "class", "permuted", "multi"),
        (0.5, "all", "split", "single"),
    ],
)
def test_gem(margin, per, kind, heads):
    """Memories of 6 examples a task, of 3 a class, and with room for more than a task has."""
    count = {"task": 6, "class": 3, "all": 25}[per]
    keep = reference.last_of_class(3) if per == "class" else reference.last(count)
    _, ref = follow(
        methods.gem(count, per="class" if per == "class" else "task", margin=margin),
        reference.Gem(keep, margin),
        kind=kind,
        heads=heads,
    )
    steps = EPOCHS * 3 * (TASKS - 1)
    assert (1 < ref.protection.conflicts < steps) or (kind, heads) == ("split", "single")


@pytest.mark.parametrize(
    ("memories", "draw", "kind", "heads"),
    [(4, 3, "split", "multi"), (3, 5, "permuted", "single"), (2, 9, "split", "single")],
)
def test_agem(memories, draw, kind, heads):
    """Draws of fewer examples than there are, of more than one task keeps, and of all."""
    _, ref = follow(
        methods.agem(memories, batch_size=draw),
        reference.Agem(reference.last(memories), draw),
        kind=kind,
        heads=heads,
        watcher=Observed(),
    )
    steps = EPOCHS * 3 * (TASKS - 1)
    assert (1 < ref.protection.conflicts < steps) or (kind, heads) == ("split", "single")
    if draw == 3:
        assert len(set(ref.protection.chosen)) > 1


class Memory(Observed):
    """Follows a replay memory: which examples it holds, with which outputs."""

    def __init__(self, size, outputs, part=None):
        self.size, self.outputs, self.part = size, outputs, part
        self.offered = 0

    def stepped(self, state, ref, batch):
        super().stepped(state, ref, batch)
        # The outputs before the step.
        answers = ref.answer(batch[0], ref.task) if self.outputs else [None] * len(batch[0])
        self.fresh = [
            reference.Kept(x, y, ref.task, z)
            for x, y, weight, z in zip(*batch, answers, strict=True)
            if weight
        ]

    def compared(self, state, ref, batch):
        kept = state.method if self.part is None else state.method[self.part]
        memory = jax.tree.map(np.asarray, kept.memory)
        self.offered += len(self.fresh)
        assert memory.seen == self.offered
        now = [
            reference.Kept(x, y, task, memory.outputs[i] if self.outputs else None)
            for i, (x, y, task) in enumerate(zip(memory.x, memory.y, memory.task, strict=True))
        ][: self.offered]
        assert reference.reservoir_allows(ref.protection.memory, self.fresh, now, self.size)
        ref.protection.memory = now


REPLAY = {
    "er": (lambda m, b: methods.er(m, b), {"union": True}),
    "er sum": (lambda m, b: methods.er(m, b, combine="sum"), {"beta": 1.0}),
    "der": (lambda m, b: methods.der(m, b, alpha=0.3), {"alpha": 0.3}),
    "derpp": (lambda m, b: methods.derpp(m, b, alpha=0.3, beta=0.7), {"alpha": 0.3, "beta": 0.7}),
}


@pytest.mark.parametrize(
    ("variant", "heads"),
    [
        ("er", "single"),
        ("er", "multi"),
        ("er sum", "single"),
        ("der", "single"),
        ("derpp", "single"),
        ("derpp", "multi"),
    ],
)
def test_replay(variant, heads):
    """Every step is one that the method allows for some draw, and so is every memory."""
    size, draw = 8, 3
    make, options = REPLAY[variant]
    _, ref = follow(
        make(size, draw),
        reference.Replay(draw, **options),
        heads=heads,
        watcher=Memory(size, variant.startswith("der")),
    )
    chosen = ref.protection.chosen
    assert {place for draws in chosen for draw in draws for place in draw} == set(range(size))
    assert any(len(set(draw)) < len(draw) for draws in chosen for draw in draws), "with replacement"
    if variant == "derpp":
        differ = [one != other for one, other in ref.protection.examples]
        assert np.mean(differ) > 0.8, "two draws"


def test_replay_in_the_modes_of_the_tasks():
    """Remembered examples are answered with the bias of the task that they came with."""
    follow(
        methods.chain(
            methods.bd(epsilon=0.02, hidden_dim=4, step="absolute"), methods.derpp(6, 2, 0.3, 0.7)
        ),
        reference.Replay(2, alpha=0.3, beta=0.7),
        [bd_part()],
        watcher=Both(Drawn(4, part=0), Memory(6, True, part=1)),
    )


def test_replay_beside_a_relative_step():
    """The size of a layer's outputs is that of the batch alone, not of what is replayed with it."""
    follow(
        methods.chain(methods.bd(hidden_dim=4), methods.er(6, 2)),
        reference.Replay(2, union=True),
        [relative_part()],
        watcher=Both(Drawn(4, part=0), Memory(6, False, part=1)),
    )


def test_reservoir_keeps_each_example_equally_often():
    """Of a stream of n each example is kept with probability M / n, padding never."""
    number = jax.ShapeDtypeStruct((), jnp.int32)
    weight = jnp.array([1.0, 0.0, 1.0])

    def last(key, size, batches):
        memory = methods.replay.empty(size, number, number)
        for i in range(batches):
            x = jnp.array([2 * i, -1, 2 * i + 1])
            batch = methods.Batch(x, x, weight, jnp.zeros(3, jnp.int32))
            memory = methods.replay.offer(memory, jax.random.fold_in(key, i), batch)
        return memory.x

    runs = 4000
    keys = jax.random.split(jax.random.key(1), runs)
    for size, batches in ((1, 1), (3, 4)):
        n = 2 * batches
        kept = np.asarray(jax.jit(jax.vmap(lambda k, s=size, b=batches: last(k, s, b)))(keys))
        share = np.array([(kept == example).any(1).mean() for example in range(n)])
        chance = size / n
        assert np.abs(share - chance).max() < 4 * np.sqrt(chance * (1 - chance) / runs), share
        assert (kept >= 0).all()


# Modes.


class Both(Watcher):
    """Several watchers in turn."""

    def __init__(self, *watchers):
        for hook in ("started", "begun", "before_step", "stepped", "compared", "ended"):
            setattr(self, hook, lambda *a, h=hook: [getattr(w, h)(*a) for w in watchers])


def at(tree, part):
    """A part of what a composition keeps; all of it for a method alone."""
    return tree if part is None else tree[part]


class Drawn(Watcher):
    """Gives the reference the fresh factors of each task, and compares them after each step."""

    def __init__(self, width, part=None, layers=LAYERS):
        self.width, self.part, self.layers, self.starts = width, part, layers, []

    def begun(self, state, ref, task):
        factors = {l: own["bias"] for l, own in at(state.task_params, self.part).items()}
        assert set(factors) == set(self.layers)
        for both in factors.values():
            w = np.asarray(both["W"])
            assert not np.any(both["M"]) and w.shape[0] == self.width
            assert 0.5 < np.abs(w).max() * self.width**0.5 <= 1.0
            assert all(other not in w for other in self.starts), "fresh factors for each task"
            self.starts.append(w.flat[0])
        ref.parts[0].given(task, {l: (both["M"], both["W"]) for l, both in factors.items()})

    def compared(self, state, ref, batch):
        for layer, (m, w) in ref.parts[0].factors[ref.task].items():
            ours = at(state.task_params, self.part)[layer]["bias"]
            same(ours["M"], m, f"M of {layer}")
            same(ours["W"], w, f"W of {layer}")

    def ended(self, state, ref, task, data):
        for layer, bias in ref.parts[0].mode(task).bias.items():
            same(at(state.method, self.part)[layer]["bias"][task], bias, f"bias of {layer}")
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.task_params))


class Given(Watcher):
    """Gives the reference the modes that never change."""

    def __init__(self, part=None, place=0):
        self.part, self.place = part, place

    def started(self, state, ours, ref):
        bank = at(state.method, self.part)
        for task in range(TASKS):
            found, mode = modes.select(bank, task), reference.Mode()
            for layer, vectors in found.items():
                for name, vector in vectors.items():
                    getattr(mode, name)[layer] = np.asarray(vector, np.float64)
            ref.parts[self.place].modes.append(mode)


def bd_part(epsilon=0.02, rate=RATE, momentum=0.0):
    """The reference's part for BD with the paper's step."""
    return reference.Factors(lambda: reference.Beneficial(epsilon), lambda: Sgd(rate, momentum))


def relative_part(size=EPSILON, rate=RATE, momentum=0.0, kind=reference.Beneficial):
    """The reference's part for BD with the relative step."""
    return reference.Factors(lambda: reference.Relative(size, kind), lambda: Sgd(rate, momentum))


# The paper's step and EWC's proximal pull.
ABSOLUTE = {"step": "absolute", "epsilon": 0.02}
PROXIMAL = {"form": "proximal", "strength": 100.0}


@pytest.mark.parametrize("kind", ["split", "permuted"])
def test_bd_ewc(kind):
    follow(
        methods.bd_ewc(hidden_dim=8, **ABSOLUTE, **PROXIMAL),
        reference.Ewc(100.0),
        [bd_part()],
        kind=kind,
        watcher=Both(Drawn(8, part=0), Anchored()),
    )


@pytest.mark.parametrize(("kind", "heads"), [("permuted", "single"), ("split", "multi")])
def test_bd_ewc_by_default(kind, heads):
    """Relative steps and a relative pull."""
    follow(
        methods.bd_ewc(hidden_dim=8),
        reference.RelativeEwc(KAPPA),
        [relative_part()],
        kind=kind,
        heads=heads,
        watcher=Both(Drawn(8, part=0), Anchored()),
    )


def test_bd_ewc_of_other_sizes():
    follow(
        methods.bd_ewc(epsilon=0.4, hidden_dim=4, learning_rate=0.02, strength=0.5),
        reference.RelativeEwc(0.5),
        [relative_part(0.4, 0.02, 0.9)],
        watcher=Both(Drawn(4, part=0), Anchored()),
        **momentum(),
    )


@pytest.mark.parametrize("heads", ["single", "multi"])
def test_bd_ewc_true_fisher(heads):
    follow(
        methods.bd_ewc(
            epsilon=0.05,
            hidden_dim=4,
            learning_rate=0.02,
            fisher="true",
            step="absolute",
            **PROXIMAL,
        ),
        reference.Ewc(100.0, kind="true"),
        [bd_part(0.05, 0.02)],
        heads=heads,
        watcher=Both(Drawn(4, part=0), Anchored()),
    )


@pytest.mark.parametrize("step", ["absolute", "relative"])
def test_bd_of_one_layer(step):
    absolute = step == "absolute"
    follow(
        methods.bd(hidden_dim=8, layers="output", **(ABSOLUTE if absolute else {})),
        None,
        [bd_part() if absolute else relative_part()],
        watcher=Drawn(8, layers=(OUTPUT,)),
    )


def test_bd_ewc_under_momentum():
    """W follows the learner's optimizer at a rate of its own; M takes the plain beneficial step."""
    follow(
        methods.bd_ewc(hidden_dim=4, learning_rate=0.02, **ABSOLUTE, **PROXIMAL),
        reference.Ewc(100.0),
        [bd_part(0.02, 0.02, 0.9)],
        watcher=Both(Drawn(4, part=0), Anchored()),
        **momentum(),
    )


@pytest.mark.parametrize("step", ["absolute", "relative"])
def test_bd_psp(step):
    absolute = step == "absolute"
    follow(
        methods.bd_psp(hidden_dim=8, **(ABSOLUTE if absolute else {})),
        None,
        [bd_part() if absolute else relative_part(), reference.Fixed([])],
        watcher=Both(Given(part=1, place=1), Drawn(8, part=0)),
    )


def test_bd_psp_ewc():
    follow(
        methods.bd_psp_ewc(hidden_dim=8, **ABSOLUTE, **PROXIMAL),
        reference.Ewc(100.0),
        [bd_part(), reference.Fixed([])],
        watcher=Both(Given(part=1, place=1), Drawn(8, part=0), Anchored()),
    )


def test_bd_psp_ewc_by_default():
    follow(
        methods.bd_psp_ewc(hidden_dim=8),
        reference.RelativeEwc(KAPPA),
        [relative_part(), reference.Fixed([])],
        watcher=Both(Given(part=1, place=1), Drawn(8, part=0), Anchored()),
    )


def test_bd_psp_ewc_kfac():
    follow(
        methods.bd_psp_ewc_kfac(hidden_dim=8, strength=20.0, every=4, **ABSOLUTE),
        reference.EwcKfac(20.0, 4),
        [bd_part(), reference.Fixed([])],
        watcher=Both(Given(part=1, place=1), Drawn(8, part=0)),
        tolerance=5e-5,
    )


@pytest.mark.parametrize("rate", [None, 0.3])
def test_gd_ewc(rate):
    """Both factors follow the learner's optimizer, at a rate of their own on request."""
    both = [lambda: Sgd(rate or RATE, 0.9)] * 2
    follow(
        methods.gd_ewc(hidden_dim=8, learning_rate=rate, **PROXIMAL),
        reference.Ewc(100.0),
        [reference.Factors(*both)],
        watcher=Both(Drawn(8, part=0), Anchored()),
        **momentum(),
    )


def test_gd_matched_ewc():
    follow(
        methods.gd_matched_ewc(hidden_dim=8, **ABSOLUTE, **PROXIMAL),
        reference.Ewc(100.0),
        [reference.Factors(lambda: reference.Matched(0.02), lambda: Sgd(RATE))],
        watcher=Both(Drawn(8, part=0), Anchored()),
    )


@pytest.mark.parametrize("kind", ["split", "permuted"])
def test_gd_matched_ewc_by_default(kind):
    follow(
        methods.gd_matched_ewc(hidden_dim=8),
        reference.RelativeEwc(KAPPA),
        [relative_part(kind=reference.Matched)],
        kind=kind,
        watcher=Both(Drawn(8, part=0), Anchored()),
    )


WIDTHS = {HIDDEN: UNITS, OUTPUT: CLASSES}


class PlainBiases(Watcher):
    """Compares plain biases after each step, and those kept."""

    def __init__(self, place=0):
        self.place = place  # in the reference; in ours they are the first part

    def compared(self, state, ref, batch):
        for layer, bias in ref.parts[self.place].mode(ref.task).bias.items():
            same(state.task_params[0][layer]["bias"]["change"], bias, f"bias of {layer}")

    def ended(self, state, ref, task, data):
        for layer, bias in ref.parts[self.place].mode(task).bias.items():
            same(state.method[0][layer]["bias"][task], bias, f"bias of {layer}")


def test_bias_ewc():
    follow(
        methods.bias_ewc(learning_rate=0.2, **PROXIMAL),
        reference.Ewc(100.0),
        [reference.Biases(WIDTHS, lambda: Sgd(0.2))],
        watcher=Both(PlainBiases(), Anchored()),
    )


@pytest.mark.parametrize("size", [0.1, 0.5])
def test_bias_ewc_with_relative_steps(size):
    """The biases themselves take BD's steps, and no learning rate counts."""
    follow(
        methods.bias_ewc(step="relative", epsilon=size),
        reference.RelativeEwc(KAPPA),
        [reference.Biases(WIDTHS, lambda: reference.Relative(size))],
        watcher=Both(PlainBiases(), Anchored()),
        **momentum(),
    )


def test_two_parts_that_both_measure():
    """Each layer has two biases, and one size: that of its outputs before both."""
    follow(
        methods.chain(methods.plain_bias(step="relative", epsilon=0.2), methods.bd(hidden_dim=4)),
        None,
        [relative_part(), reference.Biases(WIDTHS, lambda: reference.Relative(0.2))],
        watcher=Both(Drawn(4, part=1), PlainBiases(place=1)),
    )


def test_random_bias_ewc():
    part = reference.Fixed([])
    follow(
        methods.random_bias_ewc(norm=1.3, **PROXIMAL),
        reference.Ewc(100.0),
        [part],
        watcher=Both(Given(part=0), Anchored()),
    )
    for layer in LAYERS:
        biases = [mode.bias[layer] for mode in part.modes]
        same([np.linalg.norm(bias) for bias in biases], np.full(TASKS, 1.3), layer)
        assert all((a != b).all() for a, b in itertools.combinations(biases, 2))


def test_ewc_masked():
    """The mask acts on answers only: neither on the loss nor on the Fisher information."""
    follow(methods.ewc_masked(**PROXIMAL), reference.Ewc(100.0), mask=SPLIT, watcher=Anchored())
    follow(methods.ewc_masked(), reference.RelativeEwc(KAPPA), mask=SPLIT, watcher=Anchored())


@pytest.mark.parametrize("kind", ["split", "permuted"])
def test_psp(kind):
    part = reference.Fixed([])
    follow(methods.psp(), None, [part], kind=kind, watcher=Given())
    assert all(set(np.abs(mode.key[layer])) == {1.0} for mode in part.modes for layer in LAYERS)
    for one, other in itertools.combinations(part.modes, 2):
        assert all((one.key[layer] != other.key[layer]).any() for layer in LAYERS)


@pytest.mark.parametrize("heads", ["single", "multi"])
def test_xdg(heads):
    part = reference.Fixed([])
    follow(methods.xdg(gated=0.4), None, [part], heads=heads, watcher=Given())
    for mode in part.modes:
        assert set(mode.key) == {OUTPUT} and set(mode.key[OUTPUT]) == {0.0, 1.0}
    assert len({tuple(mode.key[OUTPUT]) for mode in part.modes}) > 1


def test_xdg_ewc():
    follow(
        methods.xdg_ewc(gated=0.4, **PROXIMAL),
        reference.Ewc(100.0),
        [reference.Fixed([])],
        watcher=Both(Given(part=0), Anchored()),
    )
