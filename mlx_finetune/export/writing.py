"""One file of a checkpoint, written with some of its tensors changed: blocks of rows, on all cores, each byte once.

On APFS the file is a clone of the original's and only what changes is written; elsewhere what lies between is copied.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from threadpoolctl import threadpool_limits

from mlx_finetune.allocator import keep_blocks
from mlx_finetune.errors import UserError
from mlx_finetune.export.rows import Change, Rows
from mlx_finetune.files import clone_file
from mlx_finetune.models.weights import ITEM_BYTES, are_finite, stored_numbers, to_float32

Advance = Callable[[int], None]
BLOCK = 1 << 18  # numbers computed at once: what is made of them stays in a core's cache
WORKERS = min(8, os.cpu_count() or 1)
AHEAD = 4 * WORKERS  # blocks that may wait
COPIED = 1 << 23  # bytes copied at once


@dataclass(frozen=True)
class Block:
    """`rows` rows of a tensor from the row `first` on."""

    name: str
    change: Change
    become: Rows
    first: int
    rows: int

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return math.prod(self.change.location.shape[1:])


def write_file(source: Path, target: Path, changes: Sequence[tuple[str, Change]], advance: Advance) -> int:
    """Writes `target`; gives back in how many tensors any number is not what it was. `advance` is told the bytes.

    Raises:
        UserError: a number that the dtype cannot hold, or as `Change.open_rows`.
    """
    keep_blocks()
    is_clone = clone_file(source, target)
    changed: set[str] = set()
    with (
        threadpool_limits(1, "blas"),  # the blocks are the threads
        source.open("rb") as original,
        target.open("r+b" if is_clone else "w+b") as written,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        size = os.fstat(original.fileno()).st_size
        os.ftruncate(written.fileno(), size)
        waiting: deque[Future[tuple[str, bool, int]]] = deque()
        try:
            position = 0
            for name, change in sorted(changes, key=lambda item: item[1].location.start):
                _between(original, written, position, change.location.start, is_clone, advance)
                position = change.location.end
                for block in _blocks(name, change):
                    if len(waiting) >= AHEAD:
                        _finish(waiting.popleft(), changed, advance)
                    waiting.append(pool.submit(_write, original.fileno(), written.fileno(), block, name in changed))
            _between(original, written, position, size, is_clone, advance)
            while waiting:
                _finish(waiting.popleft(), changed, advance)
        finally:
            for future in waiting:
                future.cancel()
    target.chmod(0o644)
    return len(changed)


def _finish(future: Future[tuple[str, bool, int]], changed: set[str], advance: Advance) -> None:
    name, is_changed, count = future.result()
    if is_changed:
        changed.add(name)
    advance(count)


def _blocks(name: str, change: Change) -> Iterator[Block]:
    count = change.location.shape[0] if change.location.shape else 1
    step = max(1, BLOCK // max(1, math.prod(change.location.shape[1:])))
    become = change.open_rows()
    for first in range(0, count, step):
        yield Block(name, change, become, first, min(step, count - first))


def _write(original: int, written: int, block: Block, is_changed: bool) -> tuple[str, bool, int]:
    """By file descriptors: several blocks at once. Name, whether anything changed (which is known where it `is_changed`), bytes."""
    location = block.change.location
    start = location.start + block.first * block.width * ITEM_BYTES[location.dtype]
    before = _read(original, block.rows * block.width * ITEM_BYTES[location.dtype], start)
    rows = to_float32(before, location.dtype).reshape(block.rows, block.width)
    stored = stored_numbers(block.become(block.first, rows), location.dtype)
    if not are_finite(stored, location.dtype):
        raise UserError(f"{block.name}: the sum has numbers that {location.dtype} cannot hold", hint="take an earlier checkpoint")
    _put(written, memoryview(stored).cast("B"), start)  # type: ignore[arg-type]
    return block.name, is_changed or before != stored.tobytes(), len(before)


def _put(file: int, data: memoryview, start: int) -> None:
    while data:
        count = os.pwrite(file, data, start)
        data, start = data[count:], start + count


def _read(file: int, count: int, start: int) -> bytes:
    data = os.pread(file, count, start)
    while len(data) < count and (more := os.pread(file, count - len(data), start + len(data))):
        data += more
    return data


def _between(original: IO[bytes], written: IO[bytes], start: int, end: int, is_clone: bool, advance: Advance) -> None:
    """What lies between changed tensors, as it is."""
    while start < end:
        count = min(COPIED, end - start)
        if not is_clone:
            _put(written.fileno(), memoryview(_read(original.fileno(), count, start)), start)
        advance(count)
        start += count
