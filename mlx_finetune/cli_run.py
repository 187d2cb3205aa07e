"""The verb `run` on the command line."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    config: Annotated[Path, typer.Argument(help="YAML file of settings, as `mlx-finetune init` writes it.")],
    assignments: Annotated[list[str] | None, typer.Option("--set", help="key=value, or collect.system=short (repeatable).")] = None,
    until: Annotated[str, typer.Option(help="Last stage: collect, prepare, train, evaluate, report, fuse or export.")] = "",
    newest: Annotated[
        bool, typer.Option("--newest", help="Take up new conversations even before what was begun with the older ones is done.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and why.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
) -> None:
    """All of it: collect, prepare, train, evaluate, report, fuse, export; only what has changed, and on from where it stopped."""
    from mlx_finetune.running.command import RoadOptions, run_command

    run_command(RoadOptions(config, assignments or (), until, newest, dry_run, as_json))
