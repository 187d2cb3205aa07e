"""A Hugging Face folder, or an MLX one, as an mlx-lm model that computes what transformers computes."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model as load_mlx_lm

from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.mlx_config import check_supported, mlx_overlay

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def load_model(folder: Path, dtype: str | None) -> nn.Module:
    """The evaluated model, its floating parameters in `dtype` (a key of DTYPES); quantised layers stay as they are.

    Raises:
        UserError: no config or weights, an architecture that is not proven, damaged weights, or those of another model.
    """
    model, _ = open_model(folder)
    if dtype:
        _cast(model, DTYPES[dtype])
    mx.eval(model.parameters())
    return model


def open_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model as it is stored, no parameter read yet, and its config as mlx-lm completes it; raises as `load_model`."""
    config = read_json(folder / "config.json")
    check_supported(config)
    _check_weight_files(folder)
    try:
        return load_mlx_lm(folder, lazy=True, model_config=mlx_overlay(config), trust_remote_code=False)
    except (RuntimeError, TypeError, ValueError) as error:  # damaged file; key missing in config.json; other tensors
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder}: not loadable with MLX: {reason}", hint="is the download whole? if so: --engine torch"
        ) from error


def _check_weight_files(folder: Path) -> None:
    """mlx-lm merges every model*.safetensors and never reads the index; transformers reads what the index names."""
    found = {path.name for path in folder.glob("model*.safetensors")}
    index = folder / "model.safetensors.index.json"
    named = set(read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
    if missing := sorted(named - found):
        raise UserError(
            f"{folder}: no {missing[0]}",
            hint="the download is not whole" if index.exists() else "only checkpoints in safetensors are read",
        )
    if stray := sorted(found - named):
        raise UserError(f"{folder}: {stray[0]} is not named by the index", hint="move it out of the folder")


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Leaves scales, biases and packed weights of quantised layers as they are: they belong together."""
    valid = nn.Module.valid_parameter_filter
    model.apply(
        lambda value: value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value,
        filter_fn=lambda module, name, value: "scales" not in module and valid(module, name, value),
    )
