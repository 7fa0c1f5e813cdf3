"""Train a model: settings -> mesh -> model -> data -> optimizer -> loop.

    torchrun --standalone --nproc-per-node 2 train.py --config configs/quickstart.toml --parallel.tp 2

`python train.py --help` lists every setting.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from neox_native.checkpoint.agree import Ranks
from neox_native.config.check import notices, require
from neox_native.config.load import from_command_line
from neox_native.config.schema import Config
from neox_native.data.build import build_data
from neox_native.errors import report_user_errors
from neox_native.mesh import Launch, build_mesh, pick_device, start_process_group
from neox_native.train.build import build_model
from neox_native.train.folder import open_run_folder
from neox_native.train.loop import Trainer


def main(arguments: list[str]) -> None:
    """Train as the command line says."""
    launch = Launch.from_environment()
    config = require(from_command_line(arguments), launch.world_size)
    device = pick_device(config.run.device, launch)
    start_process_group(device, launch)
    if launch.rank == 0:
        for notice in notices(config, launch.world_size, device.type):
            print(notice)
    train(config, device)
    dist.destroy_process_group()


def train(config: Config, device: torch.device) -> None:
    """Train on the ranks of the process group; `config` has passed `require`."""
    torch.use_deterministic_algorithms(config.run.determinism == "bitwise")
    ranks = Ranks()
    open_run_folder(config, ranks)
    mesh = build_mesh(config.parallel, device)
    data = build_data(
        config.data,
        seq_length=config.model.seq_length,
        vocab_size=config.model.vocab_size,
        seed=config.run.seed,
        global_batch_size=config.training.global_batch_size,
        steps=config.training.steps,
        eval_every=config.evaluation.every,
        eval_batches=config.evaluation.batches,
        is_writer=ranks.rank == 0,
        wait=dist.barrier,
    )
    parts, optimizer = build_model(config, mesh, device)
    Trainer(config, mesh, device, parts, optimizer, data, ranks).run()


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
