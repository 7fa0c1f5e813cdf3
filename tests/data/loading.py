"""Datasets and batches of small corpora, with few words."""

from __future__ import annotations

from neox_native.config.schema import Data, Evaluation, Model, Training
from neox_native.data.build import Datasets, Position, build_data
from neox_native.data.loader import StepBatch, build_loader
from neox_native.launch import Ranks

SEQ_LENGTH, SEED = 8, 1234


def datasets(
    prefix: str,
    steps: int = 6,
    eval_every: int = 0,
    vocab_size: int = 300,
    batch: int = 12,
    position: Position = Position(),
    eval_rotate: bool = True,
    **data: object,
) -> Datasets:
    return build_data(
        Data(train=prefix, **data),
        Model(seq_length=SEQ_LENGTH, vocab_size=vocab_size),
        Training(global_batch_size=batch, steps=steps),
        Evaluation(every=eval_every, batches=2, rotate=eval_rotate),
        SEED,
        Ranks(),
        position,
    )


def steps_of(
    data: Datasets, *, consumed: int = 0, batch: int = 12, micro: int = 3, rank: int = 0, dp: int = 1, steps: int = 6
) -> list[StepBatch]:
    return list(
        build_loader(
            data.train,
            consumed_samples=consumed,
            global_batch_size=batch,
            micro_batch_size=micro,
            dp_rank=rank,
            dp_size=dp,
            stop_after_steps=steps,
        )
    )
