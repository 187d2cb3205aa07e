"""config.json that plain `mlx_lm.load` and transformers both read rightly: the keys of version 4 beside those of version 5.

transformers 5.23 takes `rope_scaling` before `rope_parameters` and lets `rope_parameters` speak before `rope_theta`; both
say the same here. Its olmo3 and gemma3 lay `rope_scaling` over the layers of full attention only, as mlx-lm does.
"""

from typing import Any

from mlx_finetune.models.mlx_config import LLAMA_CLASS, Config, mlx_overlay, text_config
from mlx_finetune.models.mlx_overlays import SLIDING

CODE = "auto_map"  # names of a stranger's *.py, which are never copied
# Said in the words of version 4 whatever was there; any other key of the overlay is added only where it is missing.
SAID_AGAIN = frozenset(
    ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", "sliding_window", "sliding_window_pattern")
)


def plain_config(config: Config) -> dict[str, Any]:
    """`config` of a supported architecture with what both libraries need to read; nothing that transformers reads is lost."""
    plain = {key: value for key, value in config.items() if key != CODE}
    if text_config(config) is not config:
        return plain | {"text_config": plain_config(text_config(config))}
    overlay = mlx_overlay(config)
    overlay.pop("rope_parameters", None)  # None there, lest mlx-lm's class reads them twice; transformers needs them
    if config["model_type"] in LLAMA_CLASS:
        # mlx-lm's class would apply windows by layer; transformers' mistral needs `sliding_window`, which mlx-lm then ignores
        overlay = {key: value for key, value in overlay.items() if key not in ("layer_types", "sliding_window")}
        if config["model_type"] != "smollm3" and SLIDING in (config.get("layer_types") or ()):
            del plain["layer_types"]
    return plain | {key: value for key, value in overlay.items() if key in SAID_AGAIN or plain.get(key) is None}


def dtype_of(config: Config) -> str | None:
    """The dtype that config.json names, such as bfloat16."""
    return config.get("dtype") or config.get("torch_dtype")


def with_dtype(config: Config, dtype: str) -> dict[str, Any]:
    """Says `dtype` under the key of version 5, and under that of version 4, which mlx-lm reads."""
    return dict(config) | {"dtype": dtype, "torch_dtype": dtype}
