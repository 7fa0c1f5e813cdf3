"""Commands of an installed package: `neox-train` is `python train.py`, `neox-prepare` is `python tools/prepare_data.py`, and so on."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable

from neox_native import __version__, shipped_folder


def _command(start: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        if sys.argv[1:] == ["--version"]:
            print(f"neox_native {__version__}")
        else:
            start()

    return run


def _tool(name: str) -> Callable[[], None]:
    return _command(lambda: runpy.run_path(str(shipped_folder("tools") / f"{name}.py"), run_name="__main__"))


benchmark = _tool("benchmark")
compare = _tool("compare")
convert = _tool("convert")
evaluate = _tool("evaluate")
generate = _tool("generate")
plan = _tool("plan")
prepare = _tool("prepare_data")
show_batch = _tool("show_batch")
show_plan = _tool("show_plan")
show_schedule = _tool("show_schedule")
train = _command(lambda: runpy.run_module("neox_native.train", run_name="__main__"))
