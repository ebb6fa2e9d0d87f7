"""What the tests share: JAX on the CPU, caches of their own, a configuration that runs at once, and
the command run with it."""

import gc
import json
import os
import shutil
import socket
import sys
import types

import pytest
from command import ROOT, contents, flags_of_tests, one_line, process

# Before the first import of JAX, here and in the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = flags_of_tests()  # the workers of pytest-xdist inherit them
if os.environ.get("BPNJAX_ATTACKS_RESULT"):  # the cases of tests/attack are counted into a file
    sys.path.insert(0, str(ROOT / "tests" / "attack"))
    from counting import pytest_runtest_makereport, pytest_sessionfinish  # noqa: F401
TINY = {
    "name": "tiny",
    "dataset.name": "digits",
    "sequence.num_tasks": 3,
    "model.hidden": (16, 16),
    "train.epochs": 2,
    "train.batch_size": 32,
    "train.learning_rate": 3e-3,
    "bd.hidden_dim": 8,
}


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Decoded sets go to a folder of this session, never to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPNJAX_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Lets go of a module's compiled programs: of all modules together a worker holds gigabytes.

    They also take a place each in the process's map of memory, whose number the system limits.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture
def tiny():
    """A configuration of three tasks of two digits whose run takes seconds, most to compile."""
    from bpnjax.config import default

    config = default()
    config.update_from_flattened_dict(TINY)
    return config


@pytest.fixture(scope="session")
def tiny_flags():
    """The same configuration as the arguments of a command, with further fields changed."""

    def flags(**changes):
        fields = TINY | {field.replace("__", "."): value for field, value in changes.items()}
        config = f"--config={ROOT / 'configs' / 'digits.py'}"
        return [config, *(f"--config.{field}={value}" for field, value in fields.items())]

    return flags


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """JAX compiles fast code slowly no more, and keeps it for the processes that tests start.

    For tests that ask whether runs agree, most of whose time would go to compiling the same
    programs again; the folder of the compiled ones is the session's.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        before = {name: jax.config.values[name] for name in settings}
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
        for name, value in before.items():
            jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def programs_once(compile_once):
    """Runs of one configuration share their programs, also where one begins with later tasks."""
    from bpnjax.run import train

    compile_programs, kept = train.compile_programs, {}

    def shared(experiment, clock, *sizes):
        fields = experiment.config.to_dict() | {"resume_from": "", "seed": 0}
        key = (json.dumps(fields, sort_keys=True), *sizes)
        return kept.setdefault(key, compile_programs(experiment, clock, *sizes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_programs", shared)
        yield


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns exit code, stdout, stderr."""
    from bpnjax import main

    monkeypatch.chdir(tmp_path)

    def command(arguments):
        capsys.readouterr()
        code = main.run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def refused(run, tmp_path):
    """Checks that a command is refused in one line with all the words, and writes nothing."""

    def check(arguments, *words):
        before = contents(tmp_path)
        code, out, err = run(arguments)
        assert code == 2, err
        one_line(err, *words)
        assert out == ""
        assert contents(tmp_path) == before
        return err

    return check


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_flags, compile_once):
    """A run that a real process did, with the default workdir."""
    cwd = tmp_path_factory.mktemp("finished")
    flags = tiny_flags(method="bd_ewc", checkpoint__every_steps=7)
    done = process(flags, cwd)
    assert done.returncode == 0, done.stderr
    (workdir,) = (cwd / "runs/tiny").iterdir()
    return types.SimpleNamespace(
        cwd=cwd, flags=flags, out=done.stdout, err=done.stderr, workdir=workdir
    )


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it to damage, and the flags that run it there."""
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    return workdir, [*finished.flags, f"--workdir={workdir}"]


@pytest.fixture
def no_network(monkeypatch):
    """Whoever asks for another machine gets an error."""

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
