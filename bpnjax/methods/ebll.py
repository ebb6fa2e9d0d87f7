r"""EBLL, encoder based lifelong learning: LwF that also keeps features that earlier tasks need.

After task k an autoencoder is fitted to the features x of its examples, with the rest of the
network frozen. The features are the input of one layer (``layer``, by default the last):

.. math:: \min \; \alpha_r |x - \hat x|^2 + L_k(\hat x), \quad
          code_k(x) = \mathrm{sigmoid}(A_k^T x + a_k), \quad \hat x = D^T code_k(x) + d

Its encoder is stored. Each later task t adds to LwF's loss

.. math:: \frac{\alpha}{2} \sum_{k<t} |code_k(x) - code_k(x_{old})|^2

averaged over the batch, where :math:`x_{old}` are the features before the task. The settings of LwF
apply too.

Source: Rannen Triki et al. 2017 (arXiv 1704.01920), Eq. 6-9. Variant: both squares are summed over
elements and averaged over examples, where the authors' code sums the latter over the batch. The
autoencoder is fitted with Adam instead of AdaDelta.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bpnjax.methods import replay
from bpnjax.methods.base import Batch, Context, Method, Setup, TaskData
from bpnjax.methods.lwf import Heads, LwfState, Strength, Temperature, WarmUp, distil
from bpnjax.methods.settings import Range, Setting, register
from bpnjax.utils.errors import UserError


class Encoder(NamedTuple):
    """The stored half of an autoencoder: ``code(x) = sigmoid(A^T x + a)``."""

    kernel: jax.Array  # A, f32 [(T,) features, code]
    bias: jax.Array  # a, f32 [(T,) code]


class EbllState(NamedTuple):
    """The state of EBLL: that of LwF and an encoder per task."""

    lwf: LwfState
    encoders: Encoder  # of all tasks
    strength: jax.Array  # alpha, shape=()


def encode(encoder: Encoder, features: Any) -> jax.Array:
    r"""The code that an encoder gives for features.

    .. math:: code(x) = \mathrm{sigmoid}(A^T x + a)

    Args:
      encoder: of one task, with kernel f32 ``[features, code]`` and bias f32 ``[code]``.
      features: f32 ``[n, features]``.

    Returns:
      f32 ``[n, code]``, in (0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.ebll import Encoder, encode
      >>> encoder = Encoder(jnp.ones((2, 1)), jnp.zeros(1))
      >>> encode(encoder, jnp.array([[1.0, -1.0]])).tolist()
      [[0.5]]

    Source: Rannen Triki et al. 2017 (arXiv 1704.01920), Sec. 3.2.
    """
    return jax.nn.sigmoid(features @ encoder.kernel + encoder.bias)


def code_loss(encoder: Encoder, features: Any, old: Any, weight: Any) -> jax.Array:
    r"""Half the squared distance between codes, averaged over examples.

    .. math:: \frac{1}{2 \sum_b w_b} \sum_b w_b |code(x_b) - code(x_{old, b})|^2

    Args:
      encoder: of one task.
      features: f32 ``[n, features]``.
      old: f32 ``[n, features]``, the features before the task.
      weight: f32 ``[n]``, 0 for padding; not all 0.

    Returns:
      f32 scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.ebll import Encoder, code_loss
      >>> encoder = Encoder(jnp.array([[1.0]]), jnp.zeros(1))
      >>> x, old = jnp.array([[0.0], [9.0]]), jnp.array([[100.0], [0.0]])
      >>> float(code_loss(encoder, x, old, jnp.array([1.0, 0.0])))  # the codes are 0.5 and 1
      0.125

    Source: Rannen Triki et al. 2017 (arXiv 1704.01920), Eq. 8. Variant: summed over the code and
    averaged over examples. Codes that average over the code need a strength larger by its length.
    """
    squares = jnp.square(encode(encoder, features) - encode(encoder, old)).sum(-1)
    return 0.5 * jnp.sum(weight * squares) / jnp.sum(weight)


def fit(params: Any, data: TaskData, ctx: Context, layer: str, options: "Autoencoder") -> Encoder:
    """Fits an autoencoder to the features of a task that ended; see the top of this file.

    Args:
      params: the shared parameters. They do not change.
      data: of the task.
      ctx: of the task's end.
      layer: the layer whose input is encoded.
      options: of the autoencoder. Every epoch takes the examples in the same order.

    Returns:
      The encoder, with kernel f32 ``[features, code]`` and bias f32 ``[code]``. The decoder is
      dropped.

    Source: Rannen Triki et al. 2017 (arXiv 1704.01920), Sec. 3.2. Variant: Adam, Glorot-uniform
    kernels.
    """
    features = ctx.setup.network.layers[layer].inputs
    first, second = jax.random.split(ctx.key)
    draw = jax.nn.initializers.glorot_uniform()
    autoencoder = (
        Encoder(draw(first, (features, options.code)), jnp.zeros(options.code, jnp.float32)),
        Encoder(draw(second, (options.code, features)), jnp.zeros(features, jnp.float32)),
    )
    optimizer = optax.adam(options.learning_rate)
    steps = -(-data.count // options.batch_size)

    def loss(autoencoder: Any, x: Any, y: Any, weight: Any) -> jax.Array:
        encoder, decoder = autoencoder
        found = ctx.features(params, x, ctx.current, (layer,))[layer]
        again = encode(encoder, found) @ decoder.kernel + decoder.bias
        distance = jnp.square(found - again).sum(-1)
        losses = ctx.losses_from(params, x, y, ctx.current, layer, again)
        return jnp.sum(weight * (options.reconstruction * distance + losses)) / jnp.sum(weight)

    def step(i: Any, carry: Any) -> Any:
        autoencoder, state = carry
        place = (i % steps) * options.batch_size + jnp.arange(options.batch_size)
        x, y = data.take(jnp.minimum(place, data.size - 1))
        weight = (place < data.count).astype(jnp.float32)
        updates, state = optimizer.update(jax.grad(loss)(autoencoder, x, y, weight), state)
        return optax.apply_updates(autoencoder, updates), state

    start = (autoencoder, optimizer.init(autoencoder))
    (encoder, _), _ = jax.lax.fori_loop(0, options.epochs * steps, step, start)
    return encoder


class Autoencoder(NamedTuple):
    """The settings of an autoencoder's training."""

    code: int
    reconstruction: float
    epochs: int
    learning_rate: float
    batch_size: int


@register("ebll", paper="Rannen Triki et al. 2017, arXiv 1704.01920")
def ebll(
    layer: Annotated[
        str, Setting("path of the layer whose input is encoded; '' is the last layer")
    ] = "",
    code: Annotated[int, Setting("width of the codes", at_least=1)] = 100,
    strength: Annotated[
        float,
        Setting(
            "alpha of the penalty alpha/2 |difference of codes|^2",
            at_least=0,
            search=(Range(1e-3, 10.0),),
        ),
    ] = 0.1,
    reconstruction: Annotated[
        float,
        Setting("weight of |x - reconstruction|^2 in the autoencoder's loss", at_least=0),
    ] = 0.01,
    epochs: Annotated[int, Setting("epochs of an autoencoder", at_least=1)] = 10,
    learning_rate: Annotated[
        float, Setting("learning rate of an autoencoder (Adam)", above=0)
    ] = 1e-3,
    batch_size: Annotated[int, Setting("examples per step of an autoencoder", at_least=1)] = 128,
    distillation: Strength = 1.0,
    temperature: Temperature = 2.0,
    heads: Heads = "tasks",
    warmup_steps: WarmUp = 0,
) -> Method:
    """EBLL; see the top of this file for the formula."""
    hooks = distil("ebll", distillation, temperature, heads, warmup_steps)
    options = Autoencoder(code, reconstruction, epochs, learning_rate, batch_size)

    def encoded(setup: Setup) -> str:
        *_, last = setup.network.layers
        return layer or last

    def check(setup: Setup) -> None:
        hooks.check(setup)
        layers = setup.network.layers
        if not layers or setup.network.tapped is None:
            raise UserError(
                f"network: ebll encodes the input of a layer, and {setup.network.name} does not "
                "show any; build it with networks.from_linen or networks.from_nnx"
            )
        chosen = encoded(setup)
        if chosen not in layers:
            raise UserError(
                f"ebll.layer: {chosen!r} is not a layer of this network; it has {', '.join(layers)}"
            )
        if layers[chosen].kind != "dense" or layers[chosen].rank != 2:
            raise UserError(
                f"ebll.layer: {chosen!r} has no vector of features as its input; name a Dense layer"
            )

    def init(key: Any, params: Any, setup: Setup) -> EbllState:
        del key
        tasks, features = setup.num_tasks, setup.network.layers[encoded(setup)].inputs
        encoders = Encoder(
            jnp.zeros((tasks, features, code), jnp.float32), jnp.zeros((tasks, code), jnp.float32)
        )
        return EbllState(hooks.start(params), encoders, jnp.float32(strength))

    def gradient(grads: Any, params: Any, state: EbllState, batch: Batch, ctx: Context) -> Any:
        chosen = encoded(ctx.setup)

        def features_of(params: Any) -> jax.Array:
            return ctx.features(params, batch.x, ctx.current, (chosen,))[chosen]

        old = features_of(state.lwf.teacher)
        features, backward = jax.vjp(features_of, params)

        # Gradients for the features are summed over earlier tasks. So the number of tasks may be
        # traced, and the network is differentiated only once.
        def add(k: Any, total: jax.Array) -> jax.Array:
            encoder = jax.tree.map(lambda leaf: leaf[k], state.encoders)
            return total + jax.grad(code_loss, argnums=1)(encoder, features, old, batch.weight)

        total = jax.lax.fori_loop(0, ctx.current, add, jnp.zeros_like(features))
        grads = hooks.add(grads, params, state.lwf, batch, ctx)
        grads = replay.add(grads, backward(total)[0], state.strength)
        return hooks.warm_up(grads, ctx)

    def end_task(
        params: Any, task_params: Any, state: EbllState, data: TaskData, ctx: Context
    ) -> tuple[Any, EbllState]:
        del task_params
        encoder = fit(params, data, ctx, encoded(ctx.setup), options)
        return params, state._replace(
            lwf=state.lwf._replace(teacher=params),
            encoders=jax.tree.map(
                lambda kept, e: kept.at[ctx.current].set(e), state.encoders, encoder
            ),
        )

    return Method(check=check, init=init, gradient=gradient, end_task=end_task)
