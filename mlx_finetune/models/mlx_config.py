"""What config.json means to transformers, told to mlx-lm: pure functions from dict to dict.

transformers 5 moved RoPE's settings into `rope_parameters` and layer patterns into `layer_types`. mlx-lm 0.32.2 reads
the older keys and, where they are missing, takes its own default without a word.
"""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from mlx_finetune.errors import UserError
from mlx_finetune.models.config_checks import check_config, nearest
from mlx_finetune.models.mlx_overlays import FULL, SLIDING, TORCH, canonical, overlay_of
from mlx_finetune.models.mlx_proven import PROVEN, SEEING
from mlx_finetune.models.mpt_config import MPT, check_mpt

Config = Mapping[str, Any]
Rope = Mapping[str, Any]

# What each scaling may say; anything else would be read by one library and not by the other.
SCALING_KEYS: Mapping[str, frozenset[str]] = {
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"}),
    "dynamic": frozenset({"alpha", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}),
}
NOT_SCALING = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})

# Settings that mlx-lm does not read; it computes as if they were absent.
NOT_READ = ("use_bidirectional_attention", "model_file")
SOFTCAPS = ("final_logit_softcapping", "attn_logit_softcapping")  # gemma3_text: not read; gemma2: not to be switched off
NEEDED = ("hidden_size", "num_attention_heads", "num_hidden_layers")  # but of an MPT, which check_mpt looks at

LLAMA_CLASS = ("llama", "mistral", "smollm3")  # transformers' llama has no windows; mlx-lm's would apply `layer_types`
SCALED_WHERE_FULL = ("gemma3_text", "olmo3")  # version 4 scaled RoPE in layers of full attention only
WINDOW_IS_OPTIONAL = ("qwen2", "qwen3", "qwen3_moe", "smollm3")  # `use_sliding_window`
WINDOW_BY_LAYER = ("gemma2", "qwen2", "qwen3", "smollm3")  # `layer_types`; mistral and phi3 mask every layer


def text_config(config: Config) -> Config:
    """The settings of the text model of one that sees, as transformers reads them, defaults and all; any other config as it is.

    Raises:
        UserError: transformers refuses them.
    """
    if config.get("model_type") not in SEEING or not isinstance(config.get("text_config"), Mapping):
        return config
    apart = {key: config[key] for key in ("quantization", "quantization_config") if key in config}
    read = canonical(config)
    text = read["text_config"]
    kind = {"model_type": text.get("model_type") or SEEING[config["model_type"]][0]}
    return {**text, **kind, "tie_word_embeddings": read.get("tie_word_embeddings", text.get("tie_word_embeddings")), **apart}


def is_tied(config: Config) -> bool:
    """Whether the head is the embeddings, by config.json and what transformers takes where that is silent."""
    text = text_config(config)
    said = text.get("tie_word_embeddings")
    if said is None:  # only then: to import it takes seconds
        from transformers import CONFIG_MAPPING

        said = canonical(text).get("tie_word_embeddings") if text.get("model_type") in CONFIG_MAPPING else None
    return bool(said)


def names_of(config: Config) -> tuple[tuple[str, str], ...]:
    """Regular expressions, and what transformers has for mlx-lm's path of a module."""
    if text_config(config) is not config:
        return SEEING[config["model_type"]][1]
    return PROVEN[config["model_type"]].names


def mlx_overlay(config: Config) -> dict[str, Any]:
    """Keys to lay over a supported `config` so that mlx-lm 0.32.2 computes what transformers computes without them."""
    text = text_config(config)
    if text is not config:
        return {"text_config": {**text, **mlx_overlay(text), "model_type": text["model_type"]}, "vocab_size": text["vocab_size"]}
    model_type = config["model_type"]
    if PROVEN[model_type].by_transformers:
        return overlay_of(config)
    full, sliding = _rope(config)
    overlay: dict[str, Any] = {
        **{key: value for key, value in PROVEN[model_type].defaults.items() if config.get(key) is None},
        "tie_word_embeddings": _tied(config),
        "rope_parameters": None,
        "rope_theta": full["rope_theta"],
        "rope_scaling": _mlx_scaling(full),
    }
    if full["partial_rotary_factor"] is not None:
        overlay["partial_rotary_factor"] = full["partial_rotary_factor"]
    if model_type == "gemma3_text":
        overlay["rope_local_base_freq"] = sliding["rope_theta"]
    if model_type == "qwen3_moe":  # which transformers 5 writes as num_local_experts
        overlay["num_experts"] = config.get("num_experts") or config.get("num_local_experts") or 128
    if model_type == "exaone4":
        overlay["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return overlay | _mlx_windows(config)


def check_supported(config: Config) -> None:
    """Raises UserError, by name, for what mlx-lm would refuse or would compute otherwise than transformers."""
    check_config(config, "config.json")
    config = text_config(config)
    model_type = str(config.get("model_type"))
    check_mpt(config)
    if model_type not in PROVEN:
        _refuse(f"architecture {model_type!r} ({nearest(model_type, PROVEN)}docs/models.md lists those that are)")
    _check_quantisation(config)
    if PROVEN[model_type].by_transformers:
        _check_read(config)
        return
    _check_settings(config)
    full, sliding = _rope(config)
    _check_scaling(full, model_type)
    _check_scaling(sliding, model_type)
    if model_type == "olmo3" and full["rope_theta"] != sliding["rope_theta"]:
        _refuse("olmo3 with two values of rope_theta")
    _mlx_windows(config)


def max_exact_length(config: Config) -> int | None:
    """The longest sequence, in tokens, for which MLX equals transformers: `sliding_window` where mlx-lm ignores it. None: any."""
    config = text_config(config)
    if not PROVEN[config["model_type"]].window_ignored:
        return None
    if PROVEN[config["model_type"]].by_transformers:
        return _window_read(canonical(config))
    if config["model_type"] in WINDOW_IS_OPTIONAL and not config.get("use_sliding_window"):
        return None
    if config["model_type"] in WINDOW_BY_LAYER and SLIDING not in (config.get("layer_types") or [SLIDING]):
        return None
    return _window(config)


def hidden_size(config: Config) -> int:
    """How many numbers stand for a token between layers."""
    text = text_config(config)
    return int(text.get("hidden_size") or text["d_model"])


def _refuse(what: str) -> NoReturn:
    raise UserError(f"{what} is not supported with MLX", TORCH)


def _check_quantisation(config: Config) -> None:
    quantisation = config.get("quantization_config")
    if quantisation is not None and not isinstance(quantisation, Mapping):
        raise UserError(f"config.json: quantization_config is {quantisation!r}", hint="use the original checkpoint")
    if quantisation and not config.get("quantization") and not taken_over(config):  # mlx-lm's own models carry both
        method = quantisation.get("quant_method", "unknown method")
        raise UserError(f"quantised checkpoint ({method}): not supported yet", hint="use the original checkpoint")


def taken_over(config: Config) -> str | None:
    """The method of a quantised checkpoint whose packed weights mlx-lm takes over exactly: AutoAWQ's GEMM of 4 bits, and the
    experts of gpt-oss in mxfp4."""
    found = config["quantization_config"]
    if found.get("quant_method") == "mxfp4" and config.get("model_type") == "gpt_oss":
        return "mxfp4"
    is_awq = found.get("quant_method") == "awq" and found.get("bits", 4) == 4 and found.get("group_size", 128) in (32, 64, 128)
    return "awq" if is_awq and str(found.get("version", "gemm")).lower() == "gemm" else None


def _check_read(config: Config) -> None:
    """Of what transformers reads: a kind of RoPE or an activation that mlx-lm's class does not compute. What else it does not
    read is found where that class is at hand: engines/mlx/load.py."""
    model_type, read = config["model_type"], canonical(config)
    one = PROVEN[model_type]
    ropes = read.get("rope_parameters") or {}
    for rope in [value for value in ropes.values() if isinstance(value, Mapping)] or [ropes]:
        if (kind := _kind(rope)) not in one.scalings | {"default"}:
            _refuse(f"RoPE scaling {kind!r} of {model_type}")
    key, expected = one.activation
    if read.get(key, expected) != expected:
        _refuse(f"{model_type} with {key} {read[key]!r}")
    if config.get("model_file"):
        _refuse(f"model_file {config['model_file']!r}")
    overlay_of(config)


def _window_read(read: Config) -> int | None:
    """`sliding_window` where a layer has one."""
    window: int | None = read.get("sliding_window")
    kinds = read.get("layer_types")
    return window if window and (SLIDING in kinds if kinds else True) else None


def _check_settings(config: Config) -> None:
    model_type = config["model_type"]
    for key in NEEDED if model_type != MPT else ():
        if config.get(key) is None:
            raise UserError(f"config.json has no {key}")
    key, expected = PROVEN[model_type].activation
    if (config.get(key) or expected) != expected:
        _refuse(f"{model_type} with {key} {config[key]!r}")
    for key in NOT_READ + (SOFTCAPS if model_type == "gemma3_text" else ()):
        if config.get(key):
            _refuse(f"{key} {config[key]!r}")
    for key in SOFTCAPS if model_type == "gemma2" else ():
        if not config.get(key, 1.0):
            _refuse(f"gemma2 without {key}")


def _check_scaling(rope: Rope, model_type: str) -> None:
    kind = _kind(rope)
    if kind == "default":
        return
    if kind not in PROVEN[model_type].scalings:
        _refuse(f"RoPE scaling {kind!r} of {model_type}")
    unread = {key for key, value in rope.items() if value is not None} - NOT_SCALING - SCALING_KEYS[kind]
    if unread:
        _refuse(f"RoPE scaling {kind!r} with {min(unread)}")
    if kind == "dynamic" and not rope.get("alpha"):
        _refuse("RoPE scaling 'dynamic' without alpha")
    factor = rope.get("attention_factor")
    if factor is not None and not math.isclose(factor, 0.1 * math.log(rope.get("factor") or 1) + 1, rel_tol=1e-6):
        _refuse(f"RoPE scaling {kind!r} with attention_factor {factor}")


def _tied(config: Config) -> bool:
    tied = config.get("tie_word_embeddings")
    return PROVEN[config["model_type"]].tied if tied is None else tied


def _rope(config: Config) -> tuple[Rope, Rope]:
    """RoPE in layers of full and of sliding attention, by transformers' rules for files of versions 4 and 5."""
    model_type = config["model_type"]
    theta = config.get("rope_theta") or PROVEN[model_type].rope_theta
    local_theta = (config.get("rope_local_base_freq") or 10_000.0) if model_type == "gemma3_text" else theta
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        full, sliding = given.get(FULL) or {}, given.get(SLIDING) or {}
    else:
        full, sliding = given, {} if model_type in SCALED_WHERE_FULL else given
    return _complete(full, theta, config), _complete(sliding, local_theta, config)


def _complete(given: Rope, theta: float, config: Config) -> Rope:
    missing = {"rope_theta": theta, "partial_rotary_factor": config.get("partial_rotary_factor")}
    if _kind(given) in ("llama3", "yarn"):
        missing["original_max_position_embeddings"] = config.get("max_position_embeddings")
    return {**missing, **given}


def _kind(rope: Rope) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _mlx_scaling(rope: Rope) -> dict[str, Any] | None:
    """mlx-lm's `rope_scaling`; some of its classes read `type`, some `rope_type`."""
    kind = _kind(rope)
    if kind == "default":
        return None
    if kind not in SCALING_KEYS:
        _refuse(f"RoPE scaling {kind!r:.40}")
    settings = {key: value for key, value in rope.items() if key in SCALING_KEYS[kind] and value is not None}
    return settings | {"type": kind, "rope_type": kind}


def _window(config: Config) -> int | None:
    window: int | None = config.get("sliding_window", PROVEN[config["model_type"]].sliding_window)
    return window


def _mlx_windows(config: Config) -> dict[str, Any]:
    """Which layers see only a window, in the words of mlx-lm's class."""
    model_type, window = config["model_type"], _window(config)
    if model_type in LLAMA_CLASS:
        return {"layer_types": None, "sliding_window": None}
    if model_type == "olmo3":
        return {"sliding_window": window}
    if model_type == "exaone4" and window is None:
        return {"sliding_window": None, "sliding_window_pattern": None}
    if PROVEN[model_type].pattern == 0:
        return {}
    return {"sliding_window": window, "sliding_window_pattern": _pattern(config)}


def _pattern(config: Config) -> int | str:
    """The period of the layers with full attention; a letter for each layer for exaone4."""
    count, model_type = config["num_hidden_layers"], config["model_type"]
    period = config.get("sliding_window_pattern") or PROVEN[model_type].pattern
    if isinstance(period, str):  # exaone4's letters, where `layer_types` stands beside them
        period = PROVEN[model_type].pattern
    types = config.get("layer_types") or [FULL if (layer + 1) % period == 0 else SLIDING for layer in range(count)]
    if FULL not in types:
        _refuse(f"{model_type} without a layer of full attention")
    if model_type == "exaone4":
        return "".join("L" if kind == SLIDING else "G" for kind in types)
    period = types.index(FULL) + 1
    if any((kind == FULL) != ((layer + 1) % period == 0) for layer, kind in enumerate(types)):
        _refuse(f"{model_type} whose layer_types have no period")
    return period
