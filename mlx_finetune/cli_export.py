"""The verbs `export` and `push` on the command line."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]


def export(
    run: Annotated[Path, typer.Argument(help="Folder that train made; for gguf and ollama also a model folder that fuse made.")],
    to: Annotated[str, typer.Option("--to", help="peft or mlx-lm (one folder for both), gguf, ollama.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to make; must not exist.")],
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="best, latest, or a name such as step-000100. Default: best.")
    ] = "",
    quantisation: Annotated[
        str, typer.Option("--quantisation", help="gguf, ollama: f16, bf16, q8_0, q4_k_m and others. Default: q8_0.")
    ] = "",
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="gguf: only the adapter, for llama.cpp's --lora beside a GGUF of the base.")
    ] = False,
    base: Annotated[
        str, typer.Option("--base", help="Id of the base on the Hub, such as org/name, where it was given as a folder.")
    ] = "",
    original: Annotated[
        str, typer.Option("--original", help="The unquantised weights, where a quantised model does not name them.")
    ] = "",
    quantised_base: Annotated[
        bool, typer.Option("--quantised-base", help="gguf, ollama: with the quantised weights that were trained on, unpacked.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Hand the adapter, or the fused model, to another tool in its own format, proven before it appears."""
    options = dict(locals())
    from mlx_finetune.exporting import ExportOptions, export_command

    export_command(ExportOptions(**options))


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that fuse or export made.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: owner/name. Made where there is none.")],
    public: Annotated[bool, typer.Option("--public", help="For all to see. Without it: private.")] = False,
    allow: Annotated[
        list[str] | None, typer.Option(help="Upload this text although it looks private, or re:PATTERN (repeatable).")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be uploaded.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a model or an adapter to the Hugging Face Hub: private, and nothing that says who you are."""
    options = dict(locals())
    from mlx_finetune.exporting import PushOptions, push_command

    push_command(PushOptions(**options))
