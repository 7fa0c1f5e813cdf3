"""The datasets that a run's `[data]` section describes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

from neox_native.config.schema import Data
from neox_native.data.builtin import PYTHON_STDLIB, prepare_python_stdlib
from neox_native.data.dataset import Dataset, TokenDataset
from neox_native.data.indexed import IndexedDataset
from neox_native.data.order import split_documents
from neox_native.data.tokenizers import load_tokenizer
from neox_native.errors import UserError

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Datasets:
    """Training, validation and test data; each index is computed when first asked for, in memory, and never cached
    on disk."""

    build: Callable[[str], Dataset]

    @cached_property
    def train(self) -> Dataset:
        """What training reads."""
        return self.build("train")

    @cached_property
    def valid(self) -> Dataset:
        """What evaluation reads."""
        return self.build("valid")

    @cached_property
    def test(self) -> Dataset:
        """What a final test reads."""
        return self.build("test")


def parse_split(split: str) -> list[float]:
    """Shares of train, validation and test from "969,30,1"; missing ones are 0. Raises `UserError` for anything
    else."""
    try:
        shares = [float(share) for share in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < float("inf") for share in shares) or not sum(shares):
        raise UserError(
            f'data.split = {split!r} must be one to three shares that are not all zero, such as "969,30,1".'
        )
    return shares + [0.0] * (3 - len(shares))


def samples_needed(part: str, steps: int, global_batch_size: int, eval_every: int, eval_batches: int) -> int:
    """Samples of one part that a whole run reads, as GPT-NeoX counts them: evaluations within the run and one at its
    end."""
    evaluations = {"train": 0, "valid": steps // max(1, eval_every or steps) + 1, "test": 1}[part]
    return (steps if part == "train" else evaluations * eval_batches) * global_batch_size


def build_data(
    config: Data,
    seq_length: int,
    vocab_size: int,
    seed: int,
    global_batch_size: int,
    steps: int,
    eval_every: int,
    eval_batches: int,
    is_writer: bool,
    wait: Callable[[], None],
    log: Callable[[str], None] = print,
) -> Datasets:
    """The run's datasets; training data is opened at once, validation data if the run evaluates.

    `is_writer` tells the one rank that prepares built-in corpora, `wait` is a barrier over all ranks, `log` prints
    progress. Raises `UserError` for everything that is wrong with the files or the settings.
    """
    own = {part: getattr(config, part) for part in PARTS}
    sources = {part: source or config.train for part, source in own.items()}
    if PYTHON_STDLIB in sources.values():
        prefix = _prepare_builtin(config, vocab_size, is_writer, wait, log)
        sources = {part: prefix if source == PYTHON_STDLIB else source for part, source in sources.items()}
    shares = parse_split(config.split)
    for number, part in enumerate(PARTS):
        if part != "train" and own[part]:
            shares[number] = 0.0
    open_files = cache(IndexedDataset)

    def build(part: str) -> Dataset:
        files = open_files(sources[part])
        is_whole = part != "train" and bool(own[part])
        documents = range(len(files)) if is_whole else split_documents(shares, len(files))[PARTS.index(part)]
        num_samples = samples_needed(part, steps, global_batch_size, eval_every, eval_batches)
        return TokenDataset(
            files,
            documents,
            name=part,
            seq_length=seq_length,
            vocab_size=vocab_size,
            num_samples=num_samples,
            seed=seed,
            order=config.order,
        )

    datasets = Datasets(build)
    for part in ("train", "valid") if eval_every else ("train",):
        getattr(datasets, part)
    return datasets


def _prepare_builtin(
    config: Data, vocab_size: int, is_writer: bool, wait: Callable[[], None], log: Callable[[str], None]
) -> str:
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size = {vocab_size} is below the {tokenizer.vocab_size} ids of data.tokenizer = "
            f"{config.tokenizer!r}, which "
            f"{PYTHON_STDLIB} is encoded with; raise it to {tokenizer.vocab_size} or choose another tokenizer."
        )
    return prepare_python_stdlib(tokenizer, config.cache_dir, is_writer, wait, log)
