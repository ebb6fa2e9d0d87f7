"""Hyper-parameter search with the same number of trials and steps for every method."""

from bpnjax.search.protocol import Protocol, protocol
from bpnjax.search.spaces import Axis, space
from bpnjax.search.study import search

__all__ = ["Axis", "Protocol", "protocol", "search", "space"]
