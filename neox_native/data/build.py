"""The datasets that a run's `[data]` section describes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from neox_native.config.rules import wrong_datasets
from neox_native.config.schema import Data, Evaluation, Model, Training
from neox_native.data.dataset import Dataset, Mixture, Reading, TokenDataset
from neox_native.data.indexed import IndexedDataset
from neox_native.data.order import ENDLESS, split_documents
from neox_native.data.preparation.builtin import PYTHON_STDLIB, prepare_python_stdlib
from neox_native.data.sidecar import Vocabulary, check_tokenizer, read_sidecar, vocabulary_of
from neox_native.data.tokenizers import OutOfReach, Tokenizer, load_tokenizer
from neox_native.errors import UserError
from neox_native.launch import Ranks
from neox_native.plain_files import at_home

PARTS = ("train", "valid")


class Position(NamedTuple):
    """How far a run has read its training data."""

    step: int = 0
    consumed_samples: int = 0
    begun: dict[str, object] = {}
    """Fingerprint of the data in the order in which the run has been reading it."""

    @classmethod
    def of(cls, metadata: dict[str, object]) -> Position:
        """The position that a checkpoint's metadata tells; the start where they tell none."""
        step, consumed, begun = (metadata.get(name) for name in ("step", "consumed_samples", "data"))
        told = isinstance(step, int) and isinstance(consumed, int) and min(step, consumed) >= 0 and isinstance(begun, dict)
        return cls(step, consumed, begun) if told else cls()  # type: ignore[arg-type]

    def begun_of(self, number: int) -> dict[str, object]:
        """The part of the fingerprint on one dataset of a mixture."""
        prefix = f"{number}."
        return {name.removeprefix(prefix): value for name, value in self.begun.items() if name.startswith(prefix)}


class Datasets(NamedTuple):
    """What a run reads."""

    train: Dataset
    valid: Dataset | None
    """None where the run does not evaluate."""
    tokenizer: Tokenizer | None
    """The one that `data.tokenizer` names, which the data was checked against."""


def parse_split(split: str) -> list[float]:
    """Shares of training, validation and held-out documents from "969,30,1"; missing ones are 0. Raises `UserError` for
    anything else."""
    try:
        shares = [float(share) for share in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < float("inf") for share in shares) or not sum(shares):
        raise UserError(f'data.split = {split!r} must be one to three shares that are not all zero, such as "969,30,1".')
    return shares + [0.0] * (3 - len(shares))


def samples_needed(part: str, training: Training, evaluation: Evaluation, position: Position) -> int:
    """Samples of one part that a whole run reads. Training reads those that were consumed, maybe in batches of another size,
    and those of the steps left; validation reads those of one evaluation or, where evaluations rotate, of all within the run
    and one at its end, as GPT-NeoX counts them."""
    if part == "train":
        return position.consumed_samples + max(0, training.steps - position.step) * training.global_batch_size
    evaluations = training.steps // evaluation.every + 1 if evaluation.rotate else 1
    return evaluations * evaluation.batches * training.global_batch_size


def how_far(data: Dataset, global_batch_size: int, position: Position) -> str:
    """How far `training.steps` can be raised in the order of the training data, in a sentence; "" where it has no end.

    A run that goes beyond what it had drawn is told so.
    """
    order = data.reading.order
    if data.samples_drawn >= ENDLESS:
        return ""
    if position.begun and position.begun != data.fingerprint():
        return f'data.order = "{order}": the run is longer than the order it began, which further samples follow, drawn anew'
    steps = position.step + (data.samples_drawn - position.consumed_samples) // global_batch_size
    beyond = "there are no more rows"
    if order == "neox":
        beyond = 'beyond, further samples follow, drawn anew (data.order = "epoch", from the start, is one order at any length)'
    return f'data.order = "{order}": training.steps can be raised to {steps:,}; {beyond}'


class Source(NamedTuple):
    """One entry of `data.train` or `data.valid`."""

    path: str
    """Prefix of token files, or a built-in corpus."""
    weight: float
    """Share of the samples, in any unit."""
    labels: str = ""
    """Prefix of files of the same sizes that hold each token's label, negative where it is no target."""


def parse_sources(value: str | list[dict], setting: str) -> list[Source]:
    """The files that a setting names. Raises `UserError` for a malformed mixture and for files that do not exist."""
    if wrong := list(wrong_datasets(value, f"data.{setting}")):
        raise UserError("\n".join(wrong))
    entries = [{"path": value, "weight": 1.0}] if isinstance(value, str) else value
    sources = [Source(**entry) for entry in entries]
    missing = [
        prefix
        for source in sources
        for prefix in (source.path, source.labels)
        if prefix not in ("", PYTHON_STDLIB) and not Path(prefix + ".idx").is_file()
    ]
    if missing:
        raise UserError(
            f"data.{setting} names {', '.join(missing)}, but there is no {', '.join(f'{prefix}.idx' for prefix in missing)}; "
            "give the common prefix of an .idx and a .bin file, without the ending, and make them with tools/prepare_data.py."
        )
    return sources


def build_data(
    config: Data,
    model: Model,
    training: Training,
    evaluation: Evaluation,
    seed: int,
    ranks: Ranks,
    position: Position = Position(),
) -> Datasets:
    """The run's datasets.

    Args:
        ranks: the first of them prepares built-in corpora.
        position: where a run that goes on stands in its training data.

    Raises:
        UserError: for everything that is wrong with the files or the settings.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"run.seed = {seed} must lie between 0 and 2^32 - 1 = {2**32 - 1}.")
    given = {"train": config.train} | ({"valid": config.valid} if config.valid else {})
    sources = {setting: parse_sources(value, setting) for setting, value in given.items()}
    open_files, in_use = cache(IndexedDataset), ("train", "valid") if evaluation.every else ("train",)
    read = [entry for part in in_use for entry in sources.get(part, sources["train"])]
    tokenizer = _tokenizer_of(config, read, model.vocab_size, open_files, ranks.say)
    if any(source.path == PYTHON_STDLIB for entries in sources.values() for source in entries):
        made_with = tokenizer or load_tokenizer(config.tokenizer)
        prefix = prepare_python_stdlib(made_with, config.cache_dir, ranks)
        for setting, entries in sources.items():
            sources[setting] = [e._replace(path=prefix) if e.path == PYTHON_STDLIB else e for e in entries]
    shares = parse_split(config.split)
    if config.valid:
        shares[1] = 0.0

    def build(part: str) -> Dataset:
        reading = Reading(
            part, model.seq_length, model.vocab_size, seed, config.order, config.packing, config.document_attention,
            config.document_positions, kept_orders=str(at_home(config.cache_dir) / "orders"),
        )  # fmt: skip
        entries = sources.get(part, sources["train"])
        num_samples = samples_needed(part, training, evaluation, position)

        def make(number: int, num_samples: int) -> TokenDataset:
            files = open_files(entries[number].path)
            labels = open_files(entries[number].labels) if entries[number].labels else None
            documents = range(len(files))
            if part == "train" or not config.valid:
                documents = split_documents(shares, len(files))[PARTS.index(part)]
            begun = position.begun_of(number) if len(entries) > 1 else position.begun
            return TokenDataset(files, documents, reading, num_samples, labels, begun if part == "train" else None)

        return make(0, num_samples) if len(entries) == 1 else Mixture(make, [e.weight for e in entries], num_samples)

    return Datasets(build("train"), build("valid") if evaluation.every else None, tokenizer)


def _tokenizer_of(
    config: Data,
    sources: Iterable[Source],
    vocab_size: int,
    open_files: Callable[[str], IndexedDataset],
    notice: Callable[[str], None],
) -> Tokenizer | None:
    """The tokenizer that `data.tokenizer` names; None where the setting is empty, and where the tokenizer is tiktoken's and
    out of reach: training does without. Raises `UserError` where the files tell of another one."""
    tokenizer = None
    try:
        tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    except OutOfReach as error:
        notice(f"the data's tokenizer is not checked: {error}")
    made = {}
    for source in sources:
        if source.path == PYTHON_STDLIB:
            made[source.path] = Vocabulary.of(tokenizer or load_tokenizer(config.tokenizer))
        elif sidecar := read_sidecar(open_files(source.path)):
            made[source.path] = vocabulary_of(sidecar)
    check_tokenizer(made, tokenizer, f"data.tokenizer = {config.tokenizer!r}", vocab_size, notice)
    return tokenizer
