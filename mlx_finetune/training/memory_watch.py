"""Whether the machine runs out of memory while a run is on: seen between steps, before it swaps for good."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from mlx_finetune.config import RunConfig
from mlx_finetune.errors import UserError

GIB = 2**30
LEAST_LEFT = 0.03  # of all memory; below it systems begin to swap what is in use
MOST_SWAPPED = GIB  # more than at the start: idle programs may go there, a run may not
SHORTAGE = re.compile(r"out of memory|insufficient memory|allocate", re.IGNORECASE)


class MemoryWatch:
    """Compares memory and swap now with what they were when this was made."""

    def __init__(self) -> None:
        self._swapped = psutil.swap_memory().used

    def shortage(self) -> str | None:
        """What is short, for people; None where there is enough."""
        memory, swapped = psutil.virtual_memory(), psutil.swap_memory().used - self._swapped
        if memory.available < LEAST_LEFT * memory.total:
            return f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GB of memory are left"
        if swapped > MOST_SWAPPED:
            return f"{swapped / GIB:.1f} GB were swapped to the disk since the start"
        return None


def knob(config: RunConfig) -> str:
    """The setting that a run may go on with in less memory, as `train --resume` takes it; empty where all are turned."""
    if config.grad_checkpoint != 1:
        return " --set grad_checkpoint=1"
    if config.engine == "mlx" and config.attention != "blocks":
        return " --set attention=blocks"
    return ""


@contextmanager
def memory_errors(step: int, config: RunConfig) -> Iterator[None]:
    """Makes one line of what MLX and torch say where they get no memory: a UserError that names the setting to turn."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one too
        if not SHORTAGE.search(str(error)):
            raise
        turned = knob(config)
        hint = f"train --resume --out {config.out}{turned}" if turned else "prepare with a smaller --max-length"
        message = f"step {step}: no memory left ({str(error).strip().splitlines()[0][:120]})"
        raise UserError(message, hint=f"{hint}; checkpoints are kept") from error
