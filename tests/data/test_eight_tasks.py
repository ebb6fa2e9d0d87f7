"""The eight sets in sequence, two steps a task, on archives and sets made here in their layouts."""

import io
import json

import numpy as np
import pytest
from command import ROOT
from official_archives import WRITE
from support import encoded, write_prepared

from bpnjax import main
from bpnjax.data import load_sequence, tfds_prepare
from bpnjax.run import plots

CONFIG = f"--config={ROOT / 'configs' / 'eight_tasks.py'}"
CLASSES = (102, 67, 200, 196, 70, 10, 62, 10)
# As configured but for the widths, the steps and where the sets are.
SMALL = [
    "--config.train.epochs=1", "--config.train.batch_size=2",
    "--config.sequence.examples_per_task=3", "--config.dataset.workers=0",
    "--config.model.channels=(2,2,2,2,2)", "--config.model.hidden=(4,4)",
    "--config.bd.hidden_dim=2", "--config.evaluate.inferred_rows=last",
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("eight"), np.random.default_rng(0)
    for name, write in WRITE.items():
        write(root / "archives")
        tfds_prepare.ensure_prepared(name, root / "data", root / "archives", verify=False)
    import tensorflow_datasets as tfds

    mask = encoded(np.ones((60, 80), np.uint8))
    more = {
        "bbox": lambda: tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
        "segmentation_mask": lambda: io.BytesIO(mask),
    }
    for name in ("oxford_flowers102", "caltech_birds2011", "cars196", "svhn_cropped"):
        size = (32, 32, 3) if name == "svhn_cropped" else (60, 80, 3)

        def rows(number, size=size):
            images = rng.integers(0, 256, (number, *size), np.uint8)
            return [(encoded(image, "JPEG"), i % 10) for i, image in enumerate(images)]

        splits = {"train": rows(3), "test": rows(2)}
        if name == "oxford_flowers102":
            splits["validation"] = rows(4)
        write_prepared(root / "data", name, splits, **more)
    return root / "data"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bd_psp", "bd_ewc"])
def test_two_steps_of_each_task(prepared, tmp_path, capsys, monkeypatch, method):
    pytest.importorskip("grain", reason="grain is not installed")
    monkeypatch.setattr(plots, "draw", lambda workdir, result: [])
    flags = [CONFIG, *SMALL, f"--config.dataset.data_dir={prepared}", f"--config.method={method}"]
    config, *_ = main.parse(flags)
    assert config.dataset.augment == "crop_flip" and config.dataset.resize == (224, 224, 3)
    sequence = load_sequence(config)
    assert sequence.train.images.shape[1:] == (224, 224, 3)
    assert sequence.classes.sum(1).tolist() == list(CLASSES)
    # Flowers: 3 to train and 4 to validate.
    assert (np.asarray(sequence.files.which) == 0).sum() == 7

    assert main.run([*flags, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "tasks     8" in said and "steps     16 of 2 examples" in said
    assert main.run([*flags, f"--workdir={tmp_path / 'run'}"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for kind, matrix in result["accuracy"].items():
        last = np.array(matrix, float)[0, -1]
        assert last.shape == (8,) and ((last >= 0) & (last <= 1)).all(), kind
    assert [len(names) for names in result["class_names"]] == list(CLASSES)
    assert f"{result['memory']['core_parameters']:,} shared parameters" in said
    assert result["paper"]["average_accuracy"] == {"bd_psp": 0.5887, "bd_ewc": 0.5287}[method]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    steps = [line["total_steps"] for line in lines if line["kind"] == "train"]
    assert steps[-1] == 16


def test_a_dry_run_without_the_sets_names_them_and_their_archives(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.run([CONFIG, f"--config.dataset.data_dir={tmp_path}", "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("bpnjax: dataset.name: 8 of 8 sets are not prepared") and said[-1] == "\n"
    )
    assert said.count("\n") == 1
    files = ("102flowers.tgz", "fgvc-aircraft-2013b.tar.gz", "EnglishImg.tgz", "train_32x32.mat")
    for words in (*files, "svhn_cropped", "--config.dataset.manual_dir=DIR"):
        assert words in said
    assert not list(tmp_path.iterdir())
