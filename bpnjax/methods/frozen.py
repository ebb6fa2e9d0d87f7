r"""Frozen: the shared network does not change, and a task learns its own output columns.

.. math:: \theta \leftarrow \theta_{old} \text{ but for } W_{out}[:, c], \, b_{out}[c], \quad
          c \in C_t

For a network that starts from pretrained weights (``model.pretrained``). With biases per task
(`bd_frozen`, `bias_frozen`) a later task never changes the answers of an earlier task among its own
classes: its logits stay the same, bit for bit. The gradient of the frozen parameters is not even
computed. Running statistics of BatchNorm are not parameters; ``model.batch_statistics`` keeps them
frozen, or per task.

Source: Ge et al. 2023 (SKILL, arXiv 2305.15591), with a frozen network, and one head and one bias
per unit for each task. Variant: the head of a task is its columns of one output layer.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bpnjax.methods.base import Batch, Context, Method, Setup, output_leaves
from bpnjax.methods.settings import register


def learning_columns(params: Any, setup: Setup, task: Any) -> Any:
    """Marks the parameters that a task may change.

    Args:
      params: the shared parameters, or their shapes.
      setup: of the learner.
      task: int scalar, may be traced.

    Returns:
      A tree like ``params``. Parameters of the output layer are bool ``[C]``, True for the task's
      own classes; all others are False.

    Raises:
      UserError: the classes of the tasks, or the layers of the network, are not known.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax, bpnjax
      >>> from bpnjax import methods, networks
      >>> from bpnjax.methods.frozen import learning_columns
      >>> net = networks.from_linen(nn.Sequential([nn.Dense(3), nn.Dense(4)]), jnp.ones((1, 2)))
      >>> learner = bpnjax.learner(
      ...     net, methods.sgd(), optax.sgd(0.1), num_tasks=2, classes=[[0, 1], [2, 3]])
      >>> params, _ = net.init(jax.random.key(0))
      >>> found = learning_columns(params, learner.setup, 1)
      >>> bool(found["layers_0"]["bias"].any()), found["layers_1"]["bias"].tolist()
      (False, [False, False, True, True])
    """
    own = jnp.asarray(setup.known_classes("frozen"))[task]

    def one(flag: jax.Array, leaf: Any) -> jax.Array:
        # A parameter with another length than the outputs, such as of a norm, is for all classes.
        fits = leaf.ndim > 0 and leaf.shape[-1] == setup.num_outputs
        return own & (flag > 0) if fits else jnp.bool_(False)

    return jax.tree.map(one, output_leaves(params, setup), params)


@register("frozen", paper="Ge et al. 2023, arXiv 2305.15591")
def frozen() -> Method:
    """A network whose shared layers do not change; see the top of this file."""

    def check(setup: Setup) -> None:
        setup.known_classes("frozen")
        output_leaves({}, setup)

    def forward(params: Any, task_params: Any, state: Any, ctx: Context) -> tuple[Any, Any]:
        del task_params, state
        if not ctx.training:
            return params, {}

        *_, output = ctx.setup.network.layers

        def one(path: Any, leaf: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            learns = not output or name.startswith(f"{output}/")
            return leaf if learns else jax.lax.stop_gradient(leaf)

        return jax.tree_util.tree_map_with_path(one, params), {}

    def gradient(grads: Any, params: Any, state: Any, batch: Batch, ctx: Context) -> Any:
        del state, batch
        learns = learning_columns(params, ctx.setup, ctx.current)
        return jax.tree.map(lambda g, may: jnp.where(may, g, 0), grads, learns)

    def end_step(
        old: Any, new: Any, grads: Any, state: Any, batch: Batch, ctx: Context
    ) -> tuple[Any, Any]:
        del grads, batch  # weight decay and momentum would move the parameters too
        learns = learning_columns(old, ctx.setup, ctx.current)
        return jax.tree.map(lambda o, n, may: jnp.where(may, n, o), old, new, learns), state

    return Method(check=check, forward=forward, gradient=gradient, end_step=end_step)
