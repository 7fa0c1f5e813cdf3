"""What did step N see? Answers from the config alone, without a GPU and without reading the corpus.

    python tools/show_batch.py --config configs/quickstart.toml --step 7                  the rows of the step
    python tools/show_batch.py --config configs/quickstart.toml --step 7 --rank 1 --parallel.dp 2
    python tools/show_batch.py --config configs/quickstart.toml --document 12             the steps and rows that see it
    python tools/show_batch.py --config configs/quickstart.toml --hash 1:20               the steps' batch_hash

Steps count from 1, as in metrics.jsonl, whose `batch_hash` is the one shown here. `--json` prints one object a line.
A run that went on with another batch size or more steps reads on in the order of the checkpoint it resumed: name that
with `--checkpoint` to see what came after it. `--config FILE` is needed, and settings may follow, as --parallel.dp 2;
`python train.py --help` lists them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from neox_native.checkpoint.files import read_metadata
from neox_native.config.load import from_command_line
from neox_native.config.schema import Config, Evaluation
from neox_native.data.build import Position, build_data
from neox_native.data.dataset import Dataset
from neox_native.data.loader import as_signed, format_hash, hash_row
from neox_native.data.order import rows_of_rank
from neox_native.data.tokenizers import Tokenizer, load_tokenizer
from neox_native.errors import UserError, report_user_errors
from neox_native.launch import Ranks
from neox_native.options import Parser, whole

SHOWN_CHARACTERS = 160
QUESTION_OF = {"rank": "step", "consumed": "step", "dataset": "document"}
"""The question that an option belongs to."""


def parser() -> argparse.ArgumentParser:
    """The options beside those of the config."""
    options = Parser(description=__doc__, allow_abbrev=False)
    question = options.add_mutually_exclusive_group(required=True)
    question.add_argument("--step", type=whole(), metavar="N", help="rows of this step")
    question.add_argument(
        "--document", type=whole(), metavar="D", help="steps and rows that see this document of the training data"
    )
    question.add_argument("--hash", metavar="A:B", help="batch_hash of steps A to B")
    options.add_argument(
        "--rank", type=whole(), metavar="R", help="with --step: only the rows of this data-parallel rank, in its order"
    )
    options.add_argument("--dataset", metavar="PREFIX", help="with --document: which files of a mixture")
    options.add_argument(
        "--consumed", type=whole(), metavar="SAMPLES", help="with --step: samples before it, if the batch size changed"
    )
    options.add_argument("--checkpoint", metavar="FOLDER", help="checkpoint that the run resumed, to see the steps after it")
    options.add_argument("--json", action="store_true", help="one JSON object a line")
    return options


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the settings of the config. Raises `UserError` for an option of another question."""
    options, rest = parser().parse_known_args(arguments)
    for name, question in QUESTION_OF.items():
        if getattr(options, name) is not None and getattr(options, question) is None:
            raise UserError(f"--{name} belongs to --{question}, which was not asked; leave it out.")
    return options, rest


def training_data(config: Config, position: Position = Position()) -> Dataset:
    """The training data, as training opens it that goes on from `position`."""
    ranks = Ranks(partial(print, file=sys.stderr))
    return build_data(config.data, config.model, config.training, Evaluation(every=0), config.run.seed, ranks, position).train


def first_sample(
    config: Config, dataset: Dataset, step: int, consumed: int | None = None, position: Position = Position()
) -> int:
    """The first sample of a step. Raises `UserError` for a step or a position that the data does not reach."""
    size = config.training.global_batch_size
    if consumed is None and step > position.step > 0:
        consumed = position.consumed_samples + (step - 1 - position.step) * size
    if consumed is not None:
        if step < 1 or not 0 <= consumed <= dataset.num_samples - size:
            raise UserError(
                f"step {step} with --consumed {consumed} is not there: steps count from 1, and a step of "
                f"{size:,} samples starts between 0 and {dataset.num_samples - size:,} on this data."
            )
        return consumed
    if not 1 <= step <= dataset.num_samples // size:
        raise UserError(f"step {step} is not there: steps go from 1 to {dataset.num_samples // size:,} on this data.")
    return (step - 1) * size


def rows_of(config: Config, rank: int | None) -> list[int]:
    """Rows of the global batch that a data rank reads, in its order, or all of them."""
    training, dp = config.training, config.parallel.dp
    if rank is None:
        return list(range(training.global_batch_size))
    if not 0 <= rank < dp:
        raise UserError(f"--rank {rank} is not one of parallel.dp = {dp} data ranks; say how many with --parallel.dp.")
    if training.global_batch_size % (training.micro_batch_size * dp):
        raise UserError(
            f"training.global_batch_size = {training.global_batch_size} does not divide into "
            f"training.micro_batch_size = {training.micro_batch_size} times parallel.dp = {dp}; change one of them."
        )
    return rows_of_rank(training.global_batch_size, training.micro_batch_size, rank, dp).flatten().tolist()


def step_rows(
    config: Config, dataset: Dataset, step: int, rank: int | None, consumed: int | None, position: Position = Position()
) -> Iterator[dict[str, object]]:
    """One object a row; document and offset are those of its first token."""
    start = first_sample(config, dataset, step, consumed, position)
    for row in rows_of(config, rank):
        place = dataset.locate(start + row)
        document, offset, _ = place.segments[0]
        yield {
            "step": step,
            "row": row,
            "sample": start + row,
            "dataset": place.dataset,
            "document": document,
            "offset": offset,
            "tokens": dataset.sample(start + row).tolist(),
        }


def document_rows(config: Config, dataset: Dataset, document: int, prefix: str | None) -> Iterator[dict[str, object]]:
    """One object for each row of the run that holds a token of the document."""
    documents = dataset.documents()
    if prefix is None:
        if len(documents) > 1:
            raise UserError(f"--document {document} is in which file? Say --dataset, one of {', '.join(documents)}.")
        (prefix,) = documents
    if prefix not in documents:
        raise UserError(f"--dataset {prefix!r} is none of the training data: {', '.join(documents)}.")
    first, stop = documents[prefix].start, documents[prefix].stop
    if not first <= document < stop:
        raise UserError(f"--document {document} is not read: the training data is {first} to {stop - 1} of {prefix}.")
    size = config.training.global_batch_size
    for sample in dataset.samples_of(prefix, document, config.training.steps * size).tolist():
        yield {"step": sample // size + 1, "row": sample % size, "sample": sample}


def step_hashes(config: Config, dataset: Dataset, steps: str, position: Position) -> Iterator[dict[str, object]]:
    """One object a step, the last one included."""
    try:
        first, last = (int(step) for step in steps.split(":"))
    except ValueError as error:
        raise UserError(f"--hash {steps!r} must be two steps such as 1:20.") from error
    if first > last:
        raise UserError(f"--hash {steps!r} ends before it starts; say {last}:{first}.")
    for step in range(first, last + 1):
        start = first_sample(config, dataset, step, position=position)
        total = sum(hash_row(row, start + row, dataset.sample(start + row)) for row in rows_of(config, None))
        yield {"step": step, "batch_hash": format_hash(as_signed(total))}


def text_of(tokens: list[int], name: str, tokenizer: Tokenizer) -> str:
    """What a row says. Raises `UserError` for ids that the tokenizer lacks, as where another one made the data."""
    try:
        return tokenizer.decode(tokens)
    except (KeyError, IndexError) as error:
        raise UserError(
            f"data.tokenizer = {name!r} has no text for a row with token ids up to {max(tokens)}: name the "
            "tokenizer that the data was prepared with, or see the ids alone with --json."
        ) from error


def main(arguments: list[str]) -> None:
    """Answers one question."""
    options, rest = parse(arguments)
    config = from_command_line(rest)
    position = Position.of(read_metadata(Path(options.checkpoint))) if options.checkpoint else Position()
    dataset = training_data(config, position)
    if options.step is not None:
        answers = step_rows(config, dataset, options.step, options.rank, options.consumed, position)
    elif options.document is not None:
        answers = document_rows(config, dataset, options.document, options.dataset)
    else:
        answers = step_hashes(config, dataset, options.hash, position)
    tokenizer = None if options.json or options.step is None else load_tokenizer(config.data.tokenizer)
    for answer in answers:
        if options.json:
            print(json.dumps(answer))
            continue
        tokens = answer.pop("tokens", None)
        print("  ".join(f"{name} {value}" for name, value in answer.items()))
        if tokenizer:
            print(f"    {text_of(tokens, config.data.tokenizer, tokenizer)[:SHOWN_CHARACTERS]!r}")


if __name__ == "__main__":
    with report_user_errors():
        main(sys.argv[1:])
