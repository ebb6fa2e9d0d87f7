"""Controls for BPN: how much comes from the direction, the step size, and knowing the task?

.. math:: y = W x + b + bias_t

- `plain_bias`: one plain bias per task and layer, zero at first, trained by its gradient or by
  the relative step of BD on the bias itself (``step="relative"``). ``bd.modulation`` replaces the
  bias by other vectors.
- `random_bias`: one random bias per task and layer, never trained, uniform among the vectors of
  length ``norm``.
- `output_mask`: a method without modes that is told the task when it answers, by a mask on its
  outputs.

`bpnjax.methods.gd_matched` is GD with steps as long as those of BD. ``bd.layers`` chooses the
layers.

Source: ours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from bpnjax import modes, optim
from bpnjax.methods.base import Context, Method, Setup
from bpnjax.methods.bd import Kind, in_units_of, modulated
from bpnjax.methods.psp import checks_layers, from_bank
from bpnjax.methods.settings import Range, Setting, register
from bpnjax.networks import Layer, matching
from bpnjax.utils.errors import UserError
from bpnjax.utils.heads import FAR_BELOW

PLAIN_STEPS = ("optimizer", "relative")
ChosenLayers = Annotated[
    str,
    Setting(
        "layers with a bias per task, as a pattern for their paths", pattern=True,
        field="bd.layers",
    ),
]  # fmt: skip


@register("plain_bias", paper="control")
def plain_bias(
    learning_rate: Annotated[
        float | None,
        Setting(
            "learning rate of the task biases; None: train.learning_rate",
            above=0,
            search=(Range(1e-3, 0.3, when=("plain_bias.step", "optimizer"), own_program=True),),
        ),
    ] = 1e-2,
    layers: ChosenLayers = ".*",
    step: Annotated[
        str,
        Setting(
            "training of the task biases: by the optimizer, or by the relative step of BD",
            choices=PLAIN_STEPS,
        ),
    ] = "optimizer",
    epsilon: Annotated[
        float,
        Setting(
            "size of the relative step, as bd.epsilon",
            above=0,
            search=(Range(0.02, 2.0, when=("plain_bias.step", "relative")),),
        ),
    ] = 0.2,
    modulation: Kind = "bias",
) -> Method:
    """A bias per task and layer that follows its gradient or takes the relative step of BD."""
    relative, kind = step == "relative", modes.MODULATIONS[modulation]

    def fresh(key: Any, chosen: Mapping[str, Layer]) -> Any:
        del key
        measure = {"measure": jnp.zeros(2, jnp.float32)} if relative else {}
        return {
            path: {
                name: {"change": jnp.zeros(shape, jnp.float32), **measure}
                for name, shape in own.items()
            }
            for path, own in kind.shapes(chosen).items()
        }

    def of(task_params: Any) -> Any:
        changes = {
            path: {name: in_units_of(name, own["change"], own) for name, own in vectors.items()}
            for path, vectors in task_params.items()
        }
        return kind.values(changes)

    hooks = modulated(layers, modulation, fresh, of, relative)
    method = Method(**hooks, learning_rate=learning_rate)
    if not relative:
        return method
    return dataclasses.replace(
        method, optimizer=lambda tx: optim.relative_step(epsilon), learning_rate=None
    )


@register("random_bias", paper="control")
def random_bias(
    norm: Annotated[
        float, Setting("length of each layer's bias vector", at_least=0, search=(Range(0.2, 20.0),))
    ] = 2.4,
    layers: ChosenLayers = ".*",
) -> Method:
    """A random bias per task and layer; its state is the bank of all of them."""

    def init(key: Any, params: Any, setup: Setup) -> Any:
        del params
        chosen = matching(setup.network.layers, layers)
        bank = {}
        for own, (path, layer) in zip(
            jax.random.split(key, len(chosen)), chosen.items(), strict=True
        ):
            draws = jax.random.normal(own, (setup.num_tasks, layer.outputs), jnp.float32)
            length = jnp.linalg.norm(draws, axis=1, keepdims=True)
            bank[path] = {"bias": norm * draws / length}
        return bank

    return Method(told_task=True, check=checks_layers("bd", layers), init=init, forward=from_bank)


def output_mask(method: Method) -> Method:
    r"""Tells a method without modes the task when it answers, by a mask on its outputs.

    .. math:: z'_c = z_c - 10^9 \, [c \notin C_t]

    with :math:`C_t` the classes of the task. Training, and the measures that a method takes at the
    end of a task, use the outputs without the mask.

    Args:
      method: a method without modes. Its training does not change.

    Returns:
      A `Method` whose told accuracy is the masked accuracy of ``method``.

    Raises:
      UserError: the method is told the task already.

    Example:
      >>> from bpnjax import methods
      >>> from bpnjax.methods.controls import output_mask
      >>> output_mask(methods.ewc()).told_task
      True

    Source: ours; a fair comparison for the task biases of BPN, since both are told the task.
    """
    if method.told_task:
        raise UserError(f"output_mask: {method.name} is told the task already; leave the mask out")

    def check(setup: Setup) -> None:
        method.check(setup)
        setup.known_classes("a mask on the outputs")
        checks_layers("output_mask", ".*")(setup)

    def forward(params: Any, task_params: Any, state: Any, ctx: Context) -> tuple[Any, Any]:
        params, mode = method.forward(params, task_params, state, ctx)
        if not ctx.answering:  # training, or a hook that asks for a Fisher or for outputs to store
            return params, mode
        *_, output = ctx.setup.network.layers
        classes = jnp.asarray(ctx.setup.known_classes("a mask on the outputs"))[ctx.task]
        return params, {output: {"bias": jnp.where(classes, 0.0, FAR_BELOW)}}

    return dataclasses.replace(
        method, name=f"{method.name}_masked", told_task=True, check=check, forward=forward
    )
