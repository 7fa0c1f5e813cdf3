"""Every shipped config loads, fits the ranks it was laid out for, and builds the model it is named after."""

from __future__ import annotations

import math

import pytest
import torch

from neox_native.config.check import require
from neox_native.config.load import CONFIGS_FOLDER, load
from neox_native.model.transformer import Transformer

# Parameters of the paper's models, 2 V h + L (12 h^2 + 13 h) + 2 h with the padded vocabulary V.
PARAMETERS = {
    "pythia/14m": 14_067_712,
    "pythia/31m": 30_494_720,
    "pythia/70m": 70_426_624,
    "pythia/160m": 162_322_944,
    "pythia/410m": 405_334_016,
    "pythia/1b": 1_011_781_632,
    "pythia/1.4b": 1_414_647_808,
    "pythia/2.8b": 2_775_208_960,
    "pythia/6.9b": 6_857_302_016,
    "pythia/12b": 11_846_072_320,
    "20b": 20_554_567_680,
}
# Ranks of the original runs; a Pythia model also runs on any other number that its batch divides by.
RANKS = {
    "quickstart": 2,
    "20b": 64,
    **{f"pythia/{size}": 32 for size in ("14m", "31m", "70m", "160m", "410m")},
    **{f"pythia/{size}": 64 for size in ("1b", "1.4b", "2.8b")},
    "pythia/6.9b": 128,
    "pythia/12b": 256,
    **dict(
        zip(
            (
                f"ladder/{rung}"
                for rung in ("1_serial", "2_data", "3_zero1", "4_zero3", "5_tensor", "6_pipeline", "7_three_d")
            ),
            (1, 2, 2, 2, 4, 4, 8),
            strict=True,
        )
    ),
}


def shipped(name: str) -> str:
    return str(CONFIGS_FOLDER / f"{name}.toml")


def test_every_shipped_config_is_tested() -> None:
    found = {str(path.relative_to(CONFIGS_FOLDER).with_suffix("")) for path in CONFIGS_FOLDER.rglob("*.toml")}
    assert found == {*RANKS, "pythia/base"}


@pytest.mark.parametrize("name", RANKS)
def test_config_fits_its_ranks(name: str) -> None:
    require(load(shipped(name)), RANKS[name])


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_the_papers_to_the_unit(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(load(shipped(name)).model)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_learning_rate_falls_to_a_tenth_of_its_peak(name: str) -> None:
    config = load(shipped(name))
    assert math.isclose(config.lr_schedule.min_lr, config.optimizer.lr / 10, rel_tol=1e-9)


def test_20b_is_laid_out_for_64_gpus_with_the_papers_batch() -> None:
    config = load(shipped("20b"))
    parallel = config.parallel
    assert (parallel.pp, parallel.dp, parallel.tp, parallel.zero_stage) == (4, 8, 2, 1)
    assert config.training.global_batch_size * config.model.seq_length == 3_145_728  # tokens a step


def test_each_rung_of_the_ladder_changes_the_layout_alone() -> None:
    rungs = sorted((CONFIGS_FOLDER / "ladder").glob("*.toml"))
    serial = load(rungs[0])
    assert len({load(rung).run.dir for rung in rungs}) == len(rungs)
    for rung in rungs:
        config = load(rung)
        assert (config.model, config.data, config.training) == (serial.model, serial.data, serial.training)
        assert (config.optimizer, config.lr_schedule) == (serial.optimizer, serial.lr_schedule)
    for below, rung in zip(rungs, rungs[1:], strict=False):
        assert f'extends = "{below.name}"' in rung.read_text(encoding="utf-8")
