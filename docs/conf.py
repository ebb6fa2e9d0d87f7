"""The site: `sphinx-build -W docs build/site`. Needs no network, neither to build nor to read."""

import inspect
import os
import re
import sys

from docutils import nodes
from docutils.utils import math
from docutils.utils.math import latex2mathml
from sphinx.util import logging

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from bpnjax.version import __version__

project = "bpnjax"
release = version = __version__
copyright = "the bpnjax authors, Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
templates_path = ["_templates"]
html_theme = "furo"
html_title = "bpnjax"
html_math_renderer = "mathml"
smartquotes = False  # -- is two hyphens here
default_role = "py:obj"  # `name` in a docstring is a link where that name is documented
myst_heading_anchors = 3

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Source", "notes_style")]

_ALIAS = re.compile(r"Alias for field number \d+")
_FIELD = re.compile(r"^    (\w+):[^#\n]*#\s*(.+)$", re.MULTILINE)


def describe_fields(app, what, name, obj, options, lines):
    """A field of a NamedTuple is documented by the comment beside it."""
    if what != "attribute" or len(lines) == 0 or not _ALIAS.match(lines[0]):
        return
    module, owner, field = name.rsplit(".", 2)
    comments = dict(_FIELD.findall(inspect.getsource(getattr(sys.modules[module], owner))))
    lines[:] = [comments.get(field, ""), ""]


def indented_is_literal(app, what, name, obj, options, lines):
    """Indented lines in a module's docstring are commands and formulas as they are typed."""
    if what != "module":
        return
    found, literal = [], False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not literal and found and not found[-1].strip():
            found += ["::", ""]
        if line.strip():
            literal = indented or (literal and not line[:1].strip())
        found.append(line)
    lines[:] = found


def _mathml(translator, node, as_block):
    """Formulas as MathML, which browsers show without a script."""
    try:
        # It does not know these; parentheses grow by themselves.
        source = re.sub(r"\\[Bb]ig+(?![a-z])", "", node.astext())
        text = latex2mathml.tex2mathml(source, as_block=as_block)
    except math.MathError as error:
        logging.getLogger(__name__).warning("%s: %s", node.astext(), error, location=node)
        text = f"<code>{translator.encode(node.astext())}</code>"
    translator.body.append(f'<div class="math">{text}</div>' if as_block else text)
    raise nodes.SkipNode


def setup(app):
    app.connect("autodoc-process-docstring", describe_fields)
    app.connect("autodoc-process-docstring", indented_is_literal, priority=400)
    app.add_html_math_renderer(
        "mathml",
        (lambda self, node: _mathml(self, node, False), None),
        (lambda self, node: _mathml(self, node, True), None),
    )
