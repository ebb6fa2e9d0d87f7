"""Analytic heads: NCM, SLDA, FeCAM, RanPAC and their ceiling, against NumPy and scikit-learn."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.covariance import EmpiricalCovariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid

import bpnjax
from bpnjax import methods, networks
from bpnjax.methods.analytic import ClassSums, apart
from bpnjax.methods.fecam import normalised_covariance
from bpnjax.methods.ranpac import RIDGES, RidgeSums, held_out_errors, random_features
from bpnjax.utils.errors import UserError
from bpnjax.utils.heads import FAR_BELOW

pytestmark = pytest.mark.usefixtures("compile_once")

WIDTH, EACH = 6, 30
rng = np.random.default_rng(0)
# Classes 0 to 3 of 30 examples each in mixed order, and one more output that no task has.
Y = np.tile(np.arange(4), EACH)
SHAPE = rng.normal(size=(WIDTH, WIDTH))
X = (rng.normal(size=(len(Y), WIDTH)) @ SHAPE + 2.0 * rng.normal(size=(4, WIDTH))[Y] + 1.0).astype(
    np.float32
)
ORDERS = ([0, 1], [1, 0])
TASKS = [[0, 2], [1, 3]]  # the classes of two tasks
ANALYTIC = {
    "ncm": {}, "slda": {}, "fecam": {},
    "ranpac": {"features": 40}, "joint_ridge": {"features": 40},
}  # fmt: skip


def features_are_inputs(outputs=5):
    """A network whose output layer is all there is."""
    return networks.from_linen(nn.Dense(outputs), X[:1])


def learn(method, tasks, network=None, steps=0, **options):
    """A learner and its state after tasks, each ``(x, y)``."""
    network = network or features_are_inputs()
    learner = bpnjax.learner(network, method, optax.adam(0.1), num_tasks=len(tasks), **options)
    state = learner.init(jax.random.key(0))
    for task, (x, y) in enumerate(tasks):
        state = learner.begin_task(state, task)
        for _ in range(steps):
            state, _ = learner.step(state, (x, y))
        state = learner.end_task(state, (x, y))
    return learner, state


def of_classes(classes):
    mine = np.isin(Y, classes)
    return X[mine], Y[mine]


def logits(method, tasks, x=X, **options):
    learner, state = learn(method, tasks, **options)
    return np.asarray(learner.apply(state, x, task=0), np.float64)


def centred(z):
    return z[:, :4] - z[:, :4].mean(1, keepdims=True)


def test_ncm_is_scikit_learns_nearest_centroid():
    found = logits(methods.ncm(), [(X, Y)])
    reference = NearestCentroid().fit(X, Y)
    np.testing.assert_array_equal(found.argmax(1), reference.predict(X))
    distances = np.square(X[:, None] - reference.centroids_).sum(-1)
    np.testing.assert_allclose(centred(found), centred(-0.5 * distances), atol=1e-4)


class Shrunk(EmpiricalCovariance):
    def fit(self, x, y=None):
        super().fit(x)
        self.covariance_ = 0.9 * self.covariance_ + 0.1 * np.eye(x.shape[1])
        return self


def test_slda_is_scikit_learns_linear_discriminant_analysis():
    found = logits(methods.slda(shrinkage=0.1), [(X, Y)])
    reference = LinearDiscriminantAnalysis(
        solver="lsqr", covariance_estimator=Shrunk(), priors=[0.25] * 4
    ).fit(X.astype(np.float64), Y)
    np.testing.assert_array_equal(found.argmax(1), reference.predict(X))
    np.testing.assert_allclose(centred(found), centred(reference.decision_function(X)), atol=1e-4)


def test_slda_of_features_that_are_constant():
    """Rounding leaves a variance of their square, of either sign, which must not be inverted."""
    x = np.concatenate([X, np.full((len(X), 2), 1000.0, np.float32)], 1)
    network = networks.from_linen(nn.Dense(5), x[:1])
    found = logits(methods.slda(), [(x, Y)], x, network=network)
    assert np.isfinite(found).all()
    assert (found.argmax(1) == Y).mean() > 0.9


@pytest.mark.parametrize("number", [0, 40])
def test_ranpac_is_scikit_learns_ridge_on_its_random_features(number):
    learner, state = learn(methods.ranpac(features=number, ridge=0.5), [(X, Y)])
    h = np.asarray(random_features(state.method.settings, jnp.asarray(X), number))
    assert h.shape == (len(X), number or WIDTH)
    assert not number or (h.min() == 0 and (h > 0).mean() > 0.2)
    alpha = 0.5 * np.square(h).sum() / h.shape[1]
    reference = Ridge(alpha, fit_intercept=False).fit(h.astype(np.float64), np.eye(5)[Y])
    found = np.asarray(learner.apply(state, X, task=0))
    np.testing.assert_allclose(found[:, :4], reference.predict(h)[:, :4], atol=1e-5)


def test_the_ridge_of_the_least_held_out_error_is_taken():
    """By hand, in double precision: fits to four fifths of each task, errors on the others."""
    noisy = [
        (x + rng.normal(size=x.shape).astype(np.float32), y) for x, y in map(of_classes, TASKS)
    ]
    _, state = learn(methods.ranpac(features=30), noisy)
    x, y = (np.concatenate(parts) for parts in zip(*noisy, strict=True))
    h = np.asarray(random_features(state.method.settings, x, 30), np.float64)
    held = np.concatenate([np.arange(len(y)) % 5 == 4 for _, y in noisy])

    def fit(rows, ridge):
        g = h[rows].T @ h[rows]
        return np.linalg.solve(
            g + ridge * g.trace() / 30 * np.eye(30), h[rows].T @ np.eye(5)[y[rows]]
        )

    errors = [np.square(h[held] @ fit(~held, r) - np.eye(5)[y[held]]).sum() for r in RIDGES]
    np.testing.assert_allclose(held_out_errors(*state.method.sums), errors, rtol=1e-3)
    best = RIDGES[np.argmin(errors)]
    assert RIDGES[0] > best > RIDGES[-1]
    w = fit(np.full(len(y), True), best)
    np.testing.assert_allclose(state.method.head.kernel[:, :4], w[:, :4], atol=1e-4)


def test_the_projection_of_many_batches_is_drawn_once():
    learner, state = learn(methods.ranpac(features=40), [(X, Y)])
    drawn = learner.prepared(state)
    assert drawn.method.settings.shape == (WIDTH, 40)
    np.testing.assert_array_equal(learner.answer(drawn, X, 0), learner.answer(state, X, 0))
    text = str(jax.make_jaxpr(lambda s: learner.answer(s, jnp.asarray(X), 0))(drawn))
    assert "random" not in text and "erf_inv" not in text


def test_a_ridge_that_is_too_small_for_f32_is_passed_over():
    part = RidgeSums(jnp.full((50, 50), 1e3), jnp.ones((50, 1)), jnp.ones(1))
    errors = held_out_errors(jax.tree.map(lambda leaf: 2 * leaf, part), part)
    assert not np.isnan(errors).any() and np.isfinite(errors[0])
    none = RidgeSums(jnp.zeros((3, 3)), jnp.zeros((3, 1)), jnp.zeros(1))
    nothing = held_out_errors(none, none)
    assert int(jnp.argmin(nothing)) == 0  # without examples the strongest


def reference_fecam(x, y, of, shrinkage, power):
    """Distances of ``of`` from the classes of ``(x, y)``, in double precision."""

    def tukey(z):
        return np.sign(z) * np.abs(z.astype(np.float64)) ** power

    def unit(z):
        return z / np.linalg.norm(z, axis=-1, keepdims=True)

    found, u = [], unit(tukey(of))
    for c in range(4):
        z = tukey(x[y == c])
        covariance = np.cov(z.T, bias=True)
        d = len(covariance)
        others = ~np.eye(d, dtype=bool)
        shrunk = covariance + shrinkage * np.where(
            others, covariance[others].mean(), np.diag(covariance).mean()
        )
        s = np.sqrt(np.diag(shrunk))
        away = u - unit(z.mean(0))
        found.append(np.einsum("ni,ij,nj->n", away, np.linalg.inv(shrunk / s[:, None] / s), away))
    return np.stack(found, 1)


@pytest.mark.parametrize("shrinkage, power", [(1.0, 0.5), (0.1, 1.0)])
def test_fecam_in_double_precision(shrinkage, power):
    method = methods.fecam(shrinkage=shrinkage, power=power)
    found = logits(method, [of_classes(classes) for classes in TASKS])
    wanted = -reference_fecam(X, Y, X, shrinkage, power)
    np.testing.assert_allclose(found[:, :4], wanted, rtol=1e-3, atol=1e-4)


def test_fecam_of_a_class_with_one_example():
    covariance = normalised_covariance(jnp.zeros((3, 3)), 1.0)
    np.testing.assert_array_equal(covariance, np.eye(3))
    found = logits(methods.fecam(), [(X[:4], Y[:4])], X[:4])
    assert (found.argmax(1) == Y[:4]).all()


@pytest.mark.parametrize("name", ["ncm", "slda", "fecam", "ranpac"])
def test_the_order_of_tasks_does_not_matter(name):
    """The answers after both tasks in either order are those of both at once."""
    method = methods.REGISTRY[name](**ANALYTIC[name])
    one, other = (logits(method, [of_classes(TASKS[t]) for t in order]) for order in ORDERS)
    scale = np.abs(one[:, :4]).max()
    np.testing.assert_allclose(other[:, :4], one[:, :4], rtol=0, atol=1e-5 * scale)
    if name == "ranpac":  # told the strength, chosen from other held-out parts if taken together
        kept = {"features": 40, "ridge": 0.1}
        one = logits(methods.ranpac(**kept), [of_classes(classes) for classes in TASKS])
        method = methods.joint_ridge(**kept)
    together = logits(method, [(X, Y)])
    np.testing.assert_allclose(together[:, :4], one[:, :4], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ANALYTIC)
def test_a_class_that_was_never_seen_does_not_answer(name):
    found = logits(methods.REGISTRY[name](**ANALYTIC[name]), [of_classes([1, 2])])
    np.testing.assert_array_equal(found[:, [0, 3, 4]], FAR_BELOW)
    assert (found[:, [1, 2]] > FAR_BELOW / 2).all()
    untrained = bpnjax.learner(
        features_are_inputs(), methods.REGISTRY[name](**ANALYTIC[name]), optax.sgd(0.1), 1
    )
    state = untrained.init(jax.random.key(0))
    assert (np.asarray(untrained.apply(state, X, 0)) == FAR_BELOW).all()


class Normed(nn.Module):
    """A network with BatchNorm and dropout before its output layer."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(5)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


@pytest.mark.parametrize("name", ANALYTIC)
def test_the_network_does_not_move(name):
    """Bit for bit, running statistics too, whatever the optimizer does; steps add nothing."""
    method = methods.REGISTRY[name](**ANALYTIC[name])
    network = networks.from_linen(Normed(), X[:1])
    tasks = [of_classes(classes) for classes in TASKS]
    learner, state = learn(method, tasks, network, steps=2, batch_statistics="task")
    first = learner.init(jax.random.key(0))
    for before, after in ((first.params, state.params), (first.variables, state.variables)):
        assert jax.tree.leaves(before)
        jax.tree.map(np.testing.assert_array_equal, before, after)
    assert not learner.told_task
    _, without = learn(method, tasks, network)
    jax.tree.map(np.testing.assert_array_equal, state.method.head, without.method.head)


@pytest.mark.parametrize("name", ["ncm", "fecam"])
def test_earlier_classes_keep_what_they_are_judged_by(name):
    method = methods.REGISTRY[name]()
    first, both = (logits(method, [of_classes(c) for c in TASKS[:n]]) for n in (1, 2))
    np.testing.assert_array_equal(both[:, TASKS[0]], first[:, TASKS[0]])


def test_room_for_more_tasks():
    learner, state = learn(methods.slda(), [of_classes(TASKS[0])])
    grown, state = learner.grow(state, 2)
    state = grown.end_task(grown.begin_task(state, 1), of_classes(TASKS[1]))
    wanted = logits(methods.slda(), [of_classes(classes) for classes in TASKS])
    np.testing.assert_array_equal(grown.apply(state, X, 0), wanted)


class EndsInConvolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(5, (1,))(x[:, :, None]).mean(1)


@pytest.mark.parametrize("name", ANALYTIC)
def test_networks_that_they_cannot_serve(name):
    method = methods.REGISTRY[name]()

    def refused(network, message, **options):
        with pytest.raises(UserError, match=message):
            bpnjax.learner(network, method, optax.sgd(0.1), 1, **options)

    plain = networks.from_function(lambda p, mode, x: x @ p, lambda key: jnp.ones((6, 2)), x=X[:1])
    refused(plain, f"network: {name} needs to know what enters the output layer")
    convolution = networks.from_linen(EndsInConvolution(), X[:1])
    refused(convolution, f"{name} takes the place of a dense output layer")
    refused(
        features_are_inputs(), f"loss: {name} is defined for cross-entropy",
        loss=lambda outputs, y: jnp.square(outputs).mean(-1),
    )  # fmt: skip
    if method.trains == "in turn":
        with pytest.raises(UserError, match=f"chain: {name} has its own output layer"):
            methods.chain(methods.bd(), method)
    assert methods.chain(method).output_layer is method.output_layer


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: methods.slda(shrinkage=0.0), "slda.shrinkage: 0.0 is not above 0"),
        (lambda: methods.fecam(power=-1.0), "fecam.power: -1.0 is not above 0"),
        (lambda: methods.ranpac(features=-1), "ranpac.features: -1 is below 0"),
        (lambda: methods.joint_ridge(ridge=0.0), "ranpac.ridge: 0.0 is not above 0"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_what_two_means_add_to_a_scatter():
    """Scatters of parts and what lies between their means are the scatter of the whole."""
    draw = np.random.default_rng(0)
    one, other = draw.normal(1.0, 1.0, (7, 3)), draw.normal(-2.0, 1.0, (12, 3))
    whole = np.concatenate([one, other])
    sums = [ClassSums(jnp.array([float(len(z))]), jnp.asarray(z.sum(0, keepdims=True), jnp.float32))
            for z in (one, other)]  # fmt: skip
    weight, delta = apart(*sums)
    between = np.asarray(weight[0] * jnp.outer(delta[0], delta[0]))
    scatter = [(z - z.mean(0)).T @ (z - z.mean(0)) for z in (one, other, whole)]
    np.testing.assert_allclose(scatter[0] + scatter[1] + between, scatter[2], rtol=1e-5, atol=1e-5)
