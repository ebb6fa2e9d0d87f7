"""Our transforms as citizens of optax: each of them in each of its combinators."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bpnjax import optim

pytestmark = pytest.mark.usefixtures("compile_once")


def tree_like(seed, dtype=jnp.float32):
    """Parameters with factors, a matrix, a vector, a scalar and an array without elements.

    The leaves ``measure`` are to other transforms a vector as any other; as gradients they are the
    sum of squares and the size of a layer's outputs.
    """
    a, b, c, d, e = jax.random.split(jax.random.key(seed), 5)
    measures = 1 + jax.random.uniform(e, (2, 2))
    tree = {
        "bd": {
            "l": {
                "M": jax.random.normal(a, (1, 3)),
                "W": jax.random.normal(b, (3, 2)),
                "measure": measures[0],
            }
        },
        "core": {
            "kernel": jax.random.normal(c, (2, 2)),
            "scale": jax.random.normal(d, ()),
            "empty": jnp.zeros((0, 2)),
            "measure": measures[1],
        },
    }
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


PARAMS, GRADS, ANCHOR = (tree_like(seed) for seed in range(3))
EXTRA = {"anchor": ANCHOR, "importance": jax.tree.map(jnp.square, tree_like(3))}


def decay(count):
    return 0.5 / (1 + count)


TRANSFORMS = {
    "beneficial_sign": lambda: optim.beneficial_sign(0.25),
    "beneficial_sign_scheduled": lambda: optim.beneficial_sign(decay),
    "matched_step": lambda: optim.matched_step(0.25),
    "matched_step_scheduled": lambda: optim.matched_step(decay),
    "relative_step": lambda: optim.relative_step(0.25),
    "relative_step_scheduled": lambda: optim.relative_step(decay),
    "relative_step_along": lambda: optim.relative_step(0.25, direction="gradient"),
    "partition_by_path": lambda: optim.partition_by_path(
        [
            ("/M$", optim.matched_step(decay)),
            ("/l/(W|measure)$", optax.adam(0.1)),
            ("^core/", optax.sgd(0.5)),
        ]
    ),
    "beneficial_perturbation": lambda: optim.beneficial_perturbation(optax.adam(0.1), 0.25),
    "beneficial_perturbation_scheduled": lambda: optim.beneficial_perturbation(
        optax.adamw(optax.cosine_decay_schedule(0.1, 10)), decay
    ),
    "beneficial_perturbation_relative": lambda: optim.beneficial_perturbation(
        optax.adam(0.1), 0.25, step="relative"
    ),
    "beneficial_perturbation_along": lambda: optim.beneficial_perturbation(
        optax.adam(0.1), decay, step="relative", direction="gradient"
    ),
    "add_quadratic_anchor": lambda: optim.add_quadratic_anchor(3.0),
    "add_quadratic_anchor_proximal": lambda: optim.add_quadratic_anchor(3.0, step_size=0.1),
    "anchored_perturbation": lambda: optax.chain(
        optim.add_quadratic_anchor(3.0), optim.beneficial_perturbation(optax.sgd(0.1), 0.25)
    ),
}
every_transform = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)


def updater(tx):
    """``tx.update`` with the anchor, which those that need none take and leave."""
    update = optax.with_extra_args_support(tx).update
    return lambda grads, state, params: update(grads, state, params, **EXTRA)


def steps(tx, count=3, grads=GRADS, params=PARAMS, update=None):
    """The updates of some steps on gradients that change, and the last state."""
    update, state, all_updates = update or updater(tx), tx.init(params), []
    for i in range(count):
        scaled = jax.tree.map(lambda g, i=i: g * (1 - 2 * (i % 2)), grads)
        updates, state = update(scaled, state, params)
        params = optax.apply_updates(params, updates)
        all_updates.append(updates)
    return all_updates, state


def same(a, b, **kw):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    kw = kw or {"rtol": 1e-5, "atol": 1e-7}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kw), a, b)


def differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(not np.allclose(x, y) for x, y in pairs)


@every_transform
def test_moves_and_under_jit_moves_alike(make):
    tx = make()
    plain, state = steps(tx)
    jitted, jitted_state = steps(tx, update=jax.jit(updater(tx)))
    same(jitted, plain)
    same(jitted_state, state)
    assert all(differ(u, jax.tree.map(jnp.zeros_like, u)) for u in plain)


@every_transform
def test_vmap_equals_one_at_a_time(make):
    tx = make()
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), PARAMS, ANCHOR)
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), GRADS, PARAMS)
    states = jax.vmap(tx.init)(stack)
    got, _ = jax.jit(jax.vmap(updater(tx)))(grads, states, stack)
    for i, (g, p) in enumerate([(GRADS, PARAMS), (PARAMS, ANCHOR)]):
        expected, _ = jax.jit(updater(tx))(g, tx.init(p), p)
        same(jax.tree.map(lambda leaf, i=i: leaf[i], got), expected)


@every_transform
def test_pmap_equals_jit(make):
    tx = make()
    first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
    params, grads = (jax.tree.map(lambda leaf: leaf[None], tree) for tree in (PARAMS, GRADS))
    updates, _ = jax.pmap(updater(tx))(grads, jax.pmap(tx.init)(params), params)
    same(first(updates), steps(tx, 1)[0][0])


@every_transform
def test_state_is_a_plain_stable_pytree(make):
    tx = make()
    before = tx.init(PARAMS)
    _, after = steps(tx)
    leaves, structure = jax.tree.flatten(after)
    assert structure == jax.tree.structure(before)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    for old, new in zip(jax.tree.leaves(before), leaves, strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    same(updater(tx)(GRADS, jax.tree.unflatten(structure, leaves), PARAMS),
         updater(tx)(GRADS, after, PARAMS), rtol=0)  # fmt: skip


@every_transform
def test_bfloat16_gradients_give_bfloat16_updates(make):
    params, grads = tree_like(0, jnp.bfloat16), tree_like(1, jnp.bfloat16)
    low, _ = steps(make(), 2, grads, params)
    full, _ = steps(make(), 2)
    for updates in low:
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(updates))
        assert jax.tree.structure(updates) == jax.tree.structure(params)
    same(jax.tree.map(lambda u: u.astype(jnp.float32), low[0]), full[0], rtol=0.05, atol=0.05)


@every_transform
def test_gradients_of_zero_are_finite_and_move_no_factor(make):
    zeros = jax.tree_util.tree_map_with_path(  # a layer whose outputs are not known has no step
        lambda path, g: g if path[-1].key == "measure" else jnp.zeros_like(g), GRADS
    )
    updates, _ = updater(make())(zeros, make().init(PARAMS), PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    extra = {**EXTRA, "anchor": PARAMS}  # at its anchor nothing is pulled
    update = optax.with_extra_args_support(make()).update
    moved, _ = update(zeros, make().init(PARAMS), PARAMS, **extra)
    np.testing.assert_array_equal(moved["bd"]["l"]["M"], 0.0)


@every_transform
def test_in_chain_the_next_transform_sees_its_updates(make):
    tx = optax.chain(optax.identity(), make(), optax.scale(-2.0))
    update = optax.with_extra_args_support(tx).update
    got, _ = update(GRADS, tx.init(PARAMS), PARAMS, **EXTRA)
    alone, _ = updater(make())(GRADS, make().init(PARAMS), PARAMS)
    same(got, jax.tree.map(lambda u: -2.0 * u, alone))


MASKS = {"bd": {"bd": True, "core": False}, "core": {"bd": False, "core": True}}


@every_transform
@pytest.mark.parametrize("kept", MASKS)
def test_masked_leaves_the_rest_as_it_is(make, kept):
    if kept == "core" and "perturbation" in str(make.__code__.co_names):
        with pytest.raises(ValueError, match="no leaf matches the factor pattern"):
            optax.masked(make(), MASKS[kept]).init(PARAMS)
        return
    tx = optax.masked(make(), MASKS[kept])
    got, _ = steps(tx, 1)
    alone, _ = steps(make(), 1)
    left = next(name for name in MASKS if name != kept)
    same(got[0][kept], alone[0][kept])
    same(got[0][left], GRADS[left], rtol=0)


@every_transform
def test_partition_gives_it_its_own_leaves(make):
    tx = optax.partition(
        {"ours": make(), "theirs": optax.sgd(2.0)}, {"bd": "ours", "core": "theirs"}
    )
    got, state = steps(tx, 1, update=jax.jit(updater(tx)))
    same(got[0]["bd"], steps(make(), 1)[0][0]["bd"])
    same(got[0]["core"], jax.tree.map(lambda g: -2.0 * g, GRADS["core"]))
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(PARAMS))


@every_transform
def test_multi_steps_takes_the_mean_gradient_once(make):
    # Its gradient_transformation() would drop the anchor: it takes no extra arguments.
    tx = optax.MultiSteps(optax.with_extra_args_support(make()), every_k_schedule=2)
    first, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, **EXTRA)
    second, _ = tx.update(PARAMS, state, PARAMS, **EXTRA)
    same(first, jax.tree.map(jnp.zeros_like, GRADS))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, GRADS, PARAMS)
    expected, _ = updater(make())(mean, make().init(PARAMS), PARAMS)
    same(second, expected)


@every_transform
def test_apply_if_finite_skips_what_is_not(make):
    tx = optax.apply_if_finite(make(), max_consecutive_errors=2)
    bad = jax.tree.map(lambda g: g + jnp.nan, GRADS)
    nothing, state = updater(tx)(bad, tx.init(PARAMS), PARAMS)
    assert all(not leaf.any() for leaf in jax.tree.leaves(nothing))
    good, _ = updater(tx)(GRADS, state, PARAMS)
    same(good, steps(make(), 1)[0][0])


@pytest.mark.parametrize(
    "factory, kwargs, changed",
    [
        (optim.beneficial_sign, {"epsilon": 0.25}, {"epsilon": 0.5}),
        (optim.matched_step, {"epsilon": 0.25}, {"epsilon": 0.5}),
        (optim.add_quadratic_anchor, {"strength": 3.0, "step_size": 0.1}, {"strength": 7.0}),
        (optim.beneficial_perturbation, {"tx": optax.sgd(0.1), "epsilon": 0.25}, {"epsilon": 0.5}),
        (optim.relative_step, {"size": 0.25}, {"size": 0.5}),
        (
            optim.beneficial_perturbation,
            {"tx": optax.sgd(0.1), "epsilon": 0.25, "step": "relative"},
            {"epsilon": 0.5},
        ),
    ],
)
def test_inject_hyperparams_changes_what_it_injects(factory, kwargs, changed):
    tx = optax.inject_hyperparams(factory)(**kwargs)
    state = tx.init(PARAMS)
    run = jax.jit(updater(tx))
    same(run(GRADS, state, PARAMS)[0], steps(factory(**kwargs), 1)[0][0])
    for name, value in changed.items():
        state.hyperparams[name] = jnp.float32(value)
    same(run(GRADS, state, PARAMS)[0], steps(factory(**{**kwargs, **changed}), 1)[0][0])


def test_a_schedule_of_a_relative_step_is_read_at_each_step():
    """It is the whole size: nothing falls beside it."""
    ours, state = steps(optim.relative_step(decay))
    assert int(state.count) == 3
    square, size = np.asarray(GRADS["core"]["measure"])
    for i, updates in enumerate(ours):
        sign = np.sign(GRADS["core"]["kernel"]) * (1 - 2 * (i % 2))
        expected = -decay(i) * np.sqrt(square / size) * sign
        np.testing.assert_allclose(updates["core"]["kernel"], expected, rtol=1e-5)
    same(steps(optim.relative_step(optim.falling(0.25)))[0], steps(optim.relative_step(0.25))[0])


@pytest.mark.parametrize("factory", [optim.beneficial_sign, optim.matched_step])
def test_a_schedule_of_epsilon_is_read_at_each_step(factory):
    ours, state = steps(factory(decay))
    injected, _ = steps(optax.inject_hyperparams(factory)(epsilon=decay))
    same(ours, injected)
    assert int(state.count) == 3
    for i, updates in enumerate(ours):
        length = np.linalg.norm(updates["core"]["kernel"])
        np.testing.assert_allclose(length, 0.5 / (1 + i) * 2, rtol=1e-5)  # epsilon sqrt(4)


@pytest.mark.parametrize("step", ["absolute", "relative"])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "rmsprop", "lion", "adagrad", "novograd"])
def test_any_base_optimizer_goes_on_as_if_alone(name, step):
    base = getattr(optax, name)(1e-2)
    got, _ = steps(optim.beneficial_perturbation(base, 0.25, step=step))

    def without(tree):
        """What is the base optimizer's: neither M nor what is measured."""
        own = {"W": tree["bd"]["l"]["W"], "kernel": tree["core"]["kernel"]}
        return own | {name: tree["core"][name] for name in ("scale", "empty")}

    expected, _ = steps(base, grads=without(GRADS), params=without(PARAMS),
                        update=lambda g, s, p: base.update(g, s, p))  # fmt: skip
    same([without(updates) for updates in got], expected)
    m, (square, size) = (np.asarray(GRADS["bd"]["l"][key]) for key in ("M", "measure"))
    of_layer = 1.0 if step == "absolute" else np.sqrt(square / size)
    rounding = 0.0 if step == "absolute" else 1e-6
    expected = -0.25 * of_layer * np.sign(m)
    np.testing.assert_allclose(got[0]["bd"]["l"]["M"], expected, rtol=rounding)
    assert step == "absolute" or not any(np.any(u["core"]["measure"]) for u in got)


@pytest.mark.parametrize(
    "tx",
    [
        optim.beneficial_sign(0.1),
        optim.matched_step(0.1),
        optim.relative_step(0.1),
        optim.add_quadratic_anchor(2.0),
        optim.partition_by_path([(".*", optax.sgd(1.0))]),
    ],
)
@pytest.mark.parametrize("nothing", [{}, {"a": None}, {"a": optax.MaskedNode()}, ()])
def test_trees_without_leaves_pass(tx, nothing):
    update = optax.with_extra_args_support(tx).update
    updates, _ = update(nothing, tx.init(nothing), nothing, anchor=nothing, importance=nothing)
    assert updates == nothing


def test_a_parameter_without_gradient_anchor_or_importance_is_free():
    two = {"a": jnp.array([2.0]), "b": jnp.array([3.0])}
    zeros, ones = (jax.tree.map(lambda p, v=v: jnp.full_like(p, v), two) for v in (0.0, 1.0))
    grads = {"a": jnp.array([1.0]), "b": None}
    got = optim.anchor_gradient(grads, two, zeros, ones, 10.0)
    assert got["a"].tolist() == [21.0] and got["b"] is None
    free = {"a": ones["a"], "b": None}
    for anchor, importance in ((free, ones), (zeros, free)):
        got = optim.anchor_gradient(zeros, two, anchor, importance, 10.0)
        assert got["b"].tolist() == [0.0] and got["a"][0] > 0
        slope = jax.grad(optim.anchor_penalty)(two, anchor, importance, 10.0)
        same(slope, got)
    assert float(optim.anchor_penalty({}, {}, {}, 10.0)) == 0.0


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matched_steps_are_as_long_for_gradients_of_any_size(size, dtype):
    g = (size * jnp.arange(1.0, 1001.0)).astype(dtype)
    updates, _ = optim.matched_step(0.5).update(g, optim.matched_step(0.5).init(g))
    np.testing.assert_allclose(
        jnp.linalg.norm(updates.astype(jnp.float32)), 0.5 * 1000**0.5, rtol=0.01
    )


def quadratic(params):
    return sum(jnp.sum(jnp.square(p - 0.3) * (1 + jnp.arange(p.size).reshape(p.shape)))
               for p in jax.tree.leaves(params))  # fmt: skip


def test_as_a_transform_and_as_a_loss_term_it_is_one_under_sgd():
    """And under any optimizer that stands after it, as both hand it the same gradient."""

    def penalised(params):
        return quadratic(params) + optim.anchor_penalty(params, strength=3.0, **EXTRA)

    for base in (optax.sgd(0.01), optax.sgd(0.01, momentum=0.9), optax.adam(0.01)):
        tx = optax.chain(optim.add_quadratic_anchor(3.0), base)
        ours, theirs, ours_state, theirs_state = PARAMS, PARAMS, tx.init(PARAMS), base.init(PARAMS)
        for _ in range(4):
            u, ours_state = tx.update(jax.grad(quadratic)(ours), ours_state, ours, **EXTRA)
            v, theirs_state = base.update(jax.grad(penalised)(theirs), theirs_state, theirs)
            same(u, v, rtol=1e-4, atol=1e-6)
            ours, theirs = optax.apply_updates(ours, u), optax.apply_updates(theirs, v)


@pytest.mark.parametrize("decoupled", [False, True])
def test_before_adam_it_is_l2_and_after_it_is_adamw(decoupled):
    """Towards 0 with importance 1 the anchor is weight decay: optax has both kinds."""
    ours = [optim.add_quadratic_anchor(0.3), optax.scale_by_adam()][:: -1 if decoupled else 1]
    tx = optax.chain(*ours, optax.scale(-0.01))
    extra = {"anchor": jax.tree.map(jnp.zeros_like, PARAMS),
             "importance": jax.tree.map(jnp.ones_like, PARAMS)}  # fmt: skip
    known = {False: optax.chain(optax.add_decayed_weights(0.3), optax.adam(0.01)),
             True: optax.adamw(0.01, weight_decay=0.3)}  # fmt: skip
    got, _ = steps(tx, update=lambda g, s, p: tx.update(g, s, p, **extra))
    expected, _ = steps(known[decoupled], update=known[decoupled].update)
    same(got, expected)
    other, _ = steps(known[not decoupled], update=known[not decoupled].update)
    assert differ(got, other)
