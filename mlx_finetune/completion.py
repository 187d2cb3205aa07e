"""What a shell completes after an option: its choices, checkpoints of the run that was named, settings after --set.

Typer asks for it only where a parameter has a function for that, and only a completing shell needs them: they are added then.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from typer.models import ParameterInfo

from mlx_finetune.config import FIELDS, RunConfig
from mlx_finetune.road import SECTIONS, Collect, HandBack

Completer = Callable[[typer.Context, str], list[str]]


def add_completions(app: typer.Typer) -> None:
    """Gives each parameter that has choices the function that lists them."""
    for command in app.registered_commands:
        assert command.callback
        verb = command.name or command.callback.__name__
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            completer = COMPLETERS.get(f"{verb} {name}") or COMPLETERS.get(name)
            for info in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
                if completer and isinstance(info, ParameterInfo):
                    info.autocompletion = completer


def choices_of(kind: type[BaseModel], name: str) -> tuple[str, ...]:
    """The values that a setting takes, where they are a list."""
    return tuple(_literals(kind.model_fields[name].annotation))


def _literals(annotation: Any) -> Iterable[str]:
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    else:
        for part in get_args(annotation):
            if not isinstance(part, str):
                yield from _literals(part)


def one_of(values: Iterable[str]) -> Completer:
    """Always the same ones."""
    known = tuple(values)

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        return [value for value in known if value.startswith(incomplete)]

    return complete


def checkpoints(ctx: typer.Context, incomplete: str) -> list[str]:
    """Of the run named before on the line."""
    words = [str(ctx.params.get("run") or ""), *ctx.args]  # a line that is not whole yet leaves the run among the latter
    saved = sorted(path.name for word in words for path in (Path(word) / "checkpoints").glob("step-*"))
    return [name for name in ("best", "latest", *saved) if name.startswith(incomplete)]


def settings(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names with their equals sign, and behind it the values that the setting takes."""
    name, equals, _ = incomplete.partition("=")
    homes = _homes(ctx.info_name == "run")
    if not equals:
        return [f"{key}=" for key in homes if key.startswith(incomplete)]
    values = choices_of(homes[name], name.rpartition(".")[2]) if name in homes else ()
    return [text for value in values if (text := f"{name}={value}").startswith(incomplete)]


def _homes(of_road: bool) -> dict[str, type[BaseModel]]:
    """Each setting and the class that holds it; those of sections only for `run`."""
    homes: dict[str, type[BaseModel]] = dict.fromkeys(FIELDS, RunConfig)
    if of_road:
        homes |= {f"{section}.{name}": kind for section, (kind, _) in SECTIONS.items() for name in kind.model_fields}
    return homes


def kinds(ctx: typer.Context, incomplete: str) -> list[str]:
    """Of a GGUF."""
    from mlx_finetune.export.gguf_kinds import KINDS

    return [kind for kind in KINDS if kind.startswith(incomplete)]


def chips(ctx: typer.Context, incomplete: str) -> list[str]:
    """Apple's."""
    from mlx_finetune.planning.machine import CHIPS

    return [chip.name for chip in CHIPS if chip.name.lower().startswith(incomplete.lower())]


COMPLETERS: Mapping[str, Completer] = {
    "engine": one_of(choices_of(RunConfig, "engine")),
    "report_to": one_of(choices_of(RunConfig, "report_to")),
    "validation_by": one_of(choices_of(RunConfig, "validation_by")),
    "system": one_of(choices_of(Collect, "system")),
    "tool_calls": one_of(choices_of(Collect, "tool_calls")),
    "formats": one_of(choices_of(Collect, "format")),
    "tool_format": one_of(choices_of(Collect, "format")),
    "relevant": one_of(choices_of(Collect, "relevant")),
    "to": one_of(choices_of(HandBack, "export")),
    "split": one_of(("train", "valid", "test")),
    "sandbox": one_of(("auto", "bwrap", "sandbox-exec", "none")),
    "run until": one_of(("collect", "prepare", "train", "evaluate", "report", "fuse", "export")),
    "chat system": one_of(()),  # a text, and no choice as of collect
    "checkpoint": checkpoints,
    "assignments": settings,
    "quantisation": kinds,
    "chip": chips,
}
