"""Tiny random checkpoints of real architectures, made by transformers' own classes, and a small real tokenizer."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 320
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "The assistant runs the command and the tool answers with the output of the shell.",
    "You are a helpful assistant. The user asks; the assistant writes the file and runs the tests.",
    "def main() -> None:\n    return print(answer)\n",
    "In 2026 the user said: thank you, that is the answer that I wanted.",
)

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 16}
# Shorter than the tests' sequences, so that windows show.
WINDOW = {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
MULTIPLIERS = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
MINISTRAL_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 256,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
OSS_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
PARTICULAR: Mapping[str, Mapping[str, Any]] = {
    "cohere2": WINDOW,
    "ernie4_5": HEADS,
    "exaone4": WINDOW,
    "gemma2": HEADS | {"query_pre_attn_scalar": 24, "sliding_window": 64},
    "gemma3_text": HEADS | WINDOW | {"query_pre_attn_scalar": 24, "sliding_window_pattern": 2},
    "glm4": HEADS,
    "granite": MULTIPLIERS,
    "hunyuan_v1_dense": HEADS,
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmo3": WINDOW,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"partial_rotary_factor": 0.5},
    "qwen3": HEADS,
    "qwen3_moe": HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "seed_oss": HEADS,
    "stablelm": {"use_qkv_bias": True},
    "cohere": {"logit_scale": 0.5},
    "deepseek_v3": ROUTED
    | {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    | {"num_key_value_heads": 4},
    "dots1": HEADS | ROUTED | {"sliding_window": None},
    "gemma": HEADS,
    "gemma4_text": HEADS
    | WINDOW
    | {"layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"per_layer_config": {"01": {"head_dim": 32}, "03": {"head_dim": 32}}}
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    "glm4_moe": HEADS | ROUTED | {"use_qk_norm": True},
    "gpt_neox": {"intermediate_size": 256},
    "gpt_oss": HEADS
    | WINDOW
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"rope_parameters": OSS_ROPE},
    "granitemoe": MULTIPLIERS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": MULTIPLIERS
    | MAMBA
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48, "position_embedding_type": "rope"}
    | {"layer_types": ["mamba", "attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 16},
    "ministral3": HEADS | {"rope_parameters": MINISTRAL_ROPE},
    "nemotron": HEADS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3_5_text": HEADS | LINEAR_ATTENTION,
    "qwen3_5_moe_text": HEADS | EXPERTS | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 48},
    "qwen3_next": HEADS | EXPERTS | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 48},
}


def mostly_long(values: Iterable[Any], *often: Any) -> list[Any]:
    """Parameters of a test, tuples where it has several: `often` are always run, the others by `scripts/test --all`."""
    import pytest

    others = (value if isinstance(value, tuple) else (value,) for value in values if value not in often)
    return [*often, *(pytest.param(*value, marks=pytest.mark.long) for value in others)]


def make_tiny(
    model_type: str,
    folder: Path,
    tokenizer: bool,
    seed: int = 0,
    dtype: str = "float32",
    style: str = "v5",
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a random checkpoint of `model_type` to `folder`; `changes` are keys of its config.

    Norms and biases are random too, so that a wrong reading of either shows. Style "v4": config.json as transformers 4
    wrote it.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {key: size for key, size in SIZES.items() if model_type != "mamba2" or "head" not in key}
    config = CONFIG_MAPPING[model_type](**sizes | dict(PARTICULAR.get(model_type, {})) | dict(changes or {}))
    torch.manual_seed(seed)  # transformers draws what `_randomise` leaves near where it is
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    _randomise(model, seed)
    model.save_pretrained(folder)
    if style == "v4":
        rewrite_as_v4(folder / "config.json")
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def make_joined(model_type: str, folder: Path, changes: Mapping[str, Any]) -> Path:
    """As `make_tiny`, with the experts of a layer in one tensor."""
    import torch
    from transformers import AutoModelForCausalLM

    make_tiny(model_type, folder, tokenizer=True, changes=changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder, save_original_format=False)
    return folder


SEEING = (
    ("gemma3", "gemma3_text"),
    ("gemma4", "gemma4_text"),
    ("mistral3", "mistral"),
    ("mistral3", "ministral3"),
    ("qwen3_5", "qwen3_5_text"),
    ("qwen3_5_moe", "qwen3_5_moe_text"),
)
EYES: Mapping[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_EYES: Mapping[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "out_hidden_size": 64}


def make_seeing(model_type: str, text: str, folder: Path, tokenizer: bool = False, seed: int = 0) -> Path:
    """As `make_tiny`: a model that sees, with `text` as its text model."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    settings = CONFIG_MAPPING[text](**SIZES | dict(PARTICULAR.get(text, {}))).to_dict() | {"model_type": text}
    eyes = {
        "gemma3": EYES | {"image_size": 28, "patch_size": 14},
        "gemma4": EYES | {"num_key_value_heads": 2, "head_dim": 16},
        "mistral3": EYES | {"image_size": 28, "patch_size": 14, "head_dim": 16},
    }.get(model_type, QWEN_EYES)
    others = {"audio_config": None} if model_type == "gemma4" else {}
    config = CONFIG_MAPPING[model_type](text_config=settings, vision_config=dict(eyes), **others)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    model.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def _randomise(model: Any, seed: int) -> None:
    import torch

    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.from_numpy(generator.standard_normal(tuple(parameter.shape), dtype=np.float32))
            if parameter.ndim == 1:  # norms and biases stay near where they are
                parameter.add_((0.2 * noise).to(parameter.dtype))
            else:
                parameter.copy_((noise * 1.5 / parameter.shape[-1] ** 0.5).to(parameter.dtype))


def tiny_tokenizer() -> Any:
    """Byte-level BPE with a few merges, ChatML, and the ids 0, 1, 2 of SmolLM2's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        unk_token=SPECIAL[0],
        pad_token=SPECIAL[0],
    )
    fast.chat_template = CHATML
    return fast


def rewrite_as_v4(path: Path) -> None:
    """The same model in the words of transformers 4: flat RoPE keys, `torch_dtype`, a pattern for `layer_types`."""
    config = json.loads(path.read_text(encoding="utf-8"))
    model_type = config["model_type"]
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.53.0"
    rope = config.get("rope_parameters")
    if rope is None or model_type in ("gemma4_text", "gpt_oss", "ministral3"):  # no RoPE, or younger than version 4
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
        return
    del config["rope_parameters"]
    full = rope.get("full_attention", rope)
    config["rope_theta"] = full["rope_theta"]
    if "partial_rotary_factor" in full:
        config["partial_rotary_factor"] = full["partial_rotary_factor"]
    if model_type == "gemma3_text":
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if full["rope_type"] != "default":
        flat = ("rope_theta", "partial_rotary_factor")
        config["rope_scaling"] = {key: value for key, value in full.items() if key not in flat}
    types = config.get("layer_types", [])
    if model_type in ("cohere2", "gemma3_text"):
        config["sliding_window_pattern"] = types.index("full_attention") + 1
        config.pop("_sliding_window_pattern", None)
    if model_type in ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"):
        config["full_attention_interval"] = types.index("full_attention") + 1
    if model_type not in ("olmo3", "exaone4", "granitemoehybrid", "lfm2", "lfm2_moe"):  # which came late enough to write them
        config.pop("layer_types", None)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
