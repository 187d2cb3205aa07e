"""A LoRA checkpoint as PEFT lays it out: its settings, and which matrices belong to which module. Only headers are read.

LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024), and LoRA on embeddings, which peft writes transposed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_finetune.engines import experts
from mlx_finetune.engines.adapter import EMBEDDING_A, EMBEDDING_B, LORA_A, LORA_B, MAGNITUDE, PEFT_PREFIX
from mlx_finetune.engines.peft_settings import beyond
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.weights import ITEM_BYTES, TensorLocation, file_headers

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
RANKS, ALPHAS = "rank_pattern", "alpha_pattern"
PATTERNS = frozenset({RANKS, ALPHAS, "target_parameters"})
KINDS = "only LoRA, rsLoRA and DoRA can be fused"
FINISHED = "use a checkpoint folder of a finished save"


@dataclass(frozen=True)
class Pair:
    """A and B of a module, and the magnitude [rows] of DoRA.

    A is [r, columns] and B [rows, r] of the weight; on embeddings A is [r, rows] and B [columns, r].
    """

    a: TensorLocation
    b: TensorLocation
    scale: float  # B @ A is multiplied by it
    magnitude: TensorLocation | None = None
    on_embeddings: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight that it changes."""
        return (self.a.shape[1], self.b.shape[0]) if self.on_embeddings else (self.b.shape[0], self.a.shape[1])


@dataclass(frozen=True)
class Experts:
    """A and B of one parameter of all experts, laid out as engines/experts.py says; `pair` has rank and scale."""

    a: TensorLocation
    b: TensorLocation
    pair: experts.Pair


@dataclass(frozen=True)
class Adapter:
    """Pairs by module, and those of experts by parameter, not read yet; `scale`: of all that no pattern speaks of."""

    scale: float
    pairs: dict[str, Pair]
    of_experts: dict[str, Experts]


def read_adapter(checkpoint: Path) -> Adapter:
    """Reads settings and headers of a PEFT LoRA checkpoint, and checks that what belongs together is there.

    Raises:
        UserError: a missing or broken file, an adapter of another kind, a matrix without its other half.
    """
    config = _settings(checkpoint / CONFIG)
    path, is_dora = checkpoint / TENSORS, bool(config.get("use_dora"))
    tensors = {_without_prefix(name, path): location for name, location in file_headers(path).items()}
    of_experts = {
        parameter: Experts(tensors.pop(pair.a), tensors.pop(pair.b), pair)
        for parameter, pair in experts.pairs_of(tensors, config).items()
    }
    for parameter, of in of_experts.items():
        _check_dtypes(f"{path}: {parameter}", of.a, of.b)
    suffixes = [LORA_A, LORA_B, EMBEDDING_A, EMBEDDING_B, *([MAGNITUDE] if is_dora else [])]
    modules: dict[str, dict[str, TensorLocation]] = {}
    for name, location in tensors.items():
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        if suffix is None:
            raise UserError(f"{path}: tensor {name} is no LoRA matrix of a linear layer or of embeddings", hint=KINDS)
        modules.setdefault(name.removesuffix(suffix), {})[suffix] = location
    if not modules and not of_experts:
        raise UserError(f"{path}: no LoRA tensors", hint=FINISHED)
    pairs = {}
    for module, parts in modules.items():
        rank, scale = experts.rank_and_scale(module, config)
        pairs[module] = _pair(f"{path}: {module}", parts, scale, is_dora)
        _check(f"{path}: {module}", pairs[module], rank)
    changed = [*of_experts, *(f"{module}.weight" for module in pairs)]
    for name in config.get("target_parameters") or ():
        if not any(f".{parameter}".endswith(f".{name}") for parameter in changed):
            raise UserError(f"{path}: target_parameters names {name}, of which there are no tensors", hint=FINISHED)
    return Adapter(experts.rank_and_scale("", config)[1], pairs, of_experts)


def _without_prefix(name: str, path: Path) -> str:
    if not name.startswith(PEFT_PREFIX):
        raise UserError(f"{path}: tensor {name} is no LoRA matrix of a linear layer or of embeddings", hint=KINDS)
    return name.removeprefix(PEFT_PREFIX)


def _settings(path: Path) -> dict[str, Any]:
    """adapter_config.json, of which rank and alpha are numbers."""
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is not LORA", hint=KINDS)
    for key, value in beyond(config, also=PATTERNS).items():
        raise UserError(f"{path}: {key} is {value!r}, which cannot be fused yet", hint=KINDS)
    ranks, alphas = ([config.get(key), *_values(config, pattern)] for key, pattern in (("r", RANKS), ("lora_alpha", ALPHAS)))
    for rank in ranks:
        for alpha in alphas:
            if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
                what = f"{path}: r {rank!r} and lora_alpha {alpha!r} are not a whole number and a number"
                raise UserError(what, hint=FINISHED)
    return config


def _values(config: Mapping[str, Any], pattern: str) -> list[Any]:
    found = config.get(pattern) or {}
    return list(found.values()) if isinstance(found, dict) else [found]


def _pair(where: str, parts: Mapping[str, TensorLocation], scale: float, is_dora: bool) -> Pair:
    on_embeddings = EMBEDDING_A in parts or EMBEDDING_B in parts
    sides = (EMBEDDING_A, EMBEDDING_B) if on_embeddings else (LORA_A, LORA_B)
    if on_embeddings and is_dora:
        raise UserError(f"{where}: DoRA of embeddings cannot be fused", hint="train the embeddings with lora")
    if parts.keys() - {MAGNITUDE} != set(sides):
        names = " and ".join(side.removeprefix(".").removesuffix(".weight") for side in sides)
        raise UserError(f"{where} has only one of {names}", hint=FINISHED)
    if is_dora and MAGNITUDE not in parts:
        raise UserError(f"{where} has no {MAGNITUDE[1:]}, which use_dora asks for", hint=FINISHED)
    return Pair(parts[sides[0]], parts[sides[1]], scale, parts.get(MAGNITUDE), on_embeddings)


def _check(where: str, pair: Pair, rank: int) -> None:
    a, b = pair.a, pair.b
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise UserError(f"{where}: A {list(a.shape)} and B {list(b.shape)} are not [{rank}, in] and [out, {rank}]", hint=FINISHED)
    if pair.magnitude and pair.magnitude.shape != pair.shape[:1]:
        raise UserError(f"{where}: magnitudes {list(pair.magnitude.shape)}, but its weight has {pair.shape[0]} rows", hint=FINISHED)
    _check_dtypes(where, a, b, pair.magnitude)


def _check_dtypes(where: str, *locations: TensorLocation | None) -> None:
    for location in locations:
        if location and location.dtype not in ITEM_BYTES:
            raise UserError(f"{where}: dtype {location.dtype} is not one of {', '.join(ITEM_BYTES)}", hint=FINISHED)
