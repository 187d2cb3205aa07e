"""The verb `collect` on the command line: its options, in groups."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_finetune.road import Collect

READ, CHOOSE, LEARN, PRIVATE, TREES = "What to read", "What to choose", "What to learn", "Privacy", "OpenAssistant"

default = Collect.default


def collect(
    logs: Annotated[Path | None, typer.Argument(help="Folder of gptme logs. Default: gptme's own.")] = None,
    openassistant: Annotated[
        list[str] | None,
        typer.Option(help="OpenAssistant: hub id, folder or file of any layout (repeatable).", rich_help_panel=READ),
    ] = None,
    chat: Annotated[
        list[str] | None,
        typer.Option(
            help="Chat file, folder or hub id: OpenAI, ShareGPT, Alpaca, prompt/completion (repeatable).", rich_help_panel=READ
        ),
    ] = None,
    gptme: Annotated[bool, typer.Option(help="Read gptme logs at all.", rich_help_panel=READ)] = True,
    out: Annotated[Path, typer.Option(help="Folder to make; must not exist.")] = Path("collected"),
    update: Annotated[
        bool, typer.Option("--update", help="Add what is new to the collection in --out; with other options, make it anew.")
    ] = False,
    since: Annotated[str, typer.Option(help="Only conversations since then: 2026-06-01, or 30d.", rich_help_panel=CHOOSE)] = "",
    until: Annotated[str, typer.Option(help="Only conversations before the end of that day.", rich_help_panel=CHOOSE)] = "",
    tool: Annotated[
        list[str] | None, typer.Option(help="Only where this tool is called (repeatable).", rich_help_panel=CHOOSE)
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="Only this tool format: markdown, tool or xml (repeatable).", rich_help_panel=CHOOSE),
    ] = None,
    from_model: Annotated[
        list[str] | None, typer.Option(help="Only what this model wrote: a part of its name (repeatable).", rich_help_panel=CHOOSE)
    ] = None,
    title: Annotated[
        list[str] | None,
        typer.Option(help="Only these titles or names: a part, or a pattern (repeatable).", rich_help_panel=CHOOSE),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Not this name, id or pattern of them (repeatable).", rich_help_panel=CHOOSE)
    ] = None,
    tags: Annotated[
        Path | None,
        typer.Option(help="YAML file of NAME: keep, drop or a weight; collect writes one to edit.", rich_help_panel=CHOOSE),
    ] = None,
    near_duplicates: Annotated[
        float | None,
        typer.Option(
            help="Drop what is at least so similar (Jaccard, 5-grams of words); 0 keeps all, together in one split. Default: 0.7.",
            rich_help_panel=CHOOSE,
        ),
    ] = None,
    near_duplicate_search: Annotated[
        bool,
        typer.Option(
            help="Without it: faster, but near-duplicates may stand in training and validation both.", rich_help_panel=CHOOSE
        ),
    ] = True,
    system: Annotated[
        str, typer.Option(help="gptme's system prompt: keep, short (as gptme --system short), none.", rich_help_panel=LEARN)
    ] = default("system"),
    tool_calls: Annotated[
        str, typer.Option(help="Calls of gptme's tool format: text as in the log, or native tool_calls.", rich_help_panel=LEARN)
    ] = default("tool_calls"),
    modernise: Annotated[
        bool,
        typer.Option("--modernise", help="Rewrite old conventions (```bash) to today's, and learn them.", rich_help_panel=LEARN),
    ] = False,
    recovery_weight: Annotated[
        float, typer.Option(help="Weight of the first success after a failure.", rich_help_panel=LEARN)
    ] = default("recovery_weight"),
    relevant: Annotated[
        str, typer.Option(help="code (programming, shell, developer tools) or any.", rich_help_panel=TREES)
    ] = default("relevant"),
    language: Annotated[
        list[str] | None, typer.Option(help="Language of every message; any: all of them. Default: en.", rich_help_panel=TREES)
    ] = None,
    min_quality: Annotated[
        float, typer.Option(help="Least quality of an answer, 0 to 1, as rated.", rich_help_panel=TREES)
    ] = default("min_quality"),
    filters: Annotated[
        bool,
        typer.Option(
            "--openassistant-filters/--no-openassistant-filters", help="Labels and other assistants' names.", rich_help_panel=TREES
        ),
    ] = True,
    redact: Annotated[bool, typer.Option(help="Replace secrets by placeholders.", rich_help_panel=PRIVATE)] = True,
    personal: Annotated[
        bool, typer.Option(help="Replace your home folder and user name by /home/user and user.", rich_help_panel=PRIVATE)
    ] = True,
    home: Annotated[
        list[str] | None, typer.Option(help="Another home folder of yours in the logs (repeatable).", rich_help_panel=PRIVATE)
    ] = None,
    emails: Annotated[bool, typer.Option("--emails", help="Replace e-mail addresses too.", rich_help_panel=PRIVATE)] = False,
    allow: Annotated[
        list[str] | None, typer.Option(help="Never redact this text, or re:PATTERN (repeatable).", rich_help_panel=PRIVATE)
    ] = None,
    scan_only: Annotated[
        bool, typer.Option("--scan-only", help="Only say where secrets stand: kind, file and line.", rich_help_panel=PRIVATE)
    ] = False,
    model: Annotated[
        str, typer.Option(help="Also write train.csv and train.jsonl, rendered with this model's chat template.")
    ] = "",
    show: Annotated[bool, typer.Option("--show", help="Also show five conversations kept and five rejected.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
) -> None:
    """Read gptme logs, OpenAssistant trees and chat files into conversations, clean and private."""
    options = dict(locals())
    from mlx_finetune.collecting import CollectOptions, collect_command

    collect_command(CollectOptions(**options))
