"""Checkpoints laid out in a way that mlx-lm's class does not read: they are told to it in the way that it does.

transformers 5 has the experts of a layer in one tensor, and writes them so, or expert by expert, as it is asked.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes

from mlx_finetune.engines.mlx import mpt

Weights = dict[str, mx.array]
OWN: Mapping[str, tuple[type[nn.Module], Any]] = {"mpt": (mpt.Model, mpt.ModelArgs)}  # classes that mlx-lm does not have
JOINED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)$")
SINGLE = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
PLAIN = ("gate_proj", "up_proj", "down_proj")
W1_W3_W2 = ("w1", "w3", "w2")


def classes_of(config: dict[str, Any], widened: bool = False) -> tuple[type[nn.Module], Any]:
    """mlx-lm's class of a model and of its settings; the former's `sanitize` reads every layout that transformers writes.

    `widened`: vectors are made float32 before: some classes add 1 to norms, which 16 bits would round.
    """
    if config["model_type"] in OWN:
        return OWN[config["model_type"]]
    kind, arguments = _get_classes(config)
    told = TOLD.get(config["model_type"])
    if told is None and not widened:
        return kind, arguments

    def sanitize(self: Any, weights: Weights) -> Weights:
        weights = {name: _wide(value) for name, value in weights.items()} if widened else weights
        weights = told(weights) if told else weights
        read: Weights = kind.sanitize(self, weights) if hasattr(kind, "sanitize") else weights
        return read

    return type(kind.__name__, (kind,), {"sanitize": sanitize, "__module__": kind.__module__}), arguments


def _wide(value: mx.array) -> mx.array:
    return value.astype(mx.float32) if value.ndim == 1 and value.dtype in (mx.bfloat16, mx.float16) else value


def _singly(weights: Weights, names: tuple[str, str, str] = PLAIN) -> Weights:
    """Joined experts [E, 2 I, H] and [E, H, I] one by one, by these names of gate, up and down."""
    read: Weights = {}
    for key, value in weights.items():
        found = JOINED.match(key)
        if found is None:
            read[key] = value
            continue
        for number in range(value.shape[0]):
            where = f"{found[1]}.{number}"
            if found[2] == "down_proj":
                read[f"{where}.{names[2]}.weight"] = value[number]
            else:
                read[f"{where}.{names[0]}.weight"], read[f"{where}.{names[1]}.weight"] = mx.split(value[number], 2)
    return read


def _mixtral(weights: Weights) -> Weights:
    moved = {re.sub(r"\.mlp\.(experts|gate)\b", r".block_sparse_moe.\1", key): value for key, value in weights.items()}
    return _singly(moved, W1_W3_W2)


def _granite(weights: Weights) -> Weights:
    names = (("experts.gate_up_proj", "input_linear.weight"), ("experts.down_proj", "output_linear.weight"))
    read: Weights = {}
    for key, value in weights.items():
        for ours, name in (*names, ("router.weight", "router.layer.weight")):
            key = re.sub(rf"(block_sparse_moe)\.{ours}$", rf"\1.{name}", key)
        read[key] = value
    return read


def _together(weights: Weights) -> Weights:
    """Experts that stand one by one joined as [E, 2 I, H] and [E, H, I]."""
    read: Weights = {}
    parts: dict[str, dict[int, dict[str, mx.array]]] = {}
    for key, value in weights.items():
        if found := SINGLE.match(key):
            parts.setdefault(found[1], {}).setdefault(int(found[2]), {})[found[3]] = value
        else:
            read[key] = value
    for where, experts in parts.items():
        in_order = [experts[number] for number in sorted(experts)]
        read[f"{where}.gate_up_proj"] = mx.stack([mx.concatenate([one["gate_proj"], one["up_proj"]]) for one in in_order])
        read[f"{where}.down_proj"] = mx.stack([one["down_proj"] for one in in_order])
    return read


def _gpt_oss(weights: Weights) -> Weights:
    """Experts that are not packed in mxfp4: [E, H, 2 I] with gate and up in turn, and [E, I, H]."""
    read: Weights = {}
    for key, value in weights.items():
        found = JOINED.match(key)
        if found is None:
            read[key] = value
        elif found[2] == "down_proj":
            read[f"{key}.weight"] = value.swapaxes(-1, -2)
        else:
            turned = value.swapaxes(-1, -2)
            read[f"{found[1]}.gate_proj.weight"], read[f"{found[1]}.up_proj.weight"] = turned[:, ::2], turned[:, 1::2]
    if len(read) > len(weights):  # the class takes the names above for a sign that all has been read
        for key in [key for key in read if key.endswith("gate_up_proj_bias")]:
            bias, where = read.pop(key), key.removesuffix("gate_up_proj_bias")
            read[f"{where}gate_proj.bias"], read[f"{where}up_proj.bias"] = bias[:, ::2], bias[:, 1::2]
            read[f"{where}down_proj.bias"] = read.pop(f"{where}down_proj_bias")
    return read


def _gemma3(weights: Weights) -> Weights:
    names = ((r"^model\.language_model\.", "language_model.model."), (r"^model\.(vision_tower|multi_modal_projector)", r"\1"))
    read: Weights = {}
    for key, value in weights.items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        read[key.replace("lm_head", "language_model.lm_head") if key.startswith("lm_head") else key] = value
    return read


TOLD: Mapping[str, Callable[[Weights], Weights]] = {
    "gemma3": _gemma3,
    "granitemoe": _granite,
    "granitemoehybrid": _granite,
    "mixtral": _mixtral,
    "lfm2_moe": lambda weights: _singly(weights, W1_W3_W2),
    "gpt_oss": _gpt_oss,
    "qwen3_5_moe": _together,
    **{name: _singly for name in ("deepseek_v3", "dots1", "glm4_moe", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next")},
}
