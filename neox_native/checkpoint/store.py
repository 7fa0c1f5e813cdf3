"""Save and load the state of a run with DCP: complete or absent, whole or refused, in any layout.

[Note: state] The state is a flat dict from a global name to a tensor: a DTensor (each rank writes its boxes;
replicated ones are written once), a plain tensor that is the same on every rank that holds it, or a plain tensor
under a name of its own for each rank (a random generator's state, with the rank's coordinates in the name). Names and
shapes are those of the whole model, so a checkpoint knows nothing of the layout that wrote it and loads in any other.
"""

from __future__ import annotations

import math
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from neox_native.checkpoint import files
from neox_native.checkpoint.safe import INDEX, SafeLoadPlanner, SafeReader, read_index
from neox_native.checkpoint.shards import SavePlanner, Writer
from neox_native.durable import make_folder, put_in_place, temporary_name
from neox_native.errors import UserError, in_words
from neox_native.hashes import as_text
from neox_native.launch import Ranks

State = dict[str, torch.Tensor]
NAMES_SHOWN = 5


def own_share(state: State) -> State:
    """What this rank writes of `state`. Where several ranks hold the same DTensor, its name picks the one that writes it.

    DCP would pick too, but only after every rank has copied everything to its host.
    """

    def is_mine(name: str, value: torch.Tensor) -> bool:
        if not isinstance(value, DTensor):
            return True
        pick, mesh = zlib.crc32(name.encode()), value.device_mesh
        copies = [dim for dim, placement in enumerate(value.placements) if placement.is_replicate()]
        return all(mesh.get_local_rank(dim) == pick % mesh.size(dim) for dim in copies)

    return {name: value for name, value in state.items() if is_mine(name, value)}


def save(
    directory: Path, step: int, state: State, metadata: dict[str, Any], ranks: Ranks, host_copies: State | None = None,
    beside: Mapping[str, bytes] = {},
) -> Path:
    """Write `state` and `metadata` (JSON) as the checkpoint of `step`; returns its folder. A collective over all ranks.

    When this returns, the checkpoint is on the disk under its final name. An error on one rank (a full disk) raises the
    same `UserError` on all of them and leaves nothing behind.

    Args:
        host_copies: a local tensor for each name of `state`. The numbers come from there, and `state` only describes them.
        beside: small files by name.
    """
    doing = f"Saving the checkpoint of step {step} in {directory}"
    return write(files.step_folder(directory, step), doing, state, metadata, ranks, host_copies, beside=beside)


def write(
    final: Path,
    doing: str,
    state: State,
    metadata: dict[str, Any],
    ranks: Ranks,
    host_copies: Mapping[str, torch.Tensor] | None = None,
    file_per_tensor: bool = False,
    beside: Mapping[str, bytes] = {},
) -> Path:
    """`save` to any folder; `doing` begins the sentence of an error.

    With `file_per_tensor`, each of `host_copies` is asked for when it is written and let go before the next: DCP keeps
    what goes into one file until that is closed.
    """
    assert all(isinstance(value, torch.Tensor) for value in state.values()), "tensors only, see [Note: state]"
    with new_folder(final, doing, ranks) as temporary:
        records, hashes = _write(temporary, state, ranks, doing, SavePlanner(host_copies), file_per_tensor)
        with ranks.together(doing):
            if ranks.is_first:
                for name, content in beside.items():
                    with files.ChecksumStream(temporary / name) as stream:
                        stream.write(content)
                    records[name] = stream.record
                records[files.METADATA] = files.write_json(temporary / files.METADATA, metadata)
                records[files.HASHES] = files.write_hashes(temporary, hashes)
                files.write_json(temporary / files.MANIFEST, {"files": records})
    return final


@contextmanager
def new_folder(final: Path, doing: str, ranks: Ranks) -> Iterator[Path]:
    """A folder for all ranks to fill. It takes the place of `final` when the block ends well, and goes when it does not.
    A collective; `doing` begins the sentence of an error."""
    temporary = ranks.from_first(temporary_name(final))
    try:
        with ranks.together(doing):
            if ranks.is_first:
                make_folder(temporary.parent)
                temporary.mkdir()
        with ranks.together(doing):
            if not temporary.is_dir():
                raise UserError(f"{temporary}, made by rank 0, is not seen here; all nodes must share run.dir")
        yield temporary
        with ranks.together(doing):
            if ranks.is_first:
                put_in_place(temporary, final)
    except BaseException:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(
    path: Path, state: State, ranks: Ranks, doing: str, planner: SavePlanner, file_per_tensor: bool
) -> tuple[dict[str, files.Record], dict[str, str]]:
    """Write the shards and the index; returns the records of all ranks' files, and the hash of each tensor."""
    writer = Writer(path, planner.host_copies is not None, file_per_tensor)
    with ranks.together(doing), _dcp(ranks), planner.helper:
        dcp.save(state, storage_writer=writer, planner=planner, process_group=ranks.group, no_dist=ranks.group is None)
    records, hashes = dict[str, files.Record](), dict[str, int]()
    for of_files, of_boxes in ranks.gather((writer.fs.records, planner.hashes())):
        records |= of_files
        for name, value in of_boxes.items():
            hashes[name] = hashes.get(name, 0) + value
    return records, {name: as_text(value) for name, value in hashes.items()}


@contextmanager
def _dcp(ranks: Ranks) -> Iterator[None]:
    """Run a collective of DCP. Where it fails, every rank learns the errors of all; each raises its own, for `together` to
    name. DCP's warning that one process works alone is silenced: that is what was asked for."""
    try:
        if ranks.group is not None:
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        if ranks.rank in failure.failures:
            raise failure.failures[ranks.rank][0] from None


def find_damage(path: Path, ranks: Ranks) -> list[str]:
    """What is wrong with a checkpoint, the same on all ranks. Each rank checks some of the files against the manifest. Then
    the index must tell where in these files the tensors lie, and the name must tell the step."""
    complaints = _complaints(lambda: _damaged_files(path, ranks), ranks)
    return complaints or _complaints(lambda: _damaged_content(path) if ranks.is_first else [], ranks)


def _complaints(find: Callable[[], list[str | None]], ranks: Ranks) -> list[str]:
    """What all ranks find."""
    try:
        found = find()
    except UserError as error:
        found = [str(error).rstrip(".")]
    except OSError as error:
        found = [in_words(error)]
    return sorted({complaint for part in ranks.gather(found) for complaint in part if complaint is not None})


def _damaged_files(path: Path, ranks: Ranks) -> list[str | None]:
    records = files.read_manifest(path)
    unlisted = [f"{path / name} is missing from the manifest" for name in (INDEX, files.METADATA) if name not in records]
    mine = sorted(records.items())[ranks.rank :: ranks.size]
    return [*unlisted, *(files.damage(Path(path) / name, record) for name, record in mine)]


def _damaged_content(path: Path) -> list[str | None]:
    read_index(path)
    return [files.wrong_step(path)]


def saved_in(directory: Path, ranks: Ranks) -> list[Path]:
    """`files.finished` as rank 0 sees it. A collective."""
    with ranks.together(f"Looking for checkpoints in {directory}"):
        found = files.finished(directory) if ranks.is_first else []
    return ranks.from_first(found)


def newest(directory: Path, ranks: Ranks) -> Path | None:
    """Folder of the newest checkpoint that is whole, or None. The damaged ones are named and skipped. A collective."""
    for path in saved_in(directory, ranks):
        complaints = find_damage(path, ranks)
        if not complaints:
            return path
        ranks.say(f"Skipping the checkpoint {path.name}: " + "; ".join(complaints[:NAMES_SHOWN]) + ".")
    return None


def load(
    path: Path, state: State, ranks: Ranks, only: str = "", lenient: tuple[str, ...] = ("rng.",), verified: bool = False
) -> dict[str, Any]:
    """Fill `state` in place from the checkpoint in `path`, in any layout; returns its metadata. A collective over all
    ranks.

    Args:
        only: saved names that do not begin so are left alone ("model." takes the weights).
        lenient: names that begin so are loaded where both sides have them.
        verified: `newest` has checked the checksums.

    Raises:
        UserError: on all ranks, where the checkpoint is damaged, hostile, or of another architecture (names and shapes).
    """
    if not verified:
        complaints = find_damage(path, ranks)
        if complaints:
            raise UserError(f"The checkpoint {path} is damaged: " + "; ".join(complaints[:NAMES_SHOWN]) + ".")
    doing = f"Loading the checkpoint {path}"
    with ranks.together(doing):
        index, metadata = read_index(path), files.read_metadata(path)
    saved = index.state_dict_metadata
    wanted = {name: value for name, value in state.items() if name in saved or not name.startswith(lenient)}
    check_fit(path, wanted, index, ranks, only, lenient)
    with ranks.together(doing), _dcp(ranks):
        dcp.load(
            wanted, storage_reader=SafeReader(path, index), planner=SafeLoadPlanner(),
            process_group=ranks.group, no_dist=ranks.group is None,
        )
    return metadata


def read_alone(path: Path, name: str, index: Metadata) -> torch.Tensor:
    """One tensor of a checkpoint, whole and of its own type, read by this process alone. Raises `UserError` where it is not
    there as the index tells.

    Args:
        index: of that checkpoint, from `read_index`.
    """
    entry = index.state_dict_metadata[name]
    assert isinstance(entry, TensorStorageMetadata), f"{name} is a pickled object"
    needed = math.prod(entry.size) * entry.properties.dtype.itemsize
    if not _covered(entry) or needed > sum(record["bytes"] for record in files.read_manifest(path).values()):
        raise UserError(f"The checkpoint {path} lacks parts of {name}.")
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    with _dcp(Ranks()):
        dcp.load({name: tensor}, storage_reader=SafeReader(path, index), planner=SafeLoadPlanner(), no_dist=True)
    return tensor


def check_fit(path: Path, wanted: State, index: Metadata, ranks: Ranks, only: str, lenient: tuple[str, ...]) -> None:
    """Raise `UserError` where names or shapes of the checkpoint are not those of the model of all ranks together."""
    everyone = ranks.gather({name: tuple(value.shape) for name, value in wanted.items()})
    here = {name: shape for part in everyone for name, shape in part.items()}
    saved = {name: entry for name, entry in index.state_dict_metadata.items() if name in here or name.startswith(only)}
    complaints = [
        _listed("the model has no", [n for n in saved if n not in here and not n.startswith(lenient)]),
        _listed("the checkpoint has no", [n for n in here if n not in saved]),
        _listed("different shapes:", [
            f"{name} {_shape(saved[name])} in the checkpoint, {shape} in the model"
            for name, shape in here.items() if name in saved and _shape(saved[name]) != shape
        ]),
        _listed("parts are missing of", [n for n in here if n in saved and not _covered(saved[n])]),
    ]
    found = [complaint for complaint in complaints if complaint]
    if found:
        raise UserError(f"The checkpoint {path} does not fit this model: " + "; ".join(found) + ".")


def _listed(what: str, names: list[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > NAMES_SHOWN else ""
    return f"{what} {', '.join(sorted(names)[:NAMES_SHOWN])}{more}" if names else ""


def _shape(entry: Any) -> tuple[int, ...] | str:
    return tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else "(a pickled object)"


def _covered(entry: Any) -> bool:
    """Whether the boxes of a saved tensor have as many elements as the tensor."""
    if not isinstance(entry, TensorStorageMetadata):
        return True
    return sum(math.prod(chunk.sizes) for chunk in entry.chunks) == math.prod(entry.size)
