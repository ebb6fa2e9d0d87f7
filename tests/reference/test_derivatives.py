"""The reference's derivatives, which are written by hand, against finite differences."""

import numpy as np
import pytest
import reference
from reference import HIDDEN, OUTPUT, Mode

NET = reference.Network(5, 6, 4)
DRAWS = np.random.default_rng(0)
THETA, TEACHER = DRAWS.normal(size=(2, NET.size))
X, Y = DRAWS.normal(size=(3, 5)), np.array([1, 2, 3])
BATCH = reference.Batch(X, Y, np.array([1.0, 1.0, 0.0]), np.ones(3, int))
MODE = Mode(
    {HIDDEN: DRAWS.choice([-1.0, 1.0], 5), OUTPUT: DRAWS.choice([-1.0, 1.0], 6)},
    {HIDDEN: DRAWS.normal(size=6), OUTPUT: DRAWS.normal(size=4)},
)
HEAD = np.array([True, False, True, True])


def slope(function, at, step=1e-6):
    """Central differences."""
    moves = step * np.eye(len(at))
    return np.array([(function(at + m) - function(at - m)) / (2 * step) for m in moves])


def close(found, expected):
    """Equal up to the error of central differences."""
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-7)


def learner(protection=None):
    """In the second task."""
    made = reference.Learner(NET, THETA, lambda: reference.Sgd(0.1), protection=protection)
    made.begin_task(1)
    return made


def mean(function):
    """The weighted mean of a function of an example over the batch."""
    return sum(w * function(x) for x, _, w in BATCH) / BATCH.weight.sum()


def test_network():
    outputs, units = DRAWS.normal(size=4), DRAWS.normal(size=6)

    def number(theta, mode=MODE):
        _, _, second, logits = NET.forward(theta, X[0], mode)
        return logits @ outputs + second @ units

    def of_biases(both):
        bias = {HIDDEN: MODE.bias[HIDDEN] + both[:6], OUTPUT: MODE.bias[OUTPUT] + both[6:]}
        return number(THETA, Mode(MODE.key, bias))

    found = NET.backward(THETA, X[0], outputs, units, MODE)
    close(found.theta, slope(number, THETA))
    close(np.concatenate([found.hidden, found.output]), slope(of_biases, np.zeros(10)))


@pytest.mark.parametrize("head", [None, HEAD])
def test_cross_entropy(head):
    logits = DRAWS.normal(size=4)
    _, found = reference.cross_entropy(logits, 2, head)
    close(found, slope(lambda z: reference.cross_entropy(z, 2, head)[0], logits))


def test_inhibition():
    slnid = reference.Slnid(1.0, 2.0, "sum", reference.Mas(0.1))
    at = learner(slnid)
    slnid.units = DRAWS.random(6)
    factors = slnid.factors()

    def loss(theta):
        return mean(lambda x: NET.features(theta, x) @ factors @ NET.features(theta, x))

    close(slnid.gradient(at, np.zeros(NET.size), BATCH), slope(loss, THETA))


def test_distillation_and_codes():
    ebll = reference.Ebll(0.7, 1.5, 2.0, lambda task: [HEAD])
    at = learner(ebll)
    ebll.teacher = TEACHER
    ebll.encoders = [(DRAWS.normal(size=(6, 3)), DRAWS.normal(size=3)) for _ in range(2)]

    def loss(theta):
        def example(x):
            old, new = (reference.softmax(NET.logits(t, x) / 2.0, HEAD) for t in (TEACHER, theta))
            total = -1.5 * (old[HEAD] * np.log(new[HEAD])).sum()
            for kernel, bias in ebll.encoders:
                new, old = (
                    1 / (1 + np.exp(-NET.features(t, x) @ kernel - bias)) for t in (theta, TEACHER)
                )
                total += 0.7 / 2 * ((new - old) ** 2).sum()
            return total

        return mean(example)

    close(ebll.gradient(at, np.zeros(NET.size), BATCH), slope(loss, THETA))


def test_autoencoder(monkeypatch):
    class Plain:
        """Adds the gradient itself."""

        def __init__(self, rate):
            pass

        def update(self, gradient):
            return gradient

    monkeypatch.setattr(reference, "Adam", Plain)
    start = [DRAWS.normal(size=shape) for shape in ((6, 3), 3, (3, 6), 6)]
    found = reference.fit_autoencoder(learner(), X, Y, start, 1, 3, 1.0, 0.3)
    p = NET.unpack(THETA)

    def loss(flat):
        total = 0.0
        for x, y in zip(X, Y, strict=True):
            h = NET.features(THETA, x)
            code = 1 / (1 + np.exp(-h @ flat[:18].reshape(6, 3) - flat[18:]))
            again = code @ start[2] + start[3]
            logits = again @ p[OUTPUT, "kernel"] + p[OUTPUT, "bias"]
            total += 0.3 * ((again - h) ** 2).sum() + reference.cross_entropy(logits, y)[0]
        return total / len(X)

    flat = np.concatenate([start[0].ravel(), start[1]])
    close(np.concatenate([part.ravel() for part in found]) - flat, slope(loss, flat))


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gem_projection_solves_its_dual(margin):
    """The conditions of Karush, Kuhn and Tucker, at 20 random programmes."""
    for _ in range(20):
        g, rows = DRAWS.normal(size=8), DRAWS.normal(size=(3, 8))
        if (rows @ g >= 0).all():
            continue
        moved = reference.gem_projection(g, rows, margin, 1e-3) - g
        v = np.linalg.lstsq(rows.T, moved, rcond=None)[0]
        residual = (rows @ rows.T + 1e-3 * np.eye(3)) @ v + rows @ g
        assert (v >= margin - 1e-8).all() and (residual >= -1e-8).all()
        assert np.abs((v - margin) * residual).max() < 1e-8
