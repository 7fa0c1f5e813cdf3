"""GPT-NeoX's training framework in plain PyTorch."""

import os
import shlex
from pathlib import Path

__version__ = "0.1.0"


def shipped_folder(name: str) -> Path:
    """`configs` or `tools`: an installed package holds them, in a clone they lie beside it."""
    package = Path(__file__).resolve().parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def tool_command(name: str) -> str:
    """What to type for a tool: `neox-generate` of an installed package, `python tools/generate.py` in a clone."""
    tools = shipped_folder("tools")
    if tools.parent == Path(__file__).resolve().parent:
        return f"neox-{name}"
    return f"python {shlex.quote(os.path.relpath(tools / f'{name}.py'))}"
