"""What is compiled: where it is asked for, and where the code may choose."""

from __future__ import annotations

from dataclasses import replace

import pytest

from neox_native.config.check import notices, on_device, problems, require, require_on
from neox_native.config.load import CONFIGS_FOLDER, load
from neox_native.errors import UserError

QUICKSTART = CONFIGS_FOLDER / "quickstart.toml"
FORBIDDEN_TO_COMPILE = [
    ["--run.determinism=bitwise"],
    ["--run.determinism=elastic"],
    ["--training.activation_checkpointing=selective", "--model.hidden_dropout=0.1"],
    ["--parallel.pp=2", "--parallel.virtual_stages=2", "--parallel.pipeline_schedule=interleaved_zero_bubble"],
]


@pytest.mark.parametrize("overrides", FORBIDDEN_TO_COMPILE, ids=str)
def test_auto_compiles_on_gpus_what_may_be_compiled_and_says_what_may_not(overrides: list[str]) -> None:
    free, bound = require(load(QUICKSTART), 1), require(load(QUICKSTART, overrides), 2)
    assert load(None).compile.enabled == "auto" and not free.compile.on
    assert [on_device(free, kind).compile.enabled for kind in ("cuda", "cpu")] == [True, False]
    assert on_device(bound, "cuda").compile.enabled is False
    assert not [sentence for sentence in notices(free, 1, "cuda") if "compile" in sentence]
    (said,) = [sentence for sentence in notices(bound, 2, "cuda") if sentence.startswith('compile.enabled = "auto" compiles nothing: ')]
    assert said.split(": ", 1)[1] in problems(load(QUICKSTART, [*overrides, "--compile.enabled"]), 2)
    for asked in (True, False):
        told = replace(free, compile=replace(free.compile, enabled=asked))
        assert on_device(told, "cuda") == on_device(told, "cpu") == told


def test_low_precision_is_compiled_on_gpus_only() -> None:
    config = load(None, ["--compile.enabled=true", "--training.precision=bf16"])
    with pytest.raises(UserError, match='compile.enabled = true with training.precision = "bf16" needs a GPU'):
        require_on("cpu", config)
    require_on("cuda", config)
    require_on("cpu", load(None, ["--compile.enabled=true", "--training.precision=fp32"]))


def test_tensor_parallelism_overlaps_in_blocks_compiled_for_gpus_only() -> None:
    asked = ["--parallel.tp=2", "--parallel.sequence_parallel", "--parallel.async_tp"]
    config = require(load(QUICKSTART, asked), 2)
    require_on("cuda", config)
    with pytest.raises(UserError, match="parallel.async_tp = true with parallel.tp = 2 needs GPUs.* nothing to overlap"):
        require_on("cpu", config)
    with pytest.raises(UserError, match='"auto" compiles nothing: run.determinism = "bitwise" cannot hold.*set parallel.async_tp = false'):
        require_on("cuda", require(load(QUICKSTART, [*asked, "--run.determinism=bitwise"]), 2))
    require_on("cpu", require(load(QUICKSTART, asked[1:]), 1))
