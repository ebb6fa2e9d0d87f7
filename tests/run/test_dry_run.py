"""What a run would be, without one."""

import json

from bpnjax import config, main, methods


def test_dry_run_says_what_the_run_then_is(tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = tiny_flags(num_seeds=2, train__epochs=1)
    assert main.run([*flags, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert main.run([*flags, "--workdir=run"]) == 0
    memory = json.loads((tmp_path / "run" / "result.json").read_text())["memory"]
    assert f"{memory['core_parameters']:,} shared parameters" in said
    assert f"{memory['parameters_per_task']:,} numbers ({memory['bytes_per_task']:,} byt" in said
    assert f"{2 * memory['training_bytes'] / 1e6:,.1f} MB of state in training, 2 seeds" in said
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert f"steps     {steps[-1]['total_steps']:,} of 32 examples" in said
    assert "train.epochs = 1" in said and "tasks     3" in said
    assert "hidden_0: dense, 64 -> 16" in said and "time      about " in said


def test_dry_run_refuses_what_a_run_would(tiny_flags, capsys):
    flags = tiny_flags(bd__layers="nothing")
    assert main.run([*flags, "--dry_run"]) == 2
    assert "bd.layers" in capsys.readouterr().err


def test_help_names_methods_and_the_configs_at_hand(capsys):
    assert main.run(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {field} = " in said for field in config.flatten(config.default()))
    listed = said.split("methods:")[1].split("fields of")[0].replace(",", " ").split()
    assert listed == list(methods.REGISTRY)
    listed = said.split("of the package:")[1].split("methods:")[0].replace(",", " ").split()
    assert listed == ["default", *config.packaged()]
