"""The loss of a run as a picture."""

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.spikes import marked_losses, not_applied, running_mean, spikes, with_loss
from mlx_finetune.files import write_bytes
from mlx_finetune.installed import versions
from mlx_finetune.training.held_out import judged_by
from mlx_finetune.training.metrics import read_metrics

PICTURE = "loss.png"
SPIKE: dict[str, Any] = {"marker": "x", "color": "#c01c28", "markeredgewidth": 2}
SKIPPED: dict[str, Any] = {"marker": "v", "color": "#333333", "markerfacecolor": "none"}


def draw_loss(run: Path) -> Path | None:
    """Draws `loss.png` from `metrics.jsonl`: training loss, its running mean by token, held-out loss. None without matplotlib.

    Spikes are marked, and so are steps that were not applied.

    Raises:
        UserError: a line of the metrics is damaged, or there is no room for the picture.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(run / "metrics.jsonl")
    every = [row for row in rows if row["split"] == "train"]
    train, valid = with_loss(every), [row for row in rows if row["split"] == "valid" and math.isfinite(row["loss"])]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    steps = [row["step"] for row in train]
    axes.plot(steps, [row["loss"] for row in train], color="#9db8d6", linewidth=1, label="training, each step")
    axes.plot(steps, running_mean(train), color="#1f5fa8", linewidth=1.8, label="training, running mean")
    if valid:
        losses = [row["loss"] for row in valid]
        axes.plot([row["step"] for row in valid], losses, "o-", color="#c8501e", linewidth=1.8, label="held out")
        for source, steps_then, apart in shown_apart(valid):
            axes.plot(steps_then, apart, "o--", color="#8a8a8a", linewidth=1.2, markersize=4, label=f"held out, {source}")
        for row in (valid[0], valid[-1]):
            axes.annotate(
                f"{row['loss']:.3f}", (row["step"], row["loss"]), xytext=(6, 6), textcoords="offset points", color="#c8501e"
            )
    heights = marked_losses(every)
    for label, at, look in (("spike", spikes(every), SPIKE), ("not applied", not_applied(every), SKIPPED)):
        if at:
            axes.plot(at, [heights[step] for step in at], label=label, linestyle="none", markersize=7, **look)
    axes.set(xlabel="step", ylabel="loss (nats a learned token)", title=run.resolve().name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)  # beside the curves, wherever they run
    drawn = io.BytesIO()
    program = " ".join(("mlx-finetune", *versions(["mlx-finetune"]).values()))
    figure.savefig(drawn, metadata={"Software": program, "Source": f"metrics.jsonl up to {_until(rows)}"})
    try:
        write_bytes(run / PICTURE, drawn.getvalue())
    except OSError as error:
        raise UserError(
            f"{run / PICTURE}: cannot be written: {error.strerror}", hint="make room: mlx-finetune plot draws it"
        ) from error
    return run / PICTURE


def _until(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"step {max((row['step'] for row in rows), default=0)}"


def shown_apart(valid: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[int], list[float]]]:
    """Source, steps and losses of each source that is not a part of the held-out loss."""
    sources = sorted({source for row in valid for source in row.get("by_source", {})})
    lines = []
    for source in set(sources) - set(judged_by(sources)):
        rows = [row for row in valid if math.isfinite(row.get("by_source", {}).get(source, math.nan))]
        lines.append((source, [row["step"] for row in rows], [row["by_source"][source] for row in rows]))
    return sorted(lines)
