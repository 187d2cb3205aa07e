"""What is adapted, how it starts, and what PEFT calls it. Numpy only: both engines begin with the same numbers."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_finetune.config import RunConfig
from mlx_finetune.errors import UserError

PEFT_PREFIX = "base_model.model."
MOMENTS = ("m", "v")
LAYER = re.compile(r"\.(\d+)\.")


def choose_targets(linears: Mapping[str, tuple[int, int]], config: RunConfig) -> dict[str, tuple[int, int]]:
    """The linear layers to adapt, of all that the model has: path -> (out, in). Head and embeddings are never among them.

    Raises:
        UserError: a name in `target_modules` that no layer has, or more layers than the model has.
    """
    in_layers = {name: shape for name, shape in linears.items() if LAYER.search(name)}
    layers = sorted({int(LAYER.search(name)[1]) for name in in_layers})  # type: ignore[index]
    if not layers:
        raise UserError("this model has no linear layers that can be adapted", hint="choose a model of another architecture")
    if config.num_layers and config.num_layers > len(layers):
        raise UserError(f"num_layers = {config.num_layers}: the model has {len(layers)}", hint="leave it out to adapt all")
    last = set(layers[-config.num_layers :] if config.num_layers else layers)
    leaves = sorted({name.rsplit(".", 1)[-1] for name in in_layers})
    wanted = leaves if config.target_modules == "all-linear" else list(config.target_modules)
    for target in wanted:
        if target not in leaves:
            near = difflib.get_close_matches(target, leaves, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(leaves)}"
            raise UserError(f"target_modules: no layer of this model is called {target!r}", hint=hint)
    return {n: s for n, s in in_layers.items() if n.rsplit(".", 1)[-1] in wanted and int(LAYER.search(n)[1]) in last}  # type: ignore[index]


def initial_adapter(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, np.ndarray]:
    """A uniform in +-1/sqrt(in), B zero, so that training starts at the base model (LoRA: Hu et al. 2021; A as PEFT draws it)."""
    random = np.random.default_rng(seed)
    arrays = {}
    for name, (rows, columns) in sorted(shapes.items()):
        bound = 1 / np.sqrt(columns)
        arrays[f"{name}.lora_A.weight"] = random.uniform(-bound, bound, (rank, columns)).astype(np.float32)
        arrays[f"{name}.lora_B.weight"] = np.zeros((rows, rank), np.float32)
    return arrays


def without_adapter(shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, np.ndarray]:
    """An engine's state in which the model is the base model again."""
    return {f"adapter/{name}": array for name, array in initial_adapter(shapes, rank, 0).items()}


def peft_config(shapes: Mapping[str, tuple[int, int]], config: RunConfig, base: str) -> dict[str, Any]:
    """`adapter_config.json` with explicit paths, which peft matches exactly."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(shapes),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
