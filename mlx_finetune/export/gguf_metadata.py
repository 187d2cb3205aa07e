"""What a GGUF says of a model: sizes and RoPE from config.json, name and licence from the model card.

Only what llama.cpp computes as transformers does is written; everything else is refused by its key.
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.errors import REFUSALS, UserError
from mlx_finetune.export.card import MADE_FROM
from mlx_finetune.export.report import FILE as REPORT
from mlx_finetune.files import read_json
from mlx_finetune.models.gguf_names import NAMINGS, Naming

Config = Mapping[str, Any]

QUANTISED = ("quantization_config", "quantization", "compression_config")
INSTALL = "pip install 'mlx-finetune[gguf]'"
SERVE = "serve the Hugging Face folder instead"
GRANITE = {
    "attention_multiplier": "add_attention_scale",
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "logits_scaling": "add_logit_scale",
}
# The kinds of RoPE scaling that are proven for llama.cpp's architectures (tests/test_gguf_write.py).
SCALINGS = {
    "llama": ("linear", "yarn", "llama3"),
    "qwen2": ("linear", "yarn"),
    "qwen3": ("linear", "yarn"),
    "smollm3": ("linear", "yarn"),
    "granite": ("linear", "yarn"),
    "gemma3": ("linear",),
}
PHI3 = re.compile("phi-?3", re.IGNORECASE)
GEMMA_PERIOD, NO_ROPE_PERIOD = 6, 4  # every sixth layer of Gemma 3 sees everything, every fourth of SmolLM3 has no RoPE
LAYERS_OF_27B = 62  # of Gemma 3, where llama.cpp scales attention otherwise


def read_config(model: Path) -> tuple[dict[str, Any], Naming]:
    """config.json with transformers' defaults filled in, and how llama.cpp names the architecture.

    Raises:
        UserError: no such file, quantised weights, or something that llama.cpp computes otherwise.
    """
    path = model / "config.json"
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a JSON object", hint="use a Hugging Face model folder")
    for key in QUANTISED:
        if key in raw:
            raise UserError(f"{path}: the weights are quantised ({key})", hint="fuse into the original, unquantised model")
    naming = NAMINGS.get(str(raw.get("model_type")))
    if naming is None:
        known = ", ".join(NAMINGS)
        raise UserError(f"{path}: no GGUF of architecture {raw.get('model_type')!r}", hint=f"known are {known}; {SERVE}")
    config = _with_defaults(model)
    for key, value in _differences(config, naming):
        raise UserError(f"{path}: {key} is {str(value)[:80]!r}, which llama.cpp's {naming.name} does not compute", hint=SERVE)
    return config, naming


def _with_defaults(model: Path) -> dict[str, Any]:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False).to_dict())
    except (OSError, StrictDataclassError, *REFUSALS) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{model / 'config.json'}: cannot be read: {reason}", hint="use the folder of a whole model") from error


def head_size(config: Config) -> int:
    """Columns of one head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_of(config: Config) -> Mapping[str, Any]:
    """RoPE of the layers that see everything."""
    rope: dict[str, Any] = config.get("rope_parameters") or {}
    return rope.get("full_attention") or rope


def _differences(config: Config, naming: Naming) -> Iterator[tuple[str, Any]]:
    """The settings that llama.cpp would not heed."""
    layers, types = range(config["num_hidden_layers"]), config.get("layer_types") or []
    activation = config.get("hidden_act") or config.get("hidden_activation")
    if activation != naming.activation:
        yield "hidden_act", activation
    if config.get("use_sliding_window"):
        yield "use_sliding_window", True
    if naming.name == "gemma3":
        yield from _of_gemma(config, types)
    elif any(kind != "full_attention" for kind in types):
        yield "layer_types", types
    if naming.name == "smollm3" and config["no_rope_layers"] != [int((layer + 1) % NO_ROPE_PERIOD != 0) for layer in layers]:
        yield "no_rope_layers", config["no_rope_layers"]
    if naming.name in ("granite", "phi3") and head_size(config) * config["num_attention_heads"] != config["hidden_size"]:
        yield "head_dim", config["head_dim"]
    yield from _of_rope(rope_of(config), naming)


def _of_gemma(config: Config, types: list[str]) -> Iterator[tuple[str, Any]]:
    layers = config["num_hidden_layers"]
    pattern = ["full_attention" if (layer + 1) % GEMMA_PERIOD == 0 else "sliding_attention" for layer in range(layers)]
    scalar = config["hidden_size"] // config["num_attention_heads"] if layers == LAYERS_OF_27B else head_size(config)
    expected = {"layer_types": pattern, "query_pre_attn_scalar": scalar, "attn_logit_softcapping": None}
    for key, value in expected.items():
        if config.get(key) != value:
            yield key, config.get(key)
    if config.get("use_bidirectional_attention"):
        yield "use_bidirectional_attention", True


def _of_rope(rope: Mapping[str, Any], naming: Naming) -> Iterator[tuple[str, Any]]:
    if rope["rope_type"] not in ("default", *SCALINGS.get(naming.name, ())):
        yield "rope_type", rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and naming.name != "phi3":
        yield "partial_rotary_factor", rope["partial_rotary_factor"]
    # What transformers lets a config say of YaRN, and llama.cpp takes as the paper has it: it reads no betas here.
    beyond = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True, "beta_fast": 32, "beta_slow": 1}
    for key, usual in beyond.items():
        if rope["rope_type"] == "yarn" and rope.get(key, usual) not in (None, usual):
            yield key, rope[key]


def write_sizes(writer: Any, config: Config, naming: Naming) -> None:
    """Sizes, epsilon and RoPE, into gguf's `writer`."""
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(context_length(config, naming))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _write_rope(writer, config, naming)
    if config.get("head_dim") and naming.name not in ("granite", "phi3"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if naming.name in ("llama", "smollm3", "granite"):
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_size(config))
    if naming.name == "granite":
        for key, add in GRANITE.items():
            getattr(writer, add)(config[key])
    if naming.name == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
        if config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if naming.name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        writer.add_rope_dimension_count(int(rope_of(config).get("partial_rotary_factor", 1.0) * config["hidden_size"]) // heads)
        writer.add_sliding_window(config.get("sliding_window") or 0)


def context_length(config: Config, naming: Naming) -> int:
    """No more than what llama.cpp sees as transformers does: it knows no sliding window but Gemma's."""
    longest: int = config["max_position_embeddings"]
    window: int | None = config.get("sliding_window")
    return min(longest, window) if window and naming.name not in ("gemma3", "qwen2", "qwen3", "smollm3") else longest


def _write_rope(writer: Any, config: Config, naming: Naming) -> None:
    import gguf

    rope = rope_of(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if naming.name == "gemma3":
        writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])


def rope_divisors(config: Config) -> np.ndarray | None:
    """float32 [head / 2]: what Llama 3.1's scaling divides each frequency by; None without it.

    Source: transformers.modeling_rope_utils, `_compute_llama3_parameters`.
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    size = head_size(config)
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # of the wave in the old context
    smooth = (turns - low) / (high - low)
    between = 1.0 / ((1.0 - smooth) / factor + smooth)
    return np.where(turns > high, 1.0, np.where(turns < low, factor, between)).astype(np.float32)


def write_card(writer: Any, model: Path, like_phi3: bool) -> None:
    """Name, size, licence, base model and tags, as the `gguf` package reads them from README.md and the folder's name.

    `like_phi3`: the tokens take blanks as those of Phi-3 do, for which llama.cpp looks at the name.
    After the tensors are known to `writer`, which counts the parameters.
    """
    import gguf
    import yaml

    total, shared, expert, experts = writer.get_total_parameter_count()
    try:
        card = gguf.Metadata.load(None, model, None, total)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        what = "README.md's front matter or generation_config.json"
        raise UserError(f"{model}: {what} cannot be read: {reason}", hint="mend it, or move it away") from error
    name = card.name or model.resolve().name
    if like_phi3:
        card.name = name if PHI3.search(name) else f"{name} (Phi-3)"
    else:  # else llama.cpp would look for tokens that are not there
        card.name = PHI3.sub("Phi 3", name)
    card.size_label = card.size_label or gguf.size_label(total, shared, expert, experts)
    card.set_gguf_meta_model(writer)
    report = read_json(model / REPORT) if (model / REPORT).is_file() else {}
    write_made_from(writer, report.get("made_from") if isinstance(report, dict) else None)


def write_made_from(writer: Any, made: Any) -> None:
    """As keys of our own, `mlx-finetune.checkpoint` and so on; `made`: of verification.json, or None."""
    for key, value in made.items() if isinstance(made, dict) else ():
        if key in MADE_FROM and isinstance(value, str):
            writer.add_string(f"mlx-finetune.{key}", value)
