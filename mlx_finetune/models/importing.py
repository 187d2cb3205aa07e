"""Whatever a person has (safetensors, .bin, GGUF) as an ordinary Hugging Face folder in safetensors, tokenizer included."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlx_finetune.errors import UserError
from mlx_finetune.files import copy_file, read_json
from mlx_finetune.models.config_checks import check_config
from mlx_finetune.models.gguf import gguf_to_hugging_face
from mlx_finetune.models.hub import TOKENIZERS, check_links, hub_revision, model_folder
from mlx_finetune.models.shards import shard_name, write_index
from mlx_finetune.models.weights import INDEX, fingerprint, tensor_headers, weight_files

Format = Literal["huggingface", "bin", "gguf"]
Progress = Callable[[int, int], None]

BINS = "pytorch_model*.bin"
SPIECE = "spiece.model"
# What is copied beside the weights: settings, tokenizer, template, licence. Never *.py, a stranger's code.
BESIDE = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "README*",
    "additional_chat_templates/*.jinja",
)
WRITTEN = (
    "config.json",
    INDEX,
    "pytorch_model.bin.index.json",
    "origin.json",
)  # those that a conversion writes itself, or outdates
SAMPLES, SAMPLE = 8, 4096  # of a file, for its fingerprint


@dataclass(frozen=True)
class Source:
    """What is to be converted. `name`: how `origin.json` calls it, an absolute path or a hub id; `revision`: its commit there."""

    format: Format
    path: Path  # a folder; of GGUF the file
    name: str
    revision: str | None = None

    def fingerprint(self) -> str:
        """16 hexadecimal digits: of safetensors `models.weights.fingerprint`, else `files_fingerprint`."""
        if self.format == "huggingface":
            return fingerprint(self.path)
        return files_fingerprint([self.path] if self.format == "gguf" else [self.path / "config.json", *_bins(self.path)])


def find_source(name: str) -> Source:
    """A folder, a .gguf file, or a hub id, which is downloaded.

    Raises:
        UserError: nothing of that name, or nothing in it that is read here.
    """
    local = Path(name).expanduser()
    if local.is_file() and local.suffix == ".gguf":
        return Source("gguf", local, str(local.resolve()))
    folder = model_folder(name, pickles=True)
    if not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        hint = f"give the file: {files[0]}" if files else "give the Hugging Face folder that holds config.json and the weights"
        raise UserError(f"{folder}: no config.json", hint=hint)
    check_links(folder)
    check_config(read_json(folder / "config.json"), f"{folder / 'config.json'}")
    _find_tokenizer(folder)
    kind: Format = "bin" if _bins(folder) and not any(folder.glob("*.safetensors")) else "huggingface"
    if kind == "huggingface":
        tensor_headers(folder)
    is_local = Path(name).expanduser().is_dir()
    return Source(kind, folder, str(folder.resolve()) if is_local else name, None if is_local else hub_revision(folder))


def as_hugging_face(source: Source, scratch: Path, progress: Progress) -> Path:
    """The source's own folder where plain mlx-lm reads it whole, else one made in `scratch`, an empty folder.

    Raises:
        UserError: files that are broken, cut, or of a kind that is not read.
    """
    if source.format == "gguf":
        gguf_to_hugging_face(source.path, scratch / "model")
        return scratch / "model"
    if source.format == "huggingface" and _is_plain(source.path) and not _needs_tokenizer(source.path):
        return source.path
    folder = scratch / "model"
    folder.mkdir()
    if source.format == "bin":
        from mlx_finetune.models.torch_bin import bin_to_safetensors

        bin_to_safetensors(source.path, folder, progress)
    else:
        _link_weights(source.path, folder)
    copy_beside(source.path, folder)
    copy_file(source.path / "config.json", folder / "config.json")
    if _needs_tokenizer(source.path):
        from mlx_finetune.models.spiece import spiece_to_tokenizer

        spiece_to_tokenizer(source.path / SPIECE, folder)
    return folder


def copy_beside(source: Path, folder: Path) -> None:
    """Tokenizer, template, generation config, licence and the like, byte for byte."""
    for path in beside(source):
        copy_file(path, folder / path.relative_to(source))


def beside(folder: Path) -> Iterator[Path]:
    """The files of a model folder that are neither weights nor code nor hidden, nor config.json, which is written anew."""
    found = {path for pattern in BESIDE for path in folder.glob(pattern)}
    for path in sorted(found):
        hidden = path.name.startswith(".") or path.name in WRITTEN or path.name.endswith(".index.json")
        if path.is_file() and not hidden:
            yield path


def files_fingerprint(files: Iterable[Path]) -> str:
    """16 hexadecimal digits: SHA-256 over name, size and eight samples of 4,096 bytes, evenly spread, of each file."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(SAMPLES):
                file.seek(i * max(0, size - SAMPLE) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


def _bins(folder: Path) -> list[Path]:
    return sorted(folder.glob(BINS))


def _find_tokenizer(folder: Path) -> None:
    if not any((folder / file).is_file() for file in (*TOKENIZERS, SPIECE)):
        raise UserError(
            f"{folder}: no tokenizer ({', '.join(TOKENIZERS)} or {SPIECE})", hint="copy the model's tokenizer files into the folder"
        )


def _needs_tokenizer(folder: Path) -> bool:
    """Whether there is only SentencePiece's own file, which transformers reads with the repository's code alone."""
    return (folder / SPIECE).is_file() and not any((folder / file).is_file() for file in TOKENIZERS)


def _is_plain(folder: Path) -> bool:
    """Whether mlx-lm, which merges every model*.safetensors and reads no index, finds what transformers finds."""
    return {path.name for path in weight_files(folder)} == {path.name for path in folder.glob("model*.safetensors")}


def _link_weights(model: Path, folder: Path) -> None:
    """The model's own files under the names that mlx-lm looks for."""
    files = weight_files(model)
    names = {file: shard_name(i, len(files)) for i, file in enumerate(files)}
    for file, name in names.items():
        (folder / name).symlink_to(file.resolve())
    if len(files) > 1:
        tensors = tensor_headers(model)
        where = {name: names[location.file] for name, location in tensors.items()}
        write_index(folder, where, sum(location.end - location.start for location in tensors.values()))
