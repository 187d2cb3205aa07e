"""Whether the header of a GGUF file makes sense, before the library `gguf` builds anything of it.

It counts what a header promises and not what is there: an array of 2 ** 40 numbers in a file of a kilobyte would have no end.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO

from mlx_finetune.errors import UserError
from mlx_finetune.reading import open_ordinary

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
TEXT, ARRAY = 8, 9
LONGEST_TEXT = 16 * 2**20  # bytes; chat templates have 20,000
LONGEST_NAME = 64 * 2**10
MOST_VALUES = 2**22  # of all arrays together: the largest vocabularies have 256,000 tokens, scores and types and 500,000 merges
MOST_KEYS, MOST_TENSORS, MOST_AXES = 2**16, 2**20, 4


class _Broken(Exception):
    """What is wrong with the header."""


def check_header(path: Path, hint: str) -> None:
    """Reads keys, values and the table of tensors, with bounds; not the tensors.

    Raises:
        UserError: no such file, no GGUF, or a header that is cut or promises more than there is.
    """
    try:
        with open_ordinary(path) as file:
            _Header(file, path.stat().st_size).check()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", hint="give the path of a .gguf file") from error
    except (_Broken, UnicodeDecodeError) as error:
        reason = str(error) if isinstance(error, _Broken) else "text that is not UTF-8"
        raise UserError(f"{path}: broken or cut: {reason}", hint=hint) from error


class _Header:
    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left, self._values = file, size, 0
        self._order = "<"

    def check(self) -> None:
        self._skip(4)  # its magic, which was looked at
        version = self._number("I")
        if version > 2**16:  # written by a machine of the other byte order
            self._order, version = ">", struct.unpack(">I", struct.pack("<I", version))[0]
        if version not in (2, 3):
            raise _Broken(f"version {version} of the format")
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise _Broken(f"{tensors} tensors and {keys} keys")
        for _ in range(keys):
            name = self._text(LONGEST_NAME)
            self._value(self._number("I"), name)
        for _ in range(tensors):
            name = self._text(LONGEST_NAME)
            axes = self._number("I")
            if axes > MOST_AXES:
                raise _Broken(f"tensor {name} with {axes} axes")
            self._skip(8 * axes + 4 + 8)

    def _value(self, kind: int, name: str) -> None:
        if kind != ARRAY:
            self._one(kind, name)()
            return
        kind, count = self._number("I"), self._number("Q")
        self._values += count
        if kind == ARRAY or self._values > MOST_VALUES:
            raise _Broken(f"{name} is an array of {'arrays' if kind == ARRAY else f'{count} values'}")
        if kind in SIZES:
            self._skip(SIZES[kind] * count)
        else:
            take = self._one(kind, name)
            for _ in range(count):
                take()

    def _one(self, kind: int, name: str) -> Callable[[], object]:
        if kind == TEXT:
            return lambda: self._text(LONGEST_TEXT)
        if kind not in SIZES:
            raise _Broken(f"{name} is of the unknown kind {kind}")
        return lambda: self._skip(SIZES[kind])

    def _text(self, longest: int) -> str:
        length = self._number("Q")
        if length > longest:
            raise _Broken(f"a text of {length} bytes")
        return self._take(length).decode()

    def _number(self, kind: str) -> int:
        number: int = struct.unpack(self._order + kind, self._take(struct.calcsize(kind)))[0]
        return number

    def _take(self, length: int) -> bytes:
        data = self._file.read(length) if length <= self._left else b""
        if len(data) < length:
            raise _Broken("the file ends within its header")
        self._left -= length
        return data

    def _skip(self, length: int) -> None:
        if length > self._left:
            raise _Broken("the file ends within its header")
        self._file.seek(length, 1)
        self._left -= length
