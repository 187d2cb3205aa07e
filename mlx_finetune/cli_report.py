"""The verbs `report` and `plot` on the command line."""

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(help="Folder that train made.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]


def report(
    run: Run,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write, which must not exist. Default: RUN/report.html, made anew.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Everything about a run on one page that needs no network: result, curves, samples, data, settings, how to serve it."""
    options = dict(locals())
    from mlx_finetune.reporting import ReportOptions, report_command

    report_command(ReportOptions(**options))


def plot(run: Run, as_json: Json = False) -> None:
    """Plot the loss of a run, also of one that is still going: here in the terminal, and into loss.png."""
    from mlx_finetune.reporting import plot_command

    plot_command(run, as_json)
