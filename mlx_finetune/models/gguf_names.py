"""How llama.cpp names what Hugging Face stores, for the architectures that are written and read here.

llama.cpp's names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

OUTSIDE_LAYERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
INSIDE_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    **MLP,
}
NORMS_OF_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
# Norms before and after both parts of a layer: what others call post_attention_layernorm stands elsewhere.
FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
FUSED = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
QKV, ALL_LINEARS = ("attn_q", "attn_k", "attn_v"), ("attn_q", "attn_k", "attn_v", "attn_output", *MLP)
IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Naming:
    """An architecture.

    name: llama.cpp's word for it.
    inside: what a layer has, by llama.cpp's name; biases: those of them that may have one.
    rotates_pairs: llama.cpp rotates neighbouring rows of a head, Hugging Face the head's two halves: rows change places.
    norms_plus_one: Hugging Face stores the weights of norms less one.
    activation: the one that llama.cpp computes.
    """

    name: str
    inside: Mapping[str, str] = field(default_factory=lambda: INSIDE_LAYERS)
    biases: tuple[str, ...] = ()
    rotates_pairs: bool = False
    norms_plus_one: bool = False
    activation: str = "silu"


NAMINGS: Mapping[str, Naming] = {
    "llama": Naming("llama", biases=ALL_LINEARS, rotates_pairs=True),
    "mistral": Naming("llama", rotates_pairs=True),
    "smollm3": Naming("smollm3", rotates_pairs=True),
    "granite": Naming("granite", rotates_pairs=True),
    "qwen2": Naming("qwen2", biases=QKV),
    "qwen3": Naming("qwen3", INSIDE_LAYERS | NORMS_OF_HEADS),
    "gemma3_text": Naming(
        "gemma3", INSIDE_LAYERS | NORMS_OF_HEADS | FOUR_NORMS, norms_plus_one=True, activation="gelu_pytorch_tanh"
    ),
    "phi3": Naming("phi3", FUSED),
}


def gguf_name(naming: Naming, name: str) -> tuple[str, str] | None:
    """'model.layers.3.self_attn.q_proj.weight' -> 'blk.3.attn_q.weight', 'attn_q'; None where it has no place."""
    outside = {theirs: ours for ours, theirs in OUTSIDE_LAYERS.items()}
    if name in outside:
        return outside[name], ""
    if (found := IN_LAYER.fullmatch(name)) is None:
        return None
    layer, module, kind = found.groups()
    part = next((part for part, theirs in naming.inside.items() if theirs == module), None)
    if part is None or (kind == "bias" and part not in naming.biases):
        return None
    return f"blk.{layer}.{part}.{kind}", part


def hugging_face_name(naming: Naming, name: str) -> tuple[str, str] | None:
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight', 'attn_q'; None where it has no place."""
    if name in OUTSIDE_LAYERS:
        return OUTSIDE_LAYERS[name], ""
    match name.split("."):
        case "blk", layer, part, "weight" | "bias" as kind if part in naming.inside:
            if kind == "weight" or part in naming.biases:
                return f"model.layers.{layer}.{naming.inside[part]}.{kind}", part
    return None
