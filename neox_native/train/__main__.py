"""The command: `python -m neox_native.train`, which is `python train.py` in the clone and `neox-train` where it is installed."""

from __future__ import annotations

import os
import signal
import sys

from neox_native import __version__


ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def choose_allocator() -> None:
    """Let torch's allocator on GPUs grow its segments, unless the user has set it: ZeRO stages 2 and 3 take and give back buffers
    of all sizes, which fragment segments of fixed size. torch reads this as it is imported."""
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def command() -> None:
    """Train as this process's command line says, and end the process."""
    if sys.argv[1:] == ["--version"]:
        print(f"neox_native {__version__}")
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback
    choose_allocator()
    from neox_native.errors import report_user_errors
    from neox_native.reliability.preemption import end_of_process
    from neox_native.train.main import main

    with end_of_process(), report_user_errors():
        main(sys.argv[1:])


if __name__ == "__main__":
    command()
