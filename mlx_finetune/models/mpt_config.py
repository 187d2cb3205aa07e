"""What an MPT's config.json may say so that every library computes the same.

transformers' MPT knows the published models alone: it reads neither `alibi` nor `alibi_bias_max`, `logit_scale`, `no_bias`,
`expansion_ratio` and others, and computes as if they stood there with the values below.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from mlx_finetune.errors import UserError

MPT, REPLIT = "mpt", "replit_lm"
SIZES = ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len")
SAID: Mapping[str, tuple[Any, ...]] = {
    "expansion_ratio": (4,),
    "no_bias": (True,),
    "logit_scale": (None,),
    "norm_type": ("low_precision_layernorm", "layernorm"),
}
OF_ATTENTION: Mapping[str, tuple[Any, ...]] = {
    "alibi": (True,),
    "alibi_bias_max": (8,),
    "attn_type": ("multihead_attention",),
    "prefix_lm": (False, None),
    "qk_ln": (False, None),
    "qk_gn": (False, None),
    "rope": (False, None),
    "attn_uses_sequence_id": (False, None),
    "sliding_window_size": (-1, None),
}
OF_REPLIT = ("mlp_ratio", "alibi", "alibi_bias_max", "attn_clip_qkv", "attn_qk_ln", "softmax_scale", "attn_pdrop")
TODAY = "download the model again: its files were rewritten as MPT in May 2023"


def check_mpt(config: Mapping[str, Any]) -> None:
    """Raises UserError, by name, for an MPT that transformers would compute otherwise than its config says; others pass."""
    model_type = config.get("model_type")
    if model_type == REPLIT:
        raise UserError(f"model_type {REPLIT!r} is of the first files of replit-code-v1", hint=TODAY)
    if model_type != MPT:
        return
    if old := [key for key in OF_REPLIT if key in config]:
        raise UserError(f"config.json: {old[0]} is of the first files of replit-code-v1", hint=TODAY)
    for key in SIZES:
        if type(config.get(key)) is not int or config[key] < 1:
            raise UserError(f"config.json has no {key}, or it is no size", hint="the file is not whole: download it again")
    if config["d_model"] % config["n_heads"]:
        _refuse("n_heads", config["n_heads"])
    attention = config.get("attn_config") or {}
    if not isinstance(attention, Mapping):
        _refuse("attn_config", attention)
    for settings, allowed in ((config, SAID), (attention, OF_ATTENTION)):
        for key, values in allowed.items():
            if key in settings and settings[key] not in values:
                _refuse(key, settings[key])


def longest_of(config: Mapping[str, Any]) -> int | None:
    """How many tokens the model can take at all; None: as many as fit in memory."""
    return int(config.get("max_seq_len") or 2048) if config.get("model_type") == MPT else None


def _refuse(key: str, value: Any) -> NoReturn:
    hint = "transformers would compute something else than the model was trained with: choose another model"
    raise UserError(f"an MPT with {key} {str(value)[:60]} is not supported", hint=hint)
