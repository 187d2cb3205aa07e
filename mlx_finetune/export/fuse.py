"""A checkpoint in the original Hugging Face weights: the folder is copied, and only the trained tensors change.

The model is never loaded. Each trained tensor is read in blocks of rows, what becomes of them is computed in float32,
rounded once to the stored dtype, and written over the copy's bytes; every other byte is the original's.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_finetune.errors import UserError
from mlx_finetune.export.changes import read_changes
from mlx_finetune.export.rows import Change
from mlx_finetune.export.writing import write_file
from mlx_finetune.files import atomic_folder, read_json, write_json
from mlx_finetune.models.origin import FILE as ORIGIN
from mlx_finetune.models.weights import weight_files

Progress = Callable[[int, int], None]

# Other copies of the weights, which would be stale beside the fused ones.
OTHER_WEIGHTS = (".safetensors", ".bin", ".bin.index.json", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class Fused:
    """What was written: how many tensors changed, the dtypes they are stored in, and the bytes of the whole folder."""

    tensors: int
    dtypes: tuple[str, ...]
    bytes: int


def fuse(model: Path, checkpoint: Path, out: Path, progress: Progress | None = None) -> Fused:
    """Writes the Hugging Face folder `out`: `model` with what `checkpoint` trained in its weights.

    The checkpoint holds a PEFT adapter (LoRA, rsLoRA, DoRA; of embeddings and the head too), or trained weights.
    `progress(done, copied)` counts bytes written. Memory: a few blocks of 8 MiB and one A and B.

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
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, copied)

    of_file: dict[str, list[tuple[str, Change]]] = {}
    for name, change in changes.items():
        of_file.setdefault(change.location.file.name, []).append((name, change))
    changed = 0
    for source in files:
        changed += write_file(source, folder / source.relative_to(model), of_file.get(source.name, []), advance)
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
        is_told = path.name.startswith(".") or path.name == ORIGIN  # of this machine
        if path.is_file() and not is_told and not path.name.endswith(OTHER_WEIGHTS):
            yield path
