"""GPT-NeoX's training framework in plain PyTorch."""

from pathlib import Path

__version__ = "0.1.0"


def shipped_folder(name: str) -> Path:
    """`configs` or `tools`: an installed package holds them, in a clone they lie beside it."""
    package = Path(__file__).resolve().parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name
