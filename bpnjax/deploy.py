"""The command that writes a trained model as a program for machines without bpnjax.

bpnjax export --model=runs/digits/bd_psp --output=digits.stablehlo

It is the same as `python -m bpnjax.deploy`; in Python it is `bpnjax.export`.
"""

import os

from bpnjax import config as configuration
from bpnjax.utils import flags
from bpnjax.utils.errors import UserError

USAGE = """usage: bpnjax export --model=DIR --output=FILE [--seed=N] [--batch=N]
                     [--platforms=cpu,cuda,tpu] [--config=FILE]

  --model=DIR          the folder of a complete run, or one of its .safetensors
  --output=FILE        the StableHLO program; FILE.json describes its inputs
                       and outputs
  --seed=N             which model to use of a run with several seeds
  --batch=N            examples that the program takes at once (default: any)
  --platforms=A,B,...  from cpu, cuda, rocm, tpu (default: cpu,cuda,tpu)
  --config=FILE        the run's config file, if it registers the method"""


def run(arguments: list[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit code: 0, 1 if the file could not be written, 2 for a wrong argument or model.
    """
    return flags.run(USAGE, arguments, _answer)


def _answer(arguments: list[str]) -> str:
    """Runs the command on its arguments; returns the text to print."""
    texts = ("model", "output", "platforms", "config")
    values, rest = flags.parse(arguments, texts, numbers=("seed", "batch"))
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag; see --help")
    for name in ("model", "output"):
        if not values[name].value:
            raise UserError(f"--{name}: missing; see --help")
    if values.config:
        configuration.load_file(values.config)
    from bpnjax.run import stablehlo  # here, so that a wrong flag is reported without delay

    names = [name.strip() for name in values.platforms.split(",") if name.strip()]
    file = flags.named(
        lambda: stablehlo.export(
            values.model, values.output, batch=values.batch, seed=values.seed,
            platforms=names or stablehlo.PLATFORMS,
        ),
        out="output", batch="batch", platforms="platforms",
    )  # fmt: skip
    size = f"{os.path.getsize(file) / 1e3:,.0f} KB"
    return f"a program of {size} in {file}, described in {file}.json"


if __name__ == "__main__":
    from bpnjax.main import leave

    leave(run)
