"""Processes that torchrun started, and sums over them."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from mlx_finetune.engines.ranks import Alone, PeerGone, Ranks
from mlx_finetune.errors import UserError
from mlx_finetune.launched import launched

AT_ONCE = 2**24  # numbers summed as one array
PATIENCE = timedelta(hours=1)  # the first process may write a large checkpoint meanwhile; one that is gone is seen at once
TOLD = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # by torchrun, beside WORLD_SIZE
LOST = re.compile(r"(closed|reset) by peer|broken pipe|gloo|nccl", re.IGNORECASE)  # what torch says of a connection


class Torchrun:
    """See `Ranks`: by NCCL between GPUs, else by gloo."""

    def __init__(self, device: str) -> None:
        """Waits until every process is there.

        Raises:
            UserError: this is no process of torchrun's, or the others do not come.
        """
        if not dist.is_initialized():
            if missing := [name for name in TOLD if name not in os.environ]:
                said = f"WORLD_SIZE = {os.environ['WORLD_SIZE']} in the environment, and no {', '.join(missing)}"
                raise UserError(said, hint="start several processes with torchrun, or unset WORLD_SIZE for one")
            if device == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
            except (RuntimeError, ValueError) as error:
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                hint = "every process needs the same address, and a port that nothing else uses"
                raise UserError(f"the processes of this run did not meet at {where} ({_first_line(error)})", hint=hint) from error
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum(self, numbers: np.ndarray) -> np.ndarray:
        """See `Ranks.sum`."""
        tensor = torch.from_numpy(numbers.astype(np.float64))  # by gloo, which says that a process is gone; NCCL waits for it
        self.sum_(tensor)
        summed: np.ndarray = tensor.numpy()
        return summed

    def sum_(self, tensor: torch.Tensor) -> None:
        """In place.

        Raises:
            PeerGone: another process is gone.
        """
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            if not _is_lost(error):
                raise
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
        if not _is_lost(error):
            raise
        raise PeerGone(_first_line(error)) from error


def _is_lost(error: RuntimeError) -> bool:
    """Whether a connection ended, and not, say, the memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or bool(LOST.search(str(error)))


def _first_line(error: Exception) -> str:
    said, _, _ = (str(error).strip() or type(error).__name__).splitlines()[0].rpartition("] ")[2].partition(". This is")
    return said[:120]


def ranks_of(device: str) -> Ranks:
    """Those of torchrun, or this process alone."""
    return Torchrun(device) if launched() == "torch" else Alone()


def sum_gradients(ranks: Ranks, gradients: Sequence[torch.Tensor]) -> None:
    """In place, many as one array."""
    if not isinstance(ranks, Torchrun):
        return
    if gradients[0].is_cuda:
        ranks.sum(np.zeros(1))  # every process is there yet: NCCL would wait
    for group in _grouped(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in group])
        ranks.sum_(flat)
        for gradient, part in zip(group, flat.split([gradient.numel() for gradient in group]), strict=True):
            gradient.copy_(part.reshape(gradient.shape))


def _grouped(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """In their order, so that no second copy of them all is made."""
    group: list[torch.Tensor] = []
    for gradient in gradients:
        if group and sum(each.numel() for each in group) + gradient.numel() > AT_ONCE:
            yield group
            group = []
        group.append(gradient)
    yield group
