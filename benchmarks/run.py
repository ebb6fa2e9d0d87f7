"""Speed, as ratios within one run.

python benchmarks/run.py [--parts=steps,torch] [--output=DIR] [--quick]
"""

import argparse
import json
import pathlib
import sys

from machine import FLOPS, describe, make_matrix_product
from parts import PARTS
from problems import be_quick

from bpnjax.run.writers import markdown_table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    usual = ",".join(name for name in PARTS if name != "accelerator")
    parser.add_argument("--parts", default=usual, help=f"of {', '.join(PARTS)}")
    parser.add_argument("--output", default="", help="a folder for results.json and results.md")
    parser.add_argument("--quick", action="store_true", help="only show that everything runs")
    options = parser.parse_args()
    if options.quick:
        be_quick()
    names = options.parts.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"--parts: no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    machine = describe()
    limit = FLOPS / make_matrix_product()()
    found = {"machine": machine, "matrix_multiply_gflops": limit / 1e9, "tables": {}}
    text = [
        f"{machine['cores']} cores of {machine['processor']}, device {machine['device']}, JAX "
        f"{machine['jax']}; a matrix product runs at {limit / 1e9:.0f} GFLOP/s"
    ]
    print(text[0], flush=True)
    for name in names:
        title, header, rows = PARTS[name]()
        rows = [[str(cell) for cell in row] for row in rows]
        found["tables"][name] = {"title": title, "header": header, "rows": rows}
        text += [f"**{title}**", markdown_table(header, rows)]
        print(f"\n{title}\n{markdown_table(header, rows)}", flush=True)
    if options.output:
        folder = pathlib.Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
        page = ["# Benchmarks: results", *text]
        (folder / "results.md").write_text("\n\n".join(page) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
