"""A tiny random model in the files of Replit-v2-CodeInstruct-3B: torch shards, a SentencePiece model, code that nobody runs."""

import importlib
import io
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "split_by_whitespace": False,
    "bos_id": -1,
    "unk_id": 0,
    "eos_id": 1,
    "pad_id": 2,
    "unk_piece": "<|unk|>",
    "eos_piece": "<|endoftext|>",
    "pad_piece": "<|pad|>",
    "user_defined_symbols": ["\n", "\t"],  # the trainer reads lines, and would know no end of one
}
PIECES = 400
WIDTH, LAYERS, LONGEST = 48, 3, 512
# As replit/replit-code-v1-3b has it, but for the sizes.
CONFIG: Mapping[str, Any] = {
    "_name_or_path": "replit/replit-code-v1-3b",
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig", "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
    "d_model": WIDTH,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "eos_token_id": 1,
    "expansion_ratio": 4,
    "init_config": {"name": "kaiming_normal_", "fan_mode": "fan_in", "init_nonlinearity": "relu", "verbose": 0},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": LONGEST,
    "model_type": "mpt",
    "n_heads": 4,
    "n_layers": LAYERS,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "replit/replit-code-v1-3b",
    "torch_dtype": "float32",
    "transformers_version": "4.30.0",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": PIECES + 1,
}
TOKENIZER: Mapping[str, Any] = {
    "auto_map": {"AutoTokenizer": ["replit_lm_tokenizer.ReplitLMTokenizer", None]},
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|endoftext|>",
    "model_max_length": LONGEST,
    "pad_token": "<|pad|>",
    "padding_side": "right",
    "sep_token": None,
    "sp_model_kwargs": {},
    "tokenizer_class": "ReplitLMTokenizer",
    "unk_token": "<|unk|>",
}
TRAP = "raise SystemExit('code that came with a model was run')\n"
CODE = ("configuration_mpt.py", "modeling_mpt.py", "replit_lm_tokenizer.py")


def sources() -> list[str]:
    """Python that is here anyway: some of its own library."""
    names = ("csv", "shlex", "textwrap", "json.decoder", "json.encoder", "tempfile")
    found = [importlib.import_module(name).__file__ for name in names]
    return [Path(file).read_text(encoding="utf-8") for file in found if file]


def lines() -> list[str]:
    """Theirs, without the empty ones."""
    return [line for text in sources() for line in text.splitlines() if line.strip()]


def train_spiece(path: Path, **options: Any) -> Path:
    """A SentencePiece model of code, by sentencepiece's own trainer."""
    path.write_bytes(_trained(json.dumps(options)))
    return path


@cache
def _trained(options: str) -> bytes:
    import sentencepiece

    how = {"vocab_size": PIECES, "model_type": "unigram", "character_coverage": 0.9999, "minloglevel": 2, "num_threads": 1}
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines()), model_writer=made, **how | json.loads(options))
    return made.getvalue()


def make_replit(folder: Path, changes: Mapping[str, Any] | None = None, seed: int = 0) -> Path:
    """Writes the folder; `changes` are keys of its config."""
    folder.mkdir(parents=True)
    config = {**CONFIG, **(changes or {})}
    write(folder / "config.json", config)
    write(folder / "generation_config.json", {"eos_token_id": 1, "transformers_version": "4.30.0"})
    write(folder / "tokenizer_config.json", TOKENIZER)
    write(
        folder / "special_tokens_map.json", {key: TOKENIZER[key] for key in TOKENIZER if key.endswith("_token") and TOKENIZER[key]}
    )
    write(folder / "added_tokens.json", {"<s>": PIECES})
    train_spiece(folder / "spiece.model", **SPECIAL)
    for name in CODE:
        (folder / name).write_text(TRAP)
    write_shards(folder, weights_of(config, seed))
    return folder


def weights_of(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random weights by the names of the published checkpoint, in its order."""
    random = np.random.default_rng(seed)
    width, inner = config["d_model"], config["d_model"] * config["expansion_ratio"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (config["vocab_size"], width)}
    for layer in range(config["n_layers"]):
        block = f"transformer.blocks.{layer}"
        shapes |= {f"{block}.norm_1.weight": (width,), f"{block}.attn.Wqkv.weight": (3 * width, width)}
        shapes |= {f"{block}.attn.out_proj.weight": (width, width), f"{block}.norm_2.weight": (width,)}
        shapes |= {f"{block}.ffn.up_proj.weight": (inner, width), f"{block}.ffn.down_proj.weight": (width, inner)}
    shapes["transformer.norm_f.weight"] = (width,)
    weights = {}
    for name, shape in shapes.items():
        noise = random.standard_normal(shape)
        weights[name] = (1 + 0.2 * noise if len(shape) == 1 else 1.5 * noise / shape[-1] ** 0.5).astype(np.float32)
    return weights


def write_shards(folder: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Two shards and their index, as torch and transformers 4 wrote them."""
    import torch

    names = list(weights)
    cut = len(names) * 3 // 4
    parts = {"pytorch_model-00001-of-00002.bin": names[:cut], "pytorch_model-00002-of-00002.bin": names[cut:]}
    for file, here in parts.items():
        torch.save({name: torch.from_numpy(weights[name]) for name in here}, folder / file)
    total = sum(array.nbytes for array in weights.values())
    weight_map = {name: file for file, here in parts.items() for name in here}
    write(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def convert_replit(source: Path, out: Path) -> Path:
    """What `convert` makes of it: safetensors, a tokenizer, and the configs; no code."""
    import shutil

    from mlx_finetune.models.spiece import spiece_to_tokenizer
    from mlx_finetune.models.torch_bin import bin_to_safetensors

    out.mkdir(parents=True)
    bin_to_safetensors(source, out)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(source / name, out / name)
    spiece_to_tokenizer(source / "spiece.model", out)
    return out
