r"""EBLL, encoder based lifelong learning: LwF, and what earlier tasks need of the features stays.

After task k an autoencoder is fitted to the features x of its examples, which are the input of
one layer (`ebll.layer`, by default the last), with the rest of the network frozen:

.. math:: \min \; \alpha_r |x - \hat x|^2 + L_k(\hat x), \quad
          code_k(x) = \mathrm{sigmoid}(A_k^T x + a_k), \quad \hat x = D^T code_k(x) + d

and its encoder is kept. Later tasks t add to LwF's loss

.. math:: \frac{\alpha}{2} \sum_{k<t} |code_k(x) - code_k(x_{old})|^2

averaged over the batch, with the features before the task as :math:`x_{old}`. LwF's fields apply.

Source: Rannen Triki et al. 2017 (arXiv 1704.01920), Eq. 6-9. Variant: both squares are summed over
elements and averaged over examples (the authors' code sums the latter over the batch); the
autoencoder is fitted with Adam (AdaDelta there).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bpnjax.methods import lwf, replay
from bpnjax.methods.base import Ended, Method
from bpnjax.utils.errors import UserError


class Encoder(NamedTuple):
    """The half of an autoencoder that is kept: ``code(x) = sigmoid(A^T x + a)``."""

    kernel: jax.Array  # A, f32 [(T,) features, code]
    bias: jax.Array  # a, f32 [(T,) code]


class EbllState(NamedTuple):
    """What EBLL keeps: LwF's state and an encoder a task."""

    lwf: lwf.LwfState
    encoders: Encoder  # of all tasks
    strength: jax.Array  # alpha, shape=()


def encoded_layer(spec) -> str:
    """The path of the layer whose input is encoded: `ebll.layer`, or the network's last.

    Args:
      spec: of the run.

    Returns:
      A path; `check` makes sure that it is a layer of the network.
    """
    *_, last = spec.layers
    return spec.config.ebll.layer or last


def check(spec):
    """The hook `check` of `Method`.

    Args:
      spec: of the run.

    Raises:
      UserError: `ebll.layer` is no layer of the network, or none whose input is a vector.
    """
    layer = encoded_layer(spec)
    if layer not in spec.layers:
        raise UserError(
            f"ebll.layer: {layer!r} is no layer of this network; it has {', '.join(spec.layers)}"
        )
    if spec.layers[layer].kind != "dense" or spec.layers[layer].rank != 2:
        raise UserError(
            f"ebll.layer: {layer!r} has no vector of features as its input; name a Dense layer"
        )


def init(key, core, spec):
    """The hook `init` of `Method`: LwF's state and zero encoders, the leading axis T."""
    tasks, code = spec.num_tasks, spec.config.ebll.code
    features = spec.layers[encoded_layer(spec)].inputs
    return EbllState(
        lwf.init(key, core, spec),
        Encoder(jnp.zeros((tasks, features, code)), jnp.zeros((tasks, code))),
        jnp.float32(spec.config.ebll.strength),
    )


def encode(encoder: Encoder, features) -> jax.Array:
    r"""The code of features.

    .. math:: code(x) = \mathrm{sigmoid}(A^T x + a)

    Args:
      encoder: of one task, kernel f32 ``[features, code]``, bias f32 ``[code]``.
      features: f32 ``[n, features]``.

    Returns:
      f32 ``[n, code]``, in (0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods import ebll
      >>> encoder = ebll.Encoder(jnp.ones((2, 1)), jnp.zeros(1))
      >>> ebll.encode(encoder, jnp.array([[1.0, -1.0]])).tolist()
      [[0.5]]

    Source: Rannen Triki et al. 2017 (arXiv 1704.01920), Sec. 3.2.
    """
    return jax.nn.sigmoid(features @ encoder.kernel + encoder.bias)


def code_loss(encoder: Encoder, features, old, weight) -> jax.Array:
    r"""Half the squared distance between codes, averaged over examples.

    .. math:: \frac{1}{2 \sum_b w_b} \sum_b w_b |code(x_b) - code(x_{old, b})|^2

    Args:
      encoder: of one task.
      features: f32 ``[n, features]``.
      old: f32 ``[n, features]``, those before the task.
      weight: f32 ``[n]``, 0 for padding; not all 0.

    Returns:
      f32 scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods import ebll
      >>> encoder = ebll.Encoder(jnp.array([[1.0]]), jnp.zeros(1))
      >>> x, old = jnp.array([[0.0], [9.0]]), jnp.array([[100.0], [0.0]])
      >>> float(ebll.code_loss(encoder, x, old, jnp.array([1.0, 0.0])))  # the codes are 0.5 and 1
      0.125

    Source: Rannen Triki et al. 2017 (arXiv 1704.01920), Eq. 8. Variant: summed over the code and
    averaged over examples; where others average over the code too, their strength is as many times
    ours as the code has elements.
    """
    squares = jnp.square(encode(encoder, features) - encode(encoder, old)).sum(-1)
    return 0.5 * jnp.sum(weight * squares) / jnp.sum(weight)


def gradient(grads, core, state, step):
    """The hook `gradient` of `Method`: LwF's, and that of every earlier task's `code_loss`."""
    layer = encoded_layer(step.spec)

    def features_of(core):
        return step.examples.features(core, step.slots, (layer,))[layer]

    old = features_of(state.lwf.teacher)
    features, backward = jax.vjp(features_of, core)

    # The sum over earlier tasks is taken of gradients for the features, so that its length can
    # be traced and the network is differentiated once.
    def add(k, total):
        encoder = jax.tree.map(lambda leaf: leaf[k], state.encoders)
        return total + jax.grad(code_loss, argnums=1)(encoder, features, old, step.weight)

    total = jax.lax.fori_loop(0, step.task, add, jnp.zeros_like(features))
    grads = lwf.add_distillation(grads, core, state.lwf, step)
    grads = replay.add(grads, backward(total)[0], state.strength)
    return lwf.warm_up(grads, state.lwf, step)


def fit(core, ended: Ended, layer: str, features: int, options, batch: int) -> Encoder:
    """Fits an autoencoder to the features of a task that ended; the formula is above.

    Args:
      core: the shared parameters, which stay as they are.
      ended: the task.
      layer: the layer whose input is encoded.
      features: its width.
      options: the configuration's group `ebll`.
      batch: examples a step; every epoch takes them in the same order.

    Returns:
      Its encoder, kernel f32 ``[features, code]`` and bias f32 ``[code]``; the decoder is dropped.

    Source: Rannen Triki et al. 2017 (arXiv 1704.01920), Sec. 3.2. Variant: Adam, Glorot-uniform
    kernels.
    """
    first, second = jax.random.split(ended.key)
    draw = jax.nn.initializers.glorot_uniform()
    autoencoder = (
        Encoder(draw(first, (features, options.code)), jnp.zeros(options.code)),
        Encoder(draw(second, (options.code, features)), jnp.zeros(features)),
    )
    optimizer = optax.adam(options.learning_rate)
    steps = -(-ended.count // batch)

    def loss(autoencoder, slots, weight):
        encoder, decoder = autoencoder
        x = ended.examples.features(core, slots, (layer,))[layer]
        again = encode(encoder, x) @ decoder.kernel + decoder.bias
        distance = jnp.square(x - again).sum(-1)
        losses = ended.examples.losses_from(core, slots, layer, again)
        return jnp.sum(weight * (options.reconstruction * distance + losses)) / jnp.sum(weight)

    def step(i, carry):
        autoencoder, state = carry
        place = (i % steps) * batch + jnp.arange(batch)
        slots = ended.slots[jnp.minimum(place, ended.slots.shape[0] - 1)]
        weight = (place < ended.count).astype(jnp.float32)
        updates, state = optimizer.update(jax.grad(loss)(autoencoder, slots, weight), state)
        return optax.apply_updates(autoencoder, updates), state

    start = (autoencoder, optimizer.init(autoencoder))
    (encoder, _), _ = jax.lax.fori_loop(0, options.epochs * steps, step, start)
    return encoder


def consolidate(core, state, task, ended, spec):
    """The hook `consolidate` of `Method`: moves LwF's teacher, keeps the encoder of `fit`."""
    layer, config = encoded_layer(spec), spec.config
    width = spec.layers[layer].inputs
    encoder = fit(core, ended, layer, width, config.ebll, config.train.batch_size)
    return state._replace(
        lwf=lwf.LWF.consolidate(core, state.lwf, task, ended, spec),
        encoders=jax.tree.map(lambda kept, e: kept.at[task].set(e), state.encoders, encoder),
    )


EBLL = Method(
    name="ebll",
    paper="Rannen Triki et al. 2017, arXiv 1704.01920",
    check=check,
    init=init,
    gradient=gradient,
    consolidate=consolidate,
)
