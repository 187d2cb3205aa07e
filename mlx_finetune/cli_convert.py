"""The verb `convert` on the command line."""

from pathlib import Path
from typing import Annotated

import typer

PACK, CHECK = "Quantisation", "Comparison"


def convert(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder (safetensors or .bin), a .gguf file, or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to make; must not exist.")],
    bits: Annotated[
        int | None, typer.Option(help="2, 3, 4, 5, 6 or 8. Default: not quantised.", rich_help_panel=PACK, show_default=False)
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="32, 64 or 128 weights share a scale. Default: 64.", rich_help_panel=PACK, show_default=False)
    ] = None,
    mode: Annotated[str, typer.Option(help="affine, mxfp4, nvfp4 or mxfp8.", rich_help_panel=PACK)] = "",
    recipe: Annotated[
        str, typer.Option(help="mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6: two kinds of bits.", rich_help_panel=PACK)
    ] = "",
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16 or float16; with --bits of scales and what is not quantised. Default: as stored."),
    ] = "",
    shard_size: Annotated[
        str, typer.Option(help="Most bytes of a file; not quantised they stay as they are. Default: 5GB.", rich_help_panel=PACK)
    ] = "",
    verify: Annotated[
        bool | None,
        typer.Option(help="Compare with the original. Default: where memory suffices.", rich_help_panel=CHECK, show_default=False),
    ] = None,
    probe: Annotated[Path | None, typer.Option(help="Compare with the logits in this file.", rich_help_panel=CHECK)] = None,
    write_probe: Annotated[
        Path | None, typer.Option(help="Write the original's logits to this file, for --probe elsewhere.", rich_help_panel=CHECK)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
) -> None:
    """Any Hugging Face checkpoint as a folder that MLX computes with exactly: quantised or not, compared before it appears."""
    options = dict(locals())
    from mlx_finetune.converting import ConvertOptions, convert_command

    convert_command(ConvertOptions(**options))
