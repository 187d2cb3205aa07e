"""safetensors written tensor by tensor: what is to come is known beforehand, so nothing is held but the tensor at hand."""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mlx_finetune.errors import UserError
from mlx_finetune.files import sync, write_json
from mlx_finetune.models.weights import BITS, INDEX, SINGLE

ALIGNMENT = 8  # bytes: the header is padded to it, as the format asks


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: its dtype in the words of safetensors (F32, BF16, U32 ...) and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


def cut_into_shards(tensors: Mapping[str, Planned], most: int) -> list[dict[str, Planned]]:
    """In their order, each shard at most `most` bytes; a larger tensor has a shard of its own."""
    shards: list[dict[str, Planned]] = []
    size = 0
    for name, tensor in tensors.items():
        if not shards or size + tensor.bytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.bytes
    return shards


class ShardWriter:
    """Writes shards, and their index where they are several, under the names that transformers and mlx-lm look for.

    Tensors are written in the order in which the shards name them. As a context manager: at its end everything is on the disk.

    Raises:
        UserError: at its beginning, where there is no room for all of them.
    """

    def __init__(self, folder: Path, shards: Iterable[Mapping[str, Planned]], metadata: Mapping[str, str]) -> None:
        self.folder, self.metadata = folder, metadata
        self.shards = list(shards)
        self.names = [shard_name(i, len(self.shards)) for i in range(len(self.shards))]
        self._order = [(number, name) for number, shard in enumerate(self.shards) for name in shard]
        self._next = 0
        self._file: IO[bytes] | None = None
        self._open = ExitStack()

    def __enter__(self) -> "ShardWriter":
        check_room(self.folder, sum(tensor.bytes for shard in self.shards for tensor in shard.values()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()
        if error is None:
            assert self._next == len(self._order), f"{self._order[self._next]} was not written"
            self._write_index()

    def write(self, name: str, parts: Iterable[Any]) -> None:
        """The numbers of the next tensor, row-major and little-endian, in parts that have the buffer protocol."""
        number, expected = self._order[self._next]
        assert name == expected, f"{name} comes where {expected} was to come"
        if self._next == 0 or self._order[self._next - 1][0] != number:
            self._begin(number)
        assert self._file is not None
        written = sum(self._file.write(part) for part in parts)
        assert written == self.shards[number][name].bytes, f"{name}: {written} bytes"
        self._next += 1

    def _begin(self, number: int) -> None:
        self._close()
        self._file = self._open.enter_context((self.folder / self.names[number]).open("wb"))
        header: dict[str, Any] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        position = 0
        for name, tensor in self.shards[number].items():
            offsets = [position, position + tensor.bytes]
            header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
            position += tensor.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            sync(Path(self._file.name))
            self._open.close()
            self._file = None

    def _write_index(self) -> None:
        if len(self.shards) > 1:
            where = {name: self.names[number] for number, name in self._order}
            write_index(self.folder, where, sum(tensor.bytes for shard in self.shards for tensor in shard.values()))


def check_room(folder: Path, needed: int) -> None:
    """Raises UserError where the disk of `folder` has fewer bytes left."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        message = f"{folder.parent}: the weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        raise UserError(message, hint="make room, or choose another --out")


def shard_name(number: int, count: int) -> str:
    """Of the shard `number`, counted from 0."""
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, where: Mapping[str, str], size: int) -> None:
    """model.safetensors.index.json: `where` each tensor is, and how many bytes they are together."""
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))})
