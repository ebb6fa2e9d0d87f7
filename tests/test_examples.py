"""The examples run as they are, in small."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from command import ROOT

pytestmark = pytest.mark.usefixtures("compile_once")


def test_own_loop(tmp_path):
    """One loop, three networks, five methods; on digits, which need no download."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "own_loop.py", "200"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "scikit-learn's digits" in done.stdout
    networks = done.stdout.split("\n\n")[1:]
    assert len(networks) == 3
    for text in networks:
        rows = {
            name: np.array(numbers.split(), float)
            for name, numbers in re.findall(r"^(\w+) +([\d. ]+)$", text, re.MULTILINE)
        }
        assert list(rows) == ["sgd", "bd_ewc", "bd_psp", "er", "lwf"], text
        told = {name: row[:3] for name, row in rows.items()}
        for name, row in rows.items():
            assert np.allclose(row[3], told[name].mean(), atol=1e-3)
            assert (row[:5] >= 0).all() and (row[:5] <= 1).all()
        # Fine-tuning forgets; the modes of BD keep the earlier tasks.
        assert told["sgd"].mean() + 0.2 < told["bd_psp"].mean()
        assert told["sgd"][0] < told["bd_psp"][0]
        kept, trained = (np.array([row[i] for row in rows.values()]) for i in (5, 6))
        assert (kept <= trained).all()
        assert kept[0] == kept[3] == kept[4] < kept[1] == kept[2]  # a bias per unit and task
        assert trained[0] < trained[4] < trained[1]  # a teacher; a Fisher, an anchor and a bank


def environment():
    """That of the tests, but for sets that are prepared."""
    kept = {name: value for name, value in os.environ.items() if name != "TFDS_DATA_DIR"}
    return kept | {"PYTHONPATH": str(ROOT)}
