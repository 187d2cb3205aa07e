"""What an adapter of experts changes in the original weights, whether each expert is a tensor there or all of a layer are one."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from mlx_finetune.engines.experts import PARTS, stored_at, unfolded
from mlx_finetune.errors import UserError
from mlx_finetune.export.adapter import Experts
from mlx_finetune.export.rows import BASE, DIVERGED, Change, Headers, Rows, factored, fitting
from mlx_finetune.models.tensor_names import names_in_files
from mlx_finetune.models.weights import TensorLocation, read_float32

KEPT = 4  # pairs of a layer that are read at once: the tensors of its experts follow one another in the files


@dataclass(frozen=True)
class Matrix:
    """The change of one projection of one expert; `first`: its row in the expert's matrix where that holds several."""

    parameter: str
    of: Experts
    expert: int
    index: int  # of the projection among those of the parameter
    first: int

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """scale * B [rows, R] and A [R, columns]."""
        every_a, every_b = _read(self.parameter, self.of.a, self.of.b, self.of.pair.rank)
        rows = every_b.shape[1] // len(PARTS[self.parameter.rpartition(".")[2]])
        half = every_b[self.expert, self.index * rows : (self.index + 1) * rows]
        return np.float32(self.of.pair.scale) * half, every_a[self.expert]


def expert_changes(model: Path, headers: Headers, of_experts: Mapping[str, Experts]) -> dict[str, Change]:
    """The tensors of the model that adapters of experts change, by name.

    Raises:
        UserError: an expert that the model does not have, or stores in a form that cannot be added to.
    """
    shapes = {name: location.shape for name, location in headers.items()}
    apart: dict[str, Matrix] = {}
    joined: dict[str, list[Matrix]] = {}
    for parameter, of in of_experts.items():
        path, _, leaf = parameter.rpartition(".")
        count, rows, columns = len_of(of), of.b.shape[0] // len(PARTS[leaf]), of.a.shape[1]
        for index, name in enumerate(PARTS[leaf]):
            for expert in range(count):
                at = (stored_at(shapes, one, expert, rows, columns) for one in names_in_files(f"{path}.{name}"))
                where = next(filter(None, at), None)
                if where is None:
                    what = f"adapter on {path}.{name}: {model} has no expert {expert} of it with [{rows}, {columns}]"
                    raise UserError(what, hint=BASE)
                matrix = Matrix(parameter, of, expert, index, where.first)
                if where.expert is None:
                    apart[where.tensor] = matrix
                else:
                    joined.setdefault(where.tensor, []).append(matrix)
    rows_of = {tensor: partial(_rows_apart, matrix) for tensor, matrix in apart.items()}
    rows_of |= {tensor: partial(_rows_joined, matrices, shapes[tensor][-1]) for tensor, matrices in joined.items()}
    return {
        tensor: Change(fitting(model, headers, tensor, shapes[tensor], "adapter of experts is"), rows)
        for tensor, rows in rows_of.items()
    }


def len_of(of: Experts) -> int:
    """How many experts a pair is of."""
    return of.a.shape[0] // of.pair.rank


def _rows_apart(matrix: Matrix) -> Rows:
    return factored(*matrix.factors(), None)


def _rows_joined(matrices: list[Matrix], columns: int) -> Rows:
    """Of a tensor [E, rows, columns], of which a row is an expert."""

    def rows(first: int, before: np.ndarray) -> np.ndarray:
        after = before.copy()
        for matrix in matrices:
            if first <= matrix.expert < first + len(before):
                left, right = matrix.factors()
                own = after[matrix.expert - first].reshape(-1, columns)
                own[matrix.first : matrix.first + len(left)] += left @ right
        return after

    return rows


@lru_cache(maxsize=KEPT)
def _read(parameter: str, a: TensorLocation, b: TensorLocation, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [E, R, in] and B [E, out, R], float32.

    Raises:
        UserError: a number that is not finite: a training that diverged.
    """
    arrays = read_float32(a), read_float32(b)
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(f"{a.file}: {parameter} has numbers that are not finite", hint=DIVERGED)
    return unfolded(*arrays, rank, parameter)
