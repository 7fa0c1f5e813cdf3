"""Generate text from a checkpoint, on one process or on a tensor- and pipeline-parallel mesh.

    python tools/generate.py --checkpoint runs/quickstart --prompt "def main("
    torchrun --standalone --nproc-per-node 2 tools/generate.py --checkpoint runs/quickstart --prompts prompts.txt --json
    python tools/generate.py --checkpoint pythia-70m --temperature 0.8 --top-p 0.95        # asks for prompts
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from neox_native.errors import UserError, report_user_errors
from neox_native.inference.command import add_model_options, model_from, tokenizer_of
from neox_native.inference.generator import Generator, Limits, Row
from neox_native.inference.runner import Runner
from neox_native.inference.sampling import Sampling
from neox_native.launch import Ranks
from neox_native.options import Parser, number, number_above, whole

DEFAULTS, LIMITS = Sampling(), Limits()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add_model_options(parser)
    text = parser.add_argument_group("prompts (neither: asks for them)")
    text.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to go on from; may be given several times"
    )
    text.add_argument(
        "--prompts", type=Path, metavar="FILE", help='a file: one prompt per line, or .jsonl with {"prompt": ...}'
    )
    add_generation_options(parser.add_argument_group("generation"))
    shown = parser.add_argument_group("output")
    shown.add_argument("--json", action="store_true", help="one JSON object per answer")
    shown.add_argument("--logprobs", action="store_true", help="with the log-probability of every token (in the JSON objects)")
    return parser.parse_args(arguments)


def add_generation_options(how: argparse._ArgumentGroup) -> None:
    """How tokens are drawn, and when an answer ends."""
    how.add_argument(
        "--max-new-tokens",
        type=whole(1),
        default=LIMITS.max_new_tokens,
        metavar="N",
        help="most tokens of an answer (default: %(default)s)",
    )
    how.add_argument(
        "--temperature",
        type=number(0),
        default=DEFAULTS.temperature,
        metavar="T",
        help="divides the logits: a lower one gives likelier answers (default: 0, always the most probable token)",
    )
    how.add_argument(
        "--top-k",
        type=whole(0),
        default=DEFAULTS.top_k,
        metavar="K",
        help="draw among the K most probable tokens only (default: 0, all)",
    )
    how.add_argument(
        "--top-p",
        type=number_above(0, most=1),
        default=DEFAULTS.top_p,
        metavar="P",
        help="draw among the most probable tokens that together reach this probability (default: 1, all)",
    )
    how.add_argument(
        "--repetition-penalty",
        type=number_above(0),
        default=DEFAULTS.repetition_penalty,
        metavar="X",
        help="above 1: tokens that occurred become less likely (default: 1, none)",
    )
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be given several times")
    how.add_argument("--seed", type=whole(), default=DEFAULTS.seed, metavar="N", help="of the draws (default: %(default)s)")
    how.add_argument(
        "--samples", type=whole(1), default=LIMITS.samples, metavar="N", help="answers to each prompt (default: 1)"
    )
    how.add_argument("--ignore-end", action="store_true", help="go on after the end of a document")
    how.add_argument("--no-cache", action="store_true", help="compute every position anew for every token")


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file. Raises `UserError` where it cannot be read or a line is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}.") from None
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f'--prompts {path}, line {number}: is no JSON object with a "prompt".') from None
    return prompts


def asked(ranks: Ranks) -> Iterator[str]:
    """Prompts typed on rank 0, until the end of its input."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # all ranks shall refuse what is no text
    while True:
        line = None
        if ranks.rank == 0:
            print("prompt> ", end="", flush=True)
            line = sys.stdin.readline() or None
        line = ranks.from_first(line)
        if line is None:
            return
        yield line.rstrip("\n")


def as_json(row: Row, prompt: str, with_logprobs: bool) -> str:
    """One answer on a line."""
    found = {"prompt": prompt, "sample": row.sample, "text": row.text, "finish": row.finish, "tokens": row.new_tokens}
    if with_logprobs:
        found["logprobs"] = row.logprobs[: len(row.new_tokens)]
    return json.dumps(found, ensure_ascii=False)


def show(rows: list[Row], prompts: list[str], options: argparse.Namespace) -> None:
    """Print a batch of answers that were not streamed."""
    for row in rows:
        prompt = prompts[row.prompt]
        if options.json or options.logprobs:
            print(as_json(row, prompt, options.logprobs), flush=True)
        else:
            print(f"--- prompt {row.prompt + 1}, sample {row.sample + 1} ({row.finish})\n{prompt}{row.text}", flush=True)


def main(arguments: list[str]) -> None:
    """Answer all prompts; rank 0 prints."""
    options = parse(arguments)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.repetition_penalty, options.seed)
    limits = Limits(options.max_new_tokens, options.stop, options.samples, options.ignore_end, options.logprobs)
    prompts = options.prompt + (read_prompts(options.prompts) if options.prompts else [])
    if options.prompts and not prompts:
        raise UserError(f"--prompts {options.prompts} holds no prompt.")
    with model_from(options) as loaded:
        generator = Generator(Runner(loaded), tokenizer_of(options, loaded), use_cache=not options.no_cache)
        ranks, speaks = Ranks(), dist.get_rank() == 0
        streams = speaks and options.samples == 1 and not options.json and not options.logprobs
        for prompt in prompts:
            generator.encode(prompt)  # refuses what cannot be answered before it answers the first
        if len(prompts) > 1 or options.samples > 1 and prompts:
            for first in range(0, len(prompts), options.batch_size):
                batch = prompts[first : first + options.batch_size]
                rows = generator(batch, sampling, limits)
                if speaks:
                    show(rows, batch, options)
            return
        for prompt in prompts or asked(ranks):
            generator.encode(prompt)
            if streams:
                print(prompt, end="", flush=True)
            rows = generator(
                [prompt], sampling, limits, (lambda _row, piece: print(piece, end="", flush=True)) if streams else None
            )
            if streams:
                print(flush=True)
            elif speaks:
                show(rows, [prompt], options)


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
