"""Where the loss of a run jumps: pure functions of the rows of metrics.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_finetune.training.metrics import applied

SMOOTHING = 0.9
WINDOW = 50  # applied steps before the one that is judged
LEAST = 20  # of them, before a jump can be told from noise
JUMP = 8.0  # standard deviations, by the median distance from the median, which a jump does not move
SMALL = 0.02  # of the loss: what one that hardly varies has to rise to be seen at all
NORMAL = 1.4826  # standard deviations of a normal distribution in its median distance from the median

Rows = Sequence[Mapping[str, Any]]


def spikes(train: Rows) -> list[int]:
    """Steps whose loss stands far above the running mean, judged by how far the steps of the window before it stand from theirs.

    None among the first `LEAST`, and none that was not applied.
    """
    rows = with_loss(train)
    mean = np.array(running_mean(rows), np.float64)
    above = np.array([row["loss"] for row in rows[1:]], np.float64) - mean[:-1]
    found = [i for i in range(LEAST, len(above)) if above[i] > limit(above[max(i - WINDOW, 0) : i], mean[i])]
    return [int(rows[i + 1]["step"]) for i in found]


def limit(before: np.ndarray, mean: float) -> float:
    """How far above its running mean a loss is a spike, where `before` are those distances in the window."""
    middle = float(np.median(before))
    spread = NORMAL * float(np.median(np.abs(before - middle)))
    return middle + max(JUMP * spread, SMALL * abs(mean))


def running_mean(rows: Rows) -> list[float]:
    """Exponential mean of sums over that of counts: no mean of means. Every loss must be finite."""
    losses, total, weight = [], 0.0, 0.0
    for row in rows:
        total = SMOOTHING * total + row["loss"] * row["tokens"]
        weight = SMOOTHING * weight + row["tokens"]
        losses.append(total / weight)
    return losses


def with_loss(train: Rows) -> list[Mapping[str, Any]]:
    """The steps that were applied."""
    return [row for row in train if applied(row) and np.isfinite(row["loss"])]


def not_applied(train: Rows) -> list[int]:
    """Steps that changed nothing, since loss or gradient was not finite."""
    return [int(row["step"]) for row in train if not applied(row)]


def marked_losses(train: Rows) -> dict[int, float]:
    """Where each step stands in a figure: at its loss, or, where it has none, at that of the step before it, or behind it."""
    known = {int(row["step"]): float(row["loss"]) for row in with_loss(train)}
    heights, last = {}, next(iter(known.values()), 0.0)
    for row in train:
        last = known.get(row["step"], last)
        heights[int(row["step"])] = last
    return heights
