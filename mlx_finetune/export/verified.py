"""What verifying a fused folder found (verify.py)."""

from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_finetune.export.distance import Choices

Backend = Literal["transformers", "mlx", "weights"]


@dataclass(frozen=True)
class InEngine:
    """How far the logits of base + checkpoint in the engine that trained it lie from those of the tuned model, and the fused one.

    tolerance: 1e-3 and 3e-4 of the largest logit; the fused model may besides differ by what its own tolerance allows.
    """

    name: str
    largest_difference: float
    fused_difference: float
    kl: float
    tolerance: float
    choices: Choices
    passed: bool


@dataclass(frozen=True)
class Verified:
    """What the comparison of the fused model with the tuned one (base + checkpoint) found, over all `positions` of the texts.

    backend: what ran them; "weights": nothing did, and what only running tells is None, 0 or empty.
    missing, unexpected: tensors that the fused folder lacks (or would have drawn anew) or has too many, those left out that the
    base has alike.
    largest_difference, largest_logit: absolute, of single logits; largest_logit is of the tuned model.
    kl: mean over the positions of KL(tuned || fused), nats.
    tolerance: 1e-3 for float32; for BF16 and F16 besides what rounding the same weights costs, measured (verify.py).
    outweighed: it is what it has to be, but rounding leaves the trained weights no nearer to the tuned model than the base is.
    choices: greedy tokens of the fused model behind each text and the tuned model's answer.
    engine: the engine that trained, None where it is not installed or not known.
    folder: what must not have changed.
    trained_on: how far the fused model lies from the one that was trained where that was on quantised weights: largest and rms
    of single logits, kl in nats.
    weights: `Weights` of verify_weights.py, where nothing was run.
    not_run: why nothing was; empty where something was.
    """

    backend: Backend
    missing: list[str]
    unexpected: list[str]
    largest_difference: float | None
    largest_logit: float | None
    kl: float | None
    tolerance: float | None
    passed: bool
    outweighed: bool = False
    positions: int = 0
    choices: dict[str, int] = field(default_factory=dict)
    engine: dict[str, Any] | None = None
    folder: dict[str, Any] = field(default_factory=dict)
    trained_on: dict[str, float] | None = None
    weights: dict[str, Any] | None = None
    not_run: str = ""
