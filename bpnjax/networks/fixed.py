"""A network as in evaluation: what it needs beside its parameters filled in."""

from typing import Any, NamedTuple

import flax.linen as nn

__all__ = ["Fixed", "fixed", "split"]


class Fixed(NamedTuple):
    """A network with some of its variables and arguments filled in; see `fixed`."""

    module: nn.Module
    variables: dict[str, Any]  # collections other than "params"
    kwargs: dict[str, Any]

    def apply(self, variables, *args, **kwargs):
        """`flax.linen.Module.apply` with what is filled in.

        Args:
          variables: a dict of collections, ``"params"`` among them; they win over those filled in.
          *args: of the network's call.
          **kwargs: of the network's call; none that is filled in.

        Returns:
          What the network returns.
        """
        return self.module.apply({**self.variables, **variables}, *args, **self.kwargs, **kwargs)


def fixed(model: nn.Module, variables=None, **kwargs) -> Fixed:
    """Fills in what a network needs beside its parameters, as in evaluation.

    What runs a network of ``(params, x)`` alone, such as `bpnjax.importance.fisher`, so takes one
    with running averages (``batch_stats``) or with arguments such as ``train=False``.

    Args:
      model: any Linen module.
      variables: its collections; ``"params"`` among them is not used.
      **kwargs: keyword arguments of its call, or ``rngs``.

    Returns:
      What every function of `bpnjax.networks.linen` and `bpnjax.importance` takes for a model.

    Raises:
      ValueError: ``mutable`` was given: what is fixed does not change.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> from bpnjax import importance
      >>> from bpnjax.networks import linen
      >>> net = nn.BatchNorm()
      >>> x = jnp.ones((3, 2))
      >>> variables = net.init(jax.random.key(0), x, use_running_average=False)
      >>> as_tested = linen.fixed(net, variables, use_running_average=True)
      >>> fisher = importance.fisher(as_tested, variables["params"], {}, x, jnp.zeros(3, int))
      >>> fisher["bias"].tolist()
      [0.25, 0.25]
    """
    if "mutable" in kwargs:
        raise ValueError(
            "mutable cannot be fixed: run the network as in evaluation (for BatchNorm "
            "use_running_average=True), or pass mutable to modulated_apply"
        )
    others = {name: value for name, value in (variables or {}).items() if name != "params"}
    return Fixed(model, others, kwargs)


def split(model, params):
    """A dict of collections taken apart: the model with all but ``"params"`` fixed, and those.

    Args:
      model: a Linen module or `fixed`.
      params: a parameter collection, or a dict of collections with a ``"params"`` entry.

    Returns:
      ``model, params``, where ``params`` is a parameter collection.

    Example:
      >>> import flax.linen as nn
      >>> from bpnjax.networks.fixed import split
      >>> model, params = split(nn.BatchNorm(), {"params": {"bias": 0}, "batch_stats": {"mean": 1}})
      >>> params, model.variables
      ({'bias': 0}, {'batch_stats': {'mean': 1}})
    """
    if "params" not in params:
        return model, params
    others = {name: value for name, value in params.items() if name != "params"}
    return (fixed(model, others) if others else model), params["params"]
