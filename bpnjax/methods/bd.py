r"""BD, the beneficial perturbation: a bias per task and layer, learned as a product of factors.

.. math:: y = W_{shared} x + b + M W, \quad M \in R^{1 \times H}, \quad W \in R^{H \times K}

``modulation`` replaces the bias by other vectors, learned in the same way
(`bpnjax.modes.MODULATIONS`). Their value is that of the plain network plus M W.

While the task is learned, W follows its gradient and M takes steps against the sign of its
gradient. Then the product is frozen in a bank ``[T, K]`` and the factors are dropped. M starts at
zero, so that the network starts unchanged. W starts uniform in +-1/sqrt(H), because neither would
ever move if both were zero. ``step`` chooses the size of M's steps:

- ``"relative"`` (default): epsilon / sqrt(1 + t) times the root mean square of the layer's outputs,
  with t the number of steps of the task so far (`bpnjax.optim.relative_step`). Epsilon has no unit,
  and one value serves all networks; docs/paper/step/step.md has the measurements. Vectors that
  multiply have no unit either, so their steps are epsilon / sqrt(1 + t).
- ``"absolute"``: epsilon, as in the paper (`bpnjax.optim.beneficial_sign`). It must be tuned for
  each network.

In `gd`, the paper's control, M follows its true gradient instead. In `gd_matched` it follows the
gradient's direction with steps as long as those of BD, epsilon * sqrt(H).

Source: Wen et al. 2020 (arXiv 2009.13954), Sec. V, Alg. 1 and 2. Variant: the relative step is
ours. M's step is its whole update and no learning rate multiplies it; the paper does not say which
optimizer gets it. Every layer that ``layers`` chooses gets a bias, by default all, convolutions
included; in the paper only fully connected layers do, including the output layer. The initial
values come from the lab's prototype of a later paper. Of the other modulations ``gain`` is that of
(IA)^3 (Liu et al. 2022, arXiv 2205.05638), ``bias+gain`` FiLM (Perez et al. 2018, arXiv
1709.07871), ``rank1`` BatchEnsemble (Wen et al. 2020, arXiv 2002.06715; here the layer's own bias
is multiplied too), ``depthwise`` CLR (Ge et al. 2023, arXiv 2307.11386), and ``mask`` a hard gate
per unit like Piggyback (Mallya et al. 2018, arXiv 1801.06519), which has one per weight.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from bpnjax import modes, networks, optim
from bpnjax.methods.base import Context, Method, Setup, TaskData
from bpnjax.methods.psp import checks_layers
from bpnjax.methods.settings import Range, Setting, register
from bpnjax.networks import Layer, matching
from bpnjax.optim.beneficial import STEPS
from bpnjax.utils import arrays, prng
from bpnjax.utils.errors import UserError

Factors = dict[str, dict[str, dict[str, jax.Array]]]
Epsilon = Annotated[
    float,
    Setting(
        "size of M's step, against the sign of its gradient; see bd.step for the unit",
        above=0,
        search=(
            Range(0.02, 2.0, when=("bd.step", "relative")),
            Range(1e-3, 0.5, when=("bd.step", "absolute")),
        ),
    ),
]
Step = Annotated[
    str,
    Setting(
        "unit of M's step: relative (to the size of the layer's outputs, falling within the task) "
        "or absolute (as in the paper)",
        choices=STEPS,
    ),
]
HiddenDim = Annotated[int, Setting("H, the inner width of the product M W", at_least=1)]
Kind = Annotated[
    str,
    Setting(
        "vectors per task and layer: bias, gain (on the outputs), bias+gain, rank1 (a key on the "
        "inputs and a gain), depthwise (a 3 x 3 kernel per channel after a convolution), mask (a "
        "bit per unit)",
        choices=tuple(modes.MODULATIONS),
        field="bd.modulation",
    ),
]
LayerPattern = Annotated[
    str, Setting("layers with a bias per task, as a pattern for their paths", pattern=True)
]
Rate = Annotated[
    float | None,
    Setting("learning rate of W (with gd also of M); None: train.learning_rate", above=0),
]


def empty_bank(
    layers: Mapping[str, Layer], num_tasks: int, modulation: str = "bias"
) -> dict[str, dict[str, jax.Array]]:
    """Makes a bank whose modes are the plain network until a task is stored.

    Args:
      layers: ``{path: Layer}`` as in `bpnjax.networks.Network.layers`, or a part of it.
      num_tasks: T.
      modulation: the vectors per task and layer, a name of `bpnjax.modes.MODULATIONS`.

    Returns:
      ``{path: {"bias": f32 [T, K]}}`` with K the outputs of a layer, and likewise for other
      vectors; for ``"mask"`` uint8 ``[T, ceil(K / 8)]``.

    Example:
      >>> from bpnjax.networks.layers import Layer
      >>> from bpnjax.methods.bd import empty_bank
      >>> layers = {"out": Layer("dense", 4, 3, 1, 2, (1, 3))}
      >>> empty_bank(layers, num_tasks=2)["out"]["bias"].shape
      (2, 3)
    """
    return modes.MODULATIONS[modulation].bank(layers, num_tasks)


def init_factors(
    key: Any,
    layers: Mapping[str, Layer],
    hidden_dim: int,
    measure: bool = False,
    modulation: str = "bias",
) -> Factors:
    r"""Makes the factors of a new task, with M zero and W uniform in +-1/sqrt(H).

    .. math:: M = 0, \quad W_{ij} \sim U(-1 / \sqrt{H}, 1 / \sqrt{H})

    Their product is zero, so the network starts unchanged. A first step of epsilon on M moves the
    bias by about 0.46 epsilon sqrt(H) against the gradient, whatever the gradient's length, and by
    epsilon sqrt(K / 3) across it. So H acts like a step size, and with a small H the direction is
    mostly random.

    Args:
      key: typed PRNG key.
      layers: ``{path: Layer}`` as in `bpnjax.networks.Network.layers`.
      hidden_dim: H.
      measure: whether each has a leaf ``measure``, f32 ``[2]``, for a relative step.
      modulation: the vectors per task and layer, a name of `bpnjax.modes.MODULATIONS`.

    Returns:
      ``{path: {"bias": {"M": f32 [1, H], "W": f32 [H, K]}}}``, or other names of vectors with W
      ``[H, *shape]``. `bpnjax.optim.beneficial_perturbation` trains them, and `product` makes the
      vectors.

    Example:
      >>> import jax
      >>> from bpnjax.networks.layers import Layer
      >>> from bpnjax.methods.bd import init_factors, product
      >>> layers = {"out": Layer("dense", 4, 3, 1, 2, (1, 3))}
      >>> factors = init_factors(jax.random.key(0), layers, hidden_dim=16)
      >>> factors["out"]["bias"]["M"].shape, factors["out"]["bias"]["W"].shape
      ((1, 16), (16, 3))
      >>> product(factors)["out"]["bias"].tolist()
      [0.0, 0.0, 0.0]

    Source: Wen et al. 2020 (arXiv 2009.13954), Sec. V. Variant: the paper gives no initial values;
    these come from the lab's prototype of a later paper.
    """
    bound = hidden_dim**-0.5

    def one(key: Any, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        w = jax.random.uniform(key, (hidden_dim, *shape), jnp.float32, -bound, bound)
        factors = {"M": jnp.zeros((1, hidden_dim), jnp.float32), "W": w}
        return factors | ({"measure": jnp.zeros(2, jnp.float32)} if measure else {})

    shapes = modes.MODULATIONS[modulation].shapes(layers)
    return {
        path: {
            name: one(jax.random.fold_in(own, i) if i else own, shape)
            for i, (name, shape) in enumerate(shapes[path].items())
        }
        for own, path in zip(jax.random.split(key, len(layers)), layers, strict=True)
    }


def product(factors: Factors, modulation: str = "bias") -> dict[str, dict[str, jax.Array]]:
    r"""Multiplies the factors to vectors.

    .. math:: bias = M W, \quad gain = 1 + M W

    Args:
      factors: ``{path: {"bias": {"M": [1, H], "W": [H, K]}}}`` from `init_factors`.
      modulation: the vectors that they stand for.

    Returns:
      A mode, ``{path: {"bias": [K]}}``, differentiable with respect to the factors.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.bd import product
      >>> own = {"M": jnp.array([[1.0, -1.0]]), "W": jnp.array([[3.0], [1.0]])}
      >>> product({"out": {"bias": own}})["out"]["bias"].tolist()
      [2.0]

    Source: Wen et al. 2020 (arXiv 2009.13954), Sec. V.
    """

    def one(name: str, own: dict[str, jax.Array]) -> jax.Array:
        m = own["M"].reshape(-1, *(1,) * (own["W"].ndim - 1))
        # A matrix product would store its gradient for W before W's optimizer reads it.
        return in_units_of(name, jnp.sum(m * own["W"], 0), own)

    changes = {
        path: {name: one(name, own) for name, own in vectors.items()}
        for path, vectors in factors.items()
    }
    return modes.MODULATIONS[modulation].values(changes)


def in_units_of(name: str, change: jax.Array, own: Mapping[str, jax.Array]) -> jax.Array:
    """Sets the unit of a learned change: the size of the outputs for a bias, 1 for other vectors.

    Args:
      name: of the vector.
      change: any array.
      own: the task parameters of the vector, with or without a ``measure``.

    Returns:
      ``change``.
    """
    if name == "bias" or "measure" not in own:
        return change
    return networks.in_own_units(change, own["measure"])


def modulated(
    layers: str,
    modulation: str,
    fresh: Callable[[Any, Mapping[str, Layer]], Any],
    of: Callable[[Any], Any],
    measure: bool = False,
) -> dict[str, Any]:
    """The hooks of a method that learns vectors per task and layer and stores them in a bank.

    Args:
      layers: a pattern for the paths of the layers.
      modulation: the vectors, a name of `bpnjax.modes.MODULATIONS`.
      fresh: ``(key, layers) -> task_params``, ``{path: {name: {...}}}``.
      of: ``task_params -> {path: {name: [...]}}``, the vectors that these stand for.
      measure: whether the task parameters of each vector have a leaf ``measure``.

    Returns:
      Arguments of `Method`. Its state is the bank, see `empty_bank`.
    """
    kind = modes.MODULATIONS[modulation]

    def chosen(setup: Setup) -> dict[str, Layer]:
        found = matching(setup.network.layers, layers)
        return {path: layer for path, layer in found.items() if kind.acts_on(layer)}

    def init(key: Any, params: Any, setup: Setup) -> Any:
        del key, params
        return kind.bank(chosen(setup), setup.num_tasks)

    def begin_task(key: Any, params: Any, state: Any, ctx: Context) -> tuple[Any, Any, Any]:
        return params, state, fresh(key, chosen(ctx.setup))

    def forward(params: Any, task_params: Any, state: Any, ctx: Context) -> tuple[Any, Any]:
        if ctx.training and jnp.ndim(ctx.task) == 0:
            measures = {
                path: {"measure": vectors["bias"]["measure"]}
                for path, vectors in task_params.items()
                if "measure" in vectors.get("bias", ())
            }
            return params, modes.merge(of(task_params), measures)
        task = jnp.asarray(ctx.task)
        known = (task >= 0) & (task < ctx.setup.num_tasks)
        stored = kind.decoded(modes.select(state, task), chosen(ctx.setup), known)
        if ctx.current is None:
            return params, stored
        return params, ctx.stored_or_current(of(task_params), stored)

    def end_task(
        params: Any, task_params: Any, state: Any, data: TaskData, ctx: Context
    ) -> tuple[Any, Any]:
        del data
        return params, modes.store(state, kind.encoded(of(task_params)), ctx.current)

    def check(setup: Setup) -> None:
        checks_layers("bd", layers)(setup)
        if not chosen(setup):
            raise UserError(
                f"bd.modulation: {modulation} acts on the outputs of convolutions, and none is "
                f"among the layers of bd.layers={layers!r}; choose gain"
            )
        try:
            kind.shapes(chosen(setup))
        except ValueError as error:
            raise UserError(f"bd.modulation: {modulation}: {error}") from error
        if measure or modulation != "bias":
            _check_read(setup, chosen(setup), modulation, measure)

    return {
        "told_task": True,
        "check": check,
        "init": init,
        "begin_task": begin_task,
        "forward": forward,
        "end_task": end_task,
    }


def _check_read(setup: Setup, chosen: Mapping[str, Layer], modulation: str, measure: bool) -> None:
    """Raises an error for a plain function that ignores a part of the mode, or does not measure."""
    network = setup.network
    if all(layer.kind != "function" for layer in chosen.values()):
        return
    kind = modes.MODULATIONS[modulation]
    measured = measure and "bias" in kind.names
    setup.stored_example(
        "a step relative to the outputs of layers (bd.step)" if measured
        else f"bd.modulation={modulation}"
    )  # fmt: skip
    measures = {"measure": jnp.zeros(2, jnp.float32)} if measured else {}
    mode = {
        path: {name: jnp.zeros(shape, jnp.float32) for name, shape in own.items()} | measures
        for path, own in kind.shapes(chosen).items()
    }
    params, variables = jax.eval_shape(network.init, prng.key(0))
    read = arrays.used(
        lambda mode, params, variables, x: network.apply(params, mode, x, variables=variables)[0],
        mode, params, variables, network.example,
    )  # fmt: skip
    how = "pass them through networks.modulate(y, mode.get({!r}, {{}}))"
    unread = [path for path, own in read.items() if not all(own[name] for name in kind.names)]
    if unread:
        raise UserError(
            f"bd.modulation: the network is a function that does not read all of "
            f"{', '.join(kind.names)} of {', '.join(unread)}; {how.format(unread[0])} and multiply "
            "the inputs by a key"
        )
    missing = [path for path, own in read.items() if not own.get("measure", True)]
    if missing:
        raise UserError(
            f"bd.step: the network is a function that does not show the size of the outputs of "
            f"{', '.join(missing)}; {how.format(missing[0])}, or choose step='absolute'"
        )


def _factored(
    hidden_dim: int,
    layers: str,
    learning_rate: float | None,
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation],
    modulation: str,
    measure: bool = False,
) -> Method:
    def fresh(key: Any, chosen: Mapping[str, Layer]) -> Factors:
        return init_factors(key, chosen, hidden_dim, measure, modulation)

    def of(factors: Factors) -> Any:
        return product(factors, modulation)

    hooks = modulated(layers, modulation, fresh, of, measure)
    return Method(**hooks, optimizer=optimizer, learning_rate=learning_rate)


@register("bd", paper="Wen et al. 2020, arXiv 2009.13954")
def bd(
    epsilon: Epsilon = 0.2,
    hidden_dim: HiddenDim = 100,
    layers: LayerPattern = ".*",
    learning_rate: Rate = None,
    step: Step = "relative",
    modulation: Kind = "bias",
) -> Method:
    """BD; see the top of this file for the formula and the two steps."""
    return _factored(
        hidden_dim, layers, learning_rate,
        lambda tx: optim.beneficial_perturbation(tx, epsilon, step=step),
        modulation, step == "relative",
    )  # fmt: skip


@register("gd", group="bd", paper="Wen et al. 2020, arXiv 2009.13954")
def gd(
    hidden_dim: HiddenDim = 100,
    layers: LayerPattern = ".*",
    learning_rate: Rate = None,
    modulation: Kind = "bias",
) -> Method:
    """GD: M follows its gradient. This is the paper's control for BD."""
    return _factored(hidden_dim, layers, learning_rate, lambda tx: tx, modulation)


@register("gd_matched", group="bd", paper="control")
def gd_matched(
    epsilon: Epsilon = 0.2,
    hidden_dim: HiddenDim = 100,
    layers: LayerPattern = ".*",
    learning_rate: Rate = None,
    step: Step = "relative",
    modulation: Kind = "bias",
) -> Method:
    """BD with steps along the gradient that have the length of BD's steps."""
    return _factored(
        hidden_dim, layers, learning_rate,
        lambda tx: optim.beneficial_perturbation(tx, epsilon, step=step, direction="gradient"),
        modulation, step == "relative",
    )  # fmt: skip
