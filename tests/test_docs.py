"""The examples in docs/ do what the pages say: code and commands run in their order, in small."""

import importlib
import importlib.util
import re
import shlex
import shutil
import sys

import flax.linen as nn
import numpy as np
import pytest
from command import ROOT
from PIL import Image

from bpnjax import __main__ as commands
from bpnjax import main, methods
from bpnjax.config.fields import entries
from bpnjax.data import builtin_sets
from bpnjax.run import plots

FENCE = re.compile(r"^```(python|sh)( skip)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [p for p in sorted((ROOT / "docs").rglob("*.md")) if FENCE.search(p.read_text())]
ROLE = re.compile(r"\{py:(\w+)\}`(?:[^<`]*<([\w.]+)>|~?([\w.]+))`")
FILE = re.compile(r"# (\w+\.py)\n")
TRAINING = ("bpnjax.main", "bpnjax.compare", "bpnjax.pretrain", "bpnjax.search.__main__")
SMALL = [
    "--config.train.epochs=1",
    "--config.model.hidden=(16,)",
    "--config.checkpoint.every_tasks=9",
]

pytestmark = pytest.mark.usefixtures("compile_once")


def blocks(page):
    """The page's code as (language, is it to be run?, text)."""
    text = page.read_text()
    found = [(m[1], not m[2], m[3]) for m in FENCE.finditer(text)]
    assert len(found) == len(re.findall(r"^```(?:python|sh)", text, re.MULTILINE)), page
    return found


def arguments(line):
    """Module and arguments of a command, without the variables set before it."""
    words = shlex.split(line, comments=True)
    if words[0] == "bpnjax":
        return commands.COMMANDS[words[1]][0], words[2:]
    at = words.index("python")
    assert words[at + 1] == "-m", line
    package = {"bpnjax.search": "bpnjax.search.__main__"}.get(words[at + 2], words[at + 2])
    return package, words[at + 3 :]


@pytest.fixture
def as_it_was(monkeypatch, tmp_path):
    """What examples register is gone afterwards, and so are the modules that they import."""
    monkeypatch.setattr(builtin_sets, "SETS", dict(builtin_sets.SETS))
    before = dict(methods.REGISTRY)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)
    methods.REGISTRY.clear()
    methods.REGISTRY.update(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples(page, tmp_path, monkeypatch, as_it_was):
    monkeypatch.chdir(tmp_path)
    for figure in ("draw", "comparison"):  # other tests look at these
        monkeypatch.setattr(plots, figure, lambda *_: [])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    space = {"__name__": "__main__"}
    for language, run, text in blocks(page):
        if language == "python":
            file = FILE.match(text)
            if file:
                (tmp_path / file[1]).write_text(text)
            elif run:
                exec(compile(text, str(page), "exec"), space)
            continue
        for line in text.splitlines():
            module, words = arguments(line)
            if not run:
                main.parse(words)  # needs a set or devices; at least all its fields are right
                continue
            words += SMALL if module in TRAINING else []
            assert importlib.import_module(module).run(words) == 0, line


def test_code_of_the_readme():
    """Its loop, as it stands, around the reader's own network and data."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    ((language, run, code),) = blocks(ROOT / "README.md")
    assert language == "python" and run
    x, y = np.ones((4, 3), np.float32), np.arange(4) % 2
    space = {
        "model": nn.Dense(2), "x": x, "tasks": [(x, y)] * 2, "batches": lambda x, y: [(x, y)]
    }  # fmt: skip
    exec(compile(code, "README.md", "exec"), space)
    assert space["logits"].shape == (4, 2)


def test_commands_of_the_readme(tmp_path, monkeypatch, as_it_was, capsys):
    """CI runs the first two; the third is prepared to the last step before training."""
    install, test, own, comparison = indented(ROOT / "README.md")
    ci = (ROOT / ".ci" / "run").read_text()
    for command in (install, test):
        _, ran = command.split(" && ")
        assert f"\n{ran}" in ci
    monkeypatch.chdir(tmp_path)
    for c in range(10):
        (tmp_path / "photos" / str(c)).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (4, 4), (c, i, 0)).save(tmp_path / "photos" / str(c) / f"{i}.png")
    (tmp_path / "my_networks.py").write_text(
        "import flax.linen as nn\n"
        "def Small(num_classes):\n"
        "    return nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(num_classes)])\n"
    )
    module, words = arguments(own)
    assert importlib.import_module(module).run([*words, "--dry_run"]) == 0
    assert "my_networks:Small" in capsys.readouterr().out
    assert asked(comparison).values.methods.split(",") == ["bd_ewc", "bd_psp", "ewc"]


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_flags_of_indented_commands(page, monkeypatch):
    """They take too long for a test, or stand in others: their fields and flags exist."""
    monkeypatch.chdir(ROOT)
    for command in indented(ROOT / page):
        asked(command)


def indented(page):
    """The commands in the indented blocks of a page, a continued line as one."""
    text = re.sub(r"\\\n +", " ", page.read_text())
    return re.findall(r"^ {4}((?:pip|bpnjax|python -m bpnjax)\b.*)", text, re.MULTILINE)


def asked(command):
    """What `main.parse_flags` makes of a command with a configuration; None for others."""
    if "--config=" in command:
        flags = {"methods": "", "num_seeds": "", "latex": False, "resume_from": ""}
        return main.parse_flags(arguments(command.split(" && ")[-1])[1], flags)
    return None


def test_links_lead_somewhere():
    """Sphinx checks the site's links; these are read on the repository's pages too."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_names_exist():
    """Sphinx says nothing of a name in a role that is nowhere."""
    for page in (ROOT / "docs").rglob("*.md"):
        for _, titled, plain in ROLE.findall(page.read_text()):
            name = titled or plain
            assert locate(name) is not None, f"{page}: {name}"


def locate(name):
    """What a full name stands for: a module, or an attribute of one."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        module = ".".join(parts[:depth])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        for part in parts[depth:]:
            found = getattr(found, part, None)
        return found
    return None


def test_generated_pages():
    """The tables of settings and methods hold all there is, and every module has a page."""
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("site_of_docs", ROOT / "docs" / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    settings, found = conf.settings_tables(), conf.methods_table()
    for field, entry in entries().items():
        assert f"\n| `{field}` |" in settings
        assert entry.setting.meaning.replace("|", r"\|") in settings
    for name in methods.REGISTRY:
        assert f"\n| `{name}` |" in found
    assert "above 0" in re.search(r"\| `bd.epsilon` .*", settings)[0]
    modules = set(conf.modules())
    assert modules >= {"bpnjax.learner", "bpnjax.methods.bd", "bpnjax.networks.nnx"}
    for name in modules:
        assert f".. automodule:: {name}\n" in conf.module_page(name)
    epsilon = methods.bd.fields["bd.epsilon"].default
    assert f"py:function:: bd_ewc(epsilon={epsilon}," in conf.module_page("bpnjax.methods")


def test_pages_are_those_of_their_result_files(tmp_path, capsys):
    """No figure of a generated page or table is changed by hand; one digit is enough to fail."""
    paper = importlib.import_module("bpnjax.paper.__main__")
    assert paper.run(["--pages", "--check", f"--root={ROOT}"]) == 0, capsys.readouterr().out
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name, old in (("docs/paper/fig7/fig7.md", "0.815"), ("README.md", "0.9888 ± 0.0016")):
        page = tmp_path / name
        text = (ROOT / name).read_text()
        assert old in text
        page.write_text(text.replace(old, old.replace("8", "7").replace("15", "16"), 1))
        assert paper.run(["--pages", "--check", f"--root={tmp_path}"]) == 1
        assert f"differs from its result file: {name}" in capsys.readouterr().out
    figure = tmp_path / "docs" / "paper" / "fig7" / "fig7.png"
    figure.write_bytes(figure.read_bytes()[:-1])
    assert paper.run(["--pages", f"--root={tmp_path}"]) == 1
    assert "fig7.png (not the figure of its result file)" in capsys.readouterr().out
    assert paper.run(["--pages", "--check", f"--root={tmp_path}"]) == 1
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pages", "--root=nowhere"], "--pages: no result files in"),
        (["--check"], "--check: goes with --pages"),
    ],
)
def test_wrong_requests_for_pages(arguments, message, capsys):
    paper = importlib.import_module("bpnjax.paper.__main__")
    assert paper.run(arguments) == 2
    assert message in capsys.readouterr().err


def test_tests_that_the_page_of_attacks_names_are_there():
    named = 0
    for row in (ROOT / "docs" / "attacks.md").read_text().splitlines():
        path = None
        for file, name in re.findall(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)`", row):
            path, named = file or path, named + 1
            assert f"def {name}(" in (ROOT / path).read_text(), name
    assert named > 40
