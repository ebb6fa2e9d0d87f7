"""Metrics for other tools, and what a terminal sees of a run's progress."""

import csv
import importlib.util
import io
import json
import struct
import sys
import threading

import pytest

from bpnjax import config as configuration
from bpnjax.run import interrupt, log_copies, writers
from bpnjax.utils.errors import UserError

TRAIN = {
    "kind": "train", "task": 2, "epoch": 1, "step": 9, "total_steps": 27,
    "loss": [0.5, None], "accuracy": [0.75, 0.25], "examples_per_second": 1000.0,
}  # fmt: skip
TEST = {
    "kind": "evaluate", "task": 2, "task_finished": True, "total_steps": 27,
    "task_told": [[0.5, 1.0, None], [0.25, 0.0, None]],
    "task_masked": [[0.75, 1.0, None], [0.5, 0.0, None]],
    "task_inferred": [[None, None, None], [0.125, 0.0, None]],
}  # fmt: skip


def test_a_row_a_seed_and_tested_task(tmp_path):
    (copy,) = log_copies.open_copies("csv", tmp_path, first_seed=3)
    copy.write(TRAIN)
    copy.write(TEST)
    copy.close()
    train, train_2, *tests = csv.DictReader((tmp_path / "metrics.csv").open())
    assert (train["seed"], train["loss"], train["accuracy"]) == ("3", "0.5", "0.75")
    assert (train["task"], train["total_steps"], train["task_told"]) == ("2", "27", "")
    assert (train_2["seed"], train_2["loss"], train_2["accuracy"]) == ("4", "", "0.25")
    found = [[r[c] for c in ("seed", "tested", *log_copies.ACCURACIES)] for r in tests]
    assert found == [
        ["3", "1", "0.5", "0.75", ""],
        ["3", "2", "1.0", "1.0", ""],
        ["4", "1", "0.25", "0.5", "0.125"],
        ["4", "2", "0.0", "0.0", "0.0"],
    ]
    assert {r["task_finished"] for r in tests} == {"True"}


def scalars(folder):
    """(step, tag) -> value of an event file: records of a length, two checksums and a message."""
    from tensorboardX.proto import event_pb2

    (file,) = folder.iterdir()
    content, at, found = file.read_bytes(), 0, {}
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        found |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
        at += 12 + length + 4
    return found


def test_tensorboard_reads_them(tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install tensorboardX")
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(TRAIN) + "\n")
    length = path.stat().st_size
    with path.open("a") as f:
        f.write(json.dumps(TRAIN | {"total_steps": 36}) + "\n")  # to be written again
    for _ in range(2):  # as of a run that goes on: nothing twice, nothing of what was cut off
        copies = log_copies.open_copies("tensorboard", tmp_path, first_seed=3)
        log = writers.MetricsLog(path, length, copies)
        log.write(**TEST)
        log.close()
    assert scalars(tmp_path / "tensorboard" / "seed_3") == {
        (27, "train/loss"): 0.5,
        (27, "train/accuracy"): 0.75,
        (27, "train/examples_per_second"): 1000.0,
        (27, "task_told/task_1"): 0.5,
        (27, "task_told/task_2"): 1.0,
        (27, "task_masked/task_1"): 0.75,
        (27, "task_masked/task_2"): 1.0,
    }
    of_other = scalars(tmp_path / "tensorboard" / "seed_4")
    assert of_other[27, "task_inferred/task_1"] == 0.125 and (27, "train/loss") not in of_other


def test_a_wrong_name_and_a_missing_package(monkeypatch, tiny):
    tiny.log = "cvs"
    with pytest.raises(UserError, match=r"log: unknown value 'cvs'; choose from: csv, tensorboard"):
        configuration.validate(tiny)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tiny.log = "csv, tensorboard"
    with pytest.raises(UserError, match=r"log: 'tensorboard' needs .*; pip install tensorboardX$"):
        configuration.validate(tiny)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, kind):
    """Codes that move the cursor would fill a file or a pipe with rubbish."""
    screen = kind()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = writers.Progress(20, 0)
    before = screen.getvalue()
    progress.update(10, "task 1/2 (0, 1)  epoch 1/5", 0.5, 100.0)
    progress.line("task 1/2 done")
    progress.close()
    text = screen.getvalue()
    if kind is Terminal:
        assert "compiling  0%" in before
        assert "\r" in text and "task 1/2 (0, 1)  epoch 1/5  50%" in text
        assert "loss 0.5000, 100 examples/s" in text and "task 1/2 done\n" in text
        assert "/20" not in text  # steps say nothing to the one who waits
    else:
        assert text == "task 1/2 done\n"


def test_no_signals_outside_the_main_thread():
    found = []

    def run():
        with interrupt.at_a_good_place() as asked:
            found.append(asked())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]
