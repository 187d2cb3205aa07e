"""What the figures show, as numbers: nothing here draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_finetune.evaluation.plot import shown_apart
from mlx_finetune.evaluation.spikes import marked_losses, not_applied, running_mean, spikes, with_loss
from mlx_finetune.training.held_out import judged_by

POINTS = 1500  # of a curve, at most


@dataclass(frozen=True)
class Line:
    """One curve; `look` names its colour and how it is drawn, see figures.py."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    look: str


@dataclass(frozen=True)
class Curves:
    """One figure: what its axis of values is called, with the unit, and the curves; `told`: what it shows, in a sentence."""

    name: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    told: str


def all_curves(train: Sequence[Mapping[str, Any]], valid: Sequence[Mapping[str, Any]], max_grad_norm: float) -> list[Curves]:
    """Of a run, the loss first; a figure of which nothing was measured is left out."""
    made = [loss_curves(train, valid), by_source(valid)]
    for name, title, unit, lines in (
        ("rate", "Learning rate", "learning rate (per step)", [("learning rate", _column(train, "learning_rate"), "rate")]),
        ("norm", "Gradient norm", "gradient norm (L2)", _norm(train, max_grad_norm)),
        ("speed", "Speed", "speed (tokens/s)", _speed(train)),
        ("memory", "Peak memory", "most memory so far (GB)", [("memory", _column(train, "memory", 1e-9), "memory")]),
    ):
        there = tuple(Line(label, *points, look) for label, points, look in lines if points[0])
        made.append(Curves(name, title, unit, there, "; ".join(_from_to(line) for line in there)) if there else None)
    return [curves for curves in made if curves]


def loss_curves(train: Sequence[Mapping[str, Any]], valid: Sequence[Mapping[str, Any]]) -> Curves | None:
    """Of training each step and its running mean, held out, the jumps of the loss, and steps that were not applied."""
    rows, valid, lines = with_loss(train), [row for row in valid if np.isfinite(row["loss"])], []
    steps = [row["step"] for row in rows]
    if rows:
        lines += [Line("training, each step", *thinned(steps, [row["loss"] for row in rows]), "raw")]
        lines += [Line("training, running mean", *thinned(steps, running_mean(rows)), "train")]
    if valid:
        sources = judged_by({source for row in valid for source in row.get("by_source", {})})
        lines += [Line(f"held out ({', '.join(sources)})" if sources else "held out", *_column(valid, "loss"), "held")]
    told = "; ".join(_from_to(line) for line in lines if line.look in ("train", "held"))
    heights = marked_losses(train)
    for label, at, look in (("spike", spikes(train), "spike"), ("not applied", not_applied(train), "skipped")):
        if at and lines:
            lines += [Line(label, *thinned(at, [heights[step] for step in at]), look)]
            told += f"; {label} at step {', '.join(map(str, at[:10]))}" + (" and others" if len(at) > 10 else "")
    return Curves("loss", "Loss", "loss (nats a learned token)", tuple(lines), told) if lines else None


def by_source(valid: Sequence[Mapping[str, Any]]) -> Curves | None:
    """Held-out losses of each source, where there are several."""
    sources = sorted({source for row in valid for source, loss in row.get("by_source", {}).items() if np.isfinite(loss)})
    if len(sources) < 2:
        return None
    apart = {name for name, _, _ in shown_apart(valid)}
    lines = []
    for number, source in enumerate(sources):
        rows = [row for row in valid if np.isfinite(row.get("by_source", {}).get(source, np.nan))]
        label = f"{source} (beside the loss)" if source in apart else source
        points = [row["step"] for row in rows], [row["by_source"][source] for row in rows]
        lines.append(Line(label, *points, f"source{number % 4}"))
    told = "; ".join(map(_from_to, lines))
    return Curves("sources", "Held-out loss by source", "loss (nats a learned token)", tuple(lines), told)


def thinned(steps: Sequence[float], values: Sequence[float], most: int = POINTS) -> tuple[list[float], list[float]]:
    """A long curve by the lowest and the highest of each stretch, so that no spike is lost."""
    if len(steps) <= most:
        return list(steps), list(values)
    keep, all_values = {0, len(steps) - 1}, np.array(values)
    for part in np.array_split(np.arange(len(steps)), most // 2):
        here = all_values[part]
        keep |= {int(part[np.argmin(here)]), int(part[np.argmax(here)])}
    return [steps[i] for i in sorted(keep)], [values[i] for i in sorted(keep)]


def _column(rows: Sequence[Mapping[str, Any]], name: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    there = [row for row in rows if row.get(name) is not None and np.isfinite(row[name])]
    return thinned([row["step"] for row in there], [scale * row[name] for row in there])


def _norm(train: Sequence[Mapping[str, Any]], most: float) -> list[tuple[str, tuple[list[float], list[float]], str]]:
    steps, norms = _column(train, "grad_norm")
    limit = ([steps[0], steps[-1]], [most, most]) if steps else ([], [])
    return [("gradient norm", (steps, norms), "norm"), (f"clipped to {most:g}", limit, "limit")]


def _speed(train: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[list[float], list[float]], str]]:
    timed = [row for row in train if row.get("seconds")]
    lines = []
    for name, label, look in (("computed", "computed, padding too", "computed"), ("tokens", "learned", "learned")):
        there = [row for row in timed if name in row]
        lines.append((label, thinned([r["step"] for r in there], [r[name] / r["seconds"] for r in there]), look))
    return lines


def _from_to(line: Line) -> str:
    at = f"{line.label}: {line.values[0]:.4g} at step {line.steps[0]:g}"
    return at + (f", {line.values[-1]:.4g} at step {line.steps[-1]:g}" if len(line.steps) > 1 else "")
