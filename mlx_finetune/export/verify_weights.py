"""Proof of a fused folder without running it: every number of every changed tensor is computed again and compared.

The memory is that of some blocks of 2 MiB and of one A and B, whatever the size of the model.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlx_finetune.export.expected_weights import SUMS, Rows, expected_weights
from mlx_finetune.export.from_mlx import is_mlx_adapter
from mlx_finetune.export.rows import Change
from mlx_finetune.export.writing import BLOCK as FUSED_AT_ONCE
from mlx_finetune.models.weights import ITEM_BYTES, TensorLocation, tensor_headers, to_float32

BLOCK = 1 << 18  # numbers compared at once: 2 MiB of float64
DIGITS = {"BF16": 8, "F16": 11, "F32": 24}  # binary, of a number that is not near zero
LEAST = {"BF16": -126, "F16": -14, "F32": -126}  # exponent of two below which digits are lost
CONFIG = "config.json"

# (number of the first, what stood there, what has to, by how much float32 may be off), float64 [n] each but the first
Pieces = Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Weights:
    """What was found of `tensors` changed tensors and their `numbers`.

    independent: of those tensors, how many were computed in float64 from the files by other code than fused them; the others were
    only recomputed: what an adapter of mlx-lm or an unpacked base makes of them was asked a second time.
    changed: how many numbers are others than in the base. unchanged_tensors: those of which rounding undid every change.
    nearest: how many numbers are the nearest of their dtype to the float64 value; the others lie within what float32 may be off.
    largest_deviation: from that value, in units of the last place of it or of the number before, whichever is larger.
    rounding: how far the stored weights lie from it, as a part of how far the base does: roots of sums of squares.
    problems: a line for each tensor with a number that is not base + checkpoint, rounded once.
    """

    tensors: int
    independent: int
    numbers: int
    changed: int
    unchanged_tensors: int
    nearest: int
    largest_deviation: float
    rounding: float
    missing: list[str]
    unexpected: list[str]
    problems: list[str]


@dataclass
class _Tally:
    numbers: int = 0
    changed: int = 0
    nearest: int = 0
    largest: float = 0.0
    rounding: float = 0.0  # sums of squares, as below
    change: float = 0.0
    same: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify_weights(model: Path, checkpoint: Path, fused: Path, changes: Mapping[str, Change], independent: bool = True) -> Weights:
    """Compares every number that `changes` names with W + scale * B A (DoRA, experts, trained weights alike) in float64.

    A stored number passes within half a unit of its last place and what float32 sums may be off: 1e-6 of what is summed, or the
    bound of the sum where A has more than 13 rows. What must not change is `check_folder`'s; names of tensors and config.json are
    compared here. `independent`: False asks `changes` itself a second time, as for an unpacked base.

    Raises:
        UserError: a file that is broken or cut.
    """
    headers, found = tensor_headers(model), tensor_headers(fused)
    again = independent and not is_mlx_adapter(checkpoint)
    expected = expected_weights(model, checkpoint, headers) if again else {}
    tally = _Tally()
    if (model / CONFIG).read_bytes() != (fused / CONFIG).read_bytes():
        tally.problems.append(f"{CONFIG} is not the base's")
    names = [name for name in changes if name in found and _form(found[name]) == _form(headers[name])]
    if again and (apart := expected.keys() ^ changes.keys()):
        tally.problems.append(f"not changed, or not to be changed: {', '.join(sorted(apart))}")
        names = [name for name in names if name in expected]
    for name in names:
        pieces = _by_files(headers[name], expected[name]) if again else _by_changes(changes[name])
        _compare(name, headers[name], found[name], pieces, tally)
    return Weights(
        len(names), len(names) if again else 0, tally.numbers, tally.changed, len(tally.same), tally.nearest, tally.largest,
        math.sqrt(tally.rounding / tally.change) if tally.change else 0.0,
        sorted(headers.keys() - found.keys()), sorted(found.keys() - headers.keys()), tally.problems,
    )  # fmt: skip


def _form(location: TensorLocation) -> tuple[str, tuple[int, ...]]:
    return location.dtype, location.shape


def _by_files(location: TensorLocation, open_rows: Callable[[], Rows]) -> Pieces:
    """In blocks of whole rows of the last axis."""
    rows, columns = open_rows(), location.shape[-1] if location.shape else 1
    count, step = math.prod(location.shape[:-1]), max(1, BLOCK // max(1, columns))
    for first in range(0, count, step):
        before = _read(location, first * columns, min(step, count - first) * columns).reshape(-1, columns)
        after, slack = rows(first, before)
        yield first * columns, before.ravel(), after.ravel(), slack.ravel()


def _by_changes(change: Change) -> Pieces:
    """In the blocks in which it was fused, so that float32 sums come out alike."""
    location, rows = change.location, change.open_rows()
    count, width = location.shape[0] if location.shape else 1, math.prod(location.shape[1:])
    step = max(1, FUSED_AT_ONCE // max(1, width))
    for first in range(0, count, step):
        before = _read(location, first * width, min(step, count - first) * width).astype(np.float32)
        after = rows(first, before.reshape(-1, width)).ravel()
        for start in range(0, before.size, BLOCK):
            one, other = (array[start : start + BLOCK].astype(np.float64) for array in (before, after))
            yield first * width + start, one, other, SUMS * (np.abs(one) + np.abs(other))


def _read(location: TensorLocation, first: int, count: int) -> np.ndarray:
    """Numbers of a tensor, float64 [count]."""
    item = ITEM_BYTES[location.dtype]
    with location.file.open("rb") as file:
        file.seek(location.start + first * item)
        return to_float32(file.read(count * item), location.dtype).astype(np.float64)


def _compare(name: str, location: TensorLocation, found: TensorLocation, pieces: Pieces, tally: _Tally) -> None:
    """Adds to the tally what the tensor `found` has of what it has to have."""
    changed = wrong = 0
    first = ""
    for start, before, after, slack in pieces:
        stored = _read(found, start, len(before))
        with np.errstate(invalid="ignore"):
            apart = np.abs(stored - after)
        half = _unit(after, location.dtype) / 2
        is_wrong = ~(np.isfinite(apart) & (apart <= half + slack))  # so where either is infinite or no number
        if count := int(is_wrong.sum()):
            at = int(is_wrong.argmax())
            first = first or f"number {start + at} is {stored[at]:.9g} and not {after[at]:.9g}"
            wrong += count
        changed += int((stored != before).sum())
        tally.numbers += len(before)
        tally.nearest += int((apart <= half).sum())
        unit = _unit(np.maximum(np.abs(before), np.abs(after)), location.dtype)
        tally.largest = max(tally.largest, float(np.max(apart / unit, initial=0.0)))
        tally.rounding += float(apart @ apart)
        tally.change += float((after - before) @ (after - before))
    tally.changed += changed
    tally.same += [] if changed else [name]
    if wrong:
        tally.problems.append(f"{name}: {wrong} of {math.prod(location.shape)} numbers are not base + checkpoint, {first}")


def _unit(values: np.ndarray, dtype: str) -> np.ndarray:
    """One in the last place of each float64 number, were it stored in the dtype."""
    powers = (values.view(np.uint64) & np.uint64(0x7FF0000000000000)).view(np.float64)  # of two, at or below the number
    spacing: np.ndarray = np.maximum(powers, 2.0 ** LEAST[dtype]) * 2.0 ** (1 - DIGITS[dtype])
    return spacing
