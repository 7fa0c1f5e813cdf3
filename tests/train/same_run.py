"""Two runs whose logs and checkpoints must be equal bit by bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from neox_native.checkpoint.files import read_hashes, read_metadata, step_folder

OF_THE_MACHINE = {"tokens_per_second", "step_seconds", "tflops_per_device", "mfu", "mfu_causal", "peak_memory_bytes"}


def logged(folder: Path) -> Iterator[dict]:
    """Every number of a run's logs that is not of the machine."""
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        yield {name: value for name, value in json.loads(line).items() if name not in OF_THE_MACHINE}
    for line in map(json.loads, (folder / "events.jsonl").read_text().splitlines()):
        if line["kind"] in ("evaluation", "bad step", "empty step"):
            yield {name: value for name, value in line.items() if name != "time"}


def assert_same_run(found: Path, expected: Path, step: int) -> None:
    """Equal logs, and equal checkpoints of `step`: tensor by tensor, and byte by byte where as many ranks wrote them."""
    for mine, theirs in zip(logged(found), logged(expected), strict=True):
        assert mine == theirs
    checkpoints = step_folder(found / "checkpoints", step), step_folder(expected / "checkpoints", step)
    assert read_hashes(checkpoints[0]) == read_hashes(checkpoints[1]) != {}
    told = [read_metadata(path) for path in checkpoints]
    if told[0]["layout"] == told[1]["layout"]:
        shards = [{path.name: path.read_bytes() for path in folder.glob("*.distcp")} for folder in checkpoints]
        assert shards[0] == shards[1]
    for each in told:
        each["config"]["run"]["dir"] = each["config"]["checkpoint"] = ""
        each["config"]["training"]["activation_checkpointing"] = each["config"]["parallel"] = each["layout"] = ""
    assert told[0] == told[1]
