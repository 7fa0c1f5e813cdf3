"""Batches: the same in every layout, resumed from one integer, refused with a sentence."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from neox_native.data.loader import as_signed, format_hash
from neox_native.errors import UserError
from tests.data.corpora import neox_samples, random_documents, write_files
from tests.data.loading import SEED, SEQ_LENGTH, datasets, steps_of


def test_the_stream_is_the_order_shifted_by_one(prefix: str, documents: list[list[int]]) -> None:
    expected = np.array(neox_samples(documents, 0, 60, SEQ_LENGTH, 72, SEED)[:72]).reshape(6, 4, 3, SEQ_LENGTH + 1)
    for number, step in enumerate(steps_of(datasets(prefix, split="1"))):
        tokens, targets = step.model_fields["tokens_BT"], step.model_fields["targets_BT"]
        assert tokens.dtype == targets.dtype == torch.int64
        assert np.array_equal(tokens.numpy(), expected[number, ..., :-1])
        assert np.array_equal(targets.numpy(), expected[number, ..., 1:])
        assert step.consumed_samples == 12 * (number + 1)


@pytest.mark.parametrize("dp, micro", [(1, 12), (2, 3), (3, 4), (4, 1), (12, 1)])
def test_every_layout_reads_the_same_rows_and_hashes_alike(prefix: str, dp: int, micro: int) -> None:
    data = datasets(prefix)
    serial = steps_of(data, micro=12)
    ranks = [steps_of(data, micro=micro, rank=rank, dp=dp) for rank in range(dp)]
    for number, whole in enumerate(serial):
        parts = [steps[number] for steps in ranks]
        for name, field in whole.model_fields.items():
            joined = torch.stack([part.model_fields[name] for part in parts], dim=1)
            assert torch.equal(joined.flatten(0, 2), field.flatten(0, 1))
        assert as_signed(sum(part.row_hash for part in parts)) == whole.row_hash


def test_the_hash_is_the_documented_one(prefix: str) -> None:
    data = datasets(prefix)
    step = steps_of(data, micro=12)[2]
    total = 0
    for row in range(12):
        tokens = data.train.sample(24 + row)
        payload = struct.pack("<2q", row, 24 + row) + b"".join(struct.pack("<i", token) for token in tokens)
        total += int.from_bytes(hashlib.sha256(payload).digest()[:8], "little")
    assert format_hash(step.row_hash) == f"{total % 2**64:016x}"


def test_the_hash_sees_order_and_content(prefix: str) -> None:
    first, second = steps_of(datasets(prefix), micro=12)[:2]
    assert first.row_hash != second.row_hash
    other = steps_of(datasets(prefix, batch=6, steps=12), batch=6, micro=6, steps=2)
    assert as_signed(other[0].row_hash + other[1].row_hash) != first.row_hash


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_resumed_loader_continues_where_the_trainer_stopped(prefix: str, taken: int) -> None:
    data = datasets(prefix)
    whole = steps_of(data)
    resumed = steps_of(data, consumed=12 * taken, steps=6 - taken)
    assert [step.row_hash for step in resumed] == [step.row_hash for step in whole[taken:]]


def test_the_global_batch_may_change_on_resume(prefix: str) -> None:
    data = datasets(prefix)
    whole = torch.cat([step.model_fields["tokens_BT"].flatten() for step in steps_of(data)])
    resumed = steps_of(data, consumed=12, batch=6, steps=10)
    resumed = torch.cat([step.model_fields["tokens_BT"].flatten() for step in resumed])
    assert torch.equal(resumed, whole[len(whole) // 6 :])


def test_reading_starts_at_the_position_and_skips_nothing(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets(prefix)
    original, read = data.train.read, []
    monkeypatch.setattr(data.train, "read", lambda index: read.append(index) or original(index))
    steps_of(data, consumed=60, steps=1)
    assert sorted(read) == list(range(60, 72))


def test_a_run_longer_than_the_data_is_refused(prefix: str) -> None:
    data = datasets(prefix)
    with pytest.raises(UserError, match=r"the run needs sample 11,999, but there are .* lower training\.steps"):
        steps_of(data, steps=1000)


@pytest.mark.parametrize("dtype, token", [("uint16", 300), ("int32", -1)])
def test_a_token_id_outside_the_vocabulary_is_named_with_its_place(tmp_path: Path, dtype: str, token: int) -> None:
    documents = random_documents(1, 30)
    documents[17] = [1] * 30
    documents[17][21] = token
    data = datasets(write_files(tmp_path / "bad", documents, dtype), steps=12, split="1")
    with pytest.raises(
        UserError,
        match=rf"bad holds token id {token} in document 17 at token 21, but model\.vocab_size = 300 allows 0 to 299",
    ):
        steps_of(data, steps=12)
