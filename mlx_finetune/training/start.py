"""An adapter made elsewhere, by peft or by mlx-lm, as the start of a run. Numpy only."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mlx_finetune.config import RunConfig
from mlx_finetune.engines import Arrays, Engine
from mlx_finetune.engines.adapter import EMBEDDING_A, EMBEDDING_B, HEAD, LAYER, LORA_A, LORA_B, MAGNITUDE, PEFT_PREFIX
from mlx_finetune.engines.experts import EXPERTS, GATE_UP, from_peft, rank_and_scale
from mlx_finetune.engines.peft_settings import beyond
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.reading import open_ordinary
from mlx_finetune.training.manifest import PROGRESS, check_whole, sha256

ADAPTER, MLX_ADAPTER = "adapter_model.safetensors", "adapters.safetensors"  # of peft, of mlx-lm
PATTERNS = frozenset({"rank_pattern", "alpha_pattern", "target_parameters"})


@dataclass(frozen=True)
class Start:
    """Settings that an adapter brings, and its arrays by PEFT's names, float32."""

    settings: dict[str, Any]
    arrays: Arrays


def read_start(folder: Path, layers: int) -> Start:
    """The adapter of `folder`, made for a model of so many layers.

    Raises:
        UserError: no adapter, or one that does more than LoRA, rsLoRA and DoRA do.
    """
    if (folder / PROGRESS).is_file():  # a checkpoint of a run
        check_whole(folder, moments=False)
    found = read_json(folder / "adapter_config.json")
    if not isinstance(found, dict):
        raise UserError(f"{folder}/adapter_config.json: no settings in it", hint="name the folder of an adapter")
    if found.get("peft_type") != "LORA" and "lora_parameters" not in found:
        raise UserError(f"{folder}: an adapter of neither peft (LoRA) nor mlx-lm", hint="name another, or leave adapter_path out")
    try:
        start = _of_peft(folder, found) if found.get("peft_type") == "LORA" else _of_mlx_lm(folder, found)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, re.error) as error:
        said = f"{type(error).__name__}: {error}"
        hint = "save the adapter again, or leave adapter_path out"
        raise UserError(f"{folder}/adapter_config.json: not the settings of an adapter ({said})", hint=hint) from error
    modules = {re.sub(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.weight)?$", "", name) for name in start.arrays}
    return Start(start.settings | _where(modules, layers), start.arrays)


def started(config: RunConfig, layers: int) -> RunConfig:
    """The config with what its `adapter_path` brings.

    Raises:
        UserError: a setting asks for something else.
    """
    brought = read_start(Path(config.adapter_path), layers).settings
    for name, value in brought.items():
        asked = getattr(config, name)
        if name in config.model_fields_set and asked != value:
            raise UserError(f"{name} = {asked}, but {config.adapter_path} has {value}", hint=f"leave {name} out")
    return config.model_copy(update=brought | {"adapter_path": str(Path(config.adapter_path).resolve())})


def adapter_id(folder: str) -> str:
    """SHA-256 of the weights of an adapter that a run starts from; empty without one."""
    files = [path for path in (Path(folder) / ADAPTER, Path(folder) / MLX_ADAPTER) if folder and path.is_file()]
    return sha256(files[0]) if files else ""


def begin(engine: Engine, config: RunConfig, layers: int) -> None:
    """Puts the adapter of `adapter_path` into a fresh engine.

    Raises:
        UserError: it is of another model.
    """
    arrays = read_start(Path(config.adapter_path), layers).arrays
    for name, shape in engine.trained.items():
        if name not in arrays or arrays[name].shape != shape:
            has = list(arrays[name].shape) if name in arrays else "nothing"
            hint = "name the model that it was made for"
            raise UserError(f"{config.adapter_path}: {name} has {has}, the model takes {list(shape)}", hint=hint)
    engine.load_state({f"adapter/{name}": arrays[name] for name in engine.trained}, updates=0)


def _of_peft(folder: Path, found: dict[str, Any]) -> Start:
    for name, value in beyond(found, also=PATTERNS).items():
        what = f"{folder}: {name} = {value!r}: it changes more than A and B say"
        raise UserError(what, hint="merge it into the model with peft, and leave adapter_path out")
    arrays = {name.removeprefix(PEFT_PREFIX): array for name, array in _tensors(folder / ADAPTER).items()}
    arrays = from_peft(arrays, found)
    rank, alpha, rslora = int(found["r"]), float(found["lora_alpha"]), bool(found.get("use_rslora"))
    widest = max((array.shape[-2] for name, array in arrays.items() if name.endswith((LORA_A, EMBEDDING_A))), default=rank)
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    arrays = {n: _as_wide(n, a, widest, _own_scale(n, found) / scale) for n, a in arrays.items()}
    settings = {"rank": widest, "alpha": scale * (math.sqrt(widest) if rslora else widest), "use_rslora": rslora}
    return Start(settings | {"fine_tune_type": "dora" if found.get("use_dora") else "lora"}, _untied(arrays))


def _own_scale(name: str, found: dict[str, Any]) -> float:
    """Of a module whose rank or alpha a pattern says."""
    module = name.rsplit(".lora_", 1)[0]
    return rank_and_scale(re.sub(rf"\b{EXPERTS}\.(gate|up)_proj$", f"{EXPERTS}.{GATE_UP}", module), found)[1]


def _as_wide(name: str, array: np.ndarray, rank: int, factor: float) -> np.ndarray:
    """With zeros up to `rank`; B takes up what the module is scaled by beside the others."""
    if name.endswith((LORA_A, EMBEDDING_A)):
        return np.pad(array, (*[(0, 0)] * (array.ndim - 2), (0, rank - array.shape[-2]), (0, 0)))
    if name.endswith((LORA_B, EMBEDDING_B)):
        return np.pad(np.float32(factor) * array, (*[(0, 0)] * (array.ndim - 1), (0, rank - array.shape[-1])))
    return array


def _untied(arrays: Arrays) -> Arrays:
    """Without what stands there for a head that is its embeddings: the embeddings say the same."""
    embedding = next((name.removesuffix(EMBEDDING_A) for name in arrays if name.endswith(EMBEDDING_A)), None)
    if embedding is None or HEAD + LORA_A not in arrays:
        return arrays
    same = np.array_equal(arrays[HEAD + LORA_A], arrays[embedding + EMBEDDING_B].T)
    if same and np.array_equal(arrays[HEAD + LORA_B], arrays[embedding + EMBEDDING_A].T):
        return {name: array for name, array in arrays.items() if not name.startswith(f"{HEAD}.")}
    return arrays


def _of_mlx_lm(folder: Path, found: dict[str, Any]) -> Start:
    kind, how = found.get("fine_tune_type", "lora"), found["lora_parameters"]
    if kind not in ("lora", "dora"):
        raise UserError(
            f"{folder}: mlx-lm trained the weights themselves ({kind})", hint="name an adapter, or leave adapter_path out"
        )
    arrays = {}
    for name, array in _tensors(folder / MLX_ADAPTER).items():
        module, _, leaf = name.rpartition(".")
        embedding = module.rpartition(".")[2] == "embed_tokens"
        names = {"lora_a": EMBEDDING_A if embedding else LORA_A, "lora_b": EMBEDDING_B if embedding else LORA_B, "m": MAGNITUDE}
        if leaf not in names or array.ndim > 2:
            raise UserError(f"{folder}: {name} is not of a linear layer", hint="leave adapter_path out")
        arrays[module + names[leaf]] = np.ascontiguousarray(array.T)
    rank = int(how["rank"])
    return Start({"rank": rank, "alpha": float(how["scale"]) * rank, "use_rslora": False, "fine_tune_type": kind}, arrays)


def _where(modules: set[str], layers: int) -> dict[str, Any]:
    """`target_modules` and `num_layers` in few words where the last layers are adapted alike, else each by its path."""
    leaves: dict[str, set[int]] = {}
    for module in modules:
        where = LAYER.search(module)
        parent, _, leaf = module.rpartition(".")
        leaf = f"{EXPERTS}.{leaf}" if parent.endswith(f".{EXPERTS}") else leaf
        leaves.setdefault(leaf, set()).add(int(where[1]) if where else -1)
    inside = [found for found in leaves.values() if found != {-1}]
    count = len(inside[0]) if inside else 0
    if not inside or any(found != set(range(layers - count, layers)) for found in inside):
        return {"target_modules": tuple(sorted(modules)), "num_layers": None}
    return {"target_modules": tuple(sorted(leaves)), "num_layers": count if count < layers else None}


def _tensors(path: Path) -> Arrays:
    try:
        open_ordinary(path).close()  # the library waits for a pipe
        return {name: array.astype(np.float32) for name, array in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: {getattr(error, 'strerror', None) or error}", hint="an adapter has its weights there, as safetensors"
        ) from error
