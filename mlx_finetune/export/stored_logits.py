"""What a converted model is compared on: tokens, and the logits of a reference, which may be stored in a file.

A probe file is safetensors: `tokens.N` int32 [T] and `logits.N` float32 [T, V], and as metadata the original's fingerprint and
what computed them. A machine with little memory compares with what a larger one wrote.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.errors import REFUSALS, UserError
from mlx_finetune.export import backends
from mlx_finetune.export.probes import PROBE_TEXTS
from mlx_finetune.files import read_json, refuse_existing
from mlx_finetune.models.mlx_config import max_exact_length, text_config
from mlx_finetune.models.quiet import quietly
from mlx_finetune.models.weights import file_headers

LONGEST = 64  # tokens of a text
FORMAT = "mlx-finetune probe 1"


@dataclass(frozen=True)
class Probe:
    """Rows of tokens and their logits [T, V]; `reference`: what computed them, such as transformers 5.23.0.

    The last row is no text: what a model thinks of it says nothing about what quantisation costs.
    """

    tokens: list[list[int]]
    logits: list[np.ndarray]
    reference: str


def probe_tokens(folder: Path) -> list[list[int]]:
    """The texts in the model's tokens, and a row from the whole vocabulary: a wrong row of embeddings shows only when it is read.

    None is longer than 64 tokens, nor than MLX is exact.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    config = text_config(read_json(folder / "config.json"))
    longest = min(LONGEST, max_exact_length(config) or LONGEST, config.get("max_position_embeddings") or LONGEST)
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ImportError, StrictDataclassError, *REFUSALS) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{folder}: transformers cannot load the tokenizer: {reason}", hint="is the download whole?") from error
    if type(count := config.get("vocab_size")) is not int:
        raise UserError(f"{folder / 'config.json'}: no vocab_size", hint="download the model again")
    rows = [[token for token in tokenizer(text)["input_ids"] if token < count][:longest] for text in PROBE_TEXTS]
    return [row for row in [*rows, np.linspace(0, count - 1, longest, dtype=int).tolist()] if row]


def transformers_logits(folder: Path, tokens: Sequence[Sequence[int]], rounded: str | None = None) -> list[np.ndarray]:
    """Of each text [T, V], in float32 on the CPU; `rounded`: with weights rounded to that dtype first.

    Raises:
        UserError: transformers cannot load the folder, or finds tensors missing or too many.
    """
    import torch

    hint = "is the download whole? --no-verify converts what transformers cannot load"
    model, keys = backends.load_transformers(folder, hint)
    if wrong := sorted(map(str, keys["missing_keys"] | keys["unexpected_keys"])):
        raise UserError(f"{folder}: transformers finds {wrong[0]} missing or too many ({len(wrong)} in all)", hint)
    if rounded:
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.to(getattr(torch, rounded)))
    return list(backends.transformers_logits(model, tokens))


def named(package: str) -> str:
    """Such as transformers 5.23.0."""
    return f"{package} {version(package)}"


def write_probe(path: Path, probe: Probe, fingerprint: str) -> None:
    """Raises UserError where the file exists or cannot be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    refuse_existing(path, hint="choose another --write-probe")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    arrays: dict[str, Any] = {f"tokens.{i}": np.array(row, np.int32) for i, row in enumerate(probe.tokens)}
    arrays |= {f"logits.{i}": np.ascontiguousarray(rows, np.float32) for i, rows in enumerate(probe.logits)}
    try:
        save_file(arrays, temporary, metadata={"format": FORMAT, "fingerprint": fingerprint, "reference": probe.reference})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {error}", hint="choose another --write-probe") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_probe(path: Path, fingerprint: str) -> Probe:
    """Raises UserError where the file is no probe, or one of another model."""
    from safetensors import safe_open

    headers = file_headers(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path}: not a file that convert --write-probe wrote", hint="leave --probe out")
        if metadata.get("fingerprint") != fingerprint:
            raise UserError(f"{path}: the logits of another model", hint="make it from this one: convert --write-probe")
        count = sum(name.startswith("tokens.") for name in headers)
        tokens = [file.get_tensor(f"tokens.{i}").tolist() for i in range(count)]
        logits = [file.get_tensor(f"logits.{i}") for i in range(count)]
    return Probe(tokens, logits, f"{path.name} ({metadata.get('reference')})")
