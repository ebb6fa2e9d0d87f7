"""Starts commands by forking a process that has imported everything: at once, not in 5 seconds.

Each line of its input is a JSON list, a file for stderr and the arguments of ``bpnjax run``. It
prints the number of the new process, and when that has ended its exit code.
"""

import json
import os
import subprocess
import sys

from command import ROOT


class Forks:
    """The process that forks, as the tests see it."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )  # fmt: skip

    def start(self, errors, arguments):
        """Starts the command; returns the number of its process."""
        request = json.dumps([str(errors), *map(str, arguments)])
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self):
        """Waits for the command; returns its exit code, below 0 for a signal."""
        return int(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def _serve():
    import matplotlib.backends.backend_agg  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import sklearn.datasets  # noqa: F401

    from bpnjax import main
    from bpnjax.run import dry_run, plots, train  # noqa: F401

    for line in sys.stdin:
        errors, *arguments = json.loads(line)
        child = os.fork()
        if not child:
            for path, number in ((os.devnull, 0), (os.devnull, 1), (errors, 2)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
            sys.argv = ["bpnjax", *arguments]
            main.leave(main.run)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
