"""One name for all commands: `bpnjax COMMAND`, which is `python -m bpnjax COMMAND`."""

import configparser
import importlib
import subprocess
import sys

import pytest
from command import ROOT, one_line

import bpnjax
from bpnjax import __main__ as commands


def test_each_command_is_a_module_with_run_and_a_usage(capsys):
    for name, (module, _) in commands.COMMANDS.items():
        assert commands.run([name, "--help"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("usage: ") and err == ""
        assert callable(importlib.import_module(module).run)
        usage = out.split("\nconfigurations of the package:")[0]
        assert max(map(len, usage.splitlines())) <= 80, name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no command; choose from: run, compare,"),
        (["rnu"], "unknown command 'rnu'; did you mean run?"),
        (["--config=digits"], "unknown command '--config=digits'; choose from: run,"),
    ],
)
def test_no_such_command(capsys, arguments, words):
    assert commands.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    one_line(err, words)


def test_a_command_gets_the_other_arguments(capsys):
    assert commands.run(["run", "--config=digits", "--config.train.epoch=3"]) == 2
    one_line(capsys.readouterr().err, "did you mean train.epochs")


def test_help_and_version_do_not_wait_for_jax(tmp_path):
    """Nor does anything else that takes a second."""
    program = (
        "import sys\nfrom bpnjax.__main__ import run\n"
        "codes = [run([flag]) for flag in ('--help', '-h', '--version', 'x')]\n"
        "heavy = {'jax', 'flax', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert (codes, heavy) == ([0, 0, 0, 2], set()), (codes, heavy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, (_, meaning) in commands.COMMANDS.items():
        assert f"\n  {name:10}{meaning}\n" in done.stdout
    assert f"\nbpnjax {bpnjax.__version__}\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_python_m_bpnjax_exits_with_the_code_of_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bpnjax", "rnu"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    one_line(done.stderr, "did you mean run?")


def test_the_console_script_is_this():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    script = setup["options.entry_points"]["console_scripts"].strip()
    assert script == "bpnjax = bpnjax.__main__:main"
    assert callable(commands.main)


def test_names_of_the_package_are_imported_when_they_are_asked_for():
    """`bpnjax.learner` stays the function, whoever imports the module of that name first."""
    program = (
        "import sys, bpnjax\nassert 'jax' not in sys.modules\n"
        "import bpnjax.learner, bpnjax.run.train\n"
        "assert bpnjax.learner is bpnjax.learner.__globals__['learner']\n"
        "from bpnjax import Learner, methods\n"
        "assert bpnjax.train is bpnjax.run.train.train_and_evaluate\n"
        "assert all(getattr(bpnjax, name) is not None for name in bpnjax.__all__)\n"
        "assert set(bpnjax.__all__) <= set(dir(bpnjax)) and not hasattr(bpnjax, 'nothing')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
