"""Sets that do not fit the device: the same run as with all images on it, bit for bit."""

import jax
import numpy as np
import pytest

from bpnjax.run import train
from bpnjax.training import compilation, streaming
from bpnjax.training.task_data import HostImages
from bpnjax.utils import errors, prng

pytestmark = pytest.mark.usefixtures("compile_once")


def run(config, workdir, **fields):
    """Accuracies of a run, and its final state: what answers, and what training keeps."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    states = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train.results.export, "save_models", lambda *args: states.append(args[2]) or []
        )
        result = train.train_and_evaluate(config, workdir)
    return result["accuracy"], prng.to_numbers(states[0])


REPLAY = {"replay__memory_size": 50, "replay__batch_size": 16}


# Methods that see the batch only, that keep examples of it or of the task that ended, and that
# train on all tasks; whole chunks and, after a checkpoint, chunks that are not full.
@pytest.mark.parametrize(
    "fields",
    [
        {"method": "bd_ewc", "checkpoint__every_steps": 7},
        {"method": "er", "checkpoint__every_steps": 7, **REPLAY},
        {"method": "derpp", **REPLAY},
        {"method": "gem", "gem__memories": 20},
        {"method": "joint"},
        pytest.param(
            {"method": "er", "sequence__kind": "permuted", **REPLAY}, marks=pytest.mark.slow
        ),
        {
            "method": "bd_psp",
            "sequence__kind": "permuted",
            "num_seeds": 2,
            "evaluate__rule": "statistics",
        },
    ],
    ids=lambda fields: "-".join([fields["method"], fields.get("sequence__kind", "classes")]),
)
def test_streaming_changes_nothing(tiny, tmp_path, fields, monkeypatch):
    tiny.model.hidden = (16,)
    # Two programs that are to give the same bits: by the code generator that users have.
    monkeypatch.setitem(compilation._ON_CPU, "xla_cpu_use_fusion_emitters", True)
    chunks = []
    monkeypatch.setattr(streaming, "_chunks", spy(streaming._chunks, chunks))
    whole = run(tiny, tmp_path / "whole", **fields)
    assert not chunks
    # A batch of 32 takes 2 kB: four steps a chunk.
    streamed = run(tiny, tmp_path / "streamed", **fields, dataset__device_mb=0.034)
    assert chunks == ([] if "num_seeds" in fields else [4])  # seeds ask for each batch themselves
    for kind, accuracy in whole[0].items():
        np.testing.assert_array_equal(accuracy, streamed[0][kind])
    jax.tree.map(np.testing.assert_array_equal, whole[1], streamed[1])


def spy(function, seen):
    def spied(*args):
        seen.append(args[-1])
        return function(*args)

    return spied


def test_too_little_for_a_batch_is_refused(tiny, tmp_path):
    with pytest.raises(errors.UserError, match="dataset.device_mb: 0.001 MB cannot hold 4 batches"):
        run(tiny, tmp_path, dataset__device_mb=0.001)


def test_images_on_the_host_are_indexed_like_an_array():
    array = np.arange(24, dtype=np.uint8).reshape(6, 2, 2)
    held = HostImages(array)
    rows = np.array([[5, 0], [3, 3]])
    np.testing.assert_array_equal(jax.jit(lambda r: held[r])(rows), array[rows])
    np.testing.assert_array_equal(jax.vmap(lambda r: held[r])(rows), array[rows])
