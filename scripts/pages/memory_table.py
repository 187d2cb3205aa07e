"""The memory guide's tables: what `plan` says of published models on Macs of 8 to 64 GB. Planned, not measured."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from mlx_finetune.planning.advice import Wanted, gb, needed
from mlx_finetune.planning.command import MILLION, Plan, make_plan
from mlx_finetune.planning.machine import GIB, find_chip, planned_machine
from mlx_finetune.planning.memory import LEARNED_SHARE
from mlx_finetune.planning.model_shape import ModelShape, model_shape
from mlx_finetune.planning.wording import duration

WINDOW = 8192
CHIPS = {8: "M1", 16: "M2", 32: "M2 Pro", 64: "M4 Max"}  # one that is sold with so much memory
QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960}
LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072}


def _config(family: dict[str, Any], hidden: int, layers: int, heads: int, intermediate: int, tied: bool) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": intermediate}
    return family | sizes | {"tie_word_embeddings": tied, "torch_dtype": "bfloat16"}


# Of each model: values of its published config.json, and the parameters that its makers give for it.
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen3-0.6B": (_config(QWEN3, 1024, 28, 16, 3072, True), 0.6e9),
    "Qwen3-1.7B": (_config(QWEN3, 2048, 28, 16, 6144, True), 1.7e9),
    "Llama-3.2-3B": (_config(LLAMA, 3072, 28, 24, 8192, True), 3.21e9),
    "Qwen3-4B": (_config(QWEN3, 2560, 36, 32, 9728, True), 4.0e9),
    "Qwen3-8B": (_config(QWEN3, 4096, 36, 32, 12288, False), 8.2e9),
    "Qwen3-14B": (_config(QWEN3, 5120, 40, 40, 17408, False), 14.8e9),
    "Qwen3-32B": (_config(QWEN3, 5120, 64, 64, 25600, False), 32.8e9),
}


def memory_table(size: str) -> str:
    """The rows for a Mac of so many GB."""
    gigabytes = int(size)
    machine = planned_machine(find_chip(CHIPS[gigabytes]), gigabytes * GIB)
    head = ["model", "weights", "window", "layers that learn", "`grad_checkpoint`", "needs", "hours for a million tokens"]
    lines = [
        f"{machine.name}; {gb(machine.usable)} may be used: {machine.rule}.\n",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for name in MODELS:
        plan = make_plan(_shape(name), machine, Wanted(WINDOW, LEARNED_SHARE), None)
        lines.append(f"| {name} | {' | '.join(_row(plan, _shape(name)))} |")
    return "\n".join(lines) + "\n"


def _row(plan: Plan, shape: ModelShape) -> tuple[str, ...]:
    d = plan.choice.dials
    if not plan.choice.fits:
        return "does not fit", "", "", "", f"{gb(needed(plan.choice.memory))} at least", ""
    layers = f"{d.num_layers} of {shape.sizes.layers}" if d.num_layers else "all"
    time = duration(plan.speed, MILLION)
    return f"{d.bits} bits", f"{d.max_length:,}", layers, str(d.grad_checkpoint), gb(needed(plan.choice.memory)), time


@cache
def _shape(name: str) -> ModelShape:
    values, parameters = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        shape = model_shape(str(path))
    assert abs(shape.parameters / parameters - 1) < 0.03, (name, shape.parameters)
    return shape
