"""Joint training: one network on all tasks at once, the usual upper bound without task identity.

It trains once, after the data of all tasks are there, so only the last row of its accuracy
matrix is filled; backward transfer and forgetting have no meaning for it.
"""

from bpnjax.methods.base import Method

JOINT = Method(name="joint", paper="the upper bound", joint=True)
