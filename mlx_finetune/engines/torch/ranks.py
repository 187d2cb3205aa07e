"""Processes that torchrun started, and sums over them."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from mlx_finetune.engines.ranks import Alone, PeerGone, Ranks
from mlx_finetune.launched import launched

LOST = re.compile(r"(closed|reset) by peer|broken pipe|gloo|nccl", re.IGNORECASE)  # what torch says of a connection


class Torchrun:
    """See `Ranks`: by NCCL between GPUs, else by gloo."""

    def __init__(self, device: str) -> None:
        """Waits until every process is there."""
        if not dist.is_initialized():
            if device == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        self.rank, self.size, self._device = dist.get_rank(), dist.get_world_size(), device

    def sum(self, numbers: np.ndarray) -> np.ndarray:
        """See `Ranks.sum`."""
        tensor = torch.from_numpy(numbers.astype(np.float64)).to(self._device)
        self.sum_(tensor)
        summed: np.ndarray = tensor.cpu().numpy()
        return summed

    def sum_(self, tensor: torch.Tensor) -> None:
        """In place.

        Raises:
            PeerGone: another process is gone.
        """
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:  # torch.distributed.DistBackendError is one
            raise PeerGone(_first_line(error)) from error


@contextmanager
def gathering() -> Iterator[None]:
    """Inside, weights are gathered from other processes.

    Raises:
        PeerGone: one of them is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        raise PeerGone(_first_line(error)) from error


def _first_line(error: RuntimeError) -> str:
    said, _, _ = str(error).splitlines()[0].rpartition("] ")[2].partition(". This is")
    return said[:120]


def ranks_of(device: str) -> Ranks:
    """Those of torchrun, or this process alone."""
    return Torchrun(device) if launched() == "torch" else Alone()


def sum_gradients(ranks: Ranks, gradients: Sequence[torch.Tensor]) -> None:
    """In place, all as one array."""
    if isinstance(ranks, Torchrun):
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        ranks.sum_(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.reshape(gradient.shape))
