"""Hyper-parameter search in which every method has the same number of trials and of steps."""

from bpnjax.search.protocol import Protocol, protocol
from bpnjax.search.spaces import Axis, space
from bpnjax.search.study import search

__all__ = ["Axis", "Protocol", "protocol", "search", "space"]
