"""A Hugging Face folder as one GGUF file, which llama.cpp, Ollama and LM Studio run.

The model is never loaded: each tensor is read in blocks of rows, turned to llama.cpp's order, and written. Names, order of
rows, metadata and tokenizer are those of llama.cpp's own converter (benchmarks/results/gguf.md compares them).
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.export.gguf_kinds import Storage, check_kind, file_type, storage, type_of
from mlx_finetune.export.gguf_metadata import INSTALL, head_size, read_config, rope_divisors, write_card, write_sizes
from mlx_finetune.export.gguf_tokenizer import write_tokenizer
from mlx_finetune.files import half_made, refuse_existing
from mlx_finetune.models.gguf_names import Naming, gguf_name
from mlx_finetune.models.weights import ITEM_BYTES, TensorLocation, tensor_headers, to_float32

Progress = Callable[[int, int], None]
Config = Mapping[str, Any]

BLOCK = 1 << 21  # numbers computed at once: 8 MiB of float32
ALIGNMENT = 32  # bytes; the format's default
ROPE_TENSOR = "rope_freqs.weight"


@dataclass(frozen=True)
class GGUFSummary:
    """What was written: llama.cpp's architecture, the kind, tensors, bytes of the file, and the pre-tokenizer's name."""

    architecture: str
    kind: str
    tensors: int
    bytes: int
    pre_tokenizer: str


@dataclass(frozen=True)
class Tensor:
    """One of the file: where its numbers lie (or the numbers), how they are stored, and in what order its rows are written.

    heads: of a matrix whose rows of each head are interleaved; 0: the rows stay. plus: added to every number.
    """

    source: TensorLocation | np.ndarray
    storage: Storage
    heads: int = 0
    plus: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.storage.row_bytes(self.shape[-1])


def write_gguf(model: Path, out: Path, kind: str, progress: Progress | None = None) -> GGUFSummary:
    """Writes the file `out`; `kind` is one of gguf_kinds.KINDS. `progress(done, total)` counts bytes written.

    Memory: a few blocks of 8 MiB and the tokenizer.

    Raises:
        UserError: `out` exists; a broken file; an architecture, tokenizer or number that GGUF or llama.cpp does not take.
    """
    refuse_existing(out)
    need_gguf()
    check_kind(kind)
    config, naming = read_config(model)
    tensors = _tensors(model, config, naming, kind)
    with new_file(out) as path:
        from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter

        writer = GGUFWriter(path, naming.name)
        writer.add_type(GGUFType.MODEL)
        announce(writer, tensors)
        pre, like_phi3 = write_tokenizer(writer, model, config["vocab_size"])
        write_card(writer, model, like_phi3)
        write_sizes(writer, config, naming)
        writer.add_file_type(file_type(kind))
        writer.add_quantization_version(GGML_QUANT_VERSION)
        finish(writer, path, tensors, progress)
        size = path.stat().st_size
    return GGUFSummary(naming.name, kind, len(tensors), size, pre)


def need_gguf() -> None:
    """Raises UserError where the `gguf` package is not installed."""
    if find_spec("gguf") is None:
        raise UserError("GGUF files are written with the package gguf, which is not installed", hint=INSTALL)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A place for a file that takes the name `path` only when the block ends without an error; nothing is overwritten."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=half_made(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}", hint="choose another place") from error
    with folder as name:
        temporary = Path(name) / path.name
        yield temporary
        refuse_existing(path)
        temporary.replace(path)


def announce(writer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Tells gguf's `writer` what will follow."""
    from gguf import GGMLQuantizationType

    for name, tensor in tensors.items():
        kept = tensor.storage
        if kept.name in ("F32", "F16"):
            writer.add_tensor_info(name, tensor.shape, np.dtype(kept.name.replace("F", "float")), tensor.bytes)
        else:
            bytes_shape = [*tensor.shape[:-1], kept.row_bytes(tensor.shape[-1])]
            writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), tensor.bytes, GGMLQuantizationType[kept.name])


def finish(writer: Any, path: Path, tensors: Mapping[str, Tensor], progress: Progress | None = None) -> None:
    """Writes the header and, behind it, each tensor in blocks of rows."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    done, total = 0, sum(tensor.bytes for tensor in tensors.values())
    with path.open("ab") as file:
        for name, tensor in tensors.items():
            _pad(file)
            for block in _blocks(name, tensor):
                done += file.write(block)
                if progress is not None:
                    progress(done, total)
        _pad(file)
        file.flush()
        os.fsync(file.fileno())


def _pad(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _tensors(model: Path, config: Config, naming: Naming, kind: str) -> dict[str, Tensor]:
    """The tensors of the file by llama.cpp's names, in the order of the model's files."""
    headers = tensor_headers(model)
    tied = bool(config.get("tie_word_embeddings"))
    found: dict[str, Tensor] = {}
    if (divisors := rope_divisors(config)) is not None:
        found[ROPE_TENSOR] = Tensor(divisors, storage("F32"))
    heads = heads_of(config, naming)
    for name, location in headers.items():
        if name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        named = gguf_name(naming, name)
        if named is None or location.dtype not in ITEM_BYTES or not location.shape:
            what = f"tensor {name} ({location.dtype})"
            raise UserError(f"{model}: {what} has no place in llama.cpp's {naming.name}", hint="fuse into the original model first")
        stored = storage(type_of(kind, named[0], location.shape, config["num_hidden_layers"], tied))
        plus = 1.0 if naming.norms_plus_one and "_norm." in named[0] else 0.0
        found[named[0]] = Tensor(location, stored, heads.get(named[1], 0), plus)
    _check_whole(model, config, naming, found, tied)
    return found


def heads_of(config: Config, naming: Naming) -> dict[str, int]:
    """The matrices whose rows change places, with their heads."""
    queries = config["num_attention_heads"]
    return {"attn_q": queries, "attn_k": config.get("num_key_value_heads") or queries} if naming.rotates_pairs else {}


def _check_whole(model: Path, config: Config, naming: Naming, found: Mapping[str, Tensor], tied: bool) -> None:
    """Raises UserError where a tensor is missing that llama.cpp would ask for, or has another shape than config.json says."""
    inside = [f"blk.{layer}.{part}.weight" for layer in range(config["num_hidden_layers"]) for part in naming.inside]
    for name in ["token_embd.weight", "output_norm.weight", *([] if tied else ["output.weight"]), *inside]:
        if name not in found:
            raise UserError(f"{model}: no tensor for llama.cpp's {name}", hint="the model is not whole: download it again")
    kv = config.get("num_key_value_heads") or config["num_attention_heads"]
    hidden, size = config["hidden_size"], head_size(config)
    shapes = {
        "token_embd": (config["vocab_size"], hidden),
        "attn_q": (config["num_attention_heads"] * size, hidden),
        "attn_k": (kv * size, hidden),
        "ffn_down": (hidden, config["intermediate_size"]),
    }
    for name, tensor in found.items():
        part = name.split(".")[-2]
        if name.endswith(".weight") and tensor.shape != shapes.get(part, tensor.shape):
            raise UserError(
                f"{model}: {name} is {list(tensor.shape)}, config.json says {list(shapes[part])}", hint="use its own config"
            )


def _blocks(name: str, tensor: Tensor) -> Iterator[bytes]:
    """The stored bytes, a few megabytes at a time; rows of a head stay together, for they change places."""
    count, width = (tensor.shape[0], math.prod(tensor.shape[1:])) if len(tensor.shape) > 1 or tensor.heads else (1, tensor.shape[0])
    together = count // tensor.heads if tensor.heads else 1
    step = max(1, BLOCK // max(1, width * together)) * together
    for first in range(0, count, step):
        rows = _read(tensor.source, first, min(step, count - first), width)
        if not np.isfinite(rows).all():
            raise UserError(f"{name} has numbers that are not finite", hint="take an earlier checkpoint")
        if np.abs(rows).max(initial=0.0) > tensor.storage.largest:
            raise UserError(f"{name} has numbers that {tensor.storage.name} cannot hold", hint="take bf16 or f32")
        rows = interleaved(rows, together) if tensor.heads else rows
        rows = rows + np.float32(tensor.plus) if tensor.plus else rows
        yield tensor.storage.encode(rows.reshape(1, -1) if len(tensor.shape) == 1 else rows)


def _read(source: TensorLocation | np.ndarray, first: int, count: int, width: int) -> np.ndarray:
    """float32 [count, width]: rows from `first` on."""
    if isinstance(source, np.ndarray):
        return source.reshape(-1, width)[first : first + count]
    item = ITEM_BYTES[source.dtype]
    with source.file.open("rb") as file:
        file.seek(source.start + first * width * item)
        data = file.read(count * width * item)
    return to_float32(data, source.dtype).reshape(count, width)


def interleaved(rows: np.ndarray, head: int) -> np.ndarray:
    """[n * head, width]: of each head, rows of the first half and of the second take turns, as llama.cpp rotates them."""
    return rows.reshape(-1, 2, head // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
