"""Whether the machine runs out of memory while a run is on."""

import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from mlx_finetune.config import RunConfig
from mlx_finetune.errors import UserError, no_memory
from mlx_finetune.launched import launched

# How this process was started, by its launcher.
COMMANDS = {None: "mlx-finetune", "torch": "torchrun ... -m mlx_finetune", "mlx": "mlx.launch ... -- python -m mlx_finetune"}
GIB = 2**30
LEAST_LEFT = 0.03  # of all memory; below it systems begin to swap what is in use
MOST_SWAPPED = GIB  # more than at the start: idle programs may go there, a run may not
EVERY = 0.25  # seconds


class MemoryWatch:
    """The least memory that was left while steps were at work, and what was swapped since this was made."""

    def __init__(self) -> None:
        self._swapped, self._least = psutil.swap_memory().used, psutil.virtual_memory().available

    def look(self) -> None:
        """Now, in the midst of a step."""
        self._least = min(self._least, psutil.virtual_memory().available)

    def shortage(self) -> str | None:
        """What was short since it was asked last, for people; None where there was enough."""
        self.look()
        memory, swapped = psutil.virtual_memory(), psutil.swap_memory().used - self._swapped
        least, self._least = self._least, memory.available
        if least < LEAST_LEFT * memory.total:
            return f"{least / GIB:.1f} of {memory.total / GIB:.1f} GB of memory were left"
        if swapped > MOST_SWAPPED:
            return f"{swapped / GIB:.1f} GB were swapped to the disk since the start"
        return None


@contextmanager
def watched() -> Iterator[MemoryWatch]:
    """A thread looks several times a second: what a step holds at its peak is gone at its end."""
    watch, done = MemoryWatch(), threading.Event()

    def keep_looking() -> None:
        while not done.wait(EVERY):
            watch.look()

    thread = threading.Thread(target=keep_looking, name="memory", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        done.set()
        thread.join()


class NoMemory(UserError):
    """Memory was asked for and there was none."""


LOADING = "close other programs, take a smaller model, or, on CUDA, --set quantization=4bit"


@contextmanager
def loading(model: Path, what: str = "load it", hint: str = LOADING) -> Iterator[None]:
    """Inside a model is loaded, or `what`: where there is no memory for it, that is one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not no_memory(error):
            raise
        raise NoMemory(f"{model}: no memory left to {what} ({_said(error)})", hint=hint) from error


def _said(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def again(run: str) -> str:
    """The command that goes on with a run."""
    return f"{COMMANDS[launched()]} train --resume --out {shlex.quote(run)}"


def less_memory(config: RunConfig, command: str = "") -> str:
    """How a run may go on with less memory: the one setting that helps most."""
    command = command or again(config.out)
    if config.grad_checkpoint != 1:
        return f"{command} --set grad_checkpoint=1"
    if config.engine == "torch" and config.quantization == "none" and config.fine_tune_type != "full" and not config.fsdp:
        return f"{command} --set quantization=4bit"
    return f"close other programs, then {command}; or prepare with a smaller --max-length for a new run"


@contextmanager
def memory_errors(step: int, config: RunConfig) -> Iterator[None]:
    """Makes one line of what MLX, torch and numpy say where they get no memory: what was tried, and how to go on."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is the former, numpy's the latter
        if not no_memory(error):
            raise
        tried = f"batch_size = {config.batch_size}, grad_checkpoint = {config.grad_checkpoint}"
        hint = f"{less_memory(config)}; what was learned so far is kept"
        raise NoMemory(f"step {step}: no memory left with {tried} ({_said(error)})", hint=hint) from error
