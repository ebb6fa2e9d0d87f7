"""Runs every notebook, or those that are named, and stores what its cells print and show.

    python notebooks/store_outputs.py [quickstart ...]

What goes to stderr (progress, warnings) is left out, and so are paths of temporary folders. Images
are stored with at most 128 colours, which keeps the repository small.
"""

import base64
import io
import pathlib
import re
import sys
import tempfile

import nbclient
import nbformat
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
FOLDER = re.compile(re.escape(tempfile.gettempdir()) + r"/\w+")


def small(png):
    """An image as base64 text, with few colours."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(128)
    stored = io.BytesIO()
    image.save(stored, "PNG", optimize=True)
    return base64.b64encode(stored.getvalue()).decode()


def store(path):
    """Runs one notebook in an empty folder and writes it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(
            notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in cell.outputs:
            if "text" in output:
                output["text"] = FOLDER.sub("runs", output["text"])
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = small(output["data"]["image/png"])
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    names = sys.argv[1:] or [path.stem for path in sorted(HERE.glob("*.ipynb"))]
    for name in names:
        store(HERE / f"{name}.ipynb")
