"""A pickle read as data: its opcodes build inert records; nothing is imported, called, hashed or given attributes.

A pickle is a program for a small stack machine (the standard library's `pickletools` describes it). Here are the opcodes
that Python writes for plain data classes under protocols 4 and 5; any other is refused. None of them makes more than one
object of an opcode, copies what was stored before or names a place in memory, so that time and memory stay in proportion
to the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from neox_native.errors import UserError

PROTOCOLS = (4, 5)
MAX_MARKS = 32
"""Containers that are open at once; DCP's index has 5."""
MAX_INTEGER_BYTES = 8


class Global:
    """The name of a class or a function, "torch.Size", which stays a name."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Record:
    """What would be an object: the name that would be called, its arguments, and the attributes that would be set."""

    __slots__ = ("name", "arguments", "state")

    def __init__(self, name: str, arguments: tuple) -> None:
        self.name, self.arguments, self.state = name, arguments, None


class Table(list):
    """What would be a dict, as (key, value) pairs: hashing nested tuples may take for ever."""


def read(data: bytes, admits: Callable[[str, str], bool]) -> Any:
    """The one object of a pickle: None, bool, int, str, tuple, list, `Table`, `Global` or `Record`.

    Args:
        admits: whether a (module, name) may stand in it.

    Raises:
        UserError: the second half of a sentence that begins with the file's name.
    """
    return Machine(data, admits).run(OPCODES, PROTOCOLS)


class Machine:
    """The stack machine, of whose `opcodes` a kind of file needs some; what they make stays inert."""

    def __init__(self, data: bytes, admits: Callable[[str, str], bool]) -> None:
        self.data, self.at, self.admits = data, 0, admits
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        """The stacks under the marks."""
        self.memo: list[Any] = []

    def run(self, opcodes: Mapping[bytes, Callable[[Any], Any]], protocols: tuple[int, ...]) -> Any:
        """The one object of the pickle. Raises `UserError` as `read` does."""
        data = self.data
        if len(data) < 2 or data[0] != 0x80 or data[1] not in protocols:
            raise UserError(f"it is no pickle of protocol {' or '.join(map(str, protocols))}")
        self.at = 2
        try:
            while (code := data[self.at : self.at + 1]) != b".":
                self.at += 1
                opcodes[code](self)
        except UserError:
            raise
        except KeyError:
            raise UserError(f"its byte {self.at - 1} is no operation that such a file needs" if code else "it ends too early") from None
        except (IndexError, ValueError, TypeError):
            raise UserError(f"its operations do not fit together at byte {self.at}") from None
        if len(self.stack) != 1 or self.below or self.at + 1 != len(data):
            raise UserError("it holds more than one object")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        """The next bytes of the file."""
        taken = self.data[self.at : self.at + count]
        if len(taken) != count:
            raise UserError("it ends too early")
        self.at += count
        return taken

    def number(self, size: int, signed: bool = False) -> int:
        """The next number, little-endian."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> tuple:
        """The topmost values, lowest first."""
        if len(self.stack) < count:
            raise IndexError
        taken = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return taken

    def mark(self) -> None:
        if len(self.below) == MAX_MARKS:
            raise UserError(f"it nests more than {MAX_MARKS} containers")
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        """All values above the last mark, which goes."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def push_tuple(self, count: int) -> None:
        self.push(self.pop(count))

    def push_text(self, size: int) -> None:
        self.push(self.take(size).decode("utf-8", "surrogatepass"))

    def push_integer(self) -> None:
        if (size := self.number(1)) > MAX_INTEGER_BYTES:
            raise UserError(f"it holds a number of {size} bytes")
        self.push(self.number(size, signed=True))

    def append(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError
        self.stack[-1].extend(values)

    def set_items(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not Table:
            raise TypeError
        self.stack[-1].extend(zip(values[::2], values[1::2], strict=True))

    def find(self) -> None:
        module, name = self.pop(2)
        if type(module) is not str or type(name) is not str:
            raise TypeError
        self.push_global(module, name)

    def push_global(self, module: str, name: str) -> None:
        if not self.admits(module, name):
            raise UserError(f"it asks for {f'{module}.{name}'[:100]}, which no checkpoint needs and which could run code")
        self.push(Global(f"{module}.{name}"))

    def make(self) -> None:
        """What would call a class or a function."""
        called, arguments = self.pop(2)
        if type(called) is not Global or type(arguments) is not tuple:
            raise TypeError
        self.push(Record(called.name, arguments))

    def build(self) -> None:
        """What would set the attributes of an object: of a fresh record and nothing else."""
        (state,) = self.pop(1)
        record = self.stack[-1]
        if type(record) is not Record or record.state is not None:
            raise UserError("it sets attributes of what is no new record, which could change this program")
        record.state = state


OPCODES: dict[bytes, Callable[[Machine], Any]] = {
    b"\x95": lambda machine: machine.take(8),  # a frame's length, for readers of streams
    b"N": lambda machine: machine.push(None),
    b"\x88": lambda machine: machine.push(True),
    b"\x89": lambda machine: machine.push(False),
    b"K": lambda machine: machine.push(machine.number(1)),
    b"M": lambda machine: machine.push(machine.number(2)),
    b"J": lambda machine: machine.push(machine.number(4, signed=True)),
    b"\x8a": Machine.push_integer,
    b"\x8c": lambda machine: machine.push_text(machine.number(1)),
    b"X": lambda machine: machine.push_text(machine.number(4)),
    b"(": Machine.mark,
    b")": lambda machine: machine.push(()),
    b"\x85": lambda machine: machine.push_tuple(1),
    b"\x86": lambda machine: machine.push_tuple(2),
    b"\x87": lambda machine: machine.push_tuple(3),
    b"t": lambda machine: machine.push(tuple(machine.since_mark())),
    b"]": lambda machine: machine.push([]),
    b"a": lambda machine: machine.append(machine.pop(1)),
    b"e": lambda machine: machine.append(machine.since_mark()),
    b"}": lambda machine: machine.push(Table()),
    b"s": lambda machine: machine.set_items(machine.pop(2)),
    b"u": lambda machine: machine.set_items(machine.since_mark()),
    b"\x94": lambda machine: machine.memo.append(machine.stack[-1]),
    b"h": lambda machine: machine.push(machine.memo[machine.number(1)]),
    b"j": lambda machine: machine.push(machine.memo[machine.number(4)]),
    b"\x93": Machine.find,
    b"\x81": lambda machine: machine.make(),
    b"R": lambda machine: machine.make(),
    b"b": lambda machine: machine.build(),
}
"""By `pickletools`' names: FRAME, NONE, NEWTRUE, NEWFALSE, BININT1, BININT2, BININT, LONG1, SHORT_BINUNICODE, BINUNICODE,
MARK, EMPTY_TUPLE, TUPLE1 to 3, TUPLE, EMPTY_LIST, APPEND, APPENDS, EMPTY_DICT, SETITEM, SETITEMS, MEMOIZE, BINGET,
LONG_BINGET, STACK_GLOBAL, NEWOBJ, REDUCE, BUILD. Numbers of the memo are not written but counted."""
