"""Processes that mlx.launch started, and sums over them."""

import os

import mlx.core as mx
import numpy as np

from mlx_finetune.engines.ranks import Alone, PeerGone, Ranks
from mlx_finetune.errors import UserError
from mlx_finetune.launched import launched


class Launched:
    """See `Ranks`: the ring, or what else mlx.launch was told."""

    def __init__(self) -> None:
        """Waits until every process is there.

        Raises:
            UserError: the others do not come.
        """
        try:
            self._group = mx.distributed.init(strict=True)
        except (RuntimeError, ValueError) as error:
            said = f"MLX_RANK = {os.environ['MLX_RANK']} in the environment, but the processes did not meet ({str(error)[:120]})"
            raise UserError(said, hint="start several processes with mlx.launch, or unset MLX_RANK for one") from error
        self.rank, self.size = self._group.rank(), self._group.size()

    def sum(self, numbers: np.ndarray) -> np.ndarray:
        """See `Ranks.sum`; adds in float32."""
        return np.array(self.sum_of(mx.array(numbers.astype(np.float32)))).astype(np.float64)

    def sum_of(self, array: mx.array) -> mx.array:
        """Evaluated.

        Raises:
            PeerGone: another process is gone.
        """
        mx.eval(array)  # what goes wrong here is no other process's doing
        try:
            summed: mx.array = mx.distributed.all_sum(array, group=self._group)
            mx.eval(summed)
        except RuntimeError as error:
            raise PeerGone(str(error)[:120]) from error
        return summed


def ranks_of() -> Ranks:
    """Those of mlx.launch, or this process alone."""
    return Launched() if launched() == "mlx" else Alone()


def sum_gradients(ranks: Ranks, gradient: dict[str, mx.array]) -> dict[str, mx.array]:
    """Over all processes, all as one array."""
    if not isinstance(ranks, Launched):
        return gradient
    flat = ranks.sum_of(mx.concatenate([array.reshape(-1) for array in gradient.values()]))
    summed, place = {}, 0
    for name, array in gradient.items():
        summed[name] = flat[place : place + array.size].reshape(array.shape)
        place += array.size
    return summed
