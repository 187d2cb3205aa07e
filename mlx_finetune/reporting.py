"""The verbs `report` and `plot`: a run as one page, as a picture, and as a plot in the terminal."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.overview import overview
from mlx_finetune.data.shown import ShownExample, runs_of
from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.plot import draw_loss
from mlx_finetune.evaluation.terminal_plot import plot_rows
from mlx_finetune.files import atomic_file, refuse_existing
from mlx_finetune.inspect_page import article
from mlx_finetune.inspecting import template_of
from mlx_finetune.report.figures import check_matplotlib
from mlx_finetune.report.files_of_run import METRICS, read_losses
from mlx_finetune.report.of_run import OfRun, of_run
from mlx_finetune.report.page import page
from mlx_finetune.terminal import Done, finish, say

PAGE = "report.html"
EXAMPLES = 3  # token by token
WIDTH, HEIGHT = 100, 20  # of a plot where no terminal says how wide it is


@dataclass(frozen=True)
class ReportOptions:
    """The options of the verb, as they stand on the command line."""

    run: Path
    out: Path | None = None
    as_json: bool = False


def report_command(options: ReportOptions) -> None:
    """`mlx-finetune report`: the run's own page is made anew; any other file is refused where it exists."""
    reported(options).finish(options.as_json)


def reported(options: ReportOptions) -> Done:
    """Writes the page."""
    check_matplotlib()
    out = options.out or options.run / PAGE
    if options.out and out.resolve() != (options.run / PAGE).resolve():
        refuse_existing(out)
    say(f"report of {options.run} -> {out}")
    found = write_report(options.run, out)
    result = {"page": str(out), "steps": found.done, "finished": found.finished, "evaluated": found.evaluation is not None}
    following = f"mlx-finetune {'serve' if found.evaluation else 'evaluate'} {found.typed}"
    return Done(result, lambda: None, out, following)


def write_report(run: Path, out: Path) -> OfRun:
    """Writes the page; what it was made of.

    Raises:
        UserError: it is no run, a file of it is damaged, or matplotlib is not installed.
    """
    check_matplotlib()
    found = of_run(run)
    articles, missing = learned_examples(found)
    with atomic_file(out, private=True) as file:
        file.writelines(page(found, articles, missing))
    return found


def learned_examples(found: OfRun) -> tuple[list[str], str]:
    """A few training examples as HTML, token by token; where there are none, why."""
    if found.dataset is None:
        return [], f"Not shown: {found.data_gone}."
    try:
        shown = _examples(found.dataset)
    except UserError as error:  # the model that it was prepared for is gone, or another one now
        return [], f"Not shown: {error.message}."
    return [article(each) for each in shown], ""


def _examples(dataset: Dataset) -> list[ShownExample]:
    template = template_of(dataset)
    examples = overview(dataset.folder / "train.arrow", template.special_ids)
    places = sorted(set(np.linspace(0, len(examples) - 1, min(EXAMPLES, len(examples))).astype(int).tolist()))
    return [ShownExample(i, dataset.train[i], examples.part(i), tuple(runs_of(dataset.train[i], template))) for i in places]


def plot_command(run: Path, as_json: bool) -> None:
    """`mlx-finetune plot`: also of a run that is still going."""
    train, valid = read_losses(run / METRICS)
    if not train and not valid:
        raise UserError(f"{run / METRICS}: no losses yet", hint="mlx-finetune train writes them")
    picture = draw_loss(run)
    if picture is None:
        say("loss.png was not drawn: pip install matplotlib")
    losses = {"loss": _last_loss(train), "held_out_loss": _last_loss(valid)}
    result = {"picture": str(picture) if picture else None, "step": train[-1]["step"] if train else 0, **losses}
    finish(result, as_json, lambda: _show_plot(train, valid), picture, "")


def _last_loss(rows: Sequence[dict[str, Any]]) -> float | None:
    """None where there is none, or it is not finite, which JSON knows nothing of."""
    return float(rows[-1]["loss"]) if rows and np.isfinite(rows[-1]["loss"]) else None


def _show_plot(train: list[dict[str, Any]], valid: list[dict[str, Any]]) -> None:
    from rich.console import Console

    width, height = shutil.get_terminal_size((WIDTH, HEIGHT)) if sys.stdout.isatty() else (WIDTH, HEIGHT)
    console = Console(width=width, markup=False, highlight=False, emoji=False)
    for line in plot_rows(train, valid, width, min(HEIGHT, height), plain=not console.encoding.startswith("utf")):
        console.print(line, no_wrap=True, overflow="crop")
