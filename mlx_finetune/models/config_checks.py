"""Whether the settings of a config.json are of the kind that every reader of them takes for granted, before any computes."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mlx_finetune import nearest as names
from mlx_finetune.errors import UserError

DAMAGED = "download the model again"
LARGEST = 2**31 - 1  # MLX counts in 32 bits
MOST_LAYERS = 10_000
Check = Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return type(value) is int


def _is_size(value: Any) -> bool:
    return _is_count(value) and 0 < value <= LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _list_of(check: Check) -> Check:
    return lambda value: check(value) or (isinstance(value, list) and bool(value) and all(map(check, value)))


COUNT = ("a whole number, 0 or more", lambda value: _is_count(value) and 0 <= value <= LARGEST)
SIZE = ("a positive whole number", _is_size)
LAYERS = (f"a whole number from 1 to {MOST_LAYERS:,}", lambda value: _is_size(value) and value <= MOST_LAYERS)
SIZES = ("a positive whole number, or a list of them", _list_of(_is_size))  # some models have one for each layer
PERIOD = ("a whole number, 0 or more, or a pattern of letters", lambda value: COUNT[1](value) or isinstance(value, str))
WINDOW = ("a whole number of tokens", lambda value: _is_count(value) and -1 <= value <= LARGEST)
TOKENS = ("the number of a token, or a list of them", _list_of(_is_count))
NUMBER = ("a number", _is_number)
POSITIVE = ("a positive number", lambda value: _is_number(value) and value > 0)
FLAG = ("true or false", lambda value: isinstance(value, bool))
WORD = ("a name", lambda value: isinstance(value, str))
WORDS = ("a list of names", _is_words)
SETTINGS = ("an object", lambda value: isinstance(value, Mapping))

# What null means, a reader decides: it is taken wherever the key is.
KNOWN: Mapping[tuple[str, Check], str] = {
    LAYERS: "num_hidden_layers n_layers",
    SIZE: "hidden_size vocab_size num_attention_heads global_head_dim d_model n_heads max_seq_len "
    "max_position_embeddings original_max_position_embeddings "
    "decoder_sparse_step full_attention_interval linear_num_key_heads linear_num_value_heads linear_key_head_dim "
    "linear_value_head_dim linear_conv_kernel_dim v_head_dim kv_lora_rank state_size "
    "mamba_n_heads mamba_d_head mamba_d_state n_groups",
    SIZES: "intermediate_size num_key_value_heads",
    COUNT: "head_dim qk_rope_head_dim qk_nope_head_dim num_experts num_local_experts n_routed_experts "
    "num_kv_shared_layers hidden_size_per_layer_input shared_expert_intermediate_size moe_intermediate_size",
    PERIOD: "sliding_window_pattern",
    WINDOW: "sliding_window",
    TOKENS: "bos_token_id eos_token_id pad_token_id",
    POSITIVE: "rope_theta rope_local_base_freq rotary_emb_base rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon "
    "query_pre_attn_scalar",
    NUMBER: "partial_rotary_factor rotary_pct final_logit_softcapping attn_logit_softcapping initializer_range attention_dropout "
    "embedding_multiplier attention_multiplier residual_multiplier logits_scaling logit_scale",
    FLAG: "attention_bias mlp_bias use_cache tie_word_embeddings use_qk_norm use_qkv_bias use_sliding_window norm_topk_prob "
    "attn_output_gate is_encoder_decoder",
    WORD: "model_type hidden_act hidden_activation dtype torch_dtype norm_type position_embedding_type transformers_version",
    WORDS: "architectures layer_types",
    SETTINGS: "rope_parameters rope_scaling quantization quantization_config attn_config text_config vision_config auto_map",
}
OF_ROPE: Mapping[tuple[str, Check], str] = {
    POSITIVE: "rope_theta factor attention_factor beta_fast beta_slow low_freq_factor high_freq_factor partial_rotary_factor "
    "original_max_position_embeddings",
    NUMBER: "alpha mscale mscale_all_dim",
    WORD: "rope_type type",
    SETTINGS: "full_attention sliding_attention",
}
OF_ATTENTION: Mapping[tuple[str, Check], str] = {POSITIVE: "clip_qkv softmax_scale"}
OF_PACKING: Mapping[tuple[str, Check], str] = {SIZE: "bits group_size", WORD: "mode"}
LOGIT_SCALES = ("mpt", "dbrx")  # in whose files it may be a word, such as inv_sqrt_d_model


def check_config(config: Any, place: str) -> None:
    """Looks at the keys that are known here, whatever the architecture; null stands for an absent key. `place`: the file.

    Raises:
        UserError: no object; a value of another type or sign than its key has.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"{place}: not a JSON object", hint=DAMAGED)
    passed = ("logit_scale",) if config.get("model_type") in LOGIT_SCALES else ()
    _check(config, KNOWN, place, passed)
    for key in ("rope_parameters", "rope_scaling"):
        _check_rope(config.get(key) or {}, f"{place}: {key}")
    _check(config.get("attn_config") or {}, OF_ATTENTION, f"{place}: attn_config")
    _check_packing(config, place)
    if isinstance(config.get("text_config"), Mapping):
        check_config(config["text_config"], f"{place}: text_config")


def _check(settings: Mapping[str, Any], known: Mapping[tuple[str, Check], str], place: str, passed: tuple[str, ...] = ()) -> None:
    for (what, is_right), keys in known.items():
        for key in keys.split():
            value = settings.get(key)
            if value is not None and key not in passed and not is_right(value):
                raise UserError(f"{place}: {key} is {_short(value)}, not {what}", hint=DAMAGED)


def _check_rope(given: Mapping[str, Any], place: str) -> None:
    """One of all layers, or one for each kind of layer."""
    _check(given, OF_ROPE, place)
    for kind, value in given.items():
        if isinstance(value, Mapping):
            _check(value, OF_ROPE, f"{place}.{kind}")


def _check_packing(config: Mapping[str, Any], place: str) -> None:
    """Of MLX, whose readers ask for both numbers of the whole; a layer may have its own."""
    packing = config.get("quantization")
    if packing is None:
        return
    for key in ("bits", "group_size"):
        if packing.get(key) is None:
            raise UserError(f"{place}: quantization has no {key}", hint=DAMAGED)
    _check(packing, OF_PACKING, f"{place}: quantization")
    for layer, own in packing.items():
        if isinstance(own, Mapping):
            _check(own, OF_PACKING, f"{place}: quantization.{layer}")


def nearest(model_type: str, known: Iterable[str]) -> str:
    """The known name that is most like it, said as the beginning of a remark; empty where none is."""
    found = names.nearest(model_type, known)
    return f"nearest in name is {found}; " if found else ""


def _short(value: Any) -> str:
    """On one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
