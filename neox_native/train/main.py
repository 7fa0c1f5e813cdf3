"""Train a model: settings -> mesh -> data -> model and optimizer -> loop.

This is the whole story. `python train.py`, `python -m neox_native.train` and `neox-train` begin in `__main__.py`, which calls `main`.
"""

from __future__ import annotations

import torch

from neox_native.config.check import on_device, require, require_on
from neox_native.config.load import from_command_line
from neox_native.config.schema import Config
from neox_native.engine.build import build_engine, build_model, build_step, require_possible
from neox_native.launch import Launch, pick_device
from neox_native.reliability.preemption import Requests
from neox_native.train.keeping import Exports, Keeper
from neox_native.train.loop import Trainer
from neox_native.train.start import (
    batches_left, begin, choose_start, joined_ranks, lay_out_ranks, nothing_to_do, open_data, watched,
)  # fmt: skip
from neox_native.train.state import RunState

DRY_RUN = "--dry-run"


def main(arguments: list[str]) -> None:
    """Train as the command line says."""
    launch = Launch.from_environment()
    if DRY_RUN in arguments:
        from neox_native.plan.dry_run import report_of  # training does not need the planner

        settings = [word for word in arguments if word != DRY_RUN]
        return print(report_of(from_command_line(settings), launch.world_size))
    config = require(from_command_line(arguments), launch.world_size)
    require_possible(config)
    device = pick_device(config.run.device, launch)
    require_on(device.type, config)
    with Requests(launch) as requests, joined_ranks(config, device, launch):
        train(config, device, requests)


def train(config: Config, device: torch.device, requests: Requests | None = None) -> None:
    """Train on the ranks of the process group, until done or asked to leave; `config` has passed `require`."""
    config = on_device(config, device.type)
    with watched(config, device, requests) as (watchdog, requests):
        mesh, ranks, folder = lay_out_ranks(config, device)
        config, start = choose_start(config, ranks, folder, watchdog)
        data, exports = open_data(config, ranks, start, watchdog), Exports(config, folder.path, ranks)
        parts, optimizer = build_model(config, mesh, device)
        step = build_step(config, mesh, device, build_engine(config, mesh, device, parts, optimizer), optimizer)
        state = RunState(config, device, ranks, step, data, folder.path / "checkpoints")
        watchdog.at(0, "resume")
        state.start_from(start)
        if nothing_to_do(config, ranks, folder, state, exports):
            return
        batches = batches_left(config, mesh, device, data, state)
        report = begin(config, mesh, folder, start, state, step)
        keeper = Keeper(config, state, exports, report, watchdog)
        Trainer(config, mesh, ranks, step, data, state, report, keeper, watchdog, requests).run(batches)
