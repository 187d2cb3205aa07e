"""Architectures whose config.json transformers' own class reads: all that it read, in the words of mlx-lm's class.

Files of transformers 4 and 5 mean the same here because one library reads both; what an absent key means is its default.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mlx_finetune.errors import REFUSALS, UserError
from mlx_finetune.models.quiet import quietly

Config = Mapping[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"
TORCH = "train it with --engine torch"

# Of the file and of its loading, not of the network; and what acts in training alone, which this project does not ask for.
IDLE = frozenset(
    "architectures dtype torch_dtype transformers_version id2label label2id return_dict output_attentions output_hidden_states "
    "problem_type is_encoder_decoder chunk_size_feed_forward use_cache initializer_range pretraining_tp _name_or_path "
    "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id auto_map quantization quantization_config "
    "attention_dropout hidden_dropout classifier_dropout resid_pdrop embd_pdrop residual_dropout embedding_dropout "
    "output_router_logits router_aux_loss_coef router_jitter_noise num_nextn_predict_layers max_window_layers "
    "max_position_embeddings is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder model_type".split()
)
# What `overlay_of` says in other words, or `mlx_config` checks by itself.
SAID = frozenset({"rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "layer_types", "rope_type"})
# Sizes from which transformers derives what the class reads, and sizes of kernels that compute the same.
DERIVED: Mapping[str, frozenset[str]] = {
    "deepseek_v3": frozenset({"qk_head_dim", "head_dim"}),
    "gpt_neox": frozenset({"intermediate_size"}),  # four times the hidden size there: another one does not load
    "gemma4_text": frozenset({"per_layer_config"}),
    "gpt_oss": frozenset({"attention_bias"}),
    "granitemoehybrid": frozenset({"mamba_expand", "mamba_chunk_size"}),
    "lfm2": frozenset({"block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim"}),
    "mamba2": frozenset(
        "expand chunk_size time_step_min time_step_max time_step_floor rescale_prenorm_residual residual_in_fp32".split()
    ),
}
KEPT_NESTED = frozenset({"gemma4_text", "ministral3"})  # whose classes read `rope_parameters` themselves


def canonical(config: Config) -> dict[str, Any]:
    """The whole config as transformers reads it, with its defaults, in the words of its version 5.

    Raises:
        UserError: its class refuses a value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    apart = ("quantization", "quantization_config", "model_type")
    given = {key: _floats(value) for key, value in config.items() if key not in apart}
    try:
        with quietly():
            read: dict[str, Any] = CONFIG_MAPPING[config["model_type"]].from_dict(given).to_dict()
    except (*REFUSALS, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"config.json: transformers refuses it: {reason}", hint="download the model again") from error
    return read


def _floats(value: Any) -> Any:
    """{"__float__": "Infinity"}, as transformers 5 writes what JSON cannot say, and lists of it, as numbers."""
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return float(value["__float__"]) if isinstance(value, dict) and value.keys() == {"__float__"} else value


def overlay_of(config: Config) -> dict[str, Any]:
    """Keys to lay over `config` so that mlx-lm 0.32.2 computes what transformers computes without them."""
    read = canonical(config)
    model_type = config["model_type"]
    overlay: dict[str, Any] = {key: value for key, value in read.items() if key not in IDLE - {"max_position_embeddings"}}
    rope = read.get("rope_parameters")
    if rope and model_type not in KEPT_NESTED:
        overlay |= {"rope_parameters": None, "rope_scaling": None, "rope_theta": rope["rope_theta"]}
        if rope.get("partial_rotary_factor") is not None:
            overlay["partial_rotary_factor"] = rope["partial_rotary_factor"]
    particular = PARTICULAR.get(model_type)
    return overlay | particular(read) if particular else overlay


def unread(config: Config, known: frozenset[str]) -> tuple[str, Any] | None:
    """A key, and its value, that asks for something other than transformers' default and is not among the `known`."""
    model_type = config["model_type"]
    read, silent = canonical(config), canonical({"model_type": model_type})
    passed = known | IDLE | SAID | DERIVED.get(model_type, frozenset())
    return next(((key, value) for key, value in read.items() if key not in passed and value != silent.get(key)), None)


def _gpt_neox(read: Config) -> dict[str, Any]:
    rope = read["rope_parameters"]
    return {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 1.0)}


def _granitemoehybrid(read: Config) -> dict[str, Any]:
    words = {"linear_attention": "mamba", FULL: "attention"}
    types = [words.get(kind, kind) for kind in read["layer_types"]]
    theta = (read.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
    return {"layer_types": types, "position_embedding_type": read.get("position_embedding_type") or "nope", "rope_theta": theta}


def _period(read: Config) -> dict[str, Any]:
    """`full_attention_interval`, in which mlx-lm's class counts.

    Raises:
        UserError: layers of full attention do not come at equal distances.
    """
    types = read["layer_types"]
    period = types.index(FULL) + 1 if FULL in types else len(types) + 1
    if any((kind == FULL) != ((layer + 1) % period == 0) for layer, kind in enumerate(types)):
        raise UserError("layer_types without a period is not supported with MLX", TORCH)
    return {"full_attention_interval": period}


def _qwen3_5(read: Config) -> dict[str, Any]:
    return _period(read) | {"model_type": "qwen3_5", "rope_parameters": dict(read["rope_parameters"])}


def _lfm2(read: Config) -> dict[str, Any]:
    return {"block_dim": read["hidden_size"], "block_ff_dim": read["intermediate_size"], "full_attn_idxs": None} | {
        "layer_types": read["layer_types"]
    }


def _gemma4_text(read: Config) -> dict[str, Any]:
    """The size of heads of full attention, which transformers keeps by layer.

    Raises:
        UserError: layers differ in more than that.
    """
    own = read.get("per_layer_config") or {}
    types, sizes = read["layer_types"], set[int]()
    for number, kind in enumerate(types):
        here = dict(own.get(f"{number:02d}") or own.get(str(number)) or {})
        size = here.pop("head_dim", read["head_dim"])
        if here or (kind != FULL and size != read["head_dim"]):
            raise UserError(f"layer {number} with settings of its own is not supported with MLX", TORCH)
        if kind == FULL:
            sizes.add(size)
    if len(sizes) > 1:
        raise UserError("layers of full attention with unlike heads are not supported with MLX", TORCH)
    return {"global_head_dim": sizes.pop() if sizes else read["head_dim"]}


PARTICULAR: Mapping[str, Callable[[Config], dict[str, Any]]] = {
    "gemma4_text": _gemma4_text,
    "gpt_neox": _gpt_neox,
    "granitemoehybrid": _granitemoehybrid,
    "lfm2": _lfm2,
    "mamba2": lambda read: {"intermediate_size": int(read["expand"] * read["hidden_size"])},
    "gpt_oss": lambda read: {"rope_scaling": dict(read["rope_parameters"])},
    "qwen3_5_moe_text": lambda read: _qwen3_5(read) | {"model_type": "qwen3_5_moe"},
    "qwen3_5_text": _qwen3_5,
    "qwen3_next": _period,
}
