"""Evaluate a checkpoint: perplexity of documents, multiple choice, or tasks of lm-evaluation-harness.

    python tools/evaluate.py --checkpoint runs/quickstart --data PREFIX --json      # prepared token files
    python tools/evaluate.py --checkpoint runs/quickstart --text novel.txt --stride 64
    python tools/evaluate.py --checkpoint runs/quickstart --tasks questions.jsonl   # multiple choice, offline
    python tools/evaluate.py --checkpoint pythia-70m --tasks lambada_openai,piqa    # needs the extra [eval]

`--json` prints one object; of documents {"loss", "tokens", ...}: mean negative log-likelihood in nats over the tokens
that were predicted, which are all but the first of each document. A text is read as a document that follows another,
so that its first token is predicted too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from neox_native.data.indexed import IndexedDataset
from neox_native.data.sidecar import check_tokenizer, read_sidecar, vocabulary_of
from neox_native.data.tokenizers import Tokenizer, load_tokenizer
from neox_native.errors import UserError, named_as, report_user_errors
from neox_native.evaluation.choices import accuracy, read_questions
from neox_native.evaluation.perplexity import measure
from neox_native.inference.command import add_model_options, model_from, tokenizer_of
from neox_native.inference.generator import Generator
from neox_native.inference.load import Loaded
from neox_native.inference.runner import Runner
from neox_native.inference.score import Scorer
from neox_native.options import Parser, whole


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add_model_options(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="PREFIX", help="prepared token files, without .idx or .bin")
    what.add_argument("--text", type=Path, metavar="FILE", help="a text file (UTF-8), read as one document")
    what.add_argument(
        "--tasks",
        metavar="NAMES",
        help="a .jsonl file of questions, or names of lm-evaluation-harness's tasks with commas between",
    )
    parser.add_argument(
        "--stride",
        type=whole(0),
        default=0,
        metavar="TOKENS",
        help="how many tokens each window predicts: fewer than the context give each token more to look back on, and take "
        "longer (default: 0, the whole context, no overlap)",
    )
    parser.add_argument(
        "--documents", type=whole(0), default=0, metavar="N", help="read the first N documents of --data (default: 0, all)"
    )
    parser.add_argument("--include-path", metavar="FOLDER", help="more tasks for lm-evaluation-harness")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="the first N questions of each harness task (default: all)")
    parser.add_argument(
        "--num-fewshot",
        type=whole(0),
        metavar="N",
        help="examples before each question of harness tasks (default: as the task says)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def documents(prefix: str, count: int, vocab_size: int) -> Iterator[np.ndarray]:
    """Token ids of each document. Raises `UserError` where an id is none of the model's."""
    data = IndexedDataset(prefix)
    for number in range(min(count, len(data)) if count else len(data)):
        tokens = data.get(number)
        if len(tokens) and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
            raise UserError(
                f"--data {prefix}: document {number} holds the id {int(tokens.max())}, but the model's vocabulary has "
                f"model.vocab_size = {vocab_size}; the data was made with another tokenizer."
            )
        yield tokens


def text_document(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """A text file as one document, after the end of another."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read: {error}.") from None
    return np.concatenate((np.array([tokenizer.eod_id], np.int64), tokenizer.encode(text).astype(np.int64)))


def tokenizer_if_any(options: argparse.Namespace, loaded: Loaded) -> Tokenizer | None:
    """The checkpoint's own tokenizer; None, with a notice on the error stream, where it names one that is gone."""
    try:
        if loaded.tokenizer:
            load_tokenizer(loaded.tokenizer)
    except UserError as error:
        if dist.get_rank() == 0:
            print(f"Bytes and words are not counted: {error}", file=sys.stderr)
        return None
    return tokenizer_of(options, loaded) if loaded.tokenizer else None


def perplexity(options: argparse.Namespace, loaded: Loaded) -> dict[str, Any]:
    """Perplexity of `--data` or `--text`."""
    scorer = Scorer(Runner(loaded), options.batch_size)
    tokenizer = tokenizer_of(options, loaded) if options.text or options.tokenizer else tokenizer_if_any(options, loaded)
    if options.data and (sidecar := read_sidecar(IndexedDataset(options.data))):
        given = f"--tokenizer {options.tokenizer}" if options.tokenizer else f"the tokenizer of {options.checkpoint}"
        made = {options.data: vocabulary_of(sidecar)}
        check_tokenizer(made, tokenizer, given, loaded.model.vocab_size, notice=lambda _: None)
    if options.text:
        read = iter([text_document(options.text, tokenizer)])
    else:
        read = documents(options.data, options.documents, loaded.model.vocab_size)
    with named_as("stride = ", "--stride "):
        return measure(scorer, read, options.stride or scorer.context, tokenizer).report()


def tasks(options: argparse.Namespace, loaded: Loaded) -> dict[str, Any]:
    """Results of a file of questions, or of the harness's tasks."""
    runner, tokenizer = Runner(loaded), tokenizer_of(options, loaded)
    scorer = Scorer(runner, options.batch_size)
    if options.tasks.endswith(".jsonl"):
        return accuracy(scorer, tokenizer, read_questions(Path(options.tasks)))
    from neox_native.evaluation.harness import HarnessModel, evaluate_tasks  # an optional extra

    model = HarnessModel(Generator(runner, tokenizer), scorer)
    return evaluate_tasks(model, options.tasks.split(","), options.include_path, options.limit, options.num_fewshot)


def main(arguments: list[str]) -> None:
    """Evaluate; rank 0 prints."""
    options = parse(arguments)
    with model_from(options) as loaded:
        found = tasks(options, loaded) if options.tasks is not None else perplexity(options, loaded)
        if dist.get_rank() == 0:
            print(json.dumps(found) if options.json else "\n".join(lines(found)))


def lines(found: dict[str, Any]) -> Iterator[str]:
    """A result for people."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield f"{name}:"
            yield from (f"  {line}" for line in lines(value))
        else:
            yield f"{name}: {value:,.6g}" if isinstance(value, int | float) else f"{name}: {value}"


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
