"""What a run's `[data]` section means: splits, labels, packings, orders and mixtures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from neox_native.config.schema import Data, Evaluation, Model, Training
from neox_native.data.build import Position, build_data, how_far
from neox_native.data.dataset import Dataset, check_fingerprint
from neox_native.errors import UserError
from neox_native.launch import Ranks
from tests.data.corpora import blend, neox_samples, random_documents, write_files
from tests.data.loading import SEED, SEQ_LENGTH, datasets, steps_of


def test_a_corpus_shorter_than_one_sample_is_refused(tmp_path: Path) -> None:
    prefix = write_files(tmp_path / "short", [[1, 2, 3], [4, 5, 6, 7, 8]])
    with pytest.raises(
        UserError, match=r"train documents of .*short hold 8 tokens, one sample takes model\.seq_length \+ 1 = 9"
    ):
        datasets(prefix, split="1")


def test_a_packed_row_never_falls_short(prefix: str) -> None:
    data = datasets(prefix).train
    data.files.pointers = data.files.pointers + data.files.num_bytes  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=f"{prefix} ends 9 tokens before a row of it does"):
        data.sample(0)


def test_validation_reads_the_second_part_of_the_split(prefix: str, documents: list[list[int]]) -> None:
    data = datasets(prefix, split="2,1,1", eval_every=2)
    expected = neox_samples(documents, 30, 45, SEQ_LENGTH, (6 // 2 + 1) * 2 * 12, SEED)
    assert [data.valid.sample(index).tolist() for index in range(data.valid.num_samples)] == expected


@pytest.mark.parametrize("steps", [6, 60])
def test_evaluations_that_do_not_rotate_read_the_same_samples_however_long_the_run(
    prefix: str, documents: list[list[int]], steps: int
) -> None:
    data = datasets(prefix, split="2,1,1", eval_every=2, steps=steps, eval_rotate=False)
    expected = neox_samples(documents, 30, 45, SEQ_LENGTH, 2 * 12, SEED)
    assert [data.valid.sample(index).tolist() for index in range(data.valid.num_samples)] == expected


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
        for row, sample in enumerate(range(step.consumed_samples - 12, step.consumed_samples)):
            expected = []
            for document, offset, length in data.train.locate(sample).segments:
                expected += masked(documents, 3)[document][offset : offset + length]
            expected += [-100] * (SEQ_LENGTH + 1 - len(expected))
            assert step.model_fields["targets_BT"][0, row].tolist() == expected[1:]
        assert step.num_targets == int((step.model_fields["targets_BT"] >= 0).sum()) > 0


def test_padding_is_no_target(prefix: str, documents: list[list[int]]) -> None:
    for step in steps_of(datasets(prefix, packing="unpacked"), micro=12):
        samples = range(step.consumed_samples - 12, step.consumed_samples)
        for inputs, targets, sample in zip(*(field[0].tolist() for field in step.model_fields.values()), samples):
            (segment,) = datasets(prefix, packing="unpacked").train.locate(sample).segments
            document = documents[segment.document][: SEQ_LENGTH + 1]
            assert inputs == (document + [0] * SEQ_LENGTH)[:SEQ_LENGTH]
            assert targets == (document[1:] + [-100] * SEQ_LENGTH)[:SEQ_LENGTH]


@pytest.mark.parametrize("packing", ["packed", "pack_until_overflow", "unpacked"])
def test_documents_and_positions_follow_the_segments(prefix: str, packing: str) -> None:
    data = datasets(prefix, packing=packing, document_attention=True, document_positions=True)
    for step in steps_of(data, micro=12):
        for row, sample in enumerate(range(step.consumed_samples - 12, step.consumed_samples)):
            ids, positions = [], []
            lengths = [segment.length for segment in data.train.locate(sample).segments]
            for number, length in enumerate([*lengths, SEQ_LENGTH]):
                ids += [number] * length
                positions += range(length)
            assert step.model_fields["documents_BT"][0, row].tolist() == ids[:SEQ_LENGTH]
            assert step.model_fields["positions_BT"][0, row].tolist() == positions[:SEQ_LENGTH]


def test_documents_and_positions_are_left_out_unless_asked_for(prefix: str) -> None:
    step = steps_of(datasets(prefix))[0]
    assert list(step.model_fields) == ["tokens_BT", "targets_BT"] and step.num_targets == 12 * SEQ_LENGTH


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


def mixture_of(prefix: str, kind: str) -> str | list[dict[str, object]]:
    return prefix if kind == "one" else [{"path": prefix, "weight": 1.0}, {"path": prefix, "weight": 2.0}]


@pytest.mark.parametrize("packing", ["packed", "pack_until_overflow", "unpacked"])
@pytest.mark.parametrize("kind", ["one", "mixture"])
@pytest.mark.parametrize("batch, steps", [(4, 6), (4, 20), (24, 4), (12, 2)])
def test_a_run_goes_on_in_its_order_with_another_batch_size_or_number_of_steps(
    prefix: str, packing: str, kind: str, batch: int, steps: int
) -> None:
    data = mixture_of(prefix, kind)
    whole = datasets(data, packing=packing, steps=30).train  # type: ignore[arg-type]
    position = Position(3, 36, whole.fingerprint())
    resumed = datasets(data, packing=packing, batch=batch, steps=steps, position=position)  # type: ignore[arg-type]
    check_fingerprint(whole.fingerprint(), resumed.train.fingerprint(), "training")
    read = steps_of(resumed, consumed=36, batch=batch, micro=2, steps=max(0, steps - 3))
    rows = [row for step in read for row in step.model_fields["tokens_BT"].flatten(0, 1).tolist()]
    assert rows == [whole.sample(36 + number)[:-1].tolist() for number in range(batch * max(0, steps - 3))]


@pytest.mark.parametrize("packing", ["pack_until_overflow", "unpacked"])
@pytest.mark.parametrize("kind", ["one", "mixture"])
def test_more_steps_of_whole_documents_follow_those_of_the_checkpoint(prefix: str, packing: str, kind: str) -> None:
    data = mixture_of(prefix, kind)

    def go_on(steps: int, before: Dataset, consumed: int) -> Dataset:
        position = Position(consumed // 12, consumed, before.fingerprint())
        found = datasets(data, packing=packing, steps=steps, position=position).train  # type: ignore[arg-type]
        check_fingerprint(before.fingerprint(), found.fingerprint(), "training")
        assert all(found.sample(n).tolist() == before.sample(n).tolist() for n in range(before.num_samples))
        return found

    short = datasets(data, packing=packing, steps=6).train  # type: ignore[arg-type]
    longer = go_on(9, short, 24)
    longest = go_on(14, longer, 96)
    assert longest.num_samples >= 14 * 12
    again = go_on(14, longer, 96)
    assert all(again.sample(n).tolist() == longest.sample(n).tolist() for n in range(14 * 12))
    if kind == "one":
        assert sorted(longest.order.shuffle) == list(range(14 * 12))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="samples was"):
        check_fingerprint(longest.fingerprint(), datasets(data, packing=packing, steps=14).train.fingerprint(), "training")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["one", "mixture"])
def test_more_steps_than_the_epochs_drawn_are_followed_by_further_epochs(
    prefix: str, documents: list[list[int]], kind: str
) -> None:
    data = mixture_of(prefix, kind)

    def go_on(steps: int, before: Dataset, step: int) -> Dataset:
        position = Position(step, 12 * step, before.fingerprint())
        found = datasets(data, packing="packed", steps=steps, split="1", position=position).train  # type: ignore[arg-type]
        check_fingerprint(before.fingerprint(), found.fingerprint(), "training")
        assert all(found.sample(n).tolist() == before.sample(n).tolist() for n in range(12 * step))
        return found

    short = datasets(data, steps=6, split="1").train  # type: ignore[arg-type]
    reach = short.samples_drawn // 12
    said = how_far(short, 12, Position())
    assert said.startswith(f'data.order = "neox": training.steps can be raised to {reach}; beyond, further samples')
    assert go_on(reach, short, 6).fingerprint() == short.fingerprint()  # as it said
    longer = go_on(2 * reach, short, 6)
    assert "further samples follow" in how_far(longer, 12, Position(6, 72, short.fingerprint()))
    longest = go_on(5 * reach, longer, reach)
    assert longest.num_samples >= 60 * reach
    again = go_on(5 * reach, longer, 2 * reach)
    assert all(again.sample(n).tolist() == longest.sample(n).tolist() for n in range(60 * reach))
    if kind == "mixture":
        return
    assert how_far(again, 12, Position(9, 108, again.fingerprint())).startswith('data.order = "neox": training.steps can be')
    assert [longest.sample(n).tolist() for n in range(12 * reach)] == neox_samples(documents, 0, 60, SEQ_LENGTH, 72, SEED)[: 12 * reach]
    fingerprint = longest.fingerprint()
    legs, total = fingerprint["epochs"], sum(map(len, documents))
    assert legs[:2] == [1, 2] and len(legs) == 3  # type: ignore[index, arg-type]
    per_epoch = (total - 1) // SEQ_LENGTH
    second = sorted(tuple(longest.sample(n).tolist()) for n in range(per_epoch, 2 * per_epoch))
    assert second != sorted(tuple(longest.sample(n).tolist()) for n in range(per_epoch))  # documents in another order
    document = max(range(60), key=lambda n: len(documents[n]))
    found = longest.samples_of(prefix, document, 60 * reach).tolist()
    assert found == [n for n in range(60 * reach) if document in {each.document for each in longest.locate(n).segments}]


def test_stored_rows_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [[number] * (SEQ_LENGTH + 1) for number in range(72)]
    data = datasets(write_files(tmp_path / "rows", rows), order="stored", split="1")
    assert how_far(data.train, 12, Position()).endswith("training.steps can be raised to 6; there are no more rows")
    assert how_far(datasets(data.train.files.prefix, order="epoch", split="1").train, 12, Position()) == ""  # type: ignore[attr-defined]
    read = torch.cat([step.model_fields["tokens_BT"].flatten(0, 2) for step in steps_of(data, micro=12)])
    assert read.reshape(72, SEQ_LENGTH).tolist() == [row[1:] for row in rows]
    with pytest.raises(UserError, match="the run needs sample 83, but there are 72"):
        steps_of(data, steps=7)


def test_a_mixture_of_too_few_stored_rows_is_refused(tmp_path: Path) -> None:
    few, many = (
        write_files(tmp_path / name, [[number] * (SEQ_LENGTH + 1) for number in range(count)])
        for name, count in [("few", 10), ("many", 54)]
    )
    mixture = [{"path": few, "weight": 1.0}, {"path": many, "weight": 3.0}]
    with pytest.raises(UserError, match="train part of .*few has 10 samples, the mixture needs 18 of them; lower its"):
        datasets(mixture, order="stored", split="1")  # type: ignore[arg-type]
    mixture[0]["weight"] = 3 * 10 / 50
    data = datasets(mixture, order="stored", split="1", batch=10)  # type: ignore[arg-type]
    assert len(steps_of(data, batch=10, micro=10)) == 6


def test_stored_rows_of_another_length_are_refused(tmp_path: Path) -> None:
    rows = write_files(tmp_path / "rows", [[1] * 9, [1] * 10])
    with pytest.raises(UserError, match="rows of model.seq_length \\+ 1 = 9 tokens .* but row 1 has 10"):
        datasets(rows, order="stored", split="1")
    with pytest.raises(UserError, match="but data.packing is 'unpacked'"):
        datasets(write_files(tmp_path / "fine", [[1] * 9] * 2), order="stored", packing="unpacked", split="1")


def test_missing_files_of_a_mixture_are_all_named(prefix: str) -> None:
    paths = [prefix, "no/such", prefix, "nor/this"]
    with pytest.raises(UserError, match=r"data\.train names no/such, nor/this, but there is no no/such\.idx, nor/this\.idx"):
        datasets([{"path": path, "weight": 1.0} for path in paths])  # type: ignore[arg-type]


def test_an_unknown_key_of_a_mixture_is_named(prefix: str) -> None:
    with pytest.raises(UserError, match=r"data\.train\[0\] = {.*} has a key 'wieght'; its keys are path, weight"):
        datasets([{"path": prefix, "wieght": 1.0}])  # type: ignore[arg-type]


def test_a_mixture_entry_without_its_weight_is_named(prefix: str) -> None:
    with pytest.raises(UserError, match=r"data\.train\[1\] = {.*} must have a path and a weight above 0"):
        datasets([{"path": prefix, "weight": 1.0}, {"path": prefix}])  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [0, -1.5, float("inf"), float("nan"), "x", True])
def test_a_weight_that_is_not_above_zero_is_refused(prefix: str, weight: float) -> None:
    with pytest.raises(UserError, match=r"data\.train\[1\] = {.*} must have a path and a weight above 0"):
        datasets([{"path": prefix, "weight": 1.0}, {"path": prefix, "weight": weight}])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "count, sentence", [(0, "data.train is empty"), (256, "names 256 datasets, it takes 1 to 255")]
)
def test_a_mixture_of_no_or_too_many_sets_is_refused(prefix: str, count: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        datasets([{"path": prefix, "weight": 1.0}] * count, valid=prefix)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_cannot_take_is_refused(prefix: str, seed: int) -> None:
    with pytest.raises(UserError, match=f"run.seed = {seed} must lie between 0 and"):
        build_data(Data(train=prefix), Model(), Training(), Evaluation(), seed, Ranks())
