"""Config values as their makers published them, with the number of parameters that they give for the model."""

from typing import Any

LLAMA_LIKE = {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "zephyr-7b-beta": (
        {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "intermediate_size": 14336, "vocab_size": 32000, "sliding_window": 4096, "max_position_embeddings": 32768,
         "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
        7.24e9,
    ),
    "Qwen3-4B-Instruct-2507": (
        {"model_type": "qwen3", "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 128, "intermediate_size": 9728, "vocab_size": 151936, "max_position_embeddings": 262144, **LLAMA_LIKE},
        4.02e9,
    ),
    "Llama-3.2-3B": (
        {"model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
         "head_dim": 128, "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 131072, **LLAMA_LIKE},
        3.21e9,
    ),
    "SmolLM3-3B": (
        {"model_type": "smollm3", "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
         "intermediate_size": 11008, "vocab_size": 128256, "max_position_embeddings": 65536, "torch_dtype": "bfloat16"},
        3.08e9,
    ),
    "Replit-v2-CodeInstruct-3B": (  # published are two files of 9.98 GB and 419 MB in float32
        {"model_type": "mpt", "d_model": 2560, "n_heads": 32, "n_layers": 32, "expansion_ratio": 4, "vocab_size": 32768,
         "max_seq_len": 2048, "torch_dtype": "float32"},
        (9.98e9 + 0.419e9) / 4,
    ),
}  # fmt: skip
