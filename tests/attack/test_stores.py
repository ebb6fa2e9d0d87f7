"""Attacks on what commands keep and take up again: searches, caches, packs, earlier runs, disks.

Allowed, whatever comes in: the same result as without it, or one line and exit 1 or 2.
"""

import errno
import json
import os
import pathlib
import shutil
import threading
import types
from concurrent import futures
from functools import partial

import jax
import numpy as np
import pytest
from attacks import NUMBER, cases, damage, files_of, outcome
from command import ROOT
from PIL import Image

from bpnjax import compare, deploy, main, packs
from bpnjax.data import cache, load_sequence
from bpnjax.run import export, later_tasks, train
from bpnjax.search import __main__ as search
from bpnjax.training import compilation, epochs
from bpnjax.utils.errors import UserError

pytestmark = [
    pytest.mark.usefixtures("programs_once"),
    # Orbax and JAX warn of what they find damaged; here that is expected.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def figures(request, monkeypatch):
    """Of the long form nine in ten cases build figures and do not render them, which takes longer
    than all that is attacked."""
    case = getattr(request.node, "callspec", None)
    if NUMBER and case and case.params.get("seed", 0) % 10:
        monkeypatch.setattr(
            "matplotlib.figure.Figure.savefig",
            lambda figure, path, **options: pathlib.Path(path).write_bytes(b"not rendered"),
        )


def swap(files, random):
    """Puts one file in the place of another; returns which."""
    one, other = random.choice(len(files), 2, replace=len(files) < 2)
    shutil.copy(files[one], files[other])
    return f"{files[other].name} is {files[one].name}"


def damaged(folder, random, only=lambda path: True):
    """Damages or swaps some file below a folder; returns what was done."""
    files = [path for path in files_of(folder) if only(path)]
    if random.random() < 0.2:
        return swap(files, random)
    path = files[random.integers(len(files))]
    return f"{path.name} {damage(path, random)}"


STORAGES = ("", "journal") if NUMBER else ("",)


@pytest.fixture(scope="module")
def searches(tmp_path_factory, tiny_flags):
    """Finished searches in a database and, in the long form, a journal: flags and folder."""
    pytest.importorskip("optuna")
    made = {}
    for storage in STORAGES:
        folder = tmp_path_factory.mktemp("search") / "it"
        flags = tiny_flags(sequence__num_tasks=2, model__hidden="(8,)", train__epochs=1)
        flags += ["--methods=sgd", "--trials=2", f"--storage={storage}", "--num_seeds=1"]
        assert outcome(search.run, [*flags, f"--workdir={folder}"])[0] == 0
        made[storage] = flags, folder
    return made


def trials_of(folder):
    found = json.loads((folder / "search.json").read_text())["methods"]["sgd"]["trials"]
    return [(trial["settings"], trial["value"]) for trial in found]


@pytest.mark.parametrize("seed", cases("search", 3))
def test_a_damaged_search(seed, searches, tmp_path, monkeypatch):
    """A file of a search, its trials or what it found: the same values again, or a refusal.

    A trial whose record was cut off has its place taken by another one, which may have settings of
    its own.
    """
    random = np.random.default_rng(seed)
    flags, whole = searches[random.choice(STORAGES)]
    truth = trials_of(whole)
    folder = tmp_path / "it"
    shutil.copytree(whole, folder)
    store = random.random() < 0.7
    done = damaged(folder, random, lambda path: store == path.name.startswith("search."))
    code, _, said = outcome(search.run, [*flags, f"--workdir={folder}"])
    if code == 0:
        found = trials_of(folder)
        assert len(found) == len(truth) and found[0] == truth[0], done
        known = {json.dumps(settings): value for settings, value in truth}
        for settings, value in found:
            assert known.get(json.dumps(settings), value) == value, done
        if found != truth:
            return
        again = json.loads((folder / "report" / "sgd" / "result.json").read_text())["accuracy"]
        was = json.loads((whole / "report" / "sgd" / "result.json").read_text())["accuracy"]
        assert again == was, done
    else:
        assert code == 2, said
    if (folder / "tuned.py").exists():
        tuned = [f"--config={folder / 'tuned.py'}", "--config.method=sgd", "--dry_run"]
        assert outcome(main.run, tuned)[0] in (0, 2), done


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images, a folder per class, decoded into a cache of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(40):
        path = folder / "images" / f"class_{i % 4}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (6, 6), np.uint8)).save(path)
    config = _of_pictures(folder)
    return folder, load_sequence(config)


def _of_pictures(folder):
    config = main.parse([f"--config={ROOT / 'configs' / 'digits.py'}"])[0]
    config.dataset.path = str(folder / "images")
    config.dataset.cache_dir = str(folder / "cache")
    config.sequence.num_tasks, config.train.batch_size = 2, 4
    return config


@pytest.mark.parametrize("seed", cases("cache", 12))
def test_a_damaged_cache(seed, pictures, tmp_path):
    """A file of the decoded images: the same arrays, or a refusal that says what to delete."""
    random = np.random.default_rng(seed)
    folder, truth = pictures
    shutil.copytree(folder / "cache", tmp_path / "cache")
    config = _of_pictures(folder)
    config.dataset.cache_dir = str(tmp_path / "cache")
    done = damaged(tmp_path / "cache", random)
    try:
        found = load_sequence(config)
    except UserError as error:
        assert "is damaged" in str(error) and "delete" in str(error)
    else:
        for split in ("train", "test"):
            one, other = getattr(found, split), getattr(truth, split)
            assert np.array_equal(one.images, other.images), done
            assert np.array_equal(one.labels, other.labels), done


@pytest.fixture(scope="module")
def learned(tmp_path_factory, tiny_flags):
    """A complete run of two tasks that goes on by what its checkpoints hold, and its flags."""
    made = {}
    for method in ("sgd", "ewc"):
        flags = tiny_flags(method=method, sequence__num_tasks=2, model__hidden="(8,)",
                           train__epochs=1)  # fmt: skip
        folder = tmp_path_factory.mktemp("learned") / method
        assert outcome(main.run, [*flags, f"--workdir={folder}"])[0] == 0
        made[method] = folder, tiny_flags(method=method, model__hidden="(8,)", train__epochs=1)
    return made


def _taken_over(flags, folder):
    config = main.parse([*flags, f"--resume_from={folder}"])[0]
    return later_tasks.find(config, load_sequence(config)).state


@pytest.mark.parametrize("seed", cases("resume_from", 8))
def test_a_damaged_run_to_go_on_from(seed, learned, tmp_path):
    """A file of the run that --resume_from names: the same state, or a refusal."""
    random = np.random.default_rng(seed)
    whole, flags = learned[random.choice(["sgd", "ewc"])]
    folder = tmp_path / "earlier"
    shutil.copytree(whole, folder)
    truth = _taken_over(flags, folder)
    done = damaged(folder, random)
    try:
        found = _taken_over(flags, folder)
    except UserError as error:
        assert "\n" not in str(error), done
    else:
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
            assert np.array_equal(one, other), done


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tiny_flags):
    """A frozen network's model, two packs of tasks on it, and the bytes of what they merge to."""
    folder = tmp_path_factory.mktemp("packs")
    small = {"dataset__normalize": "unit", "model__hidden": "(8,)", "train__epochs": 1}
    flags = tiny_flags(method="sgd", sequence__num_tasks=1, sequence__classes_per_task=10, **small)
    _untrained(flags, folder / "network")
    for name, classes in (("ada", "0,1;2,3"), ("bob", "4,5;6,7")):
        flags = tiny_flags(
            method="bd_psp", sequence__classes=classes, sequence__num_tasks=2,
            sequence__heads="multi", train__rates="(?!output).*=0",
            model__pretrained=folder / "network" / "model.safetensors", **small,
        )  # fmt: skip
        _untrained(flags, folder / name)
        made = ["pack", f"--model={folder / name}", f"--output={folder / name}.pack"]
        assert outcome(packs.run, made)[0] == 0
    return folder


def _untrained(flags, folder):
    """Leaves the model of a run as it begins."""
    config = main.parse(flags)[0]
    prepared = train.prepare(config)
    state = jax.jit(partial(epochs.init_state, prepared.experiment))(train.seed_keys(config))
    folder.mkdir()
    export.save_models(folder, prepared.experiment, state, 1, prepared.sequence)


@pytest.mark.parametrize("seed", cases("packs", 8))
def test_a_damaged_pack(seed, packed, tmp_path, monkeypatch):
    """A pack, or the model it is merged with: the same merged model, or a refusal."""
    random = np.random.default_rng(seed)
    monkeypatch.chdir(tmp_path)
    for name in ("ada.pack", "bob.pack"):
        shutil.copy(packed / name, name)
    shutil.copy(packed / "network" / "model.safetensors", "network.safetensors")
    merge = ["merge", "--model=network.safetensors", "ada.pack", "bob.pack"]
    assert outcome(packs.run, [*merge, "--output=whole.safetensors"])[0] == 0
    whole = pathlib.Path("whole.safetensors").read_bytes()
    os.unlink("whole.safetensors")
    done = damaged(tmp_path, random)
    outcome(packs.run, ["show", "ada.pack", "bob.pack"])
    code, _, said = outcome(packs.run, [*merge, "--output=merged.safetensors"])
    if code == 0:
        assert pathlib.Path("merged.safetensors").read_bytes() == whole, done
    else:
        assert code == 2 and not pathlib.Path("merged.safetensors").exists(), said


@pytest.mark.parametrize("seed", cases("compare", 2))
def test_a_damaged_comparison(seed, learned, tmp_path):
    """A file of a run that is compared: the same row, or a row that says that it failed."""
    random = np.random.default_rng(seed)
    whole, flags = learned["sgd"]
    flags = [*flags, "--config.sequence.num_tasks=2", "--methods=sgd", "--num_seeds=1"]
    folder = tmp_path / "all"
    shutil.copytree(whole, folder / "sgd")
    truth = json.loads((whole / "result.json").read_text())["accuracy"]
    done = damaged(folder / "sgd", random)
    code, out, said = outcome(compare.run, [*flags, f"--workdir={folder}"])
    if code == 0:
        assert json.loads((folder / "sgd" / "result.json").read_text())["accuracy"] == truth, done
        assert (folder / "compare.csv").exists()
    else:
        assert code == 2 or "failed" in out, said


FAULTS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES, errno.ENOENT)
CALLS = ("open", "replace", "rename", "mkdir", "fsync", "link")  # of the module os


@pytest.mark.parametrize("seed", cases("disk", 1))
def test_a_failing_disk(seed, learned, tmp_path, monkeypatch):
    """A call that writes fails, by a full disk or a vanished folder; the run then goes on."""
    random = np.random.default_rng(seed)
    whole, flags = learned["sgd"]
    flags = [*flags, "--config.sequence.num_tasks=2"]
    folder = tmp_path / "run"
    flags.append(f"--workdir={folder}")
    left = int(random.integers(1, 40))  # calls until then
    fault = int(random.choice(FAULTS))
    vanishes = fault == errno.ENOENT and random.random() < 0.5

    def failing(real, writes):
        def call(*arguments, **options):
            nonlocal left
            if writes(*arguments) and (left := left - 1) == 0:
                if vanishes:
                    shutil.rmtree(folder, ignore_errors=True)
                raise OSError(fault, os.strerror(fault), str(folder))
            return real(*arguments, **options)

        return call

    def below(*arguments):
        return any(str(folder) in str(a) for a in arguments if isinstance(a, (str, os.PathLike)))

    with monkeypatch.context() as patch:
        for name in CALLS:
            writes = (lambda *_: True) if name == "fsync" else below
            patch.setattr(os, name, failing(getattr(os, name), writes))
        patch.setattr("io.open", failing(open, lambda path, mode="r", *_: "r" not in mode
                                         and below(path)))  # fmt: skip
        code, _, said = outcome(main.run, flags)
    if code == 0 and left <= 0:
        assert "no figures" in said or (folder / "result.json").exists()
    code, _, said = outcome(main.run, flags)
    if code == 2 and vanishes:  # what was still being written came after the folder had gone
        assert "holds checkpoints but no config.json" in said
        return
    assert code == 0, said
    accuracy, truth = (
        json.loads((path / "result.json").read_text())["accuracy"] for path in (folder, whole)
    )
    assert accuracy == truth


def test_without_a_home(monkeypatch, learned):
    """As in a container whose user has a number and no name: what needs no cache runs."""

    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "expanduser", unknown)
    monkeypatch.delenv("BPNJAX_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    said = "BPNJAX_CACHE_DIR is not set, and: '~/.cache' names no home folder; give a whole path"
    with pytest.raises(UserError, match=said):
        cache.cache_root()
    _, flags = learned["sgd"]
    config = main.parse(flags)[0]
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="programs are not kept"):
        patch.setattr(jax, "config", types.SimpleNamespace(jax_compilation_cache_dir=None))
        compilation.keep(config)
    assert outcome(main.run, [*flags, "--dry_run"])[0] == 0
    code, _, said = outcome(main.run, [*flags, "--dry_run", "--config.dataset.path=~me/x"])
    assert code == 2 and "dataset.path: '~me/x' names no home folder" in said


def test_two_processes_in_one_cache(pictures, tmp_path, monkeypatch):
    """Both decode, both write, one is first: the other takes what is there, which is the same."""
    folder, truth = pictures
    config = _of_pictures(folder)
    config.dataset.cache_dir = str(tmp_path / "cache")
    both, save = threading.Barrier(2, timeout=60), np.save

    def together(*arguments):
        both.wait()
        save(*arguments)

    with monkeypatch.context() as patch, futures.ThreadPoolExecutor(2) as pool:
        patch.setattr(np, "save", together)
        found = [done.result() for done in [pool.submit(load_sequence, config) for _ in range(2)]]
    for sequence in (*found, load_sequence(config)):
        assert np.array_equal(sequence.train.images, truth.train.images)
        assert np.array_equal(sequence.train.labels, truth.train.labels)
    assert not [path for path in tmp_path.rglob("*") if ".partial" in path.name]


@pytest.mark.parametrize(
    "place",
    ["plots.draw", *(pytest.param(place, marks=pytest.mark.slow)
                     for place in ("export.save_models", "writers.write_result"))],
)  # fmt: skip
def test_an_interrupt_while_results_are_written(place, learned, tmp_path, monkeypatch):
    """Nothing says that the run is complete, and the same command writes them."""
    whole, flags = learned["sgd"]
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "result.json").unlink()
    flags = [*flags, "--config.sequence.num_tasks=2", f"--workdir={folder}"]

    def pressed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"bpnjax.run.{place}", pressed)
        code, _, said = outcome(main.run, flags)
    assert code == 1 and "interrupted; run the same command again to resume" in said
    assert not (folder / "result.json").exists()
    assert outcome(main.run, flags)[0] == 0
    one, other = (json.loads((p / "result.json").read_text()) for p in (folder, whole))
    assert one["accuracy"] == other["accuracy"] and one["models"] == other["models"]


def test_an_interrupted_export_leaves_the_earlier_program(learned, tmp_path, monkeypatch):
    """The process that runs the command tells the interrupt in a line."""
    file = tmp_path / "program"
    flags = [f"--model={learned['sgd'][0]}", f"--output={file}", "--platforms=cpu"]
    file.write_bytes(b"earlier")

    def pressed(number):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", pressed)
        with pytest.raises(KeyboardInterrupt):
            deploy.run(flags)
    assert file.read_bytes() == b"earlier"
    assert outcome(deploy.run, flags)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["program", "program.json"]
