"""MLX computes what transformers computes, for every architecture that we claim and both styles of config.json."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_seeing import GEMMA3_4B
from tiny_models import SEEING, SIZES, VOCABULARY, make_joined, make_seeing, make_tiny, mostly_long, rewrite_as_v4

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.models.mlx_config import check_supported, max_exact_length, mlx_overlay
from mlx_finetune.models.mlx_proven import PROVEN
from mlx_finetune.models.mlx_proven import SEEING as SEEING_TYPES
from mlx_finetune.models.weights import tensor_headers
from mlx_finetune.training.checks import check_mlx

RELATIVE = 1e-4  # float32, random weights, four layers: 1e-6 to 1e-5 is usual; a wrong setting gives 1e-1
SCALING: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "dynamic": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0},
}
THETA = 100_000.0
SCALED = (  # each kind, and each place where it is written
    *(("gemma3_text", "linear"), ("granite", "yarn"), ("hunyuan_v1_dense", "dynamic"), ("llama", "linear"), ("llama", "llama3")),
    *(("llama", "yarn"), ("olmo3", "yarn"), ("qwen3", "llama3"), ("smollm3", "yarn")),
)
WINDOWED = ("gemma2", "mistral", "phi3", "qwen2", "qwen3", "smollm3")


def rope(model_type: str, scaling: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`rope_parameters` with a theta that is no library's default."""
    if model_type in ("gemma4_text", "gpt_oss", "mamba2", "ministral3"):  # kinds of their own, or none: see tiny_models.py
        return {}
    full = {"rope_theta": THETA, **(scaling or {"rope_type": "default"})}
    plain = {"rope_theta": 20_000.0 if model_type == "gemma3_text" else THETA, "rope_type": "default"}
    nested = model_type in ("gemma3_text", "olmo3")
    return {"rope_parameters": {"full_attention": full, "sliding_attention": plain} if nested else full}


def tokens(length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(3, VOCABULARY, size=(2, length))


def mlx_logits(folder: Path, inputs: np.ndarray) -> np.ndarray:
    import mlx.core as mx

    from mlx_finetune.engines.mlx.load import load_model

    return np.array(load_model(folder, "float32")(mx.array(inputs)))


def transformers_logits(folder: Path, inputs: np.ndarray) -> np.ndarray:
    import torch

    from mlx_finetune.engines.torch.load import auto_class

    model = auto_class(folder).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(inputs)).logits.numpy()


def difference(folder: Path, length: int = 24) -> float:
    """max |MLX - transformers| / max |transformers|; 24 tokens are more than the tiny models' window of 8."""
    theirs = transformers_logits(folder, tokens(length))
    return float(np.abs(mlx_logits(folder, tokens(length)) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("model_type", sorted(PROVEN))
def test_mlx_logits_equal_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    make_tiny(model_type, tmp_path / "v5", tokenizer=False, changes=rope(model_type))
    assert difference(tmp_path / "v5") < RELATIVE
    shutil.copytree(tmp_path / "v5", tmp_path / "v4")
    config = tmp_path / "v4" / "config.json"
    rewrite_as_v4(config)
    if model_type == "olmo3":  # transformers 5 reads a version 4 olmo3 rightly with its usual theta only
        config.write_text(config.read_text().replace(str(THETA), "500000.0"))
    assert difference(tmp_path / "v4") < RELATIVE


OF_EXPERTS = "deepseek_v3 dots1 glm4_moe granitemoe granitemoehybrid lfm2_moe mixtral olmoe qwen2_moe qwen3_moe qwen3_next"


@pytest.mark.parametrize("model_type", [*OF_EXPERTS.split(), "qwen3_5_moe_text"])
def test_experts_joined_in_one_tensor_are_read_like_those_that_stand_one_by_one(model_type: str, tmp_path: Path) -> None:
    make_tiny(model_type, tmp_path / "model", tokenizer=False, changes=rope(model_type))
    make_joined(model_type, tmp_path / "joined", rope(model_type))
    names = [sorted(tensor_headers(tmp_path / folder)) for folder in ("model", "joined")]
    assert names[0] != names[1]
    assert difference(tmp_path / "joined") < RELATIVE


@pytest.mark.parametrize(
    ("model_type", "kind"),
    mostly_long(
        [(name, kind) for name, one in sorted(PROVEN.items()) for kind in sorted(one.scalings) if not one.by_transformers],
        *SCALED,
    ),
)
def test_scaled_rope_equals_that_of_transformers(model_type: str, kind: str, tmp_path: Path) -> None:
    changes = rope(model_type, SCALING[kind])
    make_tiny(model_type, tmp_path / "v5", tokenizer=False, changes=changes)
    assert difference(tmp_path / "v5", length=200) < RELATIVE
    make_tiny(model_type, tmp_path / "plain", tokenizer=False, changes=rope(model_type))
    scaled, plain = (transformers_logits(tmp_path / name, tokens(200)) for name in ("v5", "plain"))
    assert np.abs(scaled - plain).max() > 1e-2  # the scaling is seen at all
    if model_type != "olmo3":
        rewrite_as_v4(tmp_path / "v5" / "config.json")
        assert difference(tmp_path / "v5", length=200) < RELATIVE


def test_what_a_published_model_that_sees_leaves_unsaid_is_what_transformers_takes() -> None:
    from transformers import CONFIG_MAPPING

    check_supported(GEMMA3_4B)
    read = CONFIG_MAPPING["gemma3"].from_dict(GEMMA3_4B).text_config
    text = mlx_overlay(GEMMA3_4B)["text_config"]
    names = ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "query_pre_attn_scalar")
    assert {name: text[name] for name in names} == {name: getattr(read, name) for name in names}
    assert text["rope_theta"] == 1_000_000 and text["rope_scaling"]["factor"] == 8 and text["tie_word_embeddings"] is True
    assert text["sliding_window_pattern"] == 6


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_next"])
def test_norms_to_which_1_is_added_are_not_rounded_before_they_are_computed_with(model_type: str, tmp_path: Path) -> None:
    make_tiny(model_type, tmp_path / "model", tokenizer=False, dtype="bfloat16")
    assert difference(tmp_path / "model") < RELATIVE


@pytest.mark.parametrize(("model_type", "text"), SEEING)
def test_models_that_see_read_text_as_transformers_does(model_type: str, text: str, tmp_path: Path) -> None:
    make_seeing(model_type, text, tmp_path / "model")
    assert difference(tmp_path / "model") < RELATIVE


@pytest.mark.parametrize(
    ("model_type", "option"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"head_dim": 32}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("cohere2", {"attention_bias": True}),
        ("ernie4_5", {"tie_word_embeddings": False, "use_bias": True}),
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
        ("glm4", {"attention_bias": True}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}),
        ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    ],
)
def test_options_of_an_architecture_equal_those_of_transformers(model_type: str, option: dict[str, Any], tmp_path: Path) -> None:
    make_tiny(model_type, tmp_path / "model", tokenizer=False, changes=rope(model_type) | option)
    assert difference(tmp_path / "model") < RELATIVE


@pytest.mark.parametrize("model_type", WINDOWED)
def test_within_the_window_that_mlx_ignores_logits_are_exact_and_beyond_they_are_not(model_type: str, tmp_path: Path) -> None:
    changes = {"sliding_window": 8}
    if model_type in ("qwen2", "qwen3"):
        changes |= {"use_sliding_window": True, "max_window_layers": 1}
    if model_type == "smollm3":
        changes |= {"use_sliding_window": True}
    make_tiny(model_type, tmp_path / "model", tokenizer=False, changes=changes)
    assert max_exact_length(json.loads((tmp_path / "model" / "config.json").read_text())) == 8
    assert difference(tmp_path / "model", length=8) < RELATIVE
    assert difference(tmp_path / "model", length=24) > 100 * RELATIVE


@pytest.mark.parametrize("model_type", sorted(name for name, one in PROVEN.items() if not one.by_transformers))
def test_a_config_without_optional_keys_means_what_transformers_takes_it_to_mean(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    sizes = SIZES | {"num_hidden_layers": 12}  # two periods of the longest pattern
    silent = {"model_type": model_type, **sizes}
    spoken = CONFIG_MAPPING[model_type](**sizes).to_dict()
    ours, theirs = ({**config, **mlx_overlay(config)} for config in (silent, spoken))
    assert max_exact_length(silent) == max_exact_length(spoken)
    read = mlx_arguments(model_type)
    assert {key: ours[key] for key in ours if key in read} == {key: theirs[key] for key in ours if key in read}


def mlx_arguments(model_type: str) -> set[str]:
    """The keys that mlx-lm's class reads."""
    import importlib
    from dataclasses import fields

    from mlx_lm.utils import MODEL_REMAPPING

    from mlx_finetune.engines.mlx.layouts import OWN

    if model_type in OWN:
        return {field.name for field in fields(OWN[model_type][1])}
    module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}")
    return {field.name for field in fields(module.ModelArgs)} - {"rope_parameters"}


LLAMA = {"model_type": "llama", **SIZES}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "falcon_h1"}, "falcon_h1"),
        ({}, "None"),
        ({"model_type": "exaone4"}, "no hidden_size"),
        (LLAMA | {"model_type": "gemma2", "attn_logit_softcapping": None}, "gemma2 without attn_logit_softcapping"),
        (LLAMA | {"hidden_act": "gelu"}, "gelu"),
        (LLAMA | {"model_file": "custom.py"}, "custom.py"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"gptq.*not supported yet"),
        (LLAMA | {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA | {"rope_scaling": SCALING["yarn"] | {"truncate": False}}, "truncate"),
        (LLAMA | {"rope_scaling": SCALING["yarn"] | {"attention_factor": 2.0}}, "attention_factor"),
        (LLAMA | {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "longrope"),
        (LLAMA | {"model_type": "glm4", "rope_scaling": SCALING["yarn"]}, "yarn"),
        (LLAMA | {"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (
            LLAMA | {"model_type": "cohere2", "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2},
            "layer_types",
        ),
    ],
)
def test_what_mlx_would_compute_otherwise_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_supported(config)


def test_a_model_quantised_by_mlx_lm_is_supported() -> None:
    settings = {"group_size": 64, "bits": 4}
    check_supported(LLAMA | {"quantization": settings, "quantization_config": settings})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_are_loaded_in_the_dtype_that_is_asked_for(dtype: str, tiny_llama: Path) -> None:
    from mlx.utils import tree_flatten

    from mlx_finetune.engines.mlx.load import DTYPES, load_model

    parameters = tree_flatten(load_model(tiny_llama, dtype).parameters())
    assert {value.dtype for _, value in parameters} == {DTYPES[dtype]}


def test_quantised_layers_are_left_as_they_are_and_the_rest_is_cast(tiny_llama: Path, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model

    from mlx_finetune.engines.mlx.load import load_model

    config = json.loads((tiny_llama / "config.json").read_text())
    model, config = quantize_model(load_model(tiny_llama, "float32"), config, group_size=32, bits=4)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    layer = load_model(tmp_path, "bfloat16").model.layers[0]
    assert layer.self_attn.q_proj.scales.dtype == mx.float32
    assert layer.input_layernorm.weight.dtype == mx.bfloat16
    inputs = mx.array(tokens(24))
    packed, unpacked = load_model(tmp_path, "float32")(inputs), dequantize_model(model)(inputs)
    assert mx.abs(packed - unpacked).max() < RELATIVE * mx.abs(unpacked).max()


def test_a_checkpoint_in_shards_is_read_whole_and_a_stray_file_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from mlx_finetune.engines.mlx.load import load_model

    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert np.abs(mlx_logits(tmp_path, tokens(24)) - mlx_logits(tiny_llama, tokens(24))).max() == 0
    shutil.copy(tiny_llama / "model.safetensors", tmp_path / "model-old.safetensors")
    with pytest.raises(UserError, match=r"model-old\.safetensors is not part of the model"):
        load_model(tmp_path, "float32")
    (tmp_path / "model-old.safetensors").rename(tmp_path / "old.safetensors")
    min(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match="model-00001-of"):
        load_model(tmp_path, "float32")


def test_a_folder_that_is_no_whole_checkpoint_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    from mlx_finetune.engines.mlx.load import load_model

    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_model(tmp_path / "nothing", "float32")
    config = json.loads((tiny_llama / "config.json").read_text())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        load_model(folder, "float32")
    weights = (tiny_llama / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="not loadable with MLX"):
        load_model(folder, "float32")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(UserError, match=r"not loadable with MLX: .*mlp"):
        load_model(folder, "float32")


def test_evaluating_with_mlx_beyond_the_sliding_window_is_refused(tmp_path: Path) -> None:
    model = make_tiny("mistral", tmp_path / "mistral", tokenizer=True, changes={"sliding_window": 32})
    turns = (Message("user", "list the files " * 8), Message("assistant", "```shell\nls\n```"))
    conversations = [Conversation(turns, "gptme", f"log-{i}", "MIT", {"i": i}) for i in range(3)]
    write_conversations(tmp_path / "c.jsonl", conversations)
    prepare([tmp_path / "c.jsonl"], ChatTemplate.load(model), make_config({}, "test"), tmp_path / "data", {})
    with pytest.raises(UserError, match="exact up to 32"):
        check_mlx(model, Dataset.open(tmp_path / "data"))


def test_the_docs_name_every_kind_of_model_that_mlx_computes() -> None:
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("As config.json calls them"))
    assert {name.strip("`") for name in line.rstrip(".").partition(": ")[2].split(", ")} == PROVEN.keys() | SEEING_TYPES.keys()
