"""Optimizers, written once for both engines: MLX's arrays and torch's tensors have these operators alike.

What an optimizer remembers of a parameter lies in slots, float32: "m" and "v", the moments; "row" and "column", factors of the
second; a checkpoint holds them by these names. Moments in 8 bits have what their blocks are scaled by beside them.
"""

import math
from typing import Any

from mlx_finetune.config import RunConfig
from mlx_finetune.engines.adapter import HEAD, LORA_A, LORA_B

Array = Any
Slots = dict[str, Array]
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of AdamW, torch's defaults
MOMENTUM, ITERATIONS, QUINTIC = 0.95, 5, (3.4445, -4.775, 2.0315)  # of Muon
RMS = 0.2  # of an update by Muon, as AdamW's are (Liu et al. 2025): one learning rate serves both
NARROW, BLOCK, SCALES = (
    4096,
    256,
    "_absmax",
)  # of adamw_8bit: numbers from which on an array has 8 bits; in a block; a slot's scales
DECAY_OF_BETA, SMALLEST = -0.8, 1e-30  # of Adafactor


def rule_of(config: RunConfig, name: str, shape: tuple[int, ...]) -> str:
    """adamw, adafactor or muon: Muon is for matrices of layers alone. `each`: of a stack of matrices, one of each expert."""
    if len(shape) == 3 and name.endswith((LORA_A, LORA_B)) and config.optimizer in ("adafactor", "muon"):
        return f"{config.optimizer} each"
    if config.optimizer == "muon":
        return "muon" if len(shape) == 2 and "embed" not in name and not name.startswith(HEAD) else "adamw"
    return "adafactor" if config.optimizer == "adafactor" else "adamw"


def slots_of(rule: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The slots of a parameter, and their shapes."""
    if rule in ("muon", "muon each"):
        return {"m": shape}
    if rule == "adafactor each":
        return {"row": shape[:-1], "column": (*shape[:-2], shape[-1])}
    if rule == "adafactor":
        return {"row": shape[:1], "column": shape[1:]} if len(shape) == 2 else {"v": shape}
    return {"m": shape, "v": shape}


def state_shapes(config: RunConfig, trained: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Of all that an engine's state holds: `adapter/NAME` and each slot."""
    shapes = {f"adapter/{name}": shape for name, shape in trained.items()}
    for name, shape in trained.items():
        shapes |= {f"{slot}/{name}": size for slot, size in slots_of(rule_of(config, name, shape), shape).items()}
        if config.optimizer == "adamw_8bit" and math.prod(shape) >= NARROW:
            shapes |= {f"{slot}{SCALES}/{name}": (math.ceil(math.prod(shape) / BLOCK),) for slot in ("m", "v")}
    return shapes


def rate_factor(config: RunConfig, name: str) -> float:
    """By how much a parameter learns faster than the learning rate says (LoRA+: Hayou et al. 2024)."""
    return config.loraplus_lr_ratio if name.endswith(LORA_B) else 1.0


def decay_of(config: RunConfig, shape: tuple[int, ...]) -> float:
    """Matrices decay; norms, biases and magnitudes do not."""
    return config.weight_decay if len(shape) > 1 else 0.0


def update(rule: str, parameter: Array, gradient: Array, slots: Slots, step: int, rate: float, decay: float) -> tuple[Array, Slots]:
    """The parameter and its slots after step `step`, counted from 1."""
    return RULES[rule](parameter, gradient, slots, step, rate, decay)


def _adamw(p: Array, g: Array, slots: Slots, step: int, rate: float, decay: float) -> tuple[Array, Slots]:
    """With bias correction and decoupled decay (Loshchilov and Hutter 2019), as torch has it."""
    first, second = (1 - beta**step for beta in BETAS)
    m = BETAS[0] * slots["m"] + (1 - BETAS[0]) * g
    v = BETAS[1] * slots["v"] + (1 - BETAS[1]) * g.square()
    return p * (1 - rate * decay) - (rate / first) * m / ((v / second).sqrt() + EPSILON), {"m": m, "v": v}


def _adafactor(p: Array, g: Array, slots: Slots, step: int, rate: float, decay: float) -> tuple[Array, Slots]:
    """Shazeer and Stern 2018, without relative step sizes and without momentum; the update's root mean square is 1 at most."""
    beta = 1 - step**DECAY_OF_BETA
    square = g * g + SMALLEST
    if "row" in slots:
        row = beta * slots["row"] + (1 - beta) * square.mean(-1)
        column = beta * slots["column"] + (1 - beta) * square.mean(-2)
        slots = {"row": row, "column": column}
        direction = g * ((row / row.mean(-1, True)) ** -0.5)[..., None] * (column**-0.5)[..., None, :]
    else:
        slots = {"v": beta * slots["v"] + (1 - beta) * square}
        direction = g * slots["v"] ** -0.5
    rms = (direction * direction).mean(*_each(g if "row" in slots else None)) ** 0.5
    return p * (1 - rate * decay) - rate * direction / (0.5 * (rms + 1 + (rms - 1).abs())), slots


def _muon(p: Array, g: Array, slots: Slots, step: int, rate: float, decay: float) -> tuple[Array, Slots]:
    """Momentum made orthogonal by Newton and Schulz (Jordan 2024), as torch.optim.Muon has it with `match_rms_adamw`."""
    m = MOMENTUM * slots["m"] + (1 - MOMENTUM) * g
    rows, columns = p.shape[-2:]
    size = RMS * max(rows, columns) ** 0.5
    return p * (1 - rate * decay) - (rate * size) * _orthogonal(MOMENTUM * m + (1 - MOMENTUM) * g), {"m": m}


def _orthogonal(x: Array) -> Array:
    """The nearest matrix whose singular values are about 1, or of a stack each."""
    rows, columns = x.shape[-2:]
    x = x.swapaxes(-1, -2) if rows > columns else x
    x = x / ((x * x).sum(*_each(x)) ** 0.5 + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        square = x @ x.swapaxes(-1, -2)
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.swapaxes(-1, -2) if rows > columns else x


def _each(x: Array) -> tuple[Any, ...]:
    """What `sum` and `mean` take so that they are over each matrix of a stack; of anything else over all."""
    return ((-2, -1), True) if x is not None and x.ndim == 3 else ()


RULES = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon, "adafactor each": _adafactor, "muon each": _muon}
