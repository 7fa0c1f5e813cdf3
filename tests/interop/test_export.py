"""Training writes Hugging Face folders from any layout, of the same weights as its checkpoints."""

from __future__ import annotations

import pytest

from neox_native.checkpoint.interop import CheckpointReader
from neox_native.checkpoint.interop_hf import HuggingFaceReader
from tests.interop.models import assert_equal, weights
from tests.train.test_run import corpus, run, settings

__all__ = ["corpus"]
EXPORT = ["--training.steps=3", "--checkpoint.export_hf_every=2", "--checkpoint.save_every=1", "--data.tokenizer="]
LAYOUTS = {
    "one process": ["--parallel.dp=1"],
    "pp 2, tp 2, tied": ["--parallel.pp=2", "--parallel.tp=2", "--parallel.dp=1", "--model.tie_embeddings=true"],
    "dp 2, tp 2, ZeRO-3": ["--parallel.dp=2", "--parallel.tp=2", "--parallel.zero_stage=3"],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_an_export_holds_the_weights_of_its_step(corpus, tmp_path, layout):
    run(settings(corpus, tmp_path, *EXPORT, *layout))
    exports = sorted((tmp_path / "hugging_face").iterdir())
    assert [path.name for path in exports] == ["step_000000002", "step_000000003"]
    for path in exports:
        found, saved = HuggingFaceReader(path), CheckpointReader(tmp_path / "checkpoints" / path.name)
        assert found.model == saved.model
        assert_equal(weights(found, found.model), weights(saved, saved.model))


def test_a_run_that_cannot_be_exported_is_refused_before_its_first_step(corpus, tmp_path):
    with pytest.raises(Exception, match="cannot express model.norm = 'rmsnorm'"):
        run(settings(corpus, tmp_path, *EXPORT, "--parallel.dp=1", "--model.norm=rmsnorm"))
    assert not (tmp_path / "checkpoints").exists()
