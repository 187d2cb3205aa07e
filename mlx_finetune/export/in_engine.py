"""The tuned model as the engine that trained it computes it: the engine of the run, with its checkpoint, in float32."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.config import RunConfig, make_config
from mlx_finetune.data.batches import Batch, Example
from mlx_finetune.engines import Engine, open_engine
from mlx_finetune.engines.supported import for_a_look
from mlx_finetune.export.changes import PROGRESS, is_full
from mlx_finetune.export.distance import VerificationError
from mlx_finetune.files import read_json
from mlx_finetune.models.mlx_config import max_exact_length
from mlx_finetune.training.checkpoint import load_checkpoint
from mlx_finetune.training.memory_watch import loading


def config_of(checkpoint: Path) -> RunConfig | None:
    """The settings that a checkpoint was trained with; None where it does not say: it was made elsewhere."""
    path = checkpoint / PROGRESS
    progress = read_json(path) if path.is_file() else {}
    config = progress.get("config") if isinstance(progress, dict) else None
    return make_config(config, str(path)) if isinstance(config, dict) else None


def trained_with(checkpoint: Path) -> str | None:
    """The engine that trained the checkpoint, where it is installed here."""
    config = config_of(checkpoint)
    return config.engine if config and config.engine in ("mlx", "torch") and find_spec(config.engine) else None


def any_engine(checkpoint: Path) -> str:
    """The engine that trained the checkpoint, or the other one where that is not installed."""
    return trained_with(checkpoint) or ("mlx" if find_spec("mlx") else "torch")


def exact_length(model: Path, engine: str) -> int | None:
    """The longest row that the engine computes as transformers does; None: any."""
    return max_exact_length(read_json(model / "config.json")) if engine == "mlx" else None


def logits_of(
    model: Path, checkpoint: Path, engine: str, rows: Sequence[Sequence[int]], as_trained: bool = False
) -> Iterator[np.ndarray]:
    """Of base + checkpoint in `engine`: float32 [T, V] of each row.

    On the CPU, where peft computes too; the frozen weights as they are stored, and quantised by torch only `as_trained`.

    Raises:
        UserError: the engine does not have this model.
        VerificationError: the checkpoint has not what the engine trains.
    """
    config = config_of(checkpoint)
    assert config is not None
    with on_cpu() if engine == "mlx" else nullcontext():
        opened = _open(model, checkpoint, config if as_trained else config.model_copy(update={"quantization": "none"}), engine)
        for row in rows:
            tokens = np.array([*row, 0], np.int32)
            weights = np.ones(len(tokens), np.float32)
            weights[0] = 0
            yield opened.logits(Batch.of([Example(tokens, weights, "", "", ())]))
        del opened
    gc.collect()  # one model in memory at a time


@contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, MLX computes on the CPU: some GPUs multiply float32 in fewer bits."""
    import mlx.core as mx

    usual = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    try:
        yield
    finally:
        mx.set_default_device(usual)


def _open(model: Path, checkpoint: Path, config: RunConfig, engine: str) -> Engine:
    plain: dict[str, Any] = {"engine": engine, "dtype": "auto" if is_full(checkpoint) else "float32"}
    plain |= {"device": "cpu"} if engine == "torch" else {}
    with loading(model):
        opened = open_engine(for_a_look(config, engine).model_copy(update=plain), model)
    state, progress = load_checkpoint(checkpoint, moments=False)
    own = {name: state.get(name) for name in (f"adapter/{name}" for name in opened.trained)}
    for name, array in own.items():
        if array is None or array.shape != opened.trained[name.removeprefix("adapter/")]:
            raise VerificationError(f"{checkpoint}: {name.removeprefix('adapter/')} is not what the {engine} engine trains")
    opened.load_state({name: array for name, array in own.items() if array is not None}, int(progress["step"]))
    return opened
