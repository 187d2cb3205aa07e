"""A checkpoint in the original Hugging Face weights: the folder is copied, and only the trained tensors change.

The model is never loaded. Each trained tensor is read in blocks of rows, what becomes of them is computed in float32,
rounded once to the stored dtype, and written over the copy's bytes; every other byte is the original's.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.export.changes import read_changes
from mlx_finetune.export.rows import Change, Rows
from mlx_finetune.files import atomic_folder, copy_file, read_json, write_json
from mlx_finetune.models.weights import ITEM_BYTES, from_float32, to_float32, weight_files

Progress = Callable[[int, int], None]

# Other copies of the weights, which would be stale beside the fused ones.
OTHER_WEIGHTS = (".safetensors", ".bin", ".bin.index.json", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
BLOCK = 1 << 21  # numbers computed at once: 8 MiB of float32


@dataclass(frozen=True)
class Fused:
    """What was written: how many tensors changed, the dtypes they are stored in, and the bytes of the whole folder."""

    tensors: int
    dtypes: tuple[str, ...]
    bytes: int


def fuse(model: Path, checkpoint: Path, out: Path, progress: Progress | None = None) -> Fused:
    """Writes the Hugging Face folder `out`: `model` with what `checkpoint` trained in its weights.

    The checkpoint holds a PEFT adapter (LoRA, rsLoRA, DoRA; of embeddings and the head too), or trained weights.
    `progress(done, total)` counts bytes written. Memory: a few blocks of 8 MiB and one A and B.

    Raises:
        UserError: `out` exists; a broken file; a checkpoint that does not fit the model, or that cannot be fused yet.
    """
    with atomic_folder(out) as folder:
        return fuse_into(model, checkpoint, folder, progress)


def fuse_into(
    model: Path, checkpoint: Path, folder: Path, progress: Progress | None = None, changes: Mapping[str, Change] | None = None
) -> Fused:
    """As `fuse`, into an empty folder that the caller makes and gives its name to. `changes`: others than `read_changes` says."""
    changes = read_changes(model, checkpoint) if changes is None else changes
    files = list(_files_to_copy(model))
    copied = sum(source.stat().st_size for source in files)
    total = copied + sum(change.location.end - change.location.start for change in changes.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for source in files:
        copy_file(source, folder / source.relative_to(model))
        advance(source.stat().st_size)
    changed = 0
    for name, change in changes.items():
        changed += _patch(folder / change.location.file.name, change, name)
        advance(change.location.end - change.location.start)
    dtypes = tuple(sorted({change.location.dtype for change in changes.values()}))
    if changed == 0:
        raise UserError(f"{checkpoint}: it changes no weight at the precision of {', '.join(dtypes)}", hint="train longer")
    return Fused(changed, dtypes, copied)


def write_template(folder: Path, template: str) -> None:
    """Makes `template` the chat template of a model folder, where it is not that already: any server serves what was trained."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = read_json(config) if config.is_file() else {}
    own = file.read_bytes().decode() if file.is_file() else settings.get("chat_template") if isinstance(settings, dict) else None
    if own == template:
        return
    file.write_bytes(template.encode())
    if isinstance(settings, dict) and settings.pop("chat_template", None) is not None:
        write_json(config, settings)


def _files_to_copy(model: Path) -> Iterator[Path]:
    """The model's own safetensors, and every file beside them that is neither hidden nor weights in another form."""
    yield from weight_files(model)
    for path in sorted([*model.iterdir(), *model.glob("additional_chat_templates/*")]):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(OTHER_WEIGHTS):
            yield path


def _patch(copy: Path, change: Change, name: str) -> bool:
    """Writes what becomes of the tensor over the copy, and says whether any number is not what it was."""
    location, rows = change.location, change.open_rows()
    count = location.shape[0] if location.shape else 1
    width = math.prod(location.shape[1:])
    step = max(1, BLOCK // max(1, width))
    changed = False
    with copy.open("r+b") as file:
        for first in range(0, count, step):
            file.seek(location.start + first * width * ITEM_BYTES[location.dtype])
            changed |= _write(file, rows, first, (min(step, count - first), width), location.dtype, name)
    return changed


def _write(file: IO[bytes], rows: Rows, first: int, shape: tuple[int, int], dtype: str, name: str) -> bool:
    """Where the file stands: `shape` rows from the row `first` on."""
    start = file.tell()
    before = file.read(math.prod(shape) * ITEM_BYTES[dtype])
    after = from_float32(rows(first, to_float32(before, dtype).reshape(shape)), dtype)
    if not np.isfinite(to_float32(after, dtype)).all():
        raise UserError(f"{name}: the sum has numbers that {dtype} cannot hold", hint="take an earlier checkpoint")
    file.seek(start)
    file.write(after)
    return before != after
