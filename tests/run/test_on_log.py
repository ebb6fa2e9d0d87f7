"""`on_log`: each line of metrics.jsonl for a tool of the user's, and the result at the end."""

import json

import pytest

import bpnjax

pytestmark = pytest.mark.usefixtures("compile_once")


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_line_and_then_the_result(tiny, tmp_path):
    found = []
    tiny.method = "sgd"
    bpnjax.train(tiny, tmp_path / "run", on_log=found.append)
    assert found[:-1] == lines_of(tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found[-1] == {"kind": "result"} | result
    # A run that is complete is not run again: there is nothing new but what it says of itself.
    again = []
    found = bpnjax.train(tiny, tmp_path / "run", on_log=again.append)
    assert again == [{"kind": "result"} | result]
    assert found == result


def test_what_it_raises_ends_the_run_which_goes_on_later(tiny, tmp_path):
    """Nothing is lost: the checkpoint before it stays."""
    tiny.method = "sgd"
    bpnjax.train(tiny, tmp_path / "whole")

    def fail(line):
        if line["kind"] == "train" and line["task"] == 2:
            raise ConnectionError("the service is away")

    with pytest.raises(ConnectionError, match="the service is away"):
        bpnjax.train(tiny, tmp_path / "run", on_log=fail)
    assert not (tmp_path / "run" / "result.json").exists()
    later = []
    bpnjax.train(tiny, tmp_path / "run", on_log=later.append)
    assert {line["task"] for line in later[:-1]} == {2, 3}
    whole, gone_on = (lines_of(tmp_path / name) for name in ("whole", "run"))
    for line in (*whole, *gone_on):
        line.pop("examples_per_second", None)
    assert gone_on == whole


def test_train_checks_what_it_is_given(tiny, tmp_path):
    tiny.train.epochs = 0
    with pytest.raises(bpnjax.utils.errors.UserError, match=r"train\.epochs: 0 is below 1"):
        bpnjax.train(tiny, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    tiny.train.epochs, tiny.method = 1, "sgd"
    bpnjax.train(tiny, tmp_path / "run")
    tiny.train.epochs = 2
    with pytest.raises(bpnjax.utils.errors.UserError, match=r"train\.epochs: 1 -> 2"):
        bpnjax.train(tiny, tmp_path / "run")


def test_a_damaged_result_is_not_taken_for_one(tiny, tmp_path):
    tiny.train.epochs, tiny.method, tiny.sequence.num_tasks = 1, "sgd", 1
    bpnjax.train(tiny, tmp_path)
    whole = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text('{"name": "ti')
    bpnjax.train(tiny, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["accuracy"] == whole["accuracy"]
