"""What a torch checkpoint says of its tensors, read from its pickle without running it.

A pickle is a program for a small stack machine, which may call anything. Here those instructions alone are followed that a
dictionary of tensors is written with, by a machine of our own: it calls nothing but what makes a tensor, and what it keeps is
never larger than what was read. The instructions: pickletools of Python's standard library; the calls: torch/_utils.py.
"""

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlx_finetune.errors import UserError

# Kinds of storage: dtype in safetensors, and bytes of a number.
STORAGES = {
    "DoubleStorage": ("F64", 8),
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
DICT, TENSOR, PARAMETER = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
CALLED = (DICT, TENSOR, PARAMETER)
NESTED = ("state_dict", "model", "module")  # where a trainer keeps the weights beside other things
LONGEST = 16 * 2**20  # bytes of a pickle: of 100,000 tensors
MOST_AXES = 64  # torch's own
# Instructions that put their argument on the stack, and those that put something of their own there.
VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
DAMAGED = "the file is broken or was cut while copying: download it again"
DISTRUST = "do not load this file with anything else either: take the model from another place, or in safetensors"


@dataclass(frozen=True)
class Storage:
    """Numbers in a row, of which tensors are views: the record `data/<key>`."""

    key: str
    dtype: str
    item: int  # bytes of a number
    numbers: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """How many it takes where its numbers lie one after the other."""
        return self.numbers * self.storage.item

    @property
    def in_order(self) -> bool:
        """Whether its numbers lie one after the other, in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected and self.numbers:
                return False
            expected *= size
        return True


@dataclass(frozen=True)
class _Name:
    """Something that the pickle asks for by module and name."""

    path: str


class _Mark:
    """Where on the stack a tuple, a list or a dictionary begins."""


MADE: Mapping[str, Callable[[], Any]] = {
    "MARK": _Mark,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}


class _Broken(Exception):
    """What is wrong with the pickle."""


def read_tensors(data: bytes, place: str) -> dict[str, Tensor]:
    """The tensors of a pickled dictionary, by name; each lies within its storage. `place` says where the pickle comes from.

    Raises:
        UserError: it asks for anything that tensors have no use for; it is cut or makes no sense; a value is no tensor.
    """
    try:
        found = _Machine(place).run(data)
    except _Broken as broken:
        raise UserError(f"{place}: {broken}", hint=DAMAGED) from broken
    except (ValueError, IndexError, UnicodeDecodeError, OverflowError) as error:  # pickletools, of bytes that are no pickle
        raise UserError(f"{place}: no whole pickle: {' '.join(str(error).split())[:100]}", hint=DAMAGED) from error
    return _tensors_in(found, place)


def shown(text: str) -> str:
    """What a stranger wrote, for a message of one line: the first 80 characters, without control characters."""
    return text[:80].encode("unicode_escape").decode()


def _tensors_in(found: Any, place: str) -> dict[str, Tensor]:
    for name in NESTED:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    if not isinstance(found, dict) or not found:
        raise UserError(f"{place}: no dictionary of tensors", hint="a checkpoint of weights is needed, not of a whole model")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{place}: {str(name)[:80]!r} is no tensor", hint="a checkpoint of weights alone is needed")
    return found


class _Machine:
    """Follows the instructions of a pickle."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._does: Mapping[str, Callable[[Any], Any]] = {
            **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
            **dict.fromkeys(VALUES, self._stack.append),
            **{name: partial(self._make, made) for name, made in MADE.items()},
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), self._get),
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            "POP": lambda _: self._pop(),
            "TUPLE": lambda _: self._stack.append(tuple(self._to_mark())),
            "TUPLE1": lambda _: self._stack.append(self._last(1)),
            "TUPLE2": lambda _: self._stack.append(self._last(2)),
            "TUPLE3": lambda _: self._stack.append(self._last(3)),
            "GLOBAL": lambda name: self._import(*name.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self._import(*self._last(2)),
            "APPEND": lambda _: self._extend(self._last(1)),
            "APPENDS": lambda _: self._extend(self._to_mark()),
            "SETITEM": lambda _: self._set(self._last(2)),
            "SETITEMS": lambda _: self._set(self._to_mark()),
            "BINPERSID": lambda _: self._stack.append(_storage(self._pop())),
            "REDUCE": lambda _: self._stack.append(self._call(*self._last(2))),
            "BUILD": lambda _: self._leave_attributes(),
        }

    def run(self, data: bytes) -> Any:
        """What the pickle leaves on the stack."""
        for operation, argument, _ in pickletools.genops(data):
            if operation.name == "STOP":
                return self._pop()
            if operation.name not in self._does:
                raise UserError(f"{self._place}: the pickle uses {operation.name}, as no checkpoint does", hint=DISTRUST)
            self._does[operation.name](argument)
        raise _Broken("the pickle has no end")

    def _make(self, made: Callable[[], Any], _: None) -> None:
        self._stack.append(made())

    def _pop(self) -> Any:
        if not self._stack:
            raise _Broken("the pickle takes more than it has made")
        return self._stack.pop()

    def _last(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self._pop() for _ in range(count)]))

    def _to_mark(self) -> list[Any]:
        found: list[Any] = []
        while not isinstance(value := self._pop(), _Mark):
            found.append(value)
        return found[::-1]

    def _put(self, place: int) -> None:
        self._stack.append(value := self._pop())
        self._memo[place] = value

    def _get(self, place: int) -> None:
        if place not in self._memo:
            raise _Broken("the pickle asks for what it has not made")
        self._stack.append(self._memo[place])

    def _import(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Broken("the pickle imports something without a name")
        path = f"{module}.{name}"
        if path not in CALLED and path.removeprefix("torch.") not in STORAGES:
            raise UserError(f"{self._place}: wants to import {shown(path)}, which weights have no use for", hint=DISTRUST)
        self._stack.append(_Name(path))

    def _extend(self, values: Any) -> None:
        if not self._stack or type(self._stack[-1]) is not list:
            raise _Broken("the pickle appends to what is no list")
        self._stack[-1].extend(values)

    def _set(self, values: Any) -> None:
        if not self._stack or type(self._stack[-1]) is not dict or len(values) % 2:
            raise _Broken("the pickle sets items of what is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int):
                raise _Broken("the pickle has a key that is neither text nor number")
            self._stack[-1][key] = value

    def _leave_attributes(self) -> None:
        """torch keeps `_metadata`, versions of modules, as an attribute of the dictionary: not needed."""
        self._pop()
        if not self._stack or type(self._stack[-1]) is not dict:
            raise _Broken("the pickle sets attributes of what is no dictionary")

    def _call(self, name: Any, arguments: Any) -> Any:
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise _Broken("the pickle calls what cannot be called")
        if name.path == DICT and not arguments:
            return {}
        if name.path == TENSOR and len(arguments) >= 4:
            return _tensor(*arguments[:4])
        if name.path == PARAMETER and arguments and isinstance(arguments[0], Tensor):
            return arguments[0]
        raise _Broken(f"the pickle calls {shown(name.path)} with other arguments than torch does")


def _storage(identity: Any) -> Storage:
    """Of torch's persistent id: ("storage", kind, key, device, how many numbers)."""
    if isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage":
        _, kind, key, _, numbers = identity
        known = STORAGES.get(kind.path.removeprefix("torch.")) if isinstance(kind, _Name) else None
        if known and isinstance(key, str) and _is_count(numbers):
            return Storage(key, *known, numbers)
    raise _Broken("the pickle names a storage otherwise than torch does")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    counts: tuple[Any, ...] = (offset, *shape, *strides) if isinstance(shape, tuple) and isinstance(strides, tuple) else (None,)
    if not isinstance(storage, Storage) or not all(map(_is_count, counts)) or not len(shape) == len(strides) <= MOST_AXES:
        raise _Broken("the pickle makes a tensor otherwise than torch does")
    tensor = Tensor(storage, offset, shape, strides)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if tensor.numbers and last >= storage.numbers:
        raise _Broken(f"a tensor {list(shape)} reaches beyond the {storage.numbers} numbers of its storage")
    if tensor.numbers > storage.numbers:
        raise _Broken(f"a tensor {list(shape)} repeats the {storage.numbers} numbers of its storage")
    return tensor


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
