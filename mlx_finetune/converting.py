"""What `convert` does, from its options to the lines that a person reads."""

import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path

from mlx_finetune.errors import UserError
from mlx_finetune.export.convert import Converted, How, convert
from mlx_finetune.files import refuse_existing
from mlx_finetune.models.importing import find_source
from mlx_finetune.models.quantisation import quantisation_of
from mlx_finetune.models.rewriting import DTYPES
from mlx_finetune.terminal import finish, progress, say

MEANING = {
    "original_in_mlx": "the original weights in MLX",
    "made_in_mlx": "the new folder in MLX",
    "made_in_transformers": "the new folder in transformers",
    "packed": "packed weights against the same unpacked",
}
SHARD_SIZE = "5GB"
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", re.IGNORECASE)
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True)
class ConvertOptions:
    """The options of the command line, as they were given."""

    model: str
    out: Path
    bits: int | None
    group_size: int | None
    mode: str
    recipe: str
    dtype: str
    shard_size: str
    verify: bool | None
    probe: Path | None
    write_probe: Path | None
    as_json: bool


def convert_command(options: ConvertOptions) -> None:
    """`mlx-finetune convert`."""
    how = how_of(options)
    refuse_existing(options.out)
    source = find_source(options.model)
    said = [str(how.quantisation)] if how.quantisation else ["not quantised"]
    say(f"converting {source.path} ({source.format}), {', '.join([*said, *filter(None, [how.dtype])])}, into {options.out}")
    with progress("convert") as advance:
        made = convert(source, options.out, how, advance)
    if made.left_alone:
        width = f"groups of {how.quantisation.group_size if how.quantisation else '?'} do not divide their width"
        say(f"{len(made.left_alone)} layers are stored as they were, such as {made.left_alone[0]}: {width}")
    if made.unverified:
        what = "only the weights and their packing were compared" if made.verified else "nothing was compared"
        say(f"{what}: {made.unverified}")
    if made.verified and not made.verified.read_by_mlx_lm:
        say("mlx_lm.load alone does not compute the same from this folder: use it with mlx-finetune, which mends what differs")
    result = asdict(made) | {"out": str(options.out)}
    following = f"mlx-finetune prepare collected --model {options.out}"
    finish(result, options.as_json, lambda: show(made), options.out, following)


def how_of(options: ConvertOptions) -> How:
    """Raises UserError for an option that is not known, or that does not go with another."""
    if options.dtype and options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype}: not one of {', '.join(DTYPES)}", hint="leave it out to keep what is stored")
    for name, path in (("--probe", options.probe), ("--write-probe", options.write_probe)):
        if path and options.verify is False:
            raise UserError(f"{name} and --no-verify do not go together", hint="leave one out")
    if options.probe and not options.probe.is_file():
        raise UserError(f"--probe {options.probe}: no such file", hint="a file that convert --write-probe wrote")
    if options.write_probe and not options.write_probe.absolute().parent.is_dir():
        raise UserError(f"--write-probe {options.write_probe}: no such folder", hint="make the folder, or choose another")
    if options.probe and options.write_probe:
        raise UserError("--probe and --write-probe do not go together", hint="leave one out")
    quantisation = quantisation_of(options.bits, options.group_size, options.mode, options.recipe)
    if options.shard_size and not quantisation:
        raise UserError(f"--shard-size {options.shard_size} without --bits", hint="leave it out: files stay as they are cut")
    return How(
        quantisation=quantisation,
        dtype=options.dtype or None,
        shard_size=size_of(options.shard_size or SHARD_SIZE),
        verify=options.verify,
        probe=options.probe,
        write_probe=options.write_probe,
    )


def size_of(text: str) -> int:
    """5GB, 500MB or bytes, in powers of ten as transformers counts."""
    match = SIZE.fullmatch(text.strip())
    size = int(Decimal(match[1]) * UNITS[match[2].lower()]) if match else 0
    if size <= 0:
        raise UserError(f"--shard-size {text}: not a size", hint="such as 5GB or 500MB")
    return size


def show(made: Converted) -> None:
    """What was made, what it cost, and what was compared."""
    before, after = made.bytes_before / 1e9, made.bytes_after / 1e9
    print(f"{before:.3f} GB before, {after:.3f} GB after: {made.bits_per_weight:.2f} bits per weight")
    if not made.verified:
        return
    verified = made.verified
    if verified.weights is not None:
        print(f"stored weights: at most {verified.weights:.2f} of what quantisation may take from the original's (allowed 1)")
    for name, value in verified.differences.items():
        print(f"{MEANING[name]}: largest difference {value:.1e} of the largest logit (allowed {verified.tolerance:.0e})")
    if verified.relative_error is not None:
        what = "quantised" if made.quantization else "as stored"
        error = f"largest difference {verified.relative_error:.2%} of the largest logit, KL {verified.kl:.2g} nats"
        print(f"{what} against the original ({verified.reference}, {verified.positions} positions): {error}")
