"""Joint training: one network on all tasks together, the usual upper bound without task identity.

It trains once, when the data of all tasks are there. So only the last row of its accuracy matrix is
filled, and backward transfer and forgetting are not defined for it.
"""

from bpnjax.methods.base import Method
from bpnjax.methods.settings import register


@register("joint", paper="the upper bound")
def joint() -> Method:
    """Plain training on the examples of all tasks together."""
    return Method(trains="jointly")
