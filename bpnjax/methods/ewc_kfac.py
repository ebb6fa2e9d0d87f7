r"""EWC with Kronecker-factored Fishers: the anchor holds a layer in the directions it was used in.

.. math:: L_t(\theta) + \frac{\lambda}{2} \sum_l \mathrm{tr}(\Delta_l^T A_l \Delta_l G_l),\quad
          A_l = \sum_{k<t} A_{k,l},\ G_l = \frac{1}{t} \sum_{k<t} G_{k,l},\ \
          \Delta_l = \theta_l - \theta^*_l

with tasks counted from 0. A diagonal Fisher lets a task's gradient through wherever single weights
do not matter; inputs of earlier tasks are directions across many weights. What is kept is a pair of
matrices a layer, however many tasks there are, and nothing per task. Sums of products are taken for
the product of sums, which is exact for one task.

The anchor acts by its proximal step after every `ewc_kfac.every` updates of the optimizer, for as
many times the learning rate, so its cost is a fraction of a step's and no strength diverges. The
optimizer sees the task's gradient only: under momentum 0.9 its steps are ten times the rate, and
the strength counts a tenth of what it does under plain SGD.

For networks whose shared parameters are those of Dense layers called once.

Source: Ritter, Botev and Barber 2018 (arXiv 1805.07810), "online structured Laplace"; the anchor is
the parameters after the last task. Variant: empirical Fisher, proximal.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from bpnjax.importance import kronecker, per_example
from bpnjax.methods.base import Method
from bpnjax.utils.errors import UserError


class KfacState(NamedTuple):
    """What EWC with Kronecker factors keeps, however many tasks there were."""

    total: dict[str, kronecker.Factors]  # sums over tasks, a layer each
    basis: dict[str, kronecker.Basis]
    anchor: Any  # like the shared parameters
    tasks: jax.Array  # int32 scalar, how many are in the sums
    strength: jax.Array  # lambda, shape=(); an array so that sweeps can vmap over it


def check(spec):
    """The hook `check` of `Method`.

    Args:
      spec: of the run.

    Raises:
      UserError: the network has shared parameters that are not of Dense layers called once.
    """
    covered = per_example.one_pass_layers(spec.layers)
    shapes = jax.eval_shape(spec.init, jax.random.key(0))
    leaves = traverse_util.flatten_dict(shapes, sep="/")
    for name in leaves:
        path, leaf = name.rsplit("/", 1)
        if path not in covered or leaf not in ("kernel", "bias"):
            raise UserError(
                f"method: the Kronecker factors of {name} are not known, only those of Dense "
                "layers called once; use ewc, or a network of such layers"
            )


def joined(layer):
    """A layer's kernel with its bias as a last row (zeros where it has none).

    Args:
      layer: ``{"kernel": [d, k], "bias": [k]}``, the bias optional.

    Returns:
      ``[d + 1, k]``, in the kernel's dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods import ewc_kfac
      >>> ewc_kfac.joined({"kernel": jnp.ones((1, 2)), "bias": jnp.array([2.0, 3.0])}).tolist()
      [[1.0, 1.0], [2.0, 3.0]]
    """
    kernel = layer["kernel"]
    bias = layer.get("bias", jnp.zeros(kernel.shape[1], kernel.dtype))
    return jnp.concatenate([kernel, bias[None]])


def _layers(tree, paths):
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {
        path: {
            leaf: flat[f"{path}/{leaf}"] for leaf in ("kernel", "bias") if f"{path}/{leaf}" in flat
        }
        for path in paths
    }


def init(key, core, spec):
    """The hook `init` of `Method`: zero factors; bases of zero curvature, which pull nothing."""
    del key
    total = kronecker.empty_factors(spec.layers)
    basis = {}
    for path, (inputs, outputs) in total.items():
        d, k = len(inputs), len(outputs)
        basis[path] = kronecker.Basis(jnp.eye(d), jnp.eye(k), jnp.zeros((d, k)))
    strength = jnp.float32(spec.config.ewc_kfac.strength)
    return KfacState(total, basis, core, jnp.int32(0), strength)


def after_update(core, state, step):
    r"""The hook `after_update` of `Method`: every so many steps the proximal step of the anchor.

    .. math:: \theta_l \leftarrow \arg\min_z \frac{1}{2 n \eta} |z - \theta_l|^2 +
              \frac{\lambda}{2} \mathrm{tr}(\Delta_l^T A_l \Delta_l G_l),
              \quad \Delta_l = z - \theta^*_l

    for each layer l, with n `ewc_kfac.every` and :math:`\eta` the learning rate at this step;
    `bpnjax.importance.kronecker.pull_back` solves it.
    """
    every = step.spec.config.ewc_kfac.every
    strength = every * step.rate * state.strength

    def pull(core):
        flat = traverse_util.flatten_dict(core, sep="/")
        anchors = _layers(state.anchor, state.basis)
        for path, layer in _layers(core, state.basis).items():
            pulled = kronecker.pull_back(
                joined(layer), joined(anchors[path]), state.basis[path], strength
            )
            for leaf, value in (("kernel", pulled[:-1]), ("bias", pulled[-1])):
                if leaf in layer:
                    flat[f"{path}/{leaf}"] = value.astype(layer[leaf].dtype)
        return traverse_util.unflatten_dict(flat, sep="/")

    # Nothing of the state decides: under vmap over seeds it would turn the branch into a select,
    # and every step would pay for the pull.
    due = (step.index % every == every - 1) & (step.task > 0)
    return jax.lax.cond(due, pull, lambda core: core, core)


def consolidate(core, state, task, ended, spec):
    """The hook `consolidate` of `Method`: adds the task's factors and diagonalises the sums."""
    del task
    new = ended.factors(spec.config.ewc_kfac.examples)
    total = jax.tree.map(jnp.add, state.total, new)
    tasks = state.tasks + 1
    basis = {path: kronecker.diagonalise(both, 1.0 / tasks) for path, both in total.items()}
    return state._replace(total=total, basis=basis, anchor=core, tasks=tasks)


EWC_KFAC = Method(
    name="ewc_kfac",
    paper="Ritter et al. 2018, arXiv 1805.07810",
    check=check,
    init=init,
    after_update=after_update,
    consolidate=consolidate,
)
