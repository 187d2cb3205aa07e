"""The kinds of models for which tests prove that MLX computes what transformers computes, and how mlx-lm's classes differ."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCALINGS = frozenset({"linear", "llama3", "yarn"})


@dataclass(frozen=True)
class Architecture:
    """One `model_type`: how mlx-lm's class differs, and what transformers assumes where the file is silent."""

    scalings: frozenset[str] = frozenset()  # kinds of RoPE scaling that both compute alike
    rope_theta: float = 10_000.0
    tied: bool = False
    activation: tuple[str, str] = ("hidden_act", "silu")
    sliding_window: int | None = None
    window_ignored: bool = False  # mlx-lm attends to everything where transformers masks by `sliding_window`
    pattern: int = 0  # mlx-lm reads `sliding_window_pattern`, not `layer_types`; the period where the file is silent
    defaults: Mapping[str, Any] = field(default_factory=dict)
    by_transformers: bool = False  # transformers' own class reads the file, whichever version wrote it: mlx_overlays.py
    names: tuple[tuple[str, str], ...] = ()  # regular expressions, and what transformers has for mlx-lm's path of a module
    own_attention: bool = False  # or layers that are no attention: they follow neither blocks nor trees


GELU = ("hidden_activation", "gelu_pytorch_tanh")

W1_W2_W3 = (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))
LFM2_MLP = tuple((rf"(feed_forward)\.{ours}\b", rf"\1.{name}") for ours, name in W1_W2_W3)
NEOX = ((r"^model\.h\.", "gpt_neox.layers."), (r"^model\.embed_out\b", "embed_out"), (r"^model\.(embed_in|final)", r"gpt_neox.\1"))


def _read(activation: str, key: str = "hidden_act", **settings: Any) -> Architecture:
    return Architecture(by_transformers=True, activation=(key, activation), **settings)


# Architectures for which tests/test_architectures.py proves that MLX's logits equal transformers'.
PROVEN: Mapping[str, Architecture] = {
    "cohere2": Architecture(tied=True, sliding_window=4096, pattern=4),
    "ernie4_5": Architecture(rope_theta=500_000.0, tied=True),
    "exaone4": Architecture(SCALINGS, sliding_window=4096, pattern=4),
    "gemma2": Architecture(
        tied=True, activation=GELU, sliding_window=4096, window_ignored=True, defaults={"query_pre_attn_scalar": 256}
    ),
    "gemma3_text": Architecture(SCALINGS, rope_theta=1_000_000.0, tied=True, activation=GELU, sliding_window=4096, pattern=6),
    "glm4": Architecture(defaults={"partial_rotary_factor": 0.5}),
    "granite": Architecture(SCALINGS),
    "hunyuan_v1_dense": Architecture(frozenset({"dynamic"})),
    "llama": Architecture(SCALINGS),
    "mistral": Architecture(SCALINGS, sliding_window=4096, window_ignored=True),
    "mixtral": Architecture(rope_theta=1_000_000.0, window_ignored=True),
    "mpt": Architecture(tied=True),
    "olmo2": Architecture(SCALINGS),
    "olmo3": Architecture(SCALINGS, rope_theta=500_000.0, sliding_window=4096),
    "olmoe": Architecture(SCALINGS),
    "phi3": Architecture(window_ignored=True),
    "qwen2": Architecture(SCALINGS, sliding_window=4096, window_ignored=True),
    "qwen3": Architecture(SCALINGS, sliding_window=4096, window_ignored=True),
    "qwen3_moe": Architecture(sliding_window=4096, window_ignored=True, defaults={"mlp_only_layers": []}),
    "seed_oss": Architecture(SCALINGS),
    "smollm3": Architecture(SCALINGS, rope_theta=2_000_000.0, tied=True, window_ignored=True),
    "stablelm": Architecture(defaults={"partial_rotary_factor": 0.25}),
    "cohere": _read("silu"),
    "deepseek_v3": _read("silu", own_attention=True),
    "dots1": _read("silu", window_ignored=True),
    "gemma": _read("gelu_pytorch_tanh"),
    "gemma4_text": _read("gelu_pytorch_tanh", "hidden_activation", scalings=frozenset({"proportional"}), own_attention=True),
    "glm4_moe": _read("silu"),
    "gpt_neox": _read("gelu", names=NEOX),
    "gpt_oss": _read("silu", scalings=frozenset({"yarn"}), own_attention=True),
    "granitemoe": _read("silu"),
    "granitemoehybrid": _read("silu", own_attention=True),
    "lfm2": _read("silu", own_attention=True),
    "lfm2_moe": _read("silu", own_attention=True, names=LFM2_MLP),
    "mamba2": _read("silu", own_attention=True),
    "ministral3": _read("silu", scalings=frozenset({"yarn"}), own_attention=True),
    "nemotron": _read("relu2"),
    "phi": _read("gelu_new"),
    "qwen2_moe": _read("silu", window_ignored=True),
    "qwen3_5_text": _read("silu", own_attention=True, names=((r"^language_model\.", ""),)),
    "qwen3_5_moe_text": _read("silu", own_attention=True, names=((r"^language_model\.", ""),)),
    "qwen3_next": _read("silu", own_attention=True),
    "starcoder2": _read("gelu_pytorch_tanh", window_ignored=True),
}

NESTED = ((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.", ""))
ALONE = ((r"^language_model\.", ""),)
# Models that see, trained on text: the type of the text model where the file is silent, and transformers' names of its modules.
SEEING: Mapping[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "gemma3": ("gemma3_text", NESTED),
    "gemma4": ("gemma4_text", NESTED),
    "mistral3": ("mistral", NESTED),
    "qwen3_5": ("qwen3_5_text", ALONE),  # which transformers opens as the text model alone
    "qwen3_5_moe": ("qwen3_5_moe_text", ALONE),
}
