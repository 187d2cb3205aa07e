"""origin.json of a converted folder: which weights it was made from, how, and what the comparison with them found."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json, write_json
from mlx_finetune.models.hub import model_folder
from mlx_finetune.models.weights import fingerprint
from mlx_finetune.reading import can_be_a_place

FILE = "origin.json"
AGAIN = "convert it again"


@dataclass(frozen=True)
class Origin:
    """`model`: an absolute path, or with `revision` a hub id; `fingerprint`: of what lay there (see models/importing.py).

    quantization: as config.json of mlx-lm has it, None where the weights are as they were or only rounded to `dtype`.
    """

    format: str  # huggingface, bin or gguf
    model: str
    revision: str | None
    fingerprint: str
    quantization: Mapping[str, Any] | None
    dtype: str | None
    versions: Mapping[str, str] = field(default_factory=dict)
    verified: Mapping[str, Any] | None = None


def write_origin(folder: Path, origin: Origin) -> None:
    """Puts origin.json into a converted folder."""
    write_json(folder / FILE, asdict(origin))


def read_origin(folder: Path) -> Origin | None:
    """None where the folder was not made by `convert`; raises UserError where origin.json is damaged."""
    if not (folder / FILE).exists():
        return None
    found = read_json(folder / FILE)
    needed = {name.name for name in fields(Origin)}
    if not isinstance(found, dict) or found.keys() != needed or not all(isinstance(found[n], str) for n in ("format", "model")):
        raise UserError(f"{folder / FILE}: not what convert writes", hint=AGAIN)
    if not can_be_a_place(found["model"]):
        raise UserError(f"{folder / FILE}: model is no place that a file system can have", hint=AGAIN)
    return Origin(**found)


def original_folder(folder: Path) -> Path:
    """Where the weights are that `folder` was made from, unchanged since; `folder` itself where it holds all of them.

    A model of .bin or GGUF that was not quantised holds them in the only form in which they can be added to.

    Raises:
        UserError: they were moved, changed or never were safetensors.
    """
    origin = read_origin(folder)
    if origin is None or (origin.format != "huggingface" and origin.quantization is None):
        return folder
    if origin.format != "huggingface":
        hint = f"mlx-finetune convert {origin.model} --out DIR (without --bits), then --original DIR"
        raise UserError(f"{folder}: made from {origin.model}, which holds no safetensors", hint=hint)
    hint = f"--original PATH, the folder that {folder} was made from"
    if origin.revision is None and not Path(origin.model).is_dir():
        raise UserError(f"{folder}: made from {origin.model}, which is no longer there", hint=hint)
    original = model_folder(origin.model, origin.revision)
    if fingerprint(original) != origin.fingerprint:
        raise UserError(f"{folder}: made from {origin.model}, which has changed since", hint=hint)
    return original
