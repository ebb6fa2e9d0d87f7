"""Data: reads your own data or sets of TFDS, and cuts them into sequences of tasks."""

from bpnjax.data.arrays import Arrays
from bpnjax.data.own import tasks
from bpnjax.data.sequence import Split, TaskSequence, load_sequence, set_names
from bpnjax.data.sources import load_arrays

__all__ = [
    "Arrays",
    "Split",
    "TaskSequence",
    "load_arrays",
    "load_sequence",
    "set_names",
    "tasks",
]
