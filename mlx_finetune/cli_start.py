"""The verbs `doctor` and `init` on the command line."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]


def doctor(
    model: Annotated[str, typer.Option("--model", help="Also this model: a folder, or a hub id that was downloaded before.")] = "",
    as_json: Json = False,
) -> None:
    """Look at this machine and at what is installed, and say what to do. Exit status 1: something will fail."""
    from mlx_finetune.planning.doctor.command import doctor_command

    doctor_command(model, as_json)


def init(
    file: Annotated[Path, typer.Argument(help="YAML file to make; must not exist.")] = Path("config.yaml"),
    yes: Annotated[bool, typer.Option("--yes", help="Take the defaults without asking.")] = False,
    model: Annotated[str, typer.Option("--model", help="A folder, or a hub id. Default: what fits this machine.")] = "",
    logs: Annotated[Path | None, typer.Option("--logs", help="Folder of gptme logs. Default: gptme's own.")] = None,
    chat: Annotated[list[str] | None, typer.Option("--chat", help="Chat file or folder too (repeatable).")] = None,
    openassistant: Annotated[
        list[str] | None, typer.Option("--openassistant", help="OpenAssistant too: hub id, folder or file (repeatable).")
    ] = None,
    to: Annotated[
        list[str] | None, typer.Option("--to", help="Hand back also as peft, mlx-lm, gguf or ollama (repeatable).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at this machine, ask a few questions, and write a commented config.yaml for mlx-finetune run. Downloads nothing."""
    options = dict(locals())
    from mlx_finetune.init_command import InitOptions, init_command

    init_command(InitOptions(**options))
