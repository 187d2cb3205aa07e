"""Checkpoints that somebody quantised already: which are taken over as they are packed, and which are refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.models.hub import HUB_ID
from mlx_finetune.models.mlx_config import taken_over
from mlx_finetune.models.quantisation import Quantisation
from mlx_finetune.reading import LARGEST_SETTINGS, plain_yaml

NAMES = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8 of FBGEMM",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "NVIDIA ModelOpt",
    "mxfp4": "mxfp4",
    "torchao": "torchao",
    "hqq": "HQQ",
    "quanto": "quanto",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "exl2": "EXL2",
}


def packed_by(config: Mapping[str, Any]) -> str | None:
    """The method of a checkpoint that is taken over as it is packed; None of one that is not packed."""
    return taken_over(config) if config.get("quantization_config") and not config.get("quantization") else None


def check_not_packed(folder: Path, config: Mapping[str, Any], how: Quantisation | None, dtype: str | None) -> None:
    """Raises UserError for a checkpoint that is packed in a way that is not read, or that is to be packed or rounded again."""
    if config.get("quantization"):
        raise UserError(f"{folder}: mlx-lm quantised it already", hint="use it as it is, or convert the original checkpoint")
    found = config.get("quantization_config")
    if not found:
        return
    name = _name(found)
    if not isinstance(found, Mapping) or packed_by(config) is None:
        raise UserError(f"{folder}: quantised with {name}, which MLX does not read exactly", hint=_use_original(folder))
    if how or dtype:
        raise UserError(
            f"{folder}: quantised with {name} already, so {how or dtype} would round it twice", hint=_use_original(folder)
        )


def _name(found: Any) -> str:
    """As people call it, with what tells its kinds apart."""
    if not isinstance(found, Mapping):
        return "an unknown method"
    method = str(found.get("quant_method", "an unknown method"))
    name = NAMES.get(method, method)
    if method == "fp8":
        return f"{name} in blocks" if found.get("weight_block_size") else f"{name} per tensor"
    if method == "bitsandbytes":
        return f"{name} ({'4' if found.get('load_in_4bit') else '8'} bits)"
    if method in ("awq", "gptq"):
        version = f", {found['version']}" if found.get("version") else ""
        return f"{name} ({found.get('bits', '?')} bits{version})"
    return f"{name} ({found['format']})" if isinstance(found.get("format"), str) else name


def _use_original(folder: Path) -> str:
    name = _base_model(folder)
    return f"use the original checkpoint{f' {name}' if name else ''}, and --bits"


def _base_model(folder: Path) -> str | None:
    """What the model card names as base_model in its front matter."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    begin, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        front = plain_yaml(rest.partition("\n---")[0][:LARGEST_SETTINGS]) if not begin.strip() else None
    except ValueError:
        return None
    base = front.get("base_model") if isinstance(front, dict) else None
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) and HUB_ID.fullmatch(base) else None
