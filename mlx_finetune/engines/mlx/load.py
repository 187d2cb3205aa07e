"""A Hugging Face folder, or an MLX one, as an mlx-lm model that computes what transformers computes."""

import sys
from collections.abc import Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model as load_mlx_lm

from mlx_finetune.engines.mlx.corrected import correct
from mlx_finetune.engines.mlx.layouts import classes_of
from mlx_finetune.errors import REFUSALS, UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.config_checks import check_config
from mlx_finetune.models.mlx_config import check_supported, mlx_overlay, text_config
from mlx_finetune.models.mlx_overlays import TORCH, unread
from mlx_finetune.models.mlx_proven import PROVEN
from mlx_finetune.models.weights import weight_files

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def load_model(folder: Path, dtype: str | None) -> nn.Module:
    """The evaluated model, its floating parameters in `dtype` (a key of DTYPES); quantised layers stay as they are.

    Raises:
        UserError: no config or weights, an architecture that is not proven, damaged weights, or those of another model.
    """
    model, _ = open_model(folder, widened=dtype == "float32")
    if dtype:
        _cast(model, DTYPES[dtype])
    mx.eval(model.parameters())
    return model


def open_model(folder: Path, widened: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The model as it is stored, no parameter read yet, and its config as mlx-lm completes it; raises as `load_model`.

    `widened`: vectors in float32, see `classes_of`.
    """
    config = read_json(folder / "config.json")
    check_config(config, f"{folder / 'config.json'}")
    check_supported(config)
    overlay = mlx_overlay(config)
    _check_all_is_read(text_config(config))
    _check_weight_files(folder)
    try:
        how: Any = {"get_model_classes": partial(classes_of, widened=widened), "trust_remote_code": False}
        model, config = load_mlx_lm(folder, lazy=True, model_config=overlay, **how)
    except REFUSALS as error:  # damaged file; key or tensor missing; other tensors; a setting that cannot be computed with
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise UserError(f"{folder}: not loadable with MLX: {reason}", hint=f"is the download whole? if so, {TORCH}") from error
    correct(model, text_config(read_json(folder / "config.json")))
    return model, config


def empty_model(folder: Path) -> nn.Module:
    """The model of the folder's config.json as mlx-lm's class makes it, random and not evaluated: names, shapes, `sanitize`.

    An architecture that is not proven is made from config.json as it is: whatever it computes, its weights have their names.

    Raises:
        UserError: mlx-lm has no such class, or it does not take this config.
    """
    config = read_json(folder / "config.json")
    check_config(config, f"{folder / 'config.json'}")
    try:
        laid_over = {**config, **(mlx_overlay(config) if text_config(config).get("model_type") in PROVEN else {})}
        model, arguments = classes_of(laid_over)
        made: nn.Module = model(arguments.from_dict(laid_over))
    except REFUSALS as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise UserError(f"{folder}: mlx-lm does not make a model of its config.json: {reason}", TORCH) from error
    return made


def _check_all_is_read(text: Mapping[str, Any]) -> None:
    """Raises UserError for a setting that transformers heeds and mlx-lm's class does not know."""
    one = PROVEN[text["model_type"]]
    if not one.by_transformers:
        return
    kind, arguments = classes_of({**text, **mlx_overlay(text)})
    homes = [sys.modules[base.__module__] for base in kind.__mro__]
    of_text = next((home.TextModelArgs for home in homes if hasattr(home, "TextModelArgs")), arguments)
    known = frozenset(signature(of_text).parameters)
    if one.window_ignored:  # lengths that see a window are refused where they are known
        known |= {"sliding_window", "use_sliding_window"}
    if found := unread(text, known):
        key, value = found
        raise UserError(f"{text['model_type']} with {key} = {value!r} is not supported with MLX", TORCH)


def _check_weight_files(folder: Path) -> None:
    """mlx-lm merges every model*.safetensors and never reads the index; transformers reads what the index names."""
    named = {path.name for path in weight_files(folder)}
    found = {path.name for path in folder.glob("model*.safetensors")}
    if missing := sorted(named - found):
        hint = f"mlx-finetune convert {folder} --out DIR gives them the names that mlx-lm looks for"
        raise UserError(f"{folder}: {missing[0]} is not called model*.safetensors", hint=hint)
    if stray := sorted(found - named):
        raise UserError(f"{folder}: {stray[0]} is not part of the model, which is {min(named)}", hint="move it out of the folder")


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Leaves scales, biases and packed weights of quantised layers as they are: they belong together."""
    valid = nn.Module.valid_parameter_filter
    model.apply(
        lambda value: value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value,
        filter_fn=lambda module, name, value: "scales" not in module and valid(module, name, value),
    )
