"""The command that trains a network on one set, for other runs to start from.

bpnjax pretrain [--config=tinyimagenet100] [--config.FIELD=VALUE ...]

This is an ordinary run of one task with all options of `bpnjax.main`. Name its file
``model.safetensors`` in the field ``model.pretrained`` of another run.
"""

import os
import sys

from bpnjax import main as command
from bpnjax.utils.errors import UserError

CONFIG = "tinyimagenet100"
USAGE = f"""usage: bpnjax pretrain [--config=NAME] [--config.FIELD=VALUE ...]
                       [--workdir=DIR] [--overwrite] [--dry_run]

Trains a network on one set (default: --config={CONFIG}).
Other runs start from its model.safetensors with
--config.model.pretrained=FILE. The flags are those of bpnjax run."""


def run(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    if command.asks_for_help(arguments):
        print(USAGE)
        return 0
    given = any(a.lstrip("-").split("=", 1)[0] == "config" for a in arguments)
    arguments = list(arguments) if given else [f"--config={CONFIG}", *arguments]
    try:
        config, folder, values = command.parse(arguments)
        if config.sequence.num_tasks != 1 or config.sequence.kind != "class_split":
            raise UserError(
                f"sequence.num_tasks: {config.sequence.num_tasks} tasks ({config.sequence.kind}); "
                "a network is pretrained on one, with all classes: class_split and 1"
            )
    except UserError as error:
        print(f"bpnjax: {error}", file=sys.stderr)
        return 2
    code = command.run(arguments)
    if code == 0 and not values.dry_run:
        file = os.path.join(folder, "model.safetensors")
        print(f"start from it with --config.model.pretrained={file}")
    return code


if __name__ == "__main__":
    command.leave(run)
