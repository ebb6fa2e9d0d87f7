"""Ctrl-C and SIGTERM: the first one lets a run save and end, the second one ends it at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_MESSAGE = "bpnjax: saving after the current steps; press Ctrl-C again to stop at once"


@contextlib.contextmanager
def at_a_good_place() -> Iterator[Callable[[], bool]]:
    """Delays the first Ctrl-C or SIGTERM while the block runs.

    Yields:
      A function that says whether there was one. The caller then saves and ends. Outside the main
      thread, where signals cannot be handled, it always returns False and Ctrl-C acts as usual.
    """
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # Not print, which the signal may have interrupted.
        start = "\n" if sys.stderr.isatty() else ""
        os.write(2, f"{start}{_MESSAGE}\n".encode())

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
