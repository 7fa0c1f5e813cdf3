"""Train a model: settings -> mesh -> data -> model and optimizer -> loop.

    torchrun --standalone --nproc-per-node 2 train.py --config configs/quickstart.toml --parallel.tp 2

`python train.py --help` lists every setting. `python train.py --config FILE --dry-run` trains nothing: it says what each
rank of the config's mesh would need and send.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from neox_native.config.check import notices, require, require_on
from neox_native.config.load import from_command_line
from neox_native.config.schema import Config
from neox_native.errors import report_user_errors
from neox_native.mesh import Launch, pick_device, start_process_group
from neox_native.metrics.health import enable_flight_recorder
from neox_native.train.build import build_model
from neox_native.train.dryrun import report_of
from neox_native.train.loop import Trainer
from neox_native.train.start import after_restart, flight_recorder_folder, lay_out_ranks, open_data

DRY_RUN = "--dry-run"


def main(arguments: list[str]) -> None:
    """Train as the command line says."""
    launch = Launch.from_environment()
    if DRY_RUN in arguments:
        settings = [word for word in arguments if word != DRY_RUN]
        return print(report_of(from_command_line(settings), launch.world_size))
    config = require(from_command_line(arguments), launch.world_size)
    device = pick_device(config.run.device, launch)
    require_on(device.type, config)
    if device.type == "cuda":
        enable_flight_recorder(flight_recorder_folder(config))
    start_process_group(device, launch)
    if launch.rank == 0:
        for notice in notices(config, launch.world_size, device.type):
            print(notice)
    train(config, device)
    dist.destroy_process_group()


def train(config: Config, device: torch.device) -> None:
    """Train on the ranks of the process group; `config` has passed `require`."""
    mesh, ranks, folder = lay_out_ranks(config, device)
    config = after_restart(config, ranks)
    data = open_data(config, ranks)
    parts, optimizer = build_model(config, mesh, device)
    Trainer(config, mesh, device, parts, optimizer, data, ranks, folder).run()


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
