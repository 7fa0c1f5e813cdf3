"""Compare two runs, or two checkpoints: the first step and the first weight that differ, if any.

    python tools/compare.py runs/a runs/b                                     # logged steps, then checkpoints of the same step
    python tools/compare.py runs/a runs/b/checkpoints/step_000000200          # the checkpoint of step 200
    python tools/compare.py CHECKPOINT CHECKPOINT --json

Every logged number of the training is compared (losses, norms, learning rates, samples, named metrics, evaluations, skipped
updates), no time, throughput or memory. Settings that differ are told and are no difference. Checkpoints are compared by the
hashes of their tensors, which no layout changes, without reading the tensors; one of an earlier version is read for them.

Exit status: 0 where all is bitwise equal, 2 where something differs, 1 where it cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from neox_native.compare.runs import compare
from neox_native.errors import report_user_errors
from neox_native.options import Parser

DIFFERENT = 2
"""Exit status."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("first", type=Path, metavar="A", help="the folder of a run, or a checkpoint")
    parser.add_argument("second", type=Path, metavar="B", help="another one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Compare and print; returns the exit status."""
    options = parse(arguments)
    found = compare(options.first, options.second)
    print(json.dumps(found.as_json()) if options.json else "\n".join(found.lines()))
    return 0 if found.equal else DIFFERENT


if __name__ == "__main__":
    with report_user_errors():
        status = main(sys.argv[1:])
    sys.exit(status)
