r"""EWC with Kronecker factors: protects the input directions that a layer was used on.

.. math:: L_t(\theta) + \frac{\lambda}{2} \sum_l \mathrm{tr}(\Delta_l^T A_l \Delta_l G_l),\quad
          A_l = \sum_{k<t} A_{k,l},\ G_l = \frac{1}{t} \sum_{k<t} G_{k,l},\ \
          \Delta_l = \theta_l - \theta^*_l

with tasks counted from 0. Inputs of earlier tasks are directions across many weights. A diagonal
Fisher allows a change of weights that do not matter one by one, even where they matter together.
The state is a pair of matrices per layer, however many tasks there are. The sum of products is
approximated by the product of sums, which is exact for one task.

The anchor acts by a proximal step after every ``every`` updates of the optimizer within a task, and
once more at the end of the task for the remaining ones, with a correspondingly longer step. So it
costs a fraction of a training step, and no strength diverges. The optimizer sees the task's
gradient only. With momentum 0.9 its steps are ten times as long, so a strength has a tenth of the
effect that it has with plain SGD.

The shared parameters must belong to Dense layers that are called once.

Source: Ritter, Botev and Barber 2018 (arXiv 1805.07810), "online structured Laplace", with the
parameters after the last task as anchor. Variant: empirical Fisher, proximal step.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from bpnjax.importance import kronecker, per_example
from bpnjax.methods.base import Batch, Context, Method, Setup, TaskData
from bpnjax.methods.settings import Range, Setting, register
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError


class KfacState(NamedTuple):
    """The state of EWC with Kronecker factors, of the same size for any number of tasks."""

    total: dict[str, kronecker.Factors]  # sums over tasks, one per layer
    basis: dict[str, kronecker.Basis]
    anchor: Any  # like the shared parameters
    tasks: jax.Array  # int32 scalar, number of tasks in the sums
    strength: jax.Array  # lambda, shape=(); an array so that sweeps can vmap over it


def joined(layer: Any) -> jax.Array:
    """A layer's kernel with its bias as the last row (zeros if it has no bias).

    Args:
      layer: ``{"kernel": [d, k], "bias": [k]}``, the bias optional.

    Returns:
      ``[d + 1, k]``, in the kernel's dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.ewc_kfac import joined
      >>> joined({"kernel": jnp.ones((1, 2)), "bias": jnp.array([2.0, 3.0])}).tolist()
      [[1.0, 1.0], [2.0, 3.0]]
    """
    kernel = layer["kernel"]
    bias = layer.get("bias", jnp.zeros(kernel.shape[1], kernel.dtype))
    return jnp.concatenate([kernel, bias[None]])


def _layers(tree: Any, paths: Any) -> dict[str, dict[str, jax.Array]]:
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {
        path: {
            leaf: flat[_join(path, leaf)]
            for leaf in ("kernel", "bias")
            if _join(path, leaf) in flat
        }
        for path in paths
    }


def _join(path: str, leaf: str) -> str:
    return f"{path}/{leaf}" if path else leaf


def _check(setup: Setup) -> None:
    """Raises an error for shared parameters outside of Dense layers that are called once."""
    covered = {}
    if setup.network.tapped is not None:
        covered = per_example.one_pass_layers(setup.network.layers)
    shapes, _ = jax.eval_shape(setup.network.init, prng.key(0))
    for name in traverse_util.flatten_dict(shapes, sep="/"):
        path, _, leaf = name.rpartition("/")
        if path not in covered or leaf not in ("kernel", "bias"):
            raise UserError(
                f"method: the Kronecker factors of {name} are not known, only those of Dense "
                "layers called once; use ewc, or a network of such layers"
            )


@register("ewc_kfac", paper="Ritter et al. 2018, arXiv 1805.07810")
def ewc_kfac(
    strength: Annotated[
        float,
        Setting(
            "lambda of the penalty lambda/2 tr(D^T A D G) with D = theta - anchor",
            at_least=0,
            search=(Range(0.1, 1e5),),
        ),
    ] = 10.0,
    examples: Annotated[
        int, Setting("number of examples per task for the factors, drawn once; 0: all", at_least=0)
    ] = 5000,
    every: Annotated[int, Setting("optimizer updates per pull towards the anchor", at_least=1)] = 4,
) -> Method:
    r"""EWC with Kronecker factors; see the top of this file for the formula.

    Every so many steps the anchor takes its proximal step,

    .. math:: \theta_l \leftarrow \arg\min_z \frac{1}{2 n \eta} |z - \theta_l|^2 +
              \frac{\lambda}{2} \mathrm{tr}(\Delta_l^T A_l \Delta_l G_l),
              \quad \Delta_l = z - \theta^*_l

    for each layer l, with n the number of steps since the last one and :math:`\eta` the learning
    rate of the layer. `bpnjax.importance.kronecker.pull_back` solves it.
    """

    def init(key: Any, params: Any, setup: Setup) -> KfacState:
        del key
        total = kronecker.empty_factors(setup.network.layers)
        basis = {}
        for path, (inputs, outputs) in total.items():
            d, k = len(inputs), len(outputs)
            # Zero curvature does not pull.
            basis[path] = kronecker.Basis(
                jnp.eye(d, dtype=jnp.float32),
                jnp.eye(k, dtype=jnp.float32),
                jnp.zeros((d, k), jnp.float32),
            )
        return KfacState(total, basis, params, jnp.int32(0), jnp.float32(strength))

    def pulled(params: Any, state: KfacState, steps: Any, step_size: Any) -> Any:
        flat = traverse_util.flatten_dict(params, sep="/")
        sizes = traverse_util.flatten_dict(step_size, sep="/")
        anchors = _layers(state.anchor, state.basis)
        for path, layer in _layers(params, state.basis).items():
            near = kronecker.pull_back(
                joined(layer),
                joined(anchors[path]),
                state.basis[path],
                steps * sizes[_join(path, "kernel")] * state.strength,
            )
            for leaf, value in (("kernel", near[:-1]), ("bias", near[-1])):
                if leaf in layer:
                    flat[_join(path, leaf)] = value.astype(layer[leaf].dtype)
        return traverse_util.unflatten_dict(flat, sep="/")

    def end_step(
        old: Any, new: Any, grads: Any, state: KfacState, batch: Batch, ctx: Context
    ) -> tuple[Any, KfacState]:
        del old, grads, batch
        due = (ctx.step % every == every - 1) & (ctx.current > 0)
        # This is a branch where vmap over seeds batches neither step nor task (the command's
        # epochs). As a select, every step would pay for the pull.
        new = jax.lax.cond(due, lambda p: pulled(p, state, every, ctx.step_size), lambda p: p, new)
        return new, state

    def end_task(
        params: Any, task_params: Any, state: KfacState, data: TaskData, ctx: Context
    ) -> tuple[Any, KfacState]:
        del task_params
        # The steps since the last pull; none in the first task, whose curvature is zero.
        params = pulled(params, state, ctx.step % every, ctx.step_size)
        new = data.factors(examples, params)
        total = jax.tree.map(jnp.add, state.total, new)
        tasks = state.tasks + 1
        basis = {path: kronecker.diagonalise(both, 1.0 / tasks) for path, both in total.items()}
        return params, state._replace(total=total, basis=basis, anchor=params, tasks=tasks)

    return Method(check=_check, init=init, end_step=end_step, end_task=end_task)
