"""The README's first screen holds what a newcomer types, and .ci/run types it too."""

from __future__ import annotations

import re
from pathlib import Path

from neox_native.config.load import from_command_line

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```sh\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [line for fence in FENCES for line in fence.splitlines() if line.strip()]


def test_the_first_command_installs_and_trains_on_two_ranks() -> None:
    assert (
        "pip install" in COMMANDS[0] and "--nproc-per-node 2 train.py --config configs/quickstart.toml" in COMMANDS[0]
    )


def test_the_second_command_installs_and_tests() -> None:
    assert "pip install" in COMMANDS[1] and "[test]" in COMMANDS[1] and "pytest" in COMMANDS[1]


def test_every_training_command_loads() -> None:
    words = [
        re.split(r"\s#", command)[0].split("train.py ")[1].split() for command in COMMANDS if "train.py " in command
    ]
    for arguments in words:
        if "--help" not in arguments:
            from_command_line(arguments)


def test_every_path_in_the_readme_exists() -> None:
    named = set(re.findall(r"`((?:neox_native|configs|tests|tools|\.ci)/[\w./]*|\w+\.py)`", README))
    missing = sorted(
        name for name in named if not (ROOT / name).exists() and not list(ROOT.glob(f"neox_native/**/{name}"))
    )
    assert not missing
