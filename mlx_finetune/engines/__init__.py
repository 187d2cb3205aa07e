"""Engine: all that differs between MLX and torch, behind one protocol. The loop knows only this file."""

import importlib.util
import math
import platform
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Batch
from mlx_finetune.engines.adapter import Target
from mlx_finetune.engines.answers import Advance, Choose, Kept
from mlx_finetune.engines.ranks import Ranks
from mlx_finetune.errors import UserError
from mlx_finetune.launched import launched
from mlx_finetune.nearest import did_you_mean

ENGINES = ("auto", "mlx", "torch")
TRUNK = "trunk"  # in a run's folder: hidden states that are the same in every epoch
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step says of itself."""

    loss: float  # mean over the step, weighted by token
    tokens: int  # learned in the step
    grad_norm: float  # before clipping
    computed: int  # tokens that went through the layers, padding included; what several rows begin with counts once

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers that an update can be made of; the same on every process, as both are sums."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Engine(Protocol):
    """A model with an adapter and its optimizer. `state` is in PEFT's names and orientation, float32, on either engine."""

    name: str  # "mlx" or "torch"
    device: str
    targets: dict[str, Target]  # the adapted modules, by path; none where the weights themselves are trained
    trained: dict[str, tuple[int, ...]]  # the shape of each trained array, by its name
    ranks: Ranks  # the processes that train together
    whole: bool  # false while a step changes what is trained
    lockstep: bool  # whether all of them have to compute at the same time: each is to be given the same held-out batches

    @property
    def updates(self) -> int:
        """Steps that changed what is trained: what the optimizer counts, of which a step that is not finite is none."""

    def step(self, micro_batches: Sequence[Batch], learning_rate: float, seed: int) -> StepResult:
        """One optimizer step over all micro-batches, weighted by token; nothing at all changes where the result is not finite.

        Every process is given all micro-batches, computes its share of them, and ends with the same result.
        """

    def measure(self, micro_batches: Sequence[Batch], seed: int) -> StepResult:
        """What `step` would say of them; leaves training untouched. Like a step it is a matter of all processes."""

    def loss_sum(self, batch: Batch) -> float:
        """Sum of weight times cross entropy (nats); leaves training untouched."""

    def losses(self, batch: Batch) -> np.ndarray:
        """float32 [n]: the cross entropy (nats) at the n places of the batch that count, row by row; leaves training untouched."""

    def logits(self, batch: Batch) -> np.ndarray:
        """float32 [n, V] at the n places of the batch that count, row by row, computed as for the loss."""

    def generate(
        self, prompt: Sequence[int], limit: int, stop: frozenset[int], choose: Choose | None = None, kept: Kept | None = None
    ) -> Iterator[int]:
        """At most `limit` tokens, ending before a token of `stop`: the likeliest ones, or what `choose` makes of the logits.

        What `kept` holds of the prompt is not read again; it then holds prompt and answer, as far as they were read.
        """

    def generate_all(
        self, prompts: Sequence[Sequence[int]], limit: int, stop: frozenset[int], advance: Advance | None = None
    ) -> list[list[int]]:
        """Of each prompt what `generate` gives (but where rounding decides), several at a time where the model can."""

    def state(self) -> Arrays:
        """`adapter/NAME`, and what the optimizer keeps of it (`m/NAME`, `v/NAME`: optimizers.py).

        NAME is such as model.layers.0.self_attn.q_proj.lora_A.weight, or a weight's own where weights are trained.
        """

    def initial(self) -> Arrays:
        """`adapter/NAME` of each, as it is in a fresh adapter: the model is the base model."""

    def load_state(self, state: Arrays, updates: int) -> None:
        """Goes on from `state`, which so many updates led to; moments that are missing start at zero."""

    def peak_memory(self) -> int:
        """Most bytes held at once since the start: of the device, or of this process on a CPU."""


def weighted(losses: np.ndarray, batch: Batch) -> float:
    """Sum of weight times loss, in float64."""
    return float(losses.astype(np.float64) @ batch.weights[batch.weights > 0])


def process_peak() -> int:
    """Most bytes that this process held at once.

    On Linux the kernel's high water mark of this program: what `getrusage` says there begins with that of the program before it.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def choose_engine(name: str) -> str:
    """`auto`: MLX on Apple silicon, torch where CUDA is found, else the one that is installed, torch first.

    Raises:
        UserError: the engine asked for is not installed.
    """
    installed = {engine: importlib.util.find_spec(engine) is not None for engine in ("mlx", "torch")}
    if name == "auto":
        on_apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
        name = launched() or ("mlx" if on_apple_silicon or not installed["torch"] else "torch")
    if launched() not in (None, name):
        raise UserError(f"engine {name} under a launcher of {launched()}", hint="torchrun is for torch, mlx.launch for mlx")
    if name not in installed:
        raise UserError(
            f"engine {name!r} is not one of {', '.join(ENGINES)}", hint=did_you_mean(name, ENGINES, "leave --engine out for auto")
        )
    if not installed[name]:
        raise UserError(f"engine {name} is not installed", hint=f"pip install 'mlx-finetune{'[torch]' if name == 'torch' else ''}'")
    return name


def open_engine(config: RunConfig, model: Path, adapted: bool = True) -> Engine:
    """Loads the model of folder `model`, with a fresh adapter or as it is; the framework is imported here and nowhere earlier."""
    if choose_engine(config.engine) == "mlx":
        from mlx_finetune.engines.mlx.engine import MlxEngine

        return MlxEngine(model, config, adapted)
    from mlx_finetune.engines.torch.engine import TorchEngine

    return TorchEngine(model, config, adapted)
