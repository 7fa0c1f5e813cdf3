"""What `torch.save` wrote is looked at before `torch.load` reads it.

`weights_only=True` runs no code of the file, but the file still chooses how long that takes and how much memory: a key
of nested tuples is hashed for ever, `bytearray` makes as many bytes as it is told, and a compressed entry unpacks to
more than the disk holds. So the pickle inside is read as data first, and only what GPT-NeoX and we write is let through.
"""

from __future__ import annotations

import errno
import io
import os
import struct
import zipfile
from collections.abc import Callable
from typing import IO, Any

import torch

from neox_native.checkpoint import inert
from neox_native.errors import UserError

MAX_PICKLE_BYTES = 1 << 24
"""The largest pickle in a file: it holds names and shapes but no numbers."""
MAX_DIMS = 64
BEGINS, ENDS, END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22


class Piece(io.RawIOBase):
    """A stretch of a file, as a file of its own. (DCP's view of one seeks beyond the end where it is told to go before it.)"""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        if at < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.at = at
        return at

    def readinto(self, buffer: Any, /) -> int:
        self.file.seek(self.offset + self.at)
        count = self.file.readinto(memoryview(buffer).cast("B")[: max(0, self.length - self.at)])  # type: ignore[attr-defined]
        self.at += count
        return count


def look_at(file: Any) -> None:
    """Let a file of `torch.save` pass, at its start, if reading it takes time and memory in proportion to its size.

    Raises:
        UserError: the second half of a sentence that begins with the file's name.
    """
    if file.read(len(BEGINS)) != BEGINS:
        raise UserError("it is damaged or no file of torch.save (of a torch before 1.6: load it there and save it anew)")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
            # What stands before or after the archive could hold another one for another reader.
            file.seek(-END_BYTES, os.SEEK_END)
            alone = file.read(len(ENDS)) == ENDS and min((entry.header_offset for entry in entries), default=-1) == 0
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if len(pickles) != 1 or not alone or not stored or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise UserError("it is no archive as torch.save writes it")
            data = archive.read(pickles[0])
    except UserError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f"it is damaged or no file of torch.save ({error})") from None
    _SavedByTorch(data, lambda module, name: True).run(OPCODES, (2,))
    file.seek(0)


def _is_shape(value: Any) -> bool:
    return type(value) is tuple and len(value) <= MAX_DIMS and all(type(size) is int for size in value)


def _is_tensor(arguments: tuple) -> bool:
    if len(arguments) != 6:
        return False
    storage, offset, size, stride, needs_grad, hooks = arguments
    placed = type(storage) is _Storage and type(offset) is int and _is_shape(size) and _is_shape(stride)
    return placed and type(needs_grad) is bool and type(hooks) is inert.Table


def _is_parameter(arguments: tuple) -> bool:
    tensor, *rest = arguments or (None,)
    return _is_record(tensor, "torch._utils._rebuild_tensor_v2") and [type(each) for each in rest] == [bool, inert.Table]


def _is_array(arguments: tuple) -> bool:
    """An empty array, which then gets its state."""
    kind, shape, letter = arguments if len(arguments) == 3 else (None, None, None)
    known = type(kind) is inert.Global and kind.name == "numpy.ndarray" and shape == (0,)
    return known and (type(letter) is str or _is_record(letter, "_codecs.encode"))


def _are_words(arguments: tuple) -> bool:
    return all(type(each) in (str, bool) for each in arguments)


def _is_record(value: Any, name: str) -> bool:
    return type(value) is inert.Record and value.name == name


CALLS: dict[str, Callable[[tuple], bool]] = {
    "torch._utils._rebuild_tensor_v2": _is_tensor,
    "torch._utils._rebuild_parameter": _is_parameter,
    "torch.Size": lambda arguments: len(arguments) == 1 and _is_shape(arguments[0]),
    "collections.OrderedDict": lambda arguments: not arguments,
    "numpy.core.multiarray._reconstruct": _is_array,
    "numpy._core.multiarray._reconstruct": _is_array,
    "numpy.dtype": _are_words,
    "_codecs.encode": _are_words,
}
"""What may be called, and whether with these arguments: tensors, and the arrays of GPT-NeoX's saved random state."""
NAMES = frozenset(
    ["numpy.ndarray", *(f"{kind.__module__}.{kind.__name__}" for kind in torch._storage_classes)]
    + [str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)]
)
"""What may be named besides."""


class _Storage:
    """The numbers of a tensor, which lie elsewhere in the archive."""


class _SavedByTorch(inert.Machine):
    """A machine with the opcodes of protocol 2. Keys of dicts are words or numbers, so that none takes long to hash."""

    def push_global(self, module: str, name: str) -> None:
        whole = f"{module}.{name}"
        if whole not in CALLS and whole not in NAMES:
            shown = ascii(whole)[1:-1][:100]
            raise UserError(f"it holds objects other than tensors ({shown}), which could run code; save its tensors alone")
        self.push(inert.Global(whole))

    def line(self) -> str:
        """The rest of a line."""
        return self.take(self.data.index(b"\n", self.at) + 1 - self.at)[:-1].decode("utf-8", "backslashreplace")

    def put(self, number: int) -> None:
        """Give the topmost value its number of the memo: the next one, as every pickler does."""
        if number != len(self.memo):
            raise UserError("it does not count its objects one by one")
        self.memo.append(self.stack[-1])

    def set_items(self, values: list[Any]) -> None:
        if any(type(key) not in (str, int, bool, type(None)) for key in values[::2]):
            raise UserError("a key in it is neither a word nor a number")
        super().set_items(values)

    def make(self) -> None:
        super().make()
        record = self.stack[-1]
        if record.name not in CALLS or not CALLS[record.name](record.arguments):
            raise UserError(f"it makes a {record.name} of what torch.save does not write there")
        if record.name == "collections.OrderedDict":
            self.stack[-1] = inert.Table()

    def build(self) -> None:
        if type(self.stack[-2]) is inert.Table:  # an OrderedDict; modules leave word of their versions
            self.pop(1)
        else:
            super().build()

    def make_storage(self) -> None:
        """What names a part of the archive."""
        (place,) = self.pop(1)
        if type(place) is not tuple or [type(each) for each in place] != [str, inert.Global, str, str, int]:
            raise UserError("it does not say where the numbers of a tensor lie")
        self.push(_Storage())


OPCODES: dict[bytes, Callable[[_SavedByTorch], Any]] = {
    **{code: inert.OPCODES[code] for code in (bytes([each]) for each in b"N\x88\x89KMJ\x8aX()\x85\x86\x87t]ae}suhjR\x81b")},
    b"c": lambda machine: machine.push_global(machine.line(), machine.line()),
    b"q": lambda machine: machine.put(machine.number(1)),
    b"r": lambda machine: machine.put(machine.number(4)),
    b"G": lambda machine: machine.push(struct.unpack(">d", machine.take(8))[0]),
    b"Q": _SavedByTorch.make_storage,
}
"""The opcodes of `inert.OPCODES` that protocol 2 has, with GLOBAL, BINPUT, LONG_BINPUT, BINFLOAT and BINPERSID."""
