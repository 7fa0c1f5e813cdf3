"""Measure this code on this machine, beside its peers where it has any, and print Markdown tables for the README.

    python tools/benchmark.py                the training loop beside DistributedDataParallel; one process, tp 2, pp 2
    python tools/benchmark.py --peers        ZeRO beside DDP, ZeroRedundancyOptimizer and fully_shard
    python tools/benchmark.py --checkpoint   saving and loading beside torch.save
    python tools/benchmark.py --data         preparation, index, loader
    python tools/benchmark.py --generate     generation beside Hugging Face
    python tools/benchmark.py --determinism  the modes of run.determinism beside each other
    python tools/benchmark.py --gpu          one GPU: rates, attention, Pythia 1B, 1.4B and 2.8B in five configurations, peers
"""

from __future__ import annotations

import datetime
import importlib
import platform
import sys
from pathlib import Path

import torch

from neox_native.errors import report_user_errors
from neox_native.metrics.throughput import device_name
from neox_native.options import Parser

SUBJECTS = ("training", "peers", "checkpoint", "data", "generate", "determinism", "gpu")


def machine() -> str:
    """What the figures were measured on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = f"{len(names)} x {names[0]}" if names else model
    gpu = f", {device_name(device)}" if device.type == "cuda" else ""
    return f"{model}{gpu}, torch {torch.__version__}, {datetime.date.today().isoformat()}"


def main(arguments: list[str]) -> None:
    """Run one subject's benchmark."""
    parser = Parser(description=__doc__)
    choice = parser.add_mutually_exclusive_group()
    for subject in SUBJECTS:
        choice.add_argument(f"--{subject}", dest="subject", action="store_const", const=subject, help="see above")
    subject = parser.parse_args(arguments).subject or "training"
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools is a folder of the clone, not of the package
    benchmark = importlib.import_module(f"tools.benchmarks.{subject}")
    getattr(benchmark, "require_device", lambda: None)()
    print(f"`python tools/benchmark.py --{subject}` on {machine()}\n", flush=True)
    print(benchmark.run())


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
