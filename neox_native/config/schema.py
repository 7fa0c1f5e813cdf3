"""Every setting of a run: one frozen dataclass per TOML section, in the files of `sections`.

The string under each field is its documentation; `train.py --help` prints it. Units stand in brackets.
A field whose name is a Python keyword carries a trailing underscore here and none in TOML (`async_` is `async`).
A number's range stands in its type (`ranges.py`); with none there, it is zero or more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from neox_native.config.sections.data import Data
from neox_native.config.sections.layout import Compile, Parallel
from neox_native.config.sections.model import Model
from neox_native.config.sections.run import Checkpoint, Evaluation, Logging, Run
from neox_native.config.sections.training import LrSchedule, Objective, Optimizer, Training

__all__ = [
    "Checkpoint",
    "Compile",
    "Config",
    "Data",
    "Evaluation",
    "Logging",
    "LrSchedule",
    "Model",
    "Objective",
    "Optimizer",
    "Parallel",
    "Run",
    "Training",
]


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: Run = Run()
    model: Model = Model()
    data: Data = field(default_factory=Data)
    training: Training = Training()
    objective: Objective = Objective()
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_schedule: LrSchedule = LrSchedule()
    parallel: Parallel = field(default_factory=Parallel)
    compile: Compile = Compile()
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
