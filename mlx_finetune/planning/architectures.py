"""The layers of a model from its config.json alone: which matrices one layer has, and how many other parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from mlx_finetune.errors import UserError
from mlx_finetune.models.mlx_proven import PROVEN

Config = Mapping[str, Any]
Bias = bool | str  # always, never, or where the config's key of that name says so


@dataclass(frozen=True)
class LayerKind:
    """How one `model_type` builds a layer, beyond llama's seven matrices and two norms."""

    fused_qkv: str = ""  # the name of one matrix in place of q_proj, k_proj and v_proj
    fused_gate_up: str = ""
    gated: bool = True  # False: up and down only
    output: str = "o_proj"
    norms: int = 2  # vectors of the hidden size in a layer
    norm_bias: bool = False
    norm_of_heads: str = ""  # of queries and keys; "one": a head's size; "all": of all heads together
    qkv_bias: Bias = "attention_bias"
    output_bias: Bias = "attention_bias"
    mlp_bias: Bias = False
    head_dim: int | None = None  # where the file is silent; None: hidden size by heads


LLAMA = LayerKind(mlp_bias="mlp_bias")
KINDS: Mapping[str, LayerKind] = {
    "cohere2": LayerKind(norms=1),
    "ernie4_5": LayerKind(qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias"),
    "exaone4": LayerKind(norm_of_heads="one", qkv_bias=False, output_bias=False),
    "gemma2": LayerKind(norms=4, head_dim=256),
    "gemma3_text": LayerKind(norms=4, norm_of_heads="one", head_dim=256),
    "glm4": LayerKind(fused_gate_up="gate_up_proj", norms=4, output_bias=False, head_dim=128),
    "granite": LLAMA,
    "hunyuan_v1_dense": LayerKind(norm_of_heads="one"),
    "llama": LLAMA,
    "mistral": LayerKind(qkv_bias=False, output_bias=False),
    "mpt": LayerKind("Wqkv", gated=False, output="out_proj", qkv_bias=False, output_bias=False),
    "olmo2": LayerKind(norm_of_heads="all"),
    "olmo3": LayerKind(norm_of_heads="all"),
    "phi3": LayerKind("qkv_proj", "gate_up_proj", qkv_bias=False, output_bias=False),
    "qwen2": LayerKind(qkv_bias=True, output_bias=False),
    "qwen3": LayerKind(norm_of_heads="one", head_dim=128),
    "seed_oss": LayerKind(output_bias="attention_out_bias", mlp_bias="mlp_bias", head_dim=128),
    "smollm3": LLAMA,
    "stablelm": LayerKind(norm_bias=True, qkv_bias="use_qkv_bias", output_bias=False),
}
TIED_BY_DEFAULT = {"mpt": True}
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class Layers:
    """Sizes of a model, in elements; `linears`: the matrices of one layer, name -> (out, in)."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    gated: bool
    linears: Mapping[str, tuple[int, int]] = field(repr=False)
    vectors: int  # norms and biases of the whole model
    longest: int | None  # positions that the model was made for


def read_layers(config: Config, place: str) -> Layers:
    """The sizes that `config` (a config.json) speaks of; `place` says where it comes from.

    Raises:
        UserError: an architecture that is not known here, or a size that is missing.
    """
    model_type = str(config.get("model_type"))
    if model_type not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise UserError(f"{place}: no plan for architecture {model_type!r}", hint=f"known are {known}")
    if model_type == "mpt":
        config = _mpt_as_llama(config, place)
    for key in NEEDED:
        if not isinstance(config.get(key), int) or config[key] < 1:
            _missing(place, key)
    for key in ("head_dim", "num_key_value_heads"):
        if not isinstance(config.get(key), int | None):
            raise UserError(
                f"{place}: {key} = {config[key]!r} is no number", hint="bring the file back, or download the model again"
            )
    kind, heads, hidden = KINDS[model_type], config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or kind.head_dim or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    tied = config.get("tie_word_embeddings")
    if tied is None:
        tied = TIED_BY_DEFAULT.get(model_type) or PROVEN[model_type].tied
    width, kv_width, intermediate = heads * head_dim, kv_heads * head_dim, config["intermediate_size"]
    linears = _attention(kind, hidden, width, kv_width) | _mlp(kind, hidden, intermediate)
    in_layer = _norms(kind, hidden, head_dim, width, kv_width) + _biases(kind, config, hidden, width + 2 * kv_width, intermediate)
    vectors = config["num_hidden_layers"] * in_layer + hidden * (2 if kind.norm_bias else 1)
    return Layers(
        model_type, config["num_hidden_layers"], hidden, heads, kv_heads, head_dim, intermediate, config["vocab_size"],
        bool(tied), kind.gated, linears, vectors, config.get("max_position_embeddings"),
    )  # fmt: skip


def _missing(place: str, key: str) -> NoReturn:
    raise UserError(f"{place}: no {key}, or it is no size", hint="the file is not whole: download it again")


def _mpt_as_llama(config: Config, place: str) -> Config:
    for key in ("d_model", "n_heads", "n_layers"):
        if not isinstance(config.get(key), int):
            _missing(place, key)
    ratio = 4 if config.get("expansion_ratio") is None else config["expansion_ratio"]
    if type(ratio) is not int:
        _missing(place, "expansion_ratio")
    return {
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "intermediate_size": config["d_model"] * ratio,
        "vocab_size": config.get("vocab_size"),
        "tie_word_embeddings": config.get("tie_word_embeddings"),
        "max_position_embeddings": config.get("max_seq_len"),
    }


def _attention(kind: LayerKind, hidden: int, width: int, kv_width: int) -> dict[str, tuple[int, int]]:
    if kind.fused_qkv:
        return {kind.fused_qkv: (width + 2 * kv_width, hidden), kind.output: (hidden, width)}
    wide, narrow = (width, hidden), (kv_width, hidden)
    return {"q_proj": wide, "k_proj": narrow, "v_proj": narrow, kind.output: (hidden, width)}


def _mlp(kind: LayerKind, hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    down = {"down_proj": (hidden, intermediate)}
    if kind.fused_gate_up:
        return {kind.fused_gate_up: (2 * intermediate, hidden)} | down
    gate = {"gate_proj": (intermediate, hidden)} if kind.gated else {}
    return gate | {"up_proj": (intermediate, hidden)} | down


def _norms(kind: LayerKind, hidden: int, head_dim: int, width: int, kv_width: int) -> int:
    of_heads = {"": 0, "one": 2 * head_dim, "all": width + kv_width}[kind.norm_of_heads]
    return kind.norms * hidden * (2 if kind.norm_bias else 1) + of_heads


def _biases(kind: LayerKind, config: Config, hidden: int, qkv: int, intermediate: int) -> int:
    def has(bias: Bias) -> bool:
        return bool(config.get(bias)) if isinstance(bias, str) else bias

    mlp = (2 if kind.gated else 1) * intermediate + hidden
    return qkv * has(kind.qkv_bias) + hidden * has(kind.output_bias) + mlp * has(kind.mlp_bias)
