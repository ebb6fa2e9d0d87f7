"""The site: `sphinx-build -W docs build/site`. Needs no network, neither to build nor to read.

The folder ``docs/api`` is written anew by each build: a page per module of the package, and the
tables of settings and methods, which are made from the package itself.
"""

import importlib
import inspect
import json
import os
import pathlib
import pkgutil
import re
import sys
from collections.abc import Iterator

from docutils import nodes
from docutils.utils import math
from docutils.utils.math import latex2mathml
from sphinx.util import logging

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from bpnjax.config.fields import Entry, entries
from bpnjax.methods import REGISTRY, Factory, Setting
from bpnjax.paper import pages
from bpnjax.paper.__main__ import artefacts
from bpnjax.version import __version__

DOCS = pathlib.Path(__file__).resolve().parent

project = "bpnjax"
release = version = __version__
copyright = "the bpnjax authors, Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
html_title = "bpnjax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
smartquotes = False  # -- is two hyphens here
default_role = "py:obj"  # `name` in a docstring is a link where that name is documented
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Source", "notes_style")]

MODULE = """\
{title}
{line}

.. automodule:: {name}
   :members:{options}
"""

_ALIAS = re.compile(r"Alias for field number \d+")
_FIELD = re.compile(r"^    (\w+):[^#\n]*#\s*(.+)$", re.MULTILINE)


def modules(name: str = "bpnjax") -> Iterator[str]:
    """Names of a module and of all modules below it; those with an underscore are left out."""
    yield name
    for found in pkgutil.iter_modules(getattr(importlib.import_module(name), "__path__", ())):
        if not found.name.startswith("_"):
            yield from modules(f"{name}.{found.name}")


def module_page(name: str) -> str:
    """The page of a module: its docstring, its members, its methods, and the modules within it.

    Modules are named here by their full path. An attribute of a package may be a function of the
    same name as a module: `bpnjax.learner`, `bpnjax.methods.bd`.
    """
    children = [child for child in modules(name) if child.count(".") == name.count(".") + 1]
    options = "\n   :ignore-module-all:" if children else ""
    text = MODULE.format(title=name, line="=" * len(name), name=name, options=options)
    for factory in REGISTRY.values():
        composed = factory.parts != (factory,)
        if name == ("bpnjax.methods" if composed else factory.__module__):
            text += method_entry(factory)
    if name in {factory.__module__ for factory in REGISTRY.values()}:
        file = pathlib.Path(importlib.import_module(name).__file__)
        text += f"\n.. _source-{name}:\n\nSource\n------\n\n"
        text += f".. literalinclude:: {os.path.relpath(file, DOCS / 'api')}\n"
    if children:
        text += "\n.. list-table::\n\n"
        for child in children:
            first, _, _ = (importlib.import_module(child).__doc__ or "").strip().partition("\n")
            text += f"   * - :doc:`{child}`\n     - {first}\n"
        text += "\n.. toctree::\n   :hidden:\n\n"
        text += "".join(f"   {child}\n" for child in children)
    return text


def method_entry(factory: Factory) -> str:
    """A method as the function that it is, with its settings as arguments."""
    names = [field.name for field in factory.fields.values()]
    arguments, described = [], ""
    for field, found in factory.fields.items():
        name = found.name
        if names.count(name) > 1:  # two parts of a composition have it
            described += f"   :param {factory.parts[found.part].group}: as ``dict({name}=...)``: "
        else:
            arguments.append(f"{name}={found.default!r}")
            described += f"   :param {name}: "
        # What is written for a terminal has no markup.
        plain = re.sub(r"([\\|*`_])", r"\\\1", meaning(found.setting))
        described += f"{plain}. Field ``{field}`` of the command.\n"
    text = f"\n.. py:function:: {factory.name}({', '.join(arguments)}) -> Method\n\n"
    for line in inspect.cleandoc(factory.__doc__ or "").splitlines():
        text += f"   {line}\n" if line else "\n"
    if factory.paper:
        text += f"\n   Paper: {factory.paper}.\n"
    return f"{text}\n{described}"


def meaning(setting: Setting) -> str:
    """What a setting is, and the values that it may have."""
    return "; ".join(filter(None, (setting.meaning, allowed(setting))))


def allowed(setting: Setting) -> str:
    """The values that a setting may have, in words; empty where its type says it all."""
    if setting.choices:
        return "one of " + ", ".join(map(str, setting.choices))
    bounds = (
        ("at least", setting.at_least), ("above", setting.above), ("below", setting.below)
    )  # fmt: skip
    found = [f"{word} {bound:,}" for word, bound in bounds if bound is not None]
    if setting.pattern:
        found.append("a regular expression for the whole path")
    return ", ".join(found)


def settings_tables() -> str:
    """Every field of a configuration, a table for each group, as Markdown."""
    groups: dict[str, dict[str, Entry]] = {}
    for field, entry in entries().items():
        groups.setdefault(field.rpartition(".")[0], {})[field] = entry
    text = ""
    for group, fields in groups.items():
        of_methods = any(entry.methods for entry in fields.values())
        text += f"\n## {group or 'The run'}\n\n"
        text += "| field | default | meaning | values |" + " read by |" * of_methods
        text += "\n|---|---|---|---|" + "---|" * of_methods + "\n"
        for field, entry in fields.items():
            cells = [f"`{field}`", default_of(entry), entry.setting.meaning, allowed(entry.setting)]
            if of_methods:
                cells.append(", ".join(f"`{method}`" for method in entry.methods))
            text += "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"
    return text


def default_of(entry: Entry) -> str:
    """The default of a field, as it is typed."""
    if entry.default is None:
        return "none"
    return f"`{entry.default!r}`"


def methods_table() -> str:
    """Every method with links to its formula, its source and its settings, as Markdown."""
    text = "| method | parts | formula | source | settings |\n|---|---|---|---|---|\n"
    for name, factory in REGISTRY.items():
        composed = factory.parts != (factory,)
        parts = " and ".join(f"`{part.name}`" for part in factory.parts) if composed else ""
        home = "bpnjax.methods" if composed else factory.__module__
        formulas = [
            f"{{py:func}}`{part.name} <{part.__module__}.{part.name}>`" for part in factory.parts
        ]
        formula = ", ".join(formulas) if composed else f"{{py:func}}`{name} <{home}.{name}>`"
        sources = dict.fromkeys(part.__module__ for part in factory.parts)
        source = ", ".join(
            f"{{ref}}`{module.rpartition('.')[2]}.py <source-{module}>`" for module in sources
        )
        settings = ", ".join(
            f"[`{field}`](settings.md#{field.partition('.')[0]})" for field in factory.fields
        )
        text += f"| `{name}` | {parts} | {formula} | {source} | {settings} |\n"
    return text


def gallery() -> str:
    """Every figure of a result file as a thumbnail that opens its page, as Markdown."""
    text = "````{container} gallery\n"
    for path in sorted((DOCS / "results").glob("*.json")):
        found = json.loads(path.read_text())
        for figure in found.get("figures", {}):
            page = pathlib.PurePosixPath(found["page"]).relative_to("docs")
            text += f"```{{figure}} {page.parent / figure}\n:target: {page.with_suffix('.html')}\n"
            text += f":alt: {found['title']}\n\n{found['title']}\n```\n"
    return f"{text}````\n"


def write_generated(app) -> None:
    """Writes ``docs/api``: what changed since the last build, and nothing that is not there now."""
    folder = pathlib.Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    texts = {f"{name}.rst": module_page(name) for name in modules()}
    texts |= {"settings.txt": settings_tables(), "methods.txt": methods_table()}
    texts |= {"gallery.txt": gallery()}
    for path in folder.iterdir():
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def write_report(app, error):
    """Writes the report of the paper's results into the finished site, a page of its own."""
    if error is None and app.builder.format == "html":
        path = pathlib.Path(app.outdir) / "report" / "index.html"
        path.parent.mkdir(exist_ok=True)
        path.write_text(pages.report_page(DOCS.parent, list(artefacts())))


def skip_methods(app, what, name, obj, skip, options):
    """Methods are objects that can be called; `method_entry` describes them as functions."""
    return True if isinstance(obj, Factory) else None


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
    app.connect("builder-inited", write_generated)
    app.connect("build-finished", write_report)
    app.connect("autodoc-skip-member", skip_methods)
    app.connect("autodoc-process-docstring", describe_fields)
    app.connect("autodoc-process-docstring", indented_is_literal, priority=400)
    app.add_html_math_renderer(
        "mathml",
        (lambda self, node: _mathml(self, node, False), None),
        (lambda self, node: _mathml(self, node, True), None),
    )
