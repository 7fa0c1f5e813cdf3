"""Will it fit, how fast, which layout? Nothing here needs the GPUs that it speaks of.

    python tools/plan.py dry-run --config configs/20b.toml --world-size 64 [--rank R] [--json]
    python tools/plan.py search --config configs/20b.toml --gpus 64 --gpu H100 [--top 5] [--write best.toml]
    python tools/plan.py predict --config configs/pythia/1b.toml --gpus 8 --gpu H100
    python tools/plan.py calibrate --config configs/pythia/1b.toml --like H100 --write machine.toml
    python tools/plan.py validate

Settings may follow each but the last, as --parallel.tp 4; `python train.py --help` lists them. `COMMAND --help` lists a command's options.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from neox_native.config.check import on_device, require, require_some_layout
from neox_native.config.load import dump, load
from neox_native.errors import UserError, named_as, report_user_errors
from neox_native.options import Parser, whole
from neox_native.plan import published
from neox_native.plan.hardware import find_gpu
from neox_native.plan.search import outlook, reasons, search, table
from neox_native.plan.speed import Machine

SETTINGS_FOLLOW = " Settings may follow, as --parallel.tp 4; `python train.py --help` lists them."


def dry_run(options: argparse.Namespace, overrides: list[str]) -> None:
    """Run one rank, or the distinct ones, and print what they need."""
    from neox_native.plan import dry_run

    with named_as("torchrun started", "--world-size is"):
        config = require(load(options.config, overrides), options.world_size)
        config = on_device(config, "cpu" if config.run.device == "cpu" else "cuda")
    if options.rank is not None and not 0 <= options.rank < options.world_size:
        raise UserError(f"--rank {options.rank} is none of the ranks 0 to {options.world_size - 1} of --world-size.")
    ranks = dry_run.distinct_ranks(config, options.world_size) if options.rank is None else [options.rank]
    reports = [dry_run.dry_run(config, rank, options.world_size) for rank in ranks]
    if options.json:
        for report in reports:
            print(json.dumps(dataclasses.asdict(report)))
    else:
        print(dry_run.text(reports))


def search_layouts(options: argparse.Namespace, overrides: list[str]) -> None:
    """Print the best layouts and why the others lost; write the best."""
    if options.write:
        require_writable(options.write)
    config = load(options.config, overrides)
    hardware = Path(options.hardware) if options.hardware else None
    machine = Machine(find_gpu(options.gpu, hardware), options.gpus_per_node)
    candidates = search(config, options.gpus, machine)
    fitting = sum(candidate.time is not None for candidate in candidates)
    print(f"{len(candidates)} layouts can work on {options.gpus} {machine.gpu.name}, {fitting} fit:\n")
    print(table([candidate for candidate in candidates[: options.top] if candidate.time is not None]))
    print("\nWhat lost, and why:\n" + "\n".join(reasons(candidates, machine)))
    if options.write:
        Path(options.write).write_text(dump(require(candidates[0].config, options.gpus)), encoding="utf-8")
        print(f"\nWrote {options.write}.")


def predict(options: argparse.Namespace, overrides: list[str]) -> None:
    """Print the memory and the time of a step of a config as it is, by the closed forms."""
    machine = Machine(find_gpu(options.gpu, Path(options.hardware) if options.hardware else None), options.gpus_per_node)
    with named_as("torchrun started", "--gpus is"):
        config = on_device(require(load(options.config, overrides), options.gpus), "cuda")
    print(f"{options.gpus} {machine.gpu.name}: {outlook(config, machine)}")


def calibrate(options: argparse.Namespace, overrides: list[str]) -> None:
    """Measure this machine and write a hardware file; under torchrun its links, too."""
    import torch.distributed as dist

    from neox_native.launch import Launch, pick_device, start_process_group
    from neox_native.metrics.throughput import device_name
    from neox_native.plan.calibrate import calibrate as measure, to_toml

    require_writable(options.write)
    config, launch = load(options.config, overrides), Launch.from_environment()
    require_some_layout(config)
    with named_as("--gpu", "--like"):
        known = find_gpu(options.like)
    device = pick_device(config.run.device, launch)
    if launch.world_size > 1:
        start_process_group(device, launch)
    gpu = measure(config, device, known, device_name(device))
    if launch.rank == 0:
        Path(options.write).write_text(to_toml(gpu), encoding="utf-8")
        print(f"{to_toml(gpu)}\nWrote {options.write}; use it with --hardware {options.write} --gpu {gpu.name!r}.")
    if dist.is_initialized():
        dist.destroy_process_group()


def require_writable(file: str) -> None:
    """Say now, and not after all the work, that --write names what cannot be written."""
    path = Path(file)
    if path.is_dir():
        raise UserError(f"--write {file} is a folder; name a file, such as {path / 'best.toml'}.")
    if not path.parent.is_dir():
        raise UserError(f"--write {file} lies in no folder that exists; create {path.parent}, or name another file.")
    existed = path.exists()
    try:
        open(path, "ab").close()  # permissions do not tell of read-only disks or /proc
    except OSError as error:
        raise UserError(f"--write {file} cannot be written: {error.strerror}; name another file.") from None
    if not existed:
        path.unlink()


def validate(_options: argparse.Namespace, _overrides: list[str]) -> None:
    """Print the time model's predictions beside published throughput."""
    print(published.table(published.comparisons()))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[..., None], config: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=function.__doc__, description=f"{function.__doc__}{SETTINGS_FOLLOW}")
        added.add_argument("--config", required=True, metavar="FILE", help=config)
        added.set_defaults(run=function)
        return added

    dry = command("dry-run", dry_run, "the run's config")
    dry.add_argument("--world-size", type=whole(1), required=True, metavar="RANKS", help="ranks (GPUs) of the run")
    dry.add_argument("--rank", type=whole(0), metavar="R", help="this rank alone, from 0 (default: one of each kind)")
    dry.add_argument("--json", action="store_true", help="print one JSON object a rank")

    find = command("search", search_layouts, "the run's config; its layout is what is searched")
    for added in (find, command("predict", predict, "the run's config")):
        added.add_argument("--gpus", type=whole(1), required=True, metavar="N", help="GPUs of the run")
        added.add_argument("--gpu", required=True, metavar="NAME", help="their kind, such as H100")
        added.add_argument("--gpus-per-node", type=whole(1), default=8, metavar="N", help="GPUs that fast links join (default: 8)")
        added.add_argument("--hardware", metavar="FILE", help="a file that calibrate wrote (default: the built-in devices)")
    find.add_argument("--top", type=whole(1), default=5, metavar="N", help="layouts to print (default: 5)")
    find.add_argument("--write", metavar="FILE", help="write the config with the best layout here")

    measure = command("calibrate", calibrate, "whose shapes to measure")
    measure.add_argument(
        "--like", required=True, metavar="NAME", help="known device that gives the peak and what cannot be measured"
    )
    measure.add_argument("--write", required=True, metavar="FILE", help="where to write what was measured (TOML)")

    about = validate.__doc__
    commands.add_parser("validate", help=about, description=about).set_defaults(run=validate)
    return top


def main(arguments: list[str]) -> None:
    """Run the command."""
    options, overrides = parser().parse_known_args(arguments)
    options.run(options, overrides)


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
