"""Python code that a model's folder brings or names: it is neither downloaded nor run, whatever the folder says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json

NAMED_IN = ("config.json", "tokenizer_config.json")
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def needs_own_code(folder: Path) -> str:
    """Where the folder names code of its own, in words; empty where it names none."""
    for name in NAMED_IN:
        settings = read_json(folder / name) if (folder / name).is_file() else {}
        if isinstance(settings, dict) and settings.get("auto_map"):
            return f"auto_map in {name}"
    return ""


def refuse_own_code(folder: Path, what: str, error: Exception) -> None:
    """Raises UserError where the folder names code of its own and that is what transformers misses, as `error` says."""
    code = needs_own_code(folder)
    if code and "trust_remote_code" in str(error):
        hint = "take a model that transformers and mlx-lm open without it"
        raise UserError(f"{folder}: the {what} needs Python code of its own ({code}), and such code is never run", hint) from error


def refuse_kernels(path: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError where a config.json names kernels of the Hub, which transformers would download and run.

    It does so where the package `kernels` is installed (transformers/integrations/hub_kernels.py).
    """
    for name, value in config.items():
        if name in IMPLEMENTATIONS and "/" in json.dumps(value):
            raise UserError(f"{path}: {name} names code of the Hub, and such code is never run", hint=f"take {name} out of it")
        if isinstance(value, Mapping):  # of the text model of one that sees
            refuse_kernels(path, value)
