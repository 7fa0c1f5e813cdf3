"""Train a model: settings -> mesh -> data -> model and optimizer -> loop.

    torchrun --standalone --nproc-per-node 2 train.py --config configs/quickstart.toml --parallel.tp 2

`python train.py --help` lists every setting. `python train.py --config FILE --dry-run` trains nothing: it says what each
rank of the config's mesh would need and send.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import torch

from neox_native.config.check import require, require_on
from neox_native.config.load import from_command_line
from neox_native.config.schema import Config
from neox_native.errors import report_user_errors
from neox_native.mesh import Launch, pick_device
from neox_native.metrics.preemption import Requests, end_of_process
from neox_native.train.build import build_model
from neox_native.train.dryrun import report_of
from neox_native.train.loop import Trainer
from neox_native.train.start import choose_start, joined_ranks, lay_out_ranks, open_data, watched

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
    with Requests(launch) as requests, joined_ranks(config, device, launch):
        train(config, device, requests)


def train(config: Config, device: torch.device, requests: Requests | None = None) -> None:
    """Train on the ranks of the process group, until done or asked to leave; `config` has passed `require`."""
    with watched(config, requests) as (watchdog, requests):
        mesh, ranks, folder = lay_out_ranks(config, device)
        config, start = choose_start(config, ranks, folder, watchdog)
        data = open_data(config, ranks, start, watchdog)
        parts, optimizer = build_model(config, mesh, device)
        Trainer(config, mesh, device, parts, optimizer, data, ranks, folder, start, watchdog, requests).run()


if __name__ == "__main__":
    with end_of_process(), report_user_errors():
        main(sys.argv[1:])
