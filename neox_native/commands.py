"""Commands of an installed package: `neox-prepare` is `python tools/prepare_data.py`, and so on."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable

from neox_native import __version__, shipped_folder


def _command(tool: str) -> Callable[[], None]:
    def run() -> None:
        if sys.argv[1:] == ["--version"]:
            print(f"neox_native {__version__}")
        else:
            runpy.run_path(str(shipped_folder("tools") / f"{tool}.py"), run_name="__main__")

    return run


benchmark = _command("benchmark")
convert = _command("convert")
evaluate = _command("evaluate")
generate = _command("generate")
plan = _command("plan")
prepare = _command("prepare_data")
show_batch = _command("show_batch")
show_plan = _command("show_plan")
show_schedule = _command("show_schedule")
