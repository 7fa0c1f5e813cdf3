"""Batches: the same in every layout, resumed from one integer, refused with a sentence."""

from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from neox_native.config.schema import Data
from neox_native.data.build import Datasets, build_data
from neox_native.data.dataset import check_fingerprint
from neox_native.data.loader import StepBatch, StepIndex, as_signed, build_loader, format_hash
from neox_native.errors import UserError
from tests.data.corpora import blend, neox_samples, random_documents, write_files

SEQ_LENGTH, SEED = 8, 1234


def datasets(
    prefix: str, steps: int = 6, eval_every: int = 0, vocab_size: int = 300, batch: int = 12, **data: object
) -> Datasets:
    return build_data(
        Data(train=prefix, **data),
        SEQ_LENGTH,
        vocab_size,
        SEED,
        batch,
        steps,
        eval_every,
        2,
        is_writer=True,
        wait=lambda: None,  # type: ignore[arg-type]
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


@pytest.fixture
def documents() -> list[list[int]]:
    return random_documents(1, 60)


@pytest.fixture
def prefix(tmp_path: Path, documents: list[list[int]]) -> str:
    return write_files(tmp_path / "text", documents)


def test_the_stream_is_the_order_shifted_by_one(prefix: str, documents: list[list[int]]) -> None:
    expected = np.array(neox_samples(documents, 0, 60, SEQ_LENGTH, 72, SEED)[:72]).reshape(6, 4, 3, SEQ_LENGTH + 1)
    for number, step in enumerate(steps_of(datasets(prefix, split="1"))):
        assert step.inputs.dtype == step.targets.dtype == torch.int64
        assert np.array_equal(step.inputs.numpy(), expected[number, ..., :-1])
        assert np.array_equal(step.targets.numpy(), expected[number, ..., 1:])
        assert step.consumed_samples == 12 * (number + 1)


@pytest.mark.parametrize("dp, micro", [(1, 12), (2, 3), (3, 4), (4, 1), (12, 1)])
def test_every_layout_reads_the_same_rows_and_hashes_alike(prefix: str, dp: int, micro: int) -> None:
    data = datasets(prefix)
    serial = steps_of(data, micro=12)
    ranks = [steps_of(data, micro=micro, rank=rank, dp=dp) for rank in range(dp)]
    for number, whole in enumerate(serial):
        parts = [steps[number] for steps in ranks]
        for field in ("inputs", "targets", "sample_ids"):
            joined = torch.stack([getattr(part, field) for part in parts], dim=1)
            assert torch.equal(joined.flatten(0, 2), getattr(whole, field).flatten(0, 1))
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
    whole = torch.cat([step.sample_ids.flatten() for step in steps_of(data)])
    resumed = torch.cat([step.sample_ids.flatten() for step in steps_of(data, consumed=12, batch=6, steps=10)])
    assert torch.equal(resumed, whole[12:])


def test_reading_starts_at_the_position_and_skips_nothing(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets(prefix)
    original, read = data.train.read, []
    monkeypatch.setattr(data.train, "read", lambda index: read.append(index) or original(index))
    steps_of(data, consumed=60, steps=1)
    assert sorted(read) == list(range(60, 72))


def test_the_state_of_the_index_node_is_one_integer_and_round_trips() -> None:
    node = StepIndex(consumed_samples=24, global_batch_size=12, num_steps=3)
    assert [next(node), node.state_dict()] == [24, {"consumed_samples": 36}]
    other = StepIndex(consumed_samples=0, global_batch_size=12, num_steps=5)
    other.reset(node.state_dict())
    assert list(other) == list(node) == [36, 48]


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


def test_a_corpus_shorter_than_one_sample_is_refused(tmp_path: Path) -> None:
    prefix = write_files(tmp_path / "short", [[1, 2, 3], [4, 5, 6, 7, 8]])
    with pytest.raises(
        UserError, match=r"train documents of .*short hold 8 tokens, one sample takes model\.seq_length \+ 1 = 9"
    ):
        datasets(prefix, split="1")


def test_validation_reads_the_second_part_of_the_split(prefix: str, documents: list[list[int]]) -> None:
    data = datasets(prefix, split="2,1,1", eval_every=2)
    expected = neox_samples(documents, 30, 45, SEQ_LENGTH, (6 // 2 + 1) * 2 * 12, SEED)
    assert [data.valid.sample(index).tolist() for index in range(data.valid.num_samples)] == expected
    expected = neox_samples(documents, 45, 60, SEQ_LENGTH, 2 * 12, SEED)
    assert [data.test.sample(index).tolist() for index in range(data.test.num_samples)] == expected


def test_own_validation_files_are_read_whole_and_leave_the_split_to_the_rest(
    tmp_path: Path, prefix: str, documents: list[list[int]]
) -> None:
    own = random_documents(2, 10)
    data = datasets(prefix, split="2,1,1", eval_every=6, valid=write_files(tmp_path / "valid", own))
    expected = neox_samples(own, 0, 10, SEQ_LENGTH, 2 * 2 * 12, SEED)
    assert [data.valid.sample(index).tolist() for index in range(data.valid.num_samples)] == expected
    expected = neox_samples(documents, 0, 40, SEQ_LENGTH, 72, SEED)
    assert [data.train.sample(index).tolist() for index in range(data.train.num_samples)] == expected


def test_an_empty_validation_split_is_refused_only_when_the_run_evaluates(prefix: str) -> None:
    datasets(prefix, split="1")
    with pytest.raises(UserError, match="the valid documents of .* hold 0 tokens"):
        datasets(prefix, split="1", eval_every=2)


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,2,3,4", "-1,2", "nan", "inf,1"])
def test_a_bad_split_is_refused(prefix: str, split: str) -> None:
    with pytest.raises(UserError, match=r"data\.split = .* one to three shares"):
        datasets(prefix, split=split)


def test_fingerprint_names_what_changed(tmp_path: Path, prefix: str, documents: list[list[int]]) -> None:
    saved = datasets(prefix).train.fingerprint()
    check_fingerprint(saved, datasets(prefix).train.fingerprint(), "training")
    check_fingerprint(saved, datasets(prefix, steps=12).train.fingerprint(), "training")
    for changed, name in [
        (datasets(prefix, split="1,1"), "documents was"),
        (datasets(prefix, steps=1000), "epochs was"),
        (datasets(write_files(tmp_path / "other", documents[1:])), "bin_bytes was .*; idx_sha256 was"),
    ]:
        with pytest.raises(UserError, match=name):
            check_fingerprint(saved, changed.train.fingerprint(), "training")


def masked(documents: list[list[int]], longest: int) -> list[list[int]]:
    """Labels that hide the first tokens of each document."""
    return [[-100] * min(longest, len(document)) + document[longest:] for document in documents]


@pytest.mark.parametrize("packing", ["packed", "pack_until_overflow", "unpacked"])
def test_labels_mask_the_targets_of_the_same_tokens(tmp_path: Path, documents: list[list[int]], packing: str) -> None:
    prefix = write_files(tmp_path / "text", documents)
    labels = write_files(tmp_path / "labels", masked(documents, 3), "int32")
    data = datasets([{"path": prefix, "weight": 1.0, "labels": labels}], packing=packing)  # type: ignore[arg-type]
    for step in steps_of(data, micro=12):
        for row, sample in enumerate(step.sample_ids[0].tolist()):
            expected = []
            for document, offset, length in data.train.locate(sample).segments:
                expected += masked(documents, 3)[document][offset : offset + length]
            expected += [-100] * (SEQ_LENGTH + 1 - len(expected))
            assert step.targets[0, row].tolist() == expected[1:]
        assert step.num_targets == int((step.targets >= 0).sum()) > 0


def test_padding_is_no_target(prefix: str, documents: list[list[int]]) -> None:
    for step in steps_of(datasets(prefix, packing="unpacked"), micro=12):
        for inputs, targets, sample in zip(
            step.inputs[0].tolist(), step.targets[0].tolist(), step.sample_ids[0].tolist()
        ):
            (segment,) = datasets(prefix, packing="unpacked").train.locate(sample).segments
            document = documents[segment.document][: SEQ_LENGTH + 1]
            assert inputs == (document + [0] * SEQ_LENGTH)[:SEQ_LENGTH]
            assert targets == (document[1:] + [-100] * SEQ_LENGTH)[:SEQ_LENGTH]


@pytest.mark.parametrize("packing", ["packed", "pack_until_overflow", "unpacked"])
def test_documents_and_positions_follow_the_segments(prefix: str, packing: str) -> None:
    data = datasets(prefix, packing=packing, document_attention=True, document_positions=True)
    for step in steps_of(data, micro=12):
        assert step.document_ids is not None and step.positions is not None
        for row, sample in enumerate(step.sample_ids[0].tolist()):
            ids, positions = [], []
            lengths = [segment.length for segment in data.train.locate(sample).segments]
            for number, length in enumerate([*lengths, SEQ_LENGTH]):
                ids += [number] * length
                positions += range(length)
            assert step.document_ids[0, row].tolist() == ids[:SEQ_LENGTH]
            assert step.positions[0, row].tolist() == positions[:SEQ_LENGTH]


def test_documents_and_positions_are_left_out_unless_asked_for(prefix: str) -> None:
    step = steps_of(datasets(prefix))[0]
    assert step.document_ids is None and step.positions is None and step.num_targets == 12 * SEQ_LENGTH


def test_labels_of_other_sizes_are_refused(tmp_path: Path, prefix: str, documents: list[list[int]]) -> None:
    labels = write_files(tmp_path / "labels", documents[1:], "int32")
    with pytest.raises(UserError, match="labels .*labels and the tokens .*text differ in the sizes"):
        datasets([{"path": prefix, "weight": 1.0, "labels": labels}])  # type: ignore[arg-type]


def test_documents_without_a_target_are_refused(tmp_path: Path, prefix: str, documents: list[list[int]]) -> None:
    labels = write_files(tmp_path / "labels", masked(documents, 1000), "int32")
    with pytest.raises(UserError, match="none of the 58 train documents .* has a token to predict .* 'unpacked'"):
        datasets([{"path": prefix, "weight": 1.0, "labels": labels}], packing="unpacked")  # type: ignore[arg-type]


def test_a_label_outside_the_vocabulary_is_named(tmp_path: Path, prefix: str, documents: list[list[int]]) -> None:
    wrong = [[*document[:5], 300, *document[6:]] if len(document) > 5 else document for document in documents]
    labels = write_files(tmp_path / "labels", wrong, "int32")
    data = datasets([{"path": prefix, "weight": 1.0, "labels": labels}])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"holds label id 300 in document \d+ at token 5"):
        steps_of(data)


def test_a_mixture_reads_each_dataset_in_its_own_order(tmp_path: Path, documents: list[list[int]]) -> None:
    sets = [random_documents(seed, 20 + 10 * seed) for seed in range(3)]
    prefixes = [write_files(tmp_path / f"set{number}", documents) for number, documents in enumerate(sets)]
    weights = [0.5, 2.0, 1.5]
    mixture = [{"path": path, "weight": weight} for path, weight in zip(prefixes, weights)]
    data = datasets(mixture, split="1")  # type: ignore[arg-type]
    needed = [math.ceil(72 * weight / 4.0 * 1.005) for weight in weights]
    streams = [neox_samples(own, 0, len(own), SEQ_LENGTH, count, SEED) for own, count in zip(sets, needed)]
    expected = [streams[number][sample] for number, sample in blend(weights, 72)]
    assert [data.train.sample(index).tolist() for index in range(72)] == expected
    assert data.train.num_samples == 72
    for line, own, weight in zip(data.train.describe().splitlines()[1:], range(3), weights):
        count = sum(number == own for number, _ in blend(weights, 72))
        assert f"{100 * weight / 4:.2f}% {count} samples of" in line
    place = data.train.locate(40)
    assert 40 in data.train.samples_of(place.dataset, place.segments[0].document, 72)
    assert 40 not in data.train.samples_of(place.dataset, place.segments[0].document, 40)


def test_a_mixture_is_split_set_by_set(tmp_path: Path) -> None:
    sets = [random_documents(seed, 40) for seed in range(2)]
    mixture = [{"path": write_files(tmp_path / f"set{n}", own), "weight": 1.0} for n, own in enumerate(sets)]
    data = datasets(mixture, split="1,1", eval_every=6)  # type: ignore[arg-type]
    for sample in range(data.valid.num_samples):
        assert all(segment.document >= 20 for segment in data.valid.locate(sample).segments)


@pytest.mark.parametrize("packing", ["packed", "pack_until_overflow", "unpacked"])
def test_in_epoch_order_a_longer_run_continues_a_shorter_one(prefix: str, packing: str) -> None:
    short = steps_of(datasets(prefix, order="epoch", packing=packing))
    long = datasets(prefix, order="epoch", packing=packing, steps=600)
    assert [step.row_hash for step in steps_of(long, steps=600)[:6]] == [step.row_hash for step in short]
    saved = datasets(prefix, order="epoch", packing=packing).train.fingerprint()
    check_fingerprint(saved, long.train.fingerprint(), "training")


def test_stored_rows_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [[number] * (SEQ_LENGTH + 1) for number in range(72)]
    data = datasets(write_files(tmp_path / "rows", rows), order="stored", split="1")
    read = torch.cat([step.inputs.flatten(0, 2) for step in steps_of(data, micro=12)])
    assert read.reshape(72, SEQ_LENGTH).tolist() == [row[1:] for row in rows]
    with pytest.raises(UserError, match="the run needs sample 83, but there are 72"):
        steps_of(data, steps=7)


def test_stored_rows_of_another_length_are_refused(tmp_path: Path) -> None:
    rows = write_files(tmp_path / "rows", [[1] * 9, [1] * 10])
    with pytest.raises(UserError, match="rows of model.seq_length \\+ 1 = 9 tokens .* but row 1 has 10"):
        datasets(rows, order="stored", split="1")
    with pytest.raises(UserError, match="but data.packing is 'unpacked'"):
        datasets(write_files(tmp_path / "fine", [[1] * 9] * 2), order="stored", packing="unpacked", split="1")


def test_missing_files_of_a_mixture_are_all_named(prefix: str) -> None:
    paths = [prefix, "no/such", prefix, "nor/this"]
    with pytest.raises(UserError, match=r"data\.train: no/such, nor/this of 4 named: no such \.idx file"):
        datasets([{"path": path, "weight": 1.0} for path in paths])  # type: ignore[arg-type]


def test_an_unknown_key_of_a_mixture_is_named(prefix: str) -> None:
    with pytest.raises(UserError, match=r"data\.train\[0\] has a key 'wieght'; its keys are path, weight, labels"):
        datasets([{"path": prefix, "wieght": 1.0}])  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 256])
def test_a_mixture_of_no_or_too_many_sets_is_refused(prefix: str, count: int) -> None:
    with pytest.raises(UserError, match=f"data.train names {count} datasets, it takes 1 to 255"):
        datasets([{"path": prefix, "weight": 1.0}] * count or [], valid=prefix)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_cannot_take_is_refused(prefix: str, seed: int) -> None:
    with pytest.raises(UserError, match=f"run.seed = {seed} must lie between 0 and"):
        build_data(Data(train=prefix), SEQ_LENGTH, 300, seed, 12, 6, 0, 2, is_writer=True, wait=lambda: None)
