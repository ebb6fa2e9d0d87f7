"""Controls for an honest reading of BPN: what is due to the direction, the step, the oracle?

.. math:: y = W x + b + bias_t

- `PLAIN_BIAS`: one plain bias per task and layer, zero at first, trained by its gradient at the
  rate `plain_bias.learning_rate`.
- `RANDOM_BIAS`: one random bias per task and layer, never trained, uniform among the vectors of
  the norm `random_bias.norm`.
- `output_mask`: a method without modes, told the task when it answers, by a mask on its outputs.

GD with the step of BD in length is `bpnjax.methods.bd.GD_MATCHED`. Layers are those of `bd.layers`.

Source: ours.
"""

import jax
import jax.numpy as jnp

from bpnjax.methods import bd
from bpnjax.methods.base import Method
from bpnjax.networks import linen
from bpnjax.utils.heads import FAR_BELOW

GROUP = "plain_bias"


def _fresh(key, spec):
    del key
    layers = linen.matching(spec.layers, spec.config.bd.layers)
    return {GROUP: {path: {"bias": jnp.zeros(layer.outputs)} for path, layer in layers.items()}}


def _store(core, learned, state, task):
    del core
    return bd.freeze(state, learned[GROUP], task)


PLAIN_BIAS = Method(
    name="plain_bias",
    paper="control",
    told_task=True,
    layer_fields=("bd",),
    init=bd.init,
    fresh=_fresh,
    rules=lambda config, optimizer: ((f"^{GROUP}/", optimizer(config.plain_bias.learning_rate)),),
    mode=linen.select,
    train_mode=lambda learned, mode: linen.merge(mode, learned[GROUP]),
    store=_store,
    stored=lambda state: {"bank": state},
)


def _random_bank(key, core, spec):
    del core
    layers = linen.matching(spec.layers, spec.config.bd.layers)
    bank = {}
    for layer_key, (path, layer) in zip(
        jax.random.split(key, len(layers)), layers.items(), strict=True
    ):
        draws = jax.random.normal(layer_key, (spec.num_tasks, layer.outputs))
        length = jnp.linalg.norm(draws, axis=1, keepdims=True)
        bank[path] = {"bias": spec.config.random_bias.norm * draws / length}
    return bank


RANDOM_BIAS = Method(
    name="random_bias",
    paper="control",
    told_task=True,
    layer_fields=("bd",),
    init=_random_bank,
    mode=linen.select,
    stored=lambda state: {"bank": state},
)


def output_mask(name: str, method: Method) -> Method:
    r"""Gives a method without modes the task's identity, as a mask on its outputs, in tests only.

    .. math:: z'_c = z_c - 10^9 \, [c \notin C_t]

    with :math:`C_t` the classes of the task; training sees the outputs as they are.

    Args:
      name: of the new method.
      method: trained as it is. Its hooks `store`, `train_core`, `for_eval` and `examples_kept` must
        be the defaults of `Method`: they are not wrapped and would be given the mask as well.

    Returns:
      A `Method` whose told accuracy is the masked accuracy of ``method``.

    Example:
      >>> from bpnjax.methods import controls, ewc
      >>> method = controls.output_mask("ewc_masked", ewc.EWC)
      >>> method.name, method.told_task, method.masks_outputs
      ('ewc_masked', True, True)

    Source: ours; what BPN's task biases are to be compared with, since both are told the task.
    """

    def init(key, core, spec):
        *_, output = spec.layers
        mask = jnp.where(jnp.asarray(spec.classes), 0.0, FAR_BELOW)
        return {output: {"bias": mask}}, method.init(key, core, spec)

    def after_step(state, old, new, grads, step):
        return state[0], method.after_step(state[1], old, new, grads, step)

    def consolidate(core, state, task, ended, spec):
        return state[0], method.consolidate(core, state[1], task, ended, spec)

    return method._replace(
        name=name,
        paper="control",
        told_task=True,
        masks_outputs=True,
        init=init,
        gradient=lambda grads, core, state, step: method.gradient(grads, core, state[1], step),
        after_update=lambda core, state, step: method.after_update(core, state[1], step),
        after_step=after_step,
        consolidate=consolidate,
        mode=lambda state, task: linen.select(state[0], task),
        train_mode=lambda learned, mode: {},
        renumber=lambda state, slots: (state[0], method.renumber(state[1], slots)),
        stored=lambda state: {},  # which classes a task has is part of the question
    )
