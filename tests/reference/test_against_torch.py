"""Methods against independent PyTorch implementations: same weights, data, order and steps.

PyTorch is not a dependency; where it is absent these tests are skipped. The reference computes in
double precision, per example in a Python loop, and shares no code with ours.
"""

import jax
import numpy as np
import pytest
from support import Jitted, digits_config

torch = pytest.importorskip("torch", reason="PyTorch is not installed; pip install torch")

pytestmark = pytest.mark.usefixtures("compile_once")
STEPS = 10  # before and after the task switch
RATE = 0.05


class Reference:
    """A two-layer ReLU network in PyTorch, with a hook for a penalty."""

    def __init__(self, core):
        self.theta = {
            f"{layer}/{name}": torch.tensor(np.asarray(value), dtype=torch.float64).requires_grad_()
            for layer, leaves in core.items()
            for name, value in leaves.items()
        }

    def forward(self, x):
        t = self.theta
        h = torch.relu(x @ t["hidden_0/kernel"] + t["hidden_0/bias"])
        return h @ t["output/kernel"] + t["output/bias"]

    def loss(self, x, y):
        return torch.nn.functional.cross_entropy(self.forward(x), y)

    def copy(self):
        return {name: value.detach().clone() for name, value in self.theta.items()}

    def gradients(self, value):
        return dict(zip(self.theta, torch.autograd.grad(value, self.theta.values()), strict=True))

    def step(self, grads):
        with torch.no_grad():
            for name, value in self.theta.items():
                value -= RATE * grads[name]


def tensors(x, y):
    x = torch.tensor(np.asarray(x), dtype=torch.float64).reshape(len(x), -1)
    return x, torch.tensor(np.asarray(y), dtype=torch.int64)


def two_tasks(method, **changes):
    """Runs ours over a task switch; returns start, the batches of both tasks, and the end."""
    config = digits_config(
        method, train__optimizer="sgd", train__learning_rate=RATE, train__batch_size=24,
        ewc__form="gradient", mas__form="gradient", si__form="gradient", train__epochs=1, **changes,
    )  # fmt: skip
    jitted = Jitted(config)
    key = jax.random.key(0)
    state = jitted.begin_task(jitted.init(key), 0)
    start = state.learner.params
    state, _ = jitted.run_steps(state, jitted.data, 0, 0, 0, STEPS)
    state = jitted.end_task(state, jitted.data, 0)
    state = jitted.begin_task(state, 1)
    state, _ = jitted.run_steps(state, jitted.data, 1, 0, 0, STEPS)
    batches = [
        [
            tensors(jitted.sequence.normalise(np.asarray(x)), y)
            for x, y in jitted.epoch(key, task, 0)
        ]
        for task in (0, 1)
    ]
    return start, batches, state.learner.params


def assert_same(core, reference):
    for name, value in reference.theta.items():
        layer, leaf = name.split("/")
        expected = value.detach().numpy()
        difference = np.abs(np.asarray(core[layer][leaf]) - expected).max()
        assert difference <= 1e-4 * np.abs(expected).max(), name


def per_example(reference, batches, value):
    """Gradients of value(x_i, y_i), one example at a time."""
    for x, y in batches:
        for i in range(len(x)):
            yield reference.gradients(value(x[i : i + 1], y[i : i + 1]))


def mean_of(reference, batches, value, element):
    total = {name: torch.zeros_like(v) for name, v in reference.theta.items()}
    n = sum(len(x) for x, _ in batches)
    for grads in per_example(reference, batches, value):
        for name, g in grads.items():
            total[name] += element(g) / n
    return total


@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_ewc(kind):
    start, (first, second), core = two_tasks("ewc", ewc__strength=30.0, ewc__fisher=kind)
    ref = Reference(start)
    for x, y in first[:STEPS]:
        ref.step(ref.gradients(ref.loss(x, y)))
    anchor = ref.copy()
    if kind == "empirical":
        fisher = mean_of(ref, first, ref.loss, torch.square)
    else:
        fisher = {name: torch.zeros_like(v) for name, v in ref.theta.items()}
        n = sum(len(x) for x, _ in first)
        for x, _ in first:
            for i in range(len(x)):
                p = torch.softmax(ref.forward(x[i : i + 1]), -1)[0].detach()
                for c in range(len(p)):
                    for name, g in ref.gradients(ref.loss(x[i : i + 1], torch.tensor([c]))).items():
                        fisher[name] += p[c] * g**2 / n
    for x, y in second[:STEPS]:
        penalty = sum(
            (fisher[name] * (v - anchor[name]) ** 2).sum() for name, v in ref.theta.items()
        )
        ref.step(ref.gradients(ref.loss(x, y) + 30.0 / 2 * penalty))
    assert_same(core, ref)


def test_mas():
    start, (first, second), core = two_tasks("mas", mas__strength=0.02)
    ref = Reference(start)
    for x, y in first[:STEPS]:
        ref.step(ref.gradients(ref.loss(x, y)))
    anchor = ref.copy()
    omega = mean_of(ref, first, lambda x, _: ref.forward(x).square().sum(), torch.abs)
    for x, y in second[:STEPS]:
        penalty = sum(
            (omega[name] * (v - anchor[name]) ** 2).sum() for name, v in ref.theta.items()
        )
        ref.step(ref.gradients(ref.loss(x, y) + 0.02 * penalty))
    assert_same(core, ref)


def test_si():
    start, (first, second), core = two_tasks("si", si__strength=0.5, si__damping=0.01)
    ref = Reference(start)
    before = ref.copy()
    path = {name: torch.zeros_like(v) for name, v in before.items()}
    for x, y in first[:STEPS]:
        old, grads = ref.copy(), ref.gradients(ref.loss(x, y))
        ref.step(grads)
        for name, v in ref.theta.items():
            path[name] -= grads[name] * (v.detach() - old[name])
    anchor = ref.copy()
    omega = {
        name: torch.clamp(path[name] / ((anchor[name] - before[name]) ** 2 + 0.01), min=0)
        for name in anchor
    }
    for x, y in second[:STEPS]:
        penalty = sum(
            (omega[name] * (v - anchor[name]) ** 2).sum() for name, v in ref.theta.items()
        )
        ref.step(ref.gradients(ref.loss(x, y) + 0.5 * penalty))
    assert_same(core, ref)


def flat(grads):
    return torch.cat([g.reshape(-1) for g in grads.values()])


def as_grads(reference, vector):
    sizes = [v.numel() for v in reference.theta.values()]
    parts = torch.split(vector, sizes)
    return {
        name: part.reshape(v.shape)
        for (name, v), part in zip(reference.theta.items(), parts, strict=True)
    }


def stream(batches):
    return tuple(torch.cat(part) for part in zip(*batches, strict=True))


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gem(margin):
    """One earlier task: the dual has one variable and a closed form."""
    start, (first, second), core = two_tasks("gem", gem__memories=50, gem__margin=margin)
    ref = Reference(start)
    for x, y in first[:STEPS]:
        ref.step(ref.gradients(ref.loss(x, y)))
    x, y = stream(first)
    memory = x[-50:], y[-50:]
    conflicts = 0
    for x, y in second[:STEPS]:
        g = flat(ref.gradients(ref.loss(x, y)))
        old = flat(ref.gradients(ref.loss(*memory)))
        if g @ old < 0:
            conflicts += 1
            v = torch.clamp(-(g @ old) / (old @ old + 1e-3), min=margin)
            g = g + v * old
        ref.step(as_grads(ref, g))
    assert conflicts > 0
    assert_same(core, ref)


def test_agem():
    from bpnjax.utils import prng

    size = 30
    start, (first, second), core = two_tasks("agem", gem__memories=50, gem__batch_size=size)
    ref = Reference(start)
    for x, y in first[:STEPS]:
        ref.step(ref.gradients(ref.loss(x, y)))
    x, y = stream(first)
    memory = x[-50:], y[-50:]
    conflicts = 0
    for i, (x, y) in enumerate(second[:STEPS]):
        key = prng.fold(jax.random.key(0), prng.STEP, 1, i)
        # Three tasks, of which the first has its memory: its places with the largest lots.
        lots = np.asarray(jax.random.uniform(key, (3 * 50,)))[:50]
        places = np.argsort(-lots)[:size].tolist()
        g = flat(ref.gradients(ref.loss(x, y)))
        old = flat(ref.gradients(ref.loss(memory[0][places], memory[1][places])))
        if g @ old < 0:
            conflicts += 1
            g = g - (g @ old) / (old @ old) * old
        ref.step(as_grads(ref, g))
    assert conflicts > 0
    assert_same(core, ref)


@pytest.mark.parametrize("heads", ["tasks", "seen"])
def test_lwf(heads):
    start, (first, second), core = two_tasks("lwf", lwf__strength=2.0, lwf__heads=heads)
    ref = Reference(start)
    for x, y in first[:STEPS]:
        ref.step(ref.gradients(ref.loss(x, y)))
    teacher = Reference(start)
    teacher.theta = ref.copy()
    for x, y in second[:STEPS]:
        old = torch.softmax(teacher.forward(x)[:, :2] / 2, -1)  # the first task's two classes
        new = torch.log_softmax(ref.forward(x)[:, :2] / 2, -1)
        distillation = -(old * new).sum(-1).mean()
        ref.step(ref.gradients(ref.loss(x, y) + 2.0 * distillation))
    assert_same(core, ref)
