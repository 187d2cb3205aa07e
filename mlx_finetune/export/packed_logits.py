"""Logits, float32 [T, V] of each row: of a model trained on quantised weights, of those weights alone, of a fused folder."""

import gc
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from mlx_finetune.export.backends import load_transformers, lost_keys, transformers_logits
from mlx_finetune.export.from_mlx import is_mlx_adapter
from mlx_finetune.export.in_engine import logits_of, on_cpu, trained_with
from mlx_finetune.export.mlx_adapter import open_in_mlx_lm
from mlx_finetune.export.mlx_backend import lost, mlx_logits

Rows = Sequence[Sequence[int]]


def trained_logits(packed: Path, checkpoint: Path, rows: Rows) -> list[np.ndarray] | None:
    """Of the checkpoint on the weights that it was trained on; None where what trained it is not known or not installed."""
    engine = trained_with(checkpoint)
    if engine:
        return list(logits_of(packed, checkpoint, engine, rows, as_trained=True))
    if not (is_mlx_adapter(checkpoint) and find_spec("mlx")):
        return None
    from mlx_finetune.engines.mlx.load import load_model

    with on_cpu():
        network = open_in_mlx_lm(load_model(packed, "float32"), checkpoint)
        network.eval()
        return list(mlx_logits(network, rows))


def packed_logits(packed: Path, rows: Rows) -> list[np.ndarray]:
    """Of the quantised weights without what was trained."""
    from mlx_finetune.engines.mlx.load import load_model

    with on_cpu():
        return list(mlx_logits(load_model(packed, "float32"), rows))


def fused_logits(model: Path, fused: Path, rows: Rows, backend: str) -> tuple[list[np.ndarray], list[str], list[str]]:
    """And the tensors that are missing or too many beside those of `model`."""
    gc.collect()  # one model in memory at a time
    if backend == "mlx":
        return packed_logits(fused, rows), *lost(model, fused)
    network, keys = load_transformers(fused)
    logits = list(transformers_logits(network, rows))
    del network
    gc.collect()
    missing, unexpected = lost_keys(keys, load_transformers(model)[1])
    return logits, missing, unexpected
