"""A pickle as the plain values that it describes, of which nothing is made.

A pickle is a program for a small machine with a stack. Two of its instructions name something importable and call it;
to load a pickle is to run what it says. The machine here has no way to import or to call: a name stays a name
(`Global`), and in the place of what a call would have made stands what was to be called (`Made`). So no list of what is
harmless is needed, and objects of classes that are not installed are no obstacle. Which of the calls stand for tensors,
`torch_file` knows.

Memory and time are bounded by the number of instructions, which is counted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

MOST_STEPS = 6_000_000
"""Instructions of one pickle. A tensor takes some 40."""


class PickleError(Exception):
    """What should be a pickle is none, or a larger one than may be. The message is what is said of the file."""


class PickleEndError(PickleError):
    """The bytes end within the pickle."""


class Global(NamedTuple):
    """Something importable, by its name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Made:
    """What a call would have made, had there been one.

    Attributes:
        of: what was to be called; None where that is no name.
        arguments: with what.
        state: what the object was to be given then; of most the `__dict__`.
        items: what was to be put into it, of a kind of dict.
    """

    __slots__ = ("arguments", "items", "of", "state")

    def __init__(self, of: Global | None, arguments: Any = ()) -> None:
        self.of, self.arguments, self.state = of, arguments, None
        self.items: dict[Any, Any] = {}


class OtherKey:
    """Stands for the key of a dict that is neither text nor a number that 64 bits hold. Of others, as many as one likes
    could have one hash, or be nested so deep that to hash them takes more stack than there is.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "a key of another kind"


class Hooks:
    """What a reader makes of the three instructions that reach out of the pickle; here as little as can be."""

    def named(self, what: Global) -> None:
        """Something importable is named, for the first time."""

    def called(self, what: Global, arguments: Any) -> Any:
        """What stands for the result of a call. The arguments mostly are a tuple."""
        return Made(what, arguments)

    def stored(self, key: Any) -> Any:
        """What stands for something that lies outside of the pickle.

        Raises:
            PickleError: there is no such thing.
        """
        raise PickleError(f"its pickle refers to a {type(key).__name__} that lies elsewhere")


def read_pickle(data: bytes, at: int = 0, hooks: Hooks | None = None) -> tuple[Any, int]:
    """The value that a pickle describes, and where the pickle ends. Keys of dicts are text, or small numbers; any other
    becomes an `OtherKey` of its own.

    Args:
        data: the bytes, of protocol 2 or later.
        at: where in them it begins.
        hooks: what is made of names, calls and references.

    Raises:
        PickleError: it is no such pickle, or takes more than `MOST_STEPS`.
        PickleEndError: the bytes end before it does.
    """
    machine = _Machine(data, at, hooks or Hooks())
    try:
        return machine.run(), machine.at
    except struct.error as error:
        raise PickleEndError(_ENDS) from error
    except IndexError as error:
        if machine.at >= len(data):
            raise PickleEndError(_ENDS) from error
        raise PickleError(_NONSENSE.format(machine.at)) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PickleError(_NONSENSE.format(machine.at)) from error


_ENDS = "it ends within its pickle"
_NONSENSE = "its pickle makes no sense, at byte {:,} of it"

_U1, _U2, _U4, _U8 = (struct.Struct(f"<{size}") for size in "BHIQ")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")

_SET = Global("builtins", "set")
_CONSTANTS: dict[int, Callable[[], Any]] = {
    ord("N"): lambda: None,
    0x88: lambda: True,
    0x89: lambda: False,
    ord(")"): tuple,
    ord("}"): dict,
    ord("]"): list,
    0x8F: lambda: Made(_SET),
}
_NUMBERS = {ord("K"): _U1, ord("M"): _U2, ord("J"): _I4, ord("G"): _F8}
_TEXTS = {ord("X"): _U4, 0x8C: _U1, 0x8D: _U8, ord("U"): _U1, ord("T"): _I4}  # the last two: of Python 2
_BYTES = {ord("B"): _U4, ord("C"): _U1, 0x8E: _U8, 0x96: _U8}
_LONGS = {0x8A: _U1, 0x8B: _I4}


class _Machine:
    """One pickle, and the stack on which it builds its value."""

    def __init__(self, data: bytes, at: int, hooks: Hooks) -> None:
        self.data, self.at, self._hooks = data, at, hooks
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._globals: dict[tuple[str, str], Global] = {}

    def run(self) -> Any:
        """The value. The instructions that come for every tensor come first."""
        data, stack, memo, marks = self.data, self._stack, self._memo, self._marks
        push = stack.append
        for _ in range(MOST_STEPS):
            code = data[self.at]
            self.at += 1
            if code == 0x71:  # BINPUT
                memo[self._number(_U1)] = stack[-1]
            elif code in _NUMBERS:
                push(self._number(_NUMBERS[code]))
            elif code == 0x68:  # BINGET
                push(memo[self._number(_U1)])
            elif code == 0x72:  # LONG_BINPUT
                memo[self._number(_U4)] = stack[-1]
            elif code == 0x6A:  # LONG_BINGET
                push(memo[self._number(_U4)])
            elif code in _CONSTANTS:
                push(_CONSTANTS[code]())
            elif code == 0x28:  # MARK
                marks.append(len(stack))
            elif code == 0x74:  # TUPLE
                push(tuple(self._above_mark()))
            elif 0x85 <= code <= 0x87:  # TUPLE1, TUPLE2, TUPLE3
                push(self._last(code - 0x84))
            elif code in _TEXTS:
                push(_text(self._run_of_bytes(_TEXTS[code])))
            elif code == 0x52 or code == 0x81:  # noqa: PLR1714 - REDUCE, NEWOBJ; a tuple takes longer
                push(self._called(*self._last(2)))
            elif code == 0x51:  # BINPERSID
                push(self._hooks.stored(stack.pop()))
            elif code == 0x2E:  # STOP
                return stack.pop()
            else:
                self._seldom(code)
        raise PickleError(f"its pickle has more than {MOST_STEPS:,} instructions")

    def _seldom(self, code: int) -> None:
        """An instruction that does not come for every tensor."""
        stack, memo = self._stack, self._memo
        if code == 0x63:  # GLOBAL
            stack.append(self._global(self._line(), self._line()))
        elif code == 0x93:  # STACK_GLOBAL
            stack.append(self._global(*self._last(2)))
        elif code == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif code == 0x75:  # SETITEMS
            items = self._above_mark()
            _put(stack[-1], items[::2], items[1::2])
        elif code == 0x73:  # SETITEM
            key, value = self._last(2)
            _put(stack[-1], [key], [value])
        elif code == 0x65:  # APPENDS
            _append(self._above_mark(), stack[-1])
        elif code == 0x61:  # APPEND
            _append(self._last(1), stack[-1])
        elif code == 0x90:  # ADDITEMS
            self._above_mark()
        elif code == 0x91:  # FROZENSET
            self._above_mark()
            stack.append(Made(_SET))
        elif code == 0x62:  # BUILD
            (state,) = self._last(1)
            if isinstance(stack[-1], Made):
                stack[-1].state = state
        elif code == 0x92:  # NEWOBJ_EX
            of, arguments, keywords = self._last(3)
            stack.append(self._called(of, (arguments, keywords)))
        elif code in _BYTES:
            stack.append(self._run_of_bytes(_BYTES[code]))
        elif code in _LONGS:
            stack.append(int.from_bytes(self._run_of_bytes(_LONGS[code]), "little", signed=True))
        elif code == 0x32:  # DUP
            stack.append(stack[-1])
        elif code == 0x30:  # POP
            stack.pop()
        elif code == 0x31:  # POP_MARK
            self._above_mark()
        elif code == 0x95:  # FRAME
            self._number(_U8)
        elif code == 0x80:  # PROTO
            if (protocol := self._number(_U1)) > 5:
                raise PickleError(f"its pickle is of protocol {protocol}")
        else:
            raise PickleError(f"its pickle has an instruction that torch.save does not write ({bytes([code])!r})")

    def _number(self, form: struct.Struct) -> Any:
        (number,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return number

    def _run_of_bytes(self, length: struct.Struct) -> bytes:
        nbytes = self._number(length)
        if nbytes < 0:
            raise ValueError(nbytes)
        taken = self.data[self.at : self.at + nbytes]
        if len(taken) < nbytes:
            raise PickleEndError(_ENDS)
        self.at += nbytes
        return taken

    def _line(self) -> str:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise PickleEndError(_ENDS)
        line, self.at = self.data[self.at : end], end + 1
        return line.decode("utf-8")

    def _last(self, number: int) -> tuple[Any, ...]:
        """Take the last values off the stack."""
        stack = self._stack
        if len(stack) < number:
            raise ValueError(number)
        taken = tuple(stack[-number:])
        del stack[-number:]
        return taken

    def _above_mark(self) -> list[Any]:
        """Take everything off the stack that was put onto it since the last mark."""
        start = self._marks.pop() if self._marks else -1
        if not 0 <= start <= len(self._stack):
            raise ValueError(start)
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _global(self, module: Any, name: Any) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError(name)
        known = self._globals.get((module, name))
        if known is None:
            known = self._globals[module, name] = Global(module, name)
            self._hooks.named(known)
        return known

    def _called(self, of: Any, arguments: Any) -> Any:
        if not isinstance(of, Global):
            return Made(None, arguments)
        return _dict_of(arguments) if of in _DICTS else self._hooks.called(of, arguments)


_DICTS = frozenset({Global("collections", "OrderedDict"), Global("collections", "defaultdict")})


def _dict_of(arguments: Any) -> dict[Any, Any]:
    """The dict that is made of these: none, a list of pairs (as Python 2 has it), or a function for missing keys."""
    made: dict[Any, Any] = {}
    for pairs in arguments if isinstance(arguments, tuple) else ():
        for pair in pairs if isinstance(pairs, list) else ():
            key, value = pair
            _put(made, [key], [value])
    return made


def _put(into: Any, keys: Sequence[Any], values: Sequence[Any]) -> None:
    items = into.items if isinstance(into, Made) else into
    if not isinstance(items, dict) or len(keys) != len(values):
        raise TypeError(items)
    for key, value in zip(keys, values, strict=True):
        plain = isinstance(key, str) or (isinstance(key, int) and -(2**63) <= key < 2**63)
        items[key if plain else OtherKey()] = value


def _append(values: Sequence[Any], into: Any) -> None:
    if isinstance(into, list):
        into.extend(values)
    elif not isinstance(into, Made):
        raise TypeError(into)


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:  # of Python 2, which had bytes there
        return raw.decode("latin-1")
