"""The loss of a run as a plot of characters, for those who stay in the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_finetune.evaluation.spikes import not_applied, running_mean, spikes, with_loss

if TYPE_CHECKING:
    from rich.text import Text

DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # of a braille sign (Unicode 2800): 4 high, 2 wide
TRAIN, HELD_OUT, FAINT, SPIKE, SKIPPED = "cyan", "bold yellow", "dim", "bold red", "bold"
Points = tuple[Sequence[float], Sequence[float]]


def plot_rows(
    train: Sequence[Mapping[str, Any]], valid: Sequence[Mapping[str, Any]], width: int, height: int, plain: bool = False
) -> "list[Text]":
    """Lines of text with colours: the running mean of training as a line of dots, held-out losses as signs; none without numbers.

    width, height: of the whole, in characters. plain: where only ASCII can be shown.
    """
    from rich.text import Text

    learned = with_loss(train)
    mean, held = _finite(learned, running_mean(learned)), _finite(valid, [row["loss"] for row in valid])
    steps, losses = [*mean[0], *held[0]], [*mean[1], *held[1]]
    if not losses:
        return []
    low, high = min(losses), max(losses)
    labels = [f"{value:.3f}" for value in (high, (low + high) / 2, low)]
    margin = max(map(len, labels))
    columns, rows = max(width - margin - 2, 10), max(height - 4, 3)
    box = min(steps), max(steps), low, high
    cells = _line(mean, box, columns, rows, plain)
    mark = "o" if plain else "\u25cf"
    for across, down in _places(held, box, columns, rows):
        cells[down][across] = (mark, HELD_OUT)
    lines = [Text("loss (nats a learned token)")]
    at = {0: labels[0], rows // 2: labels[1], rows - 1: labels[2]}
    for number, row in enumerate(cells):
        lines.append(Text(f"{at.get(number, ''):>{margin}} ").append("|" if plain else "│", FAINT))
        for sign, style in row:
            lines[-1].append(sign, style)
        lines[-1].rstrip()
    marks = {"x": (spikes(train), "spike", SPIKE), "v": (not_applied(train), "not applied", SKIPPED)}
    lines.append(Text(" " * (margin + 1)).append("+" if plain else "└", FAINT))
    for sign, style in _axis(marks, box, columns, "-" if plain else "─"):
        lines[-1].append(sign, style)
    first, last = f"{box[0]:g}", f"step {box[1]:g}"
    told = [(f"{sign} {name}", style) for sign, (at, name, style) in marks.items() if at]
    lines.append(Text(" " * (margin + 2) + first).append_text(_between(told, columns - len(first) - len(last))).append(last))
    key = [(f"{'..' if plain else '⠒⠒'} training, running mean", TRAIN)] if mean[0] else []
    key += [(f"{mark} held out", HELD_OUT)] if held[0] else []
    lines.append(Text("   ").join(Text(name, style) for name, style in key))
    return lines


def _finite(rows: Sequence[Mapping[str, Any]], losses: Sequence[float]) -> Points:
    there = [(row["step"], loss) for row, loss in zip(rows, losses, strict=True) if np.isfinite(loss)]
    return [step for step, _ in there], [loss for _, loss in there]


def _places(points: Points, box: tuple[float, float, float, float], columns: int, rows: int) -> list[tuple[int, int]]:
    """Column from the left and row from the top of each point."""
    left, right, low, high = box
    across = [(step - left) / max(right - left, 1e-12) for step in points[0]]
    down = [(high - loss) / max(high - low, 1e-12) for loss in points[1]]
    return [(round(x * (columns - 1)), round(y * (rows - 1))) for x, y in zip(across, down, strict=True)]


def _axis(
    marks: Mapping[str, tuple[Sequence[int], str, str]], box: tuple[float, float, float, float], columns: int, line: str
) -> list[tuple[str, str]]:
    """Steps, with signs at those that are marked: their losses may lie far outside of what is drawn."""
    cells = [(line, FAINT)] * columns
    for sign, (at, _, style) in marks.items():
        within = [step for step in at if box[0] <= step <= box[1]]
        for across, _ in _places((within, [box[2]] * len(within)), box, columns, 1):
            cells[across] = (sign, style)
    return cells


def _between(told: Sequence[tuple[str, str]], width: int) -> "Text":
    """As many of them as fit, in the middle of `width` characters."""
    from rich.text import Text

    fitting = [each for i, each in enumerate(told) if sum(len(name) + 2 for name, _ in told[: i + 1]) < width]
    text = Text("  ").join(Text(name, style) for name, style in fitting)
    text.align("center", max(width, 0))
    return text


def _line(
    points: Points, box: tuple[float, float, float, float], columns: int, rows: int, plain: bool
) -> list[list[tuple[str, str]]]:
    """A character and its style for each cell."""
    tall, wide = (1, 1) if plain else DOTS.shape
    on = np.zeros((rows * tall, columns * wide), bool)
    places = _places(points, box, columns * wide, rows * tall)
    for (x, y), (right, bottom) in zip(places, places[1:] or places, strict=False):
        for share in np.linspace(0, 1, max(abs(right - x), abs(bottom - y)) + 1):
            on[round(y + share * (bottom - y)), round(x + share * (right - x))] = True
    if plain:
        return [[("." if cell else " ", TRAIN) for cell in row] for row in on]
    signs = (on.reshape(rows, tall, columns, wide).transpose(0, 2, 1, 3) * DOTS).sum((2, 3))
    return [[(chr(0x2800 + int(sign)) if sign else " ", TRAIN) for sign in row] for row in signs]
