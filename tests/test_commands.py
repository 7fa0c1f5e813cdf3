"""An installed package has the clone's tools and configs, and commands for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import neox_native
from neox_native import __version__, commands
from neox_native.config.load import load
from neox_native.train import __main__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_of_code_is_installed() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "neox_native").rglob("*.py")}
    shipped = {"neox_native.configs", "neox_native.tools", "neox_native.tools.benchmarks"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders | shipped


def test_every_tool_has_a_command() -> None:
    functions = {target.partition(":")[2] for target in PROJECT["project"]["scripts"].values()}
    assert functions == {path.stem.removesuffix("_data") for path in (ROOT / "tools").glob("*.py")} | {"train"}


def test_a_command_runs_its_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["neox-plan", "validate"])
    commands.plan()
    assert "Pythia 1B" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["neox-plan", "--version"])
    commands.plan()
    assert capsys.readouterr().out == f"neox_native {__version__}\n"
    __main__.command()
    assert capsys.readouterr().out == f"neox_native {__version__}\n"


def test_what_to_type_next_is_said_as_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert neox_native.tool_command("generate") == "python tools/generate.py"
    monkeypatch.chdir(ROOT / "configs")
    assert neox_native.tool_command("generate") == "python ../tools/generate.py"
    (tmp_path / "tools").mkdir()
    monkeypatch.setattr(neox_native, "__file__", str(tmp_path / "__init__.py"))
    assert neox_native.tool_command("generate") == "neox-generate"


def test_training_is_a_command_of_its_own(tmp_path: Path) -> None:
    """Away from the clone, as `neox-train`; and Ctrl-C is left to the system, and the allocator chosen, before torch is imported."""
    code = (
        # As at a terminal; a script's background ignores Ctrl-C.
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from neox_native import commands; sys.argv = ['neox-train', '--help']; "
        "sys.addaudithook(lambda event, told: event != 'import' or told[0] != 'torch' or "
        "print(signal.getsignal(signal.SIGINT), os.environ.get('PYTORCH_ALLOC_CONF')));"
        "commands.train()"
    )
    unset = {name: value for name, value in os.environ.items() if name not in __main__.ALLOCATOR_SETTINGS}
    environment = {**unset, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for setting in ("model.rotary_pct", "parallel.zero_stage", "checkpoint.async", "lr_schedule.kind"):
        assert f"--{setting} " in done.stdout
    assert done.stdout.startswith(f"{signal.SIG_DFL} expandable_segments:True\n")


@pytest.mark.parametrize("name", __main__.ALLOCATOR_SETTINGS)
def test_the_users_allocator_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in __main__.ALLOCATOR_SETTINGS:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    __main__.choose_allocator()
    assert {each: os.environ.get(each) for each in __main__.ALLOCATOR_SETTINGS if each in os.environ} == {name: "max_split_size_mb:512"}


def test_a_shipped_config_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = load("configs/20b.toml")
    monkeypatch.chdir(tmp_path)
    assert load("configs/20b.toml") == here


def test_closed_streams_are_empty_ones() -> None:
    code = (
        "import sys\nfrom neox_native.errors import report_user_errors\nwith report_user_errors():\n"
        "    print(1)\n    sys.exit(len(sys.stdin.readline()))"
    )
    words = ["bash", "-c", 'exec "$0" -c "$1" <&- >&-', sys.executable, code]
    done = subprocess.run(words, stderr=subprocess.PIPE, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "from neox_native.errors import report_user_errors\nwith report_user_errors():\n    print('x' * 100_000)"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, cwd=ROOT, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
