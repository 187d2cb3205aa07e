"""What each tensor that a checkpoint changes has to be: float64 from the files of model and checkpoint, in blocks of rows.

Apart from the code that fuses: the sums of rows.py, and where expert_changes.py finds the matrices of an expert, are done anew.
What this shares with it are the readers of settings and headers, and engines/experts.py, which knows where experts are stored.
A tensor is a matrix here, [all but its last axis, last axis]; each `Part` of it is changed by matrices of its own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from mlx_finetune.engines.experts import PARTS, stored_at
from mlx_finetune.export.adapter import Experts, Pair, read_adapter
from mlx_finetune.export.changes import EMBEDDINGS, is_full
from mlx_finetune.export.rows import HEAD_WEIGHT, Headers
from mlx_finetune.files import read_json
from mlx_finetune.models.mlx_config import is_tied
from mlx_finetune.models.tensor_names import names_in_files, stored_name, tensor_of
from mlx_finetune.models.weights import ITEM_BYTES, SINGLE, TensorLocation, file_headers, read_float32, to_float32

# (number of the first row, rows of the original, float64 [n, columns]) -> what they have to be, and by how much what is
# summed in float32 may differ from that; float64 [n, columns] both
Rows = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]
Read = Callable[[TensorLocation], np.ndarray]

SUMS = 1e-6  # of the numbers that are added; a dot product of more than 13 terms may need more, see `_slack`
UNIT = 2.0**-24  # a float32 result is off by no more than this of itself
LENGTHS = 2e-6  # and the length of a row, summed pairwise from its squares, with a division and a product, of DoRA
KEPT = 4  # matrices of experts that are kept: the tensors of a layer's experts follow one another in the files


@dataclass(frozen=True)
class Factors:
    """What is added is scale * left @ right; left float32 [rows, r], right float64 [r, columns]; magnitude: of DoRA, [rows]."""

    left: np.ndarray
    right: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None


@dataclass(frozen=True)
class Part:
    """`rows` rows of a tensor, from its row `first` on."""

    first: int
    rows: int
    factors: Callable[[], Factors]


def expected_weights(model: Path, checkpoint: Path, headers: Headers) -> dict[str, Callable[[], Rows]]:
    """Of each tensor that has to change, by its name in the model, what its rows have to be; nothing is read before that is asked.

    `checkpoint`: as PEFT lays adapters out, or trained weights; it is one that `read_changes` has accepted.
    """
    if is_full(checkpoint):
        return _trained(model, checkpoint, headers)
    adapter, read = read_adapter(checkpoint), lru_cache(maxsize=KEPT)(read_float32)
    parts: dict[str, list[Part]] = {}
    for module, pair in adapter.pairs.items():
        tensor = tensor_of(module, headers)
        if tensor in headers:  # else it is the second name of a shared weight
            parts[tensor] = [Part(0, pair.shape[0], partial(_of_pair, pair))]
    shapes = {name: location.shape for name, location in headers.items()}
    for parameter, of in adapter.of_experts.items():
        for tensor, part in _of_experts(parameter, of, shapes, read):
            parts.setdefault(tensor, []).append(part)
    return {tensor: partial(_added, own) for tensor, own in parts.items()}


def _of_pair(pair: Pair) -> Factors:
    a, b = read_float32(pair.a), read_float32(pair.b)
    left, right = (a.T, b.T) if pair.on_embeddings else (b, a)
    magnitude = read_float32(pair.magnitude).astype(np.float64) if pair.magnitude else None
    return Factors(left, right.astype(np.float64), pair.scale, magnitude)


def _of_experts(parameter: str, of: Experts, shapes: Mapping[str, tuple[int, ...]], read: Read) -> list[tuple[str, Part]]:
    """The matrix of each expert and projection: the tensor it stands in, and where."""
    path, _, leaf = parameter.rpartition(".")
    names, count = PARTS[leaf], of.a.shape[0] // of.pair.rank
    rows, columns = of.b.shape[0] // len(names), of.a.shape[1]
    found = []
    for index, name in enumerate(names):
        for expert in range(count):
            at = (stored_at(shapes, one, expert, rows, columns) for one in names_in_files(f"{path}.{name}"))
            where = next(filter(None, at))
            before = 0 if where.expert is None else where.expert * shapes[where.tensor][1] + where.first
            found.append((where.tensor, Part(before, rows, partial(_of_expert, of, expert, index * rows, rows, read))))
    return found


def _of_expert(of: Experts, expert: int, first: int, rows: int, read: Read) -> Factors:
    """As engines/experts.py says: A has the experts one below the other, and column r * experts + e of B is column r of e."""
    rank = of.pair.rank
    a, b = read(of.a), read(of.b)
    left = b[first : first + rows, expert :: len(a) // rank]
    return Factors(left, a[expert * rank : (expert + 1) * rank].astype(np.float64), of.pair.scale)


def _added(parts: list[Part]) -> Rows:
    """The original, and in the rows of each part what is added to them; of rows in no part nothing is."""
    alone = parts[0].factors() if len(parts) == 1 else None

    def rows(first: int, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        after, slack = before.copy(), np.zeros_like(before)
        for part in parts:
            start, end = max(first, part.first), min(first + len(before), part.first + part.rows)
            if start < end:
                here, own = slice(start - first, end - first), slice(start - part.first, end - part.first)
                after[here], slack[here] = _tuned(before[here], own, alone or part.factors())
        return after, slack

    return rows


def _tuned(before: np.ndarray, own: slice, factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """W + scale * B A, with DoRA's lengths, of the rows `own` of a part; and its slack."""
    left = factors.scale * factors.left[own].astype(np.float64)
    after, slack = before + left @ factors.right, _slack(before, left, factors.right)
    if factors.magnitude is None:
        return after, slack
    longer = (factors.magnitude[own] / np.sqrt(np.einsum("ij,ij->i", after, after)))[:, None]
    return after * longer, slack * longer + LENGTHS * np.abs(after * longer)


def _slack(before: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """By how much float32 may be off: of a dot product of r terms r units of the terms' sizes, which Cauchy and Schwarz bound.

    Three more are of the scale, its product and the last sum (Higham 2002, Accuracy and Stability of Numerical Algorithms, 3.1).
    """
    most = max(SUMS, (len(right) + 3) * UNIT)
    lengths = np.sqrt(np.einsum("ij,ij->i", left, left))[:, None] * np.sqrt(np.einsum("ij,ij->j", right, right))
    bound: np.ndarray = most * (np.abs(before) + lengths)
    return bound


def _trained(model: Path, checkpoint: Path, headers: Headers) -> dict[str, Callable[[], Rows]]:
    """Of full fine-tuning: the trained tensor itself."""
    trained = file_headers(checkpoint / SINGLE)
    found: dict[str, Callable[[], Rows]] = {stored_name(name, headers): partial(_instead, at) for name, at in trained.items()}
    embeddings = next((name for name in found if name.endswith(f"{EMBEDDINGS}.weight")), None)
    if embeddings and HEAD_WEIGHT in headers and HEAD_WEIGHT not in found and is_tied(read_json(model / "config.json")):
        found[HEAD_WEIGHT] = found[embeddings]  # the shared weight is stored twice
    return found


def _instead(source: TensorLocation) -> Rows:
    columns, item = source.shape[-1] if source.shape else 1, ITEM_BYTES[source.dtype]

    def rows(first: int, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with source.file.open("rb") as file:
            file.seek(source.start + first * columns * item)
            data = file.read(math.prod(before.shape) * item)
        after = to_float32(data, source.dtype).astype(np.float64).reshape(before.shape)
        return after, np.zeros_like(after)

    return rows
