r"""BD, the beneficial perturbation: a bias per task and layer, learned as a product of factors.

.. math:: y = W_{shared} x + b + M W, \quad M \in R^{1 \times H}, \quad W \in R^{H \times K}

While the task is learned, W follows its gradient and M takes steps against the sign of its
gradient. Afterwards the product is frozen in a bank ``[T, K]`` and the factors are dropped. M
starts at zero, so that the network starts as it was. W starts uniform in +-1/sqrt(H), because with
both at zero neither would ever move. ``step`` says how long the steps of M are:

- ``"relative"`` (default): epsilon / sqrt(1 + t) times the root mean square of the layer's outputs,
  with t the steps of the task so far (`bpnjax.optim.relative_step`). Epsilon has no unit, and one
  value serves all networks; docs/paper/step/step.md has the measurements.
- ``"absolute"``: epsilon, as in the paper (`bpnjax.optim.beneficial_sign`). It has to be found for
  each network.

`gd` is the same with M following its true gradient, the paper's control; `gd_matched` follows the
gradient's direction with steps of the length of BD's, epsilon * sqrt(H).

Source: Wen et al. 2020 (arXiv 2009.13954), Sec. V, Alg. 1 and 2. Variant: the relative step is
ours; the step of M is its whole update, no learning rate multiplies it (the paper does not say what
it is handed to); every
layer gets a bias, convolutions too, unless ``layers`` chooses (the paper: fully connected layers
only, the output layer among them); initial values are those of the lab's prototype of a later
paper.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from bpnjax import modes, optim
from bpnjax.methods.base import Context, Method, Setup, TaskData
from bpnjax.methods.psp import checks_layers
from bpnjax.methods.settings import Range, Setting, register
from bpnjax.networks import Layer, matching
from bpnjax.optim.beneficial import STEPS
from bpnjax.utils import arrays, prng
from bpnjax.utils.errors import UserError

Factors = dict[str, dict[str, jax.Array]]
Epsilon = Annotated[
    float,
    Setting(
        "step of M, against the sign of its gradient; see bd.step for its unit",
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
        "M's steps: relative to the size of the layer's outputs and falling within the task, or "
        "absolute (the paper's)",
        choices=STEPS,
    ),
]
HiddenDim = Annotated[int, Setting("H, the inner width of the product M W", at_least=1)]
LayerPattern = Annotated[
    str, Setting("which layers get a bias per task, a pattern for their path", pattern=True)
]
Rate = Annotated[
    float | None,
    Setting("of W (and of M under gd); None for train.learning_rate", above=0),
]


def empty_bank(layers: Mapping[str, Layer], num_tasks: int) -> dict[str, dict[str, jax.Array]]:
    """Makes a bank of zero biases. Until a task is frozen, its mode is the plain network.

    Args:
      layers: ``{path: Layer}`` as `bpnjax.networks.Network.layers`, or a part of it.
      num_tasks: T.

    Returns:
      ``{path: {"bias": f32 [T, K]}}``, K the outputs of a layer.

    Example:
      >>> from bpnjax.networks.layers import Layer
      >>> from bpnjax.methods.bd import empty_bank
      >>> layers = {"out": Layer("dense", 4, 3, 1, 2, (1, 3))}
      >>> empty_bank(layers, num_tasks=2)["out"]["bias"].shape
      (2, 3)
    """
    return {
        path: {"bias": jnp.zeros((num_tasks, layer.outputs), jnp.float32)}
        for path, layer in layers.items()
    }


def init_factors(
    key: Any, layers: Mapping[str, Layer], hidden_dim: int, measure: bool = False
) -> Factors:
    r"""Makes the factors of a new task: M zero, W uniform in +-1/sqrt(H).

    .. math:: M = 0, \quad W_{ij} \sim U(-1 / \sqrt{H}, 1 / \sqrt{H})

    Their product is zero, so the network starts as it was. A first step of epsilon on M moves the
    bias by about 0.46 epsilon sqrt(H) against the gradient, whatever the gradient's length, and by
    epsilon sqrt(K / 3) across it: H acts like a step size, and a small H leaves the direction to
    chance.

    Args:
      key: typed PRNG key.
      layers: ``{path: Layer}`` as `bpnjax.networks.Network.layers`.
      hidden_dim: H.
      measure: whether each layer gets a leaf ``measure``, f32 ``[2]``, for a relative step.

    Returns:
      ``{path: {"M": f32 [1, H], "W": f32 [H, K]}}``; ``bpnjax.optim.beneficial_perturbation`` is
      the transform that trains them, `product` the biases they stand for.

    Example:
      >>> import jax
      >>> from bpnjax.networks.layers import Layer
      >>> from bpnjax.methods.bd import init_factors, product
      >>> layers = {"out": Layer("dense", 4, 3, 1, 2, (1, 3))}
      >>> factors = init_factors(jax.random.key(0), layers, hidden_dim=16)
      >>> factors["out"]["M"].shape, factors["out"]["W"].shape
      ((1, 16), (16, 3))
      >>> product(factors)["out"]["bias"].tolist()
      [0.0, 0.0, 0.0]

    Source: Wen et al. 2020 (arXiv 2009.13954), Sec. V. Variant: the paper does not say how they
    start; these are the values of the lab's prototype of a later paper.
    """
    bound = hidden_dim**-0.5
    factors = {}
    for layer_key, (path, layer) in zip(
        jax.random.split(key, len(layers)), layers.items(), strict=True
    ):
        shape = (hidden_dim, layer.outputs)
        factors[path] = {
            "M": jnp.zeros((1, hidden_dim), jnp.float32),
            "W": jax.random.uniform(layer_key, shape, jnp.float32, -bound, bound),
            **({"measure": jnp.zeros(2, jnp.float32)} if measure else {}),
        }
    return factors


def product(factors: Factors) -> dict[str, dict[str, jax.Array]]:
    r"""The biases that are the product of the factors.

    .. math:: bias = M W

    Args:
      factors: ``{path: {"M": [1, H], "W": [H, K]}}`` as `init_factors` gives.

    Returns:
      A mode, ``{path: {"bias": [K]}}``, differentiable for the factors.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.bd import product
      >>> factors = {"out": {"M": jnp.array([[1.0, -1.0]]), "W": jnp.array([[3.0], [1.0]])}}
      >>> product(factors)["out"]["bias"].tolist()
      [2.0]

    Source: Wen et al. 2020 (arXiv 2009.13954), Sec. V.
    """
    # As a matrix product its gradient for W would be written out before W's optimizer reads it.
    return {path: {"bias": jnp.sum(f["M"].T * f["W"], 0)} for path, f in factors.items()}


def biases(
    layers: str, fresh: Callable[..., Any], of: Callable[[Any], Any], measure: bool = False
) -> dict[str, Any]:
    """The hooks of a method that learns a bias per task and layer and keeps it in a bank.

    Args:
      layers: a pattern for the paths of the layers.
      fresh: ``(key, layers) -> task_params``, ``{path: {...}}``.
      of: ``task_params -> {path: {"bias": [K]}}``, the biases they stand for.
      measure: whether the task parameters have a leaf ``measure`` for each layer.

    Returns:
      Arguments of `Method`; its state is the bank ``{path: {"bias": f32 [T, K]}}``.
    """

    def init(key: Any, params: Any, setup: Setup) -> Any:
        del key, params
        return empty_bank(matching(setup.network.layers, layers), setup.num_tasks)

    def begin_task(key: Any, params: Any, state: Any, ctx: Context) -> tuple[Any, Any, Any]:
        return params, state, fresh(key, matching(ctx.setup.network.layers, layers))

    def forward(params: Any, task_params: Any, state: Any, ctx: Context) -> tuple[Any, Any]:
        if ctx.training and jnp.ndim(ctx.task) == 0:
            measures = {
                path: {"measure": own["measure"]}
                for path, own in task_params.items()
                if "measure" in own
            }
            return params, modes.merge(of(task_params), measures)
        stored = modes.select(state, ctx.task)
        if ctx.current is None:
            return params, stored
        return params, ctx.stored_or_current(of(task_params), stored)

    def end_task(
        params: Any, task_params: Any, state: Any, data: TaskData, ctx: Context
    ) -> tuple[Any, Any]:
        del data
        return params, modes.store(state, of(task_params), ctx.current)

    def check(setup: Setup) -> None:
        checks_layers("bd", layers)(setup)
        if measure:
            _check_measured(setup, layers)

    return {
        "told_task": True,
        "check": check,
        "init": init,
        "begin_task": begin_task,
        "forward": forward,
        "end_task": end_task,
    }


def _check_measured(setup: Setup, pattern: str) -> None:
    """Refuses a plain function that does not let the outputs of its layers be measured."""
    network = setup.network
    chosen = matching(network.layers, pattern)
    if all(layer.kind != "function" for layer in chosen.values()):
        return
    setup.stored_example("a step relative to the outputs of layers (bd.step)")
    mode = {
        path: {"bias": jnp.zeros(layer.outputs, jnp.float32), "measure": jnp.zeros(2, jnp.float32)}
        for path, layer in chosen.items()
    }
    params, variables = jax.eval_shape(network.init, prng.key(0))
    read = arrays.used(
        lambda mode, params, variables, x: network.apply(params, mode, x, variables=variables)[0],
        mode, params, variables, network.example,
    )  # fmt: skip
    missing = [path for path, vectors in read.items() if not vectors["measure"]]
    if missing:
        raise UserError(
            f"bd.step: the network is a function that does not show the size of the outputs of "
            f"{', '.join(missing)}; add the bias with networks.add_bias(y, mode.get("
            f"{missing[0]!r}, {{}})), or choose step='absolute'"
        )


def _factored(
    hidden_dim: int,
    layers: str,
    learning_rate: float | None,
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation],
    measure: bool = False,
) -> Method:
    def fresh(key: Any, chosen: Mapping[str, Layer]) -> Factors:
        return init_factors(key, chosen, hidden_dim, measure)

    hooks = biases(layers, fresh, product, measure)
    return Method(**hooks, optimizer=optimizer, learning_rate=learning_rate)


@register("bd", paper="Wen et al. 2020, arXiv 2009.13954")
def bd(
    epsilon: Epsilon = 0.2,
    hidden_dim: HiddenDim = 100,
    layers: LayerPattern = ".*",
    learning_rate: Rate = None,
    step: Step = "relative",
) -> Method:
    """BD; see the top of this file for the formula and the two steps."""
    return _factored(
        hidden_dim, layers, learning_rate,
        lambda tx: optim.beneficial_perturbation(tx, epsilon, step=step), step == "relative",
    )  # fmt: skip


@register("gd", group="bd", paper="Wen et al. 2020, arXiv 2009.13954")
def gd(
    hidden_dim: HiddenDim = 100, layers: LayerPattern = ".*", learning_rate: Rate = None
) -> Method:
    """GD: M follows its gradient. This is the paper's control for BD."""
    return _factored(hidden_dim, layers, learning_rate, lambda tx: tx)


@register("gd_matched", group="bd", paper="control")
def gd_matched(
    epsilon: Epsilon = 0.2,
    hidden_dim: HiddenDim = 100,
    layers: LayerPattern = ".*",
    learning_rate: Rate = None,
    step: Step = "relative",
) -> Method:
    """BD with steps along the gradient that are as long as BD's."""
    return _factored(
        hidden_dim, layers, learning_rate,
        lambda tx: optim.beneficial_perturbation(tx, epsilon, step=step, direction="gradient"),
        step == "relative",
    )  # fmt: skip
