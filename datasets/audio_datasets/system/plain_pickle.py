"""Reads pickles of plain data – dicts, lists, text, numbers – without being able to do anything else.

``pickle.load`` calls whatever a file tells it to call. Here nothing is unpickled: the file's instructions, as
``pickletools.genops`` lists them, are followed by the few lines below, which know containers, text and numbers and nothing
that could be called. NumPy's whole numbers, which are pickled as a call to NumPy, are recognised by that call's
description and made from their bytes; so are its arrays of objects with one axis, which become lists.

Why not a ``pickle.Unpickler`` with a strict ``find_class`` (tried on Python 3.11): it keeps code from being run and nothing
else. It fills dicts itself, so a file of 300 bytes with a key of shared tuples keeps it busy for ever, one with a deeply nested
key ends the process (segmentation fault), colliding whole numbers take quadratic time, and five bytes make it ask for 32 GB.
"""

import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from audio_datasets.system.paths.inputs import read_regular

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_VALUES = frozenset((*_NUMBERS, *_TEXTS, *_BYTES))
_NUMPY_SCALARS = ("numpy.core.multiarray scalar", "numpy._core.multiarray scalar")
_NUMPY_ARRAYS = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_OBJECTS = "O8"
_MOST_NESTED = 100
_LARGEST_KEY = 2**64
"""Larger whole numbers can be chosen so that all have one hash, and each takes as long to store as there are others."""
_WHOLE_NUMBERS = frozenset(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))


class _Name(NamedTuple):
    """What a pickle would import; never looked up."""

    text: str


class _ArrayType:
    """What takes the place of ``numpy.dtype`` in a pickle."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.byte_order = "<"


class _ObjectArray(list):
    """What takes the place of a NumPy array of objects in a pickle."""


def read_plain_pickle(path: Path) -> Any:
    """The content of a pickle file of plain data.

    Raises ValueError, with the path, for anything else: a damaged file, and one that would import or call something, of which
    nothing is executed.
    """
    try:
        return plain_pickle(read_regular(path))
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error


def plain_pickle(data: bytes) -> Any:
    """The content of a pickle of plain data; ValueError as ``read_plain_pickle``, without a path."""
    try:
        content = _follow(data)
        _check_extent(content, len(data))
        return content
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, struct.error) as error:
        raise ValueError(f"not a pickle of plain data (dicts, lists, text and numbers): {error}") from error


def _follow(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _ACTIONS:
            _ACTIONS[name](stack)
        elif name == "GLOBAL":
            stack.append(_Name(argument))
        elif name == "STOP":
            return _only(stack)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it holds the instruction {name}, which plain data does not need")
    raise ValueError("it ends too early")


def _check_extent(content: Any, most_containers: int) -> None:
    """ValueError for containers that lie too deep or, by being shared, at too many places: code that walks them would not end."""
    found = 0
    to_visit = [(content, 1)]
    while to_visit:
        container, depth = to_visit.pop()
        if not isinstance(container, dict | list | tuple):
            continue
        found += 1
        if depth > _MOST_NESTED:
            raise ValueError(f"its values are nested more than {_MOST_NESTED} deep")
        if found > most_containers:
            raise ValueError("the same values are at too many places")
        values = container.values() if isinstance(container, dict) else container
        to_visit.extend((value, depth + 1) for value in values if isinstance(value, dict | list | tuple))


def _only(stack: list) -> Any:
    if len(stack) != 1 or isinstance(stack[0], _Name | _ArrayType) or stack[0] is _MARK:
        raise ValueError("it does not end with one value")
    return stack[0]


def _above_mark(stack: list) -> list:
    """Takes the values above the last mark, and the mark, off the stack."""
    start = next((index for index in range(len(stack) - 1, -1, -1) if stack[index] is _MARK), None)
    if start is None:
        raise ValueError("it takes values up to a mark that is not there")
    values = stack[start + 1 :]
    del stack[start:]
    return values


def _fill_dict(stack: list, values: list) -> None:
    """Puts keys and values, in turn, into the dict on top of the stack."""
    target = stack[-1]
    if not isinstance(target, dict) or len(values) % 2:
        raise ValueError("entries are added to what is no dict")
    for key in values[::2]:
        # No tuples: how long one takes to hash has no limit.
        if not isinstance(key, str | bytes | int | float | None):
            raise ValueError(f"a dict has a key that is a {type(key).__name__}")
        if isinstance(key, int) and not -_LARGEST_KEY < key < _LARGEST_KEY:
            raise ValueError("a dict has a key that is a whole number of more than 64 bits")
    target.update(zip(values[::2], values[1::2], strict=True))


def _fill_list(stack: list, values: list) -> None:
    """Puts values at the end of the list on top of the stack."""
    if not isinstance(stack[-1], list):
        raise ValueError("elements are added to what is no list")
    stack[-1].extend(values)


def _pop(stack: list, count: int) -> list:
    if len(stack) < count:
        raise ValueError("it takes more values than there are")
    values = stack[-count:]
    del stack[-count:]
    return values


def _dict_above_mark(stack: list) -> None:
    values = _above_mark(stack)
    stack.append({})
    _fill_dict(stack, values)


def _global_on_stack(stack: list) -> None:
    module, name = _pop(stack, 2)
    stack.append(_Name(f"{module} {name}"))


def _call(stack: list) -> None:
    """What a pickle would call: only NumPy's ways of writing down whole numbers and arrays of objects are understood."""
    function, arguments = _pop(stack, 2)
    match function, arguments:
        case _Name("numpy dtype"), (str(code), *_) if code in _WHOLE_NUMBERS or code == _OBJECTS:
            stack.append(_ArrayType(code))
        case _Name(name), (_Name("numpy ndarray"), (0,), b"b") if name in _NUMPY_ARRAYS:
            stack.append(_ObjectArray())
        case _Name(name), (_ArrayType() as kind, bytes(content)) if name in _NUMPY_SCALARS and kind.code != _OBJECTS:
            if len(content) != int(kind.code[1:]):
                raise ValueError(f"a number of type {kind.code} has {len(content)} bytes")
            order = "big" if kind.byte_order == ">" else "little"
            stack.append(int.from_bytes(content, order, signed=kind.code[0] == "i"))
        case _Name("_codecs encode"), (str(text), "latin1"):  # how older protocols write bytes
            stack.append(text.encode("latin1"))
        case _Name("__builtin__ bytes" | "builtins bytes"), ():
            stack.append(b"")
        case _:
            named = function.text.replace(" ", ".") if isinstance(function, _Name) else type(function).__name__
            raise ValueError(f"it would call {named}; nothing was executed")


def _set_state(stack: list) -> None:
    (state,) = _pop(stack, 1)
    match stack[-1], state:
        case _ArrayType() as kind, (int(), ("<" | ">" | "|" | "=") as order, *_):
            kind.byte_order = order
        case _ObjectArray() as array, (1, (int(length),), _ArrayType(code=code), bool(), list(values)) if (
            code == _OBJECTS and length == len(values) and not array
        ):
            array.extend(values)
        case _:
            raise ValueError("it would change an object; nothing was executed")


_ACTIONS: dict[str, Callable[[list], None]] = {
    "MARK": lambda stack: stack.append(_MARK),
    "EMPTY_DICT": lambda stack: stack.append({}),
    "EMPTY_LIST": lambda stack: stack.append([]),
    "EMPTY_TUPLE": lambda stack: stack.append(()),
    "DICT": _dict_above_mark,
    "LIST": lambda stack: stack.append(_above_mark(stack)),
    "TUPLE": lambda stack: stack.append(tuple(_above_mark(stack))),
    "TUPLE1": lambda stack: stack.append(tuple(_pop(stack, 1))),
    "TUPLE2": lambda stack: stack.append(tuple(_pop(stack, 2))),
    "TUPLE3": lambda stack: stack.append(tuple(_pop(stack, 3))),
    # The values are taken off the stack before what is then on top of it is filled.
    "SETITEM": lambda stack: _fill_dict(stack, _pop(stack, 2)),
    "SETITEMS": lambda stack: _fill_dict(stack, _above_mark(stack)),
    "APPEND": lambda stack: _fill_list(stack, _pop(stack, 1)),
    "APPENDS": lambda stack: _fill_list(stack, _above_mark(stack)),
    "STACK_GLOBAL": _global_on_stack,
    "REDUCE": _call,
    "BUILD": _set_state,
}
