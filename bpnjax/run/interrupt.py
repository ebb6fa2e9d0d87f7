"""Ctrl-C and SIGTERM: the first asks a run to end where it can be saved, the second ends it."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_MESSAGE = "bpnjax: ending after this stretch of steps, to save; Ctrl-C again ends at once"


@contextlib.contextmanager
def at_a_good_place() -> Iterator[Callable[[], bool]]:
    """Holds the first Ctrl-C or SIGTERM back while the block runs.

    Yields:
      A function that says whether there was one; whoever asks saves and ends. Outside the main
      thread, where signals cannot be handled, it is always False and Ctrl-C does what it did.
    """
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # Not print, which may be what the signal came in the middle of.
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
