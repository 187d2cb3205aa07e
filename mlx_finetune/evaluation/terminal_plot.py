"""The loss of a run as a plot of characters, for those who stay in the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_finetune.evaluation.plot import running_mean

if TYPE_CHECKING:
    from rich.text import Text

DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # of a braille sign (Unicode 2800): 4 high, 2 wide
TRAIN, HELD_OUT, FAINT = "cyan", "bold yellow", "dim"
Points = tuple[Sequence[float], Sequence[float]]


def plot_rows(
    train: Sequence[Mapping[str, Any]], valid: Sequence[Mapping[str, Any]], width: int, height: int, plain: bool = False
) -> "list[Text]":
    """Lines of text with colours: the running mean of training as a line of dots, held-out losses as signs; none without numbers.

    width, height: of the whole, in characters. plain: where only ASCII can be shown.
    """
    from rich.text import Text

    mean, held = _finite(train, running_mean(train)), _finite(valid, [row["loss"] for row in valid])
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
    lines.append(Text(" " * (margin + 1)).append(("+" if plain else "└") + ("-" if plain else "─") * columns, FAINT))
    first, last = f"{box[0]:g}", f"step {box[1]:g}"
    lines.append(Text(" " * (margin + 2) + first + last.rjust(columns - len(first))))
    key = [(f"{'..' if plain else '⠒⠒'} training, running mean", TRAIN)] if mean[0] else []
    key += [(f"{mark} held out", HELD_OUT)] if held[0] else []
    lines.append(Text("   ").join(Text(told, style) for told, style in key))
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
