"""A LoRA checkpoint as PEFT lays it out: its settings, and which matrices belong to which module. Only headers are read.

LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024), and LoRA on embeddings, which peft writes transposed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_finetune.engines.adapter import EMBEDDING_A, EMBEDDING_B, LORA_A, LORA_B, MAGNITUDE, PEFT_PREFIX
from mlx_finetune.engines.peft_settings import beyond
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.weights import ITEM_BYTES, TensorLocation, file_headers

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KINDS = "only LoRA, rsLoRA and DoRA can be fused"
FINISHED = "use a checkpoint folder of a finished save"


@dataclass(frozen=True)
class Pair:
    """A and B of a module, and the magnitude [rows] of DoRA.

    A is [r, columns] and B [rows, r] of the weight; on embeddings A is [r, rows] and B [columns, r].
    """

    a: TensorLocation
    b: TensorLocation
    magnitude: TensorLocation | None = None
    on_embeddings: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight that it changes."""
        return (self.a.shape[1], self.b.shape[0]) if self.on_embeddings else (self.b.shape[0], self.a.shape[1])


@dataclass(frozen=True)
class Adapter:
    """Pairs by module, not read yet; `scale` is what B @ A is multiplied by."""

    scale: float
    pairs: dict[str, Pair]


def read_adapter(checkpoint: Path) -> Adapter:
    """Reads settings and headers of a PEFT LoRA checkpoint, and checks that what belongs together is there.

    Raises:
        UserError: a missing or broken file, an adapter of another kind, a matrix without its other half.
    """
    rank, scale, is_dora = _settings(checkpoint / CONFIG)
    path = checkpoint / TENSORS
    suffixes = [LORA_A, LORA_B, EMBEDDING_A, EMBEDDING_B, *([MAGNITUDE] if is_dora else [])]
    modules: dict[str, dict[str, TensorLocation]] = {}
    for name, location in file_headers(path).items():
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        if suffix is None or not name.startswith(PEFT_PREFIX):
            raise UserError(f"{path}: tensor {name} is no LoRA matrix of a linear layer or of embeddings", hint=KINDS)
        modules.setdefault(name.removeprefix(PEFT_PREFIX).removesuffix(suffix), {})[suffix] = location
    if not modules:
        raise UserError(f"{path}: no LoRA tensors", hint=FINISHED)
    pairs = {module: _pair(f"{path}: {module}", parts, is_dora) for module, parts in modules.items()}
    for module, pair in pairs.items():
        _check(f"{path}: {module}", pair, rank)
    return Adapter(scale, pairs)


def _settings(path: Path) -> tuple[int, float, bool]:
    """Rank, scale, and whether it is DoRA."""
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is not LORA", hint=KINDS)
    for key, value in beyond(config).items():
        raise UserError(f"{path}: {key} is {value!r}, which cannot be fused yet", hint=KINDS)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{path}: r {rank!r} and lora_alpha {alpha!r} are not a whole number and a number", hint=FINISHED)
    return rank, float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank), bool(config.get("use_dora"))


def _pair(where: str, parts: Mapping[str, TensorLocation], is_dora: bool) -> Pair:
    on_embeddings = EMBEDDING_A in parts or EMBEDDING_B in parts
    sides = (EMBEDDING_A, EMBEDDING_B) if on_embeddings else (LORA_A, LORA_B)
    if on_embeddings and is_dora:
        raise UserError(f"{where}: DoRA of embeddings cannot be fused", hint="train the embeddings with lora")
    if parts.keys() - {MAGNITUDE} != set(sides):
        names = " and ".join(side.removeprefix(".").removesuffix(".weight") for side in sides)
        raise UserError(f"{where} has only one of {names}", hint=FINISHED)
    if is_dora and MAGNITUDE not in parts:
        raise UserError(f"{where} has no {MAGNITUDE[1:]}, which use_dora asks for", hint=FINISHED)
    return Pair(parts[sides[0]], parts[sides[1]], parts.get(MAGNITUDE), on_embeddings)


def _check(where: str, pair: Pair, rank: int) -> None:
    a, b = pair.a, pair.b
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise UserError(f"{where}: A {list(a.shape)} and B {list(b.shape)} are not [{rank}, in] and [out, {rank}]", hint=FINISHED)
    if pair.magnitude and pair.magnitude.shape != pair.shape[:1]:
        raise UserError(f"{where}: magnitudes {list(pair.magnitude.shape)}, but its weight has {pair.shape[0]} rows", hint=FINISHED)
    for location in (a, b, pair.magnitude):
        if location and location.dtype not in ITEM_BYTES:
            raise UserError(f"{where}: dtype {location.dtype} is not one of {', '.join(ITEM_BYTES)}", hint=FINISHED)
