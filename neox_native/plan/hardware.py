"""Accelerators by name, from `hardware.toml` beside this file or from one that `tools/plan.py calibrate` wrote."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

from neox_native.errors import UserError

BUILT_IN = Path(__file__).with_name("hardware.toml")


@dataclass(frozen=True)
class Gpu:
    """One device. `hardware.toml` says what each number means and where it comes from."""

    name: str
    peak_flops_per_second: float
    memory_bytes: float
    memory_bytes_per_second: float
    node_bytes_per_second: float
    network_bytes_per_second: float
    matmul_efficiency: float
    attention_efficiency: float
    memory_efficiency: float
    link_efficiency: float
    collective_seconds: float
    source: str


def load_gpus(path: Path = BUILT_IN) -> dict[str, Gpu]:
    """Every device of a hardware file by name.

    Raises:
        UserError: the file cannot be read or a device lacks a number.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the hardware file {path}: {error}.") from error
    wanted = {field.name for field in dataclasses.fields(Gpu)} - {"name"}
    for name, table in tables.items():
        if not isinstance(table, dict) or set(table) != wanted:
            odd = ", ".join(sorted(wanted ^ set(table))) if isinstance(table, dict) else "not a table"
            raise UserError(f"{path}: [{name}] must have exactly the entries {', '.join(sorted(wanted))}; differs in: {odd}.")
    return {name: Gpu(name, **table) for name, table in tables.items()}


def find_gpu(name: str, path: Path | None = None) -> Gpu:
    """The device called `name`, capital letters or not.

    Raises:
        UserError: unknown; the message lists the known.
    """
    gpus = load_gpus(path or BUILT_IN)
    for known, gpu in gpus.items():
        if known.lower() == name.lower():
            return gpu
    raise UserError(
        f"--gpu {name!r} is not known; the known are {', '.join(gpus)}. `tools/plan.py calibrate` measures the "
        "machine at hand and writes a file for --hardware."
    )


def gpu_of(device_name: str) -> Gpu:
    """The device that a driver's name means, memory included: "A100-40" for "NVIDIA A100-PCIE-40GB"; H100 where none is meant."""
    gpus = [gpu for name, gpu in load_gpus().items() if name.split("-")[0] in device_name]
    return max(gpus, key=lambda gpu: sum(part in device_name for part in gpu.name.split("-")), default=find_gpu("H100"))
