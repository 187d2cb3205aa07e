"""What mlx-lm trained, of any architecture that it loads, comes back in the original weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mxfp4_checkpoints import make_mxfp4
from safetensors.numpy import load_file, save_file
from test_architectures import RELATIVE, tokens, transformers_logits
from tiny_models import make_tiny, mostly_long

from mlx_finetune.errors import UserError
from mlx_finetune.export.fuse import fuse
from mlx_finetune.export.verify import fuse_and_verify
from mlx_finetune.models.mlx_proven import PROVEN
from mlx_finetune.models.weights import tensor_headers

DORA = ("cohere", "gemma2", "gpt_neox", "llama", "phi3", "qwen2", "qwen3_5_text")
# Of each way in which a checkpoint's tensors are named or joined, one.
SOME = "deepseek_v3 gemma3_text gpt_neox gpt_oss granitemoehybrid lfm2 llama mamba2 mixtral mpt phi3 qwen3_moe qwen3_next".split()
FULL = ("deepseek_v3", "gpt_neox", "granitemoe", "lfm2", "llama", "mamba2", "mixtral", "qwen3_5_text", "qwen3_moe", "qwen3_next")
# Recurrences sum in another order in each engine and on each CPU: up to 4e-4 was seen; a wrong weight gives 1e-2.
RECURRENT = ("granitemoehybrid", "mamba2", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")


def trained(model: Path, adapter: Path, kind: str, dtype: str = "float32") -> np.ndarray:
    """Writes an adapter as mlx-lm writes it, on every module that mlx-lm adapts; its logits. float32."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_finetune.engines.mlx.load import load_model

    network = load_model(model, "float32")
    network.freeze()
    how = {"rank": 3, "scale": 1.5, "dropout": 0.0}
    if kind == "full":
        network.unfreeze()
    else:
        linear_to_lora_layers(network, len(network.layers), how, use_dora=kind == "dora")
    random = np.random.default_rng(3)
    arrays = {}
    for name, array in tree_flatten(network.trainable_parameters()):
        noise = random.standard_normal(array.shape).astype(np.float32)
        size = 0.3 if name.endswith(("lora_a", "lora_b")) else 0.05
        moved = array * mx.array(1 + size * noise) if name.endswith(".m") else array + mx.array(size * noise)
        arrays[name] = moved.astype(getattr(mx, dtype))
    network.load_weights(list(arrays.items()), strict=False)
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), arrays)
    config = {"fine_tune_type": kind, "num_layers": len(network.layers), "lora_parameters": how}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return np.array(network(mx.array(tokens(24))).astype(mx.float32))


def check(model_type: str, kind: str, tmp_path: Path, **how: Any) -> None:
    model = make_tiny(model_type, tmp_path / "model", tokenizer=False, **how)
    expected = trained(model, tmp_path / "adapter", kind)
    fuse(model, tmp_path / "adapter", tmp_path / "fused")
    found, before = (transformers_logits(folder, tokens(24)) for folder in (tmp_path / "fused", model))
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < (8 if model_type in RECURRENT else 1) * RELATIVE * scale
    assert np.abs(before - expected).max() > 1e-2 * scale  # the adapter is seen at all
    headers = [tensor_headers(folder) for folder in (model, tmp_path / "fused")]
    assert [(n, one.dtype, one.shape, one.start) for n, one in headers[0].items()] == [
        (n, one.dtype, one.shape, one.start) for n, one in headers[1].items()
    ]


@pytest.mark.parametrize("model_type", mostly_long(sorted(PROVEN), *SOME))
def test_lora_of_mlx_lm_on_all_that_it_adapts_is_fused_into_the_original(model_type: str, tmp_path: Path) -> None:
    check(model_type, "lora", tmp_path)


@pytest.mark.parametrize("model_type", DORA)
def test_dora_of_mlx_lm_is_fused_into_the_original(model_type: str, tmp_path: Path) -> None:
    check(model_type, "dora", tmp_path)


@pytest.mark.parametrize("model_type", FULL)
def test_weights_that_mlx_lm_trained_themselves_are_handed_back(model_type: str, tmp_path: Path) -> None:
    check(model_type, "full", tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_5_text"])
def test_weights_that_mlx_lm_trained_themselves_in_bfloat16_are_handed_back_to_the_bit(model_type: str, tmp_path: Path) -> None:
    import mlx.core as mx

    model = make_tiny(model_type, tmp_path / "model", tokenizer=True, dtype="bfloat16")
    trained(model, tmp_path / "adapter", "full", dtype="bfloat16")
    _, verified = fuse_and_verify(model, tmp_path / "adapter", tmp_path / "fused", ["The tests run."])
    assert verified.passed
    wanted: Any = mx.load(str(tmp_path / "adapter" / "adapters.safetensors"))
    found: Any = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    bare = {name.removeprefix("language_model."): array for name, array in wanted.items()}
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        assert mx.array_equal(found[name], bare[name]).item(), name


def test_an_adapter_of_an_older_mlx_lm_is_fused_and_proven(tmp_path: Path) -> None:
    model = make_tiny("qwen3_moe", tmp_path / "model", tokenizer=True)
    expected = trained(model, tmp_path / "adapter", "lora")
    path, config = tmp_path / "adapter" / "adapters.safetensors", tmp_path / "adapter" / "adapter_config.json"
    arrays = {name: a.reshape(-1, a.shape[-1]) if name.endswith("lora_a") else a for name, a in load_file(path).items()}
    save_file(arrays, path)
    told = json.loads(config.read_text())
    config.write_text(json.dumps({"lora_layers": told["num_layers"], "lora_parameters": {"rank": 3, "alpha": 1, "scale": 1.5}}))
    _, verified = fuse_and_verify(model, tmp_path / "adapter", tmp_path / "fused", ["The tests run."])
    assert verified.passed
    assert np.abs(transformers_logits(tmp_path / "fused", tokens(24)) - expected).max() < RELATIVE * np.abs(expected).max()


def refused(model: Path, adapter: Path, out: Path) -> UserError:
    """What fusing says; it leaves nothing behind."""
    there = set(out.parent.iterdir())
    with pytest.raises(UserError) as error:
        fuse(model, adapter, out)
    assert "\n" not in error.value.message and len(error.value.message) < 500 and error.value.hint
    assert set(out.parent.iterdir()) == there
    return error.value


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_parameters": [1, 2]}, "with scale None"),
        ({"lora_parameters": {"scale": True}}, "with scale True"),
        ({"lora_parameters": {"scale": 1.5}}, "mlx-lm does not open it: 'rank'"),
        ({"lora_parameters": {"scale": 1.5, "rank": 4}}, "does not match"),
        ({"num_layers": 1}, "not an adapter parameter"),
        ({"num_layers": "all"}, "mlx-lm does not open it"),
    ],
)
def test_settings_that_mlx_lm_would_not_open_are_told_before_anything_is_written(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = make_tiny("llama", tmp_path / "model", tokenizer=False)
    trained(model, tmp_path / "adapter", "lora")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    assert said in refused(model, tmp_path / "adapter", tmp_path / "fused").message


@pytest.mark.parametrize("damage", ["m one short", "m of one number", "float64"])
def test_magnitudes_and_numbers_of_another_kind_are_refused(damage: str, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", tokenizer=False)
    trained(model, tmp_path / "adapter", "dora")
    path = tmp_path / "adapter" / "adapters.safetensors"
    arrays = load_file(path)
    name = "model.layers.1.self_attn.q_proj." + ("lora_a" if damage == "float64" else "m")
    arrays[name] = arrays[name].astype(np.float64) if damage == "float64" else arrays[name][: 1 if "of one" in damage else -1]
    save_file(arrays, path)
    assert "model.layers.1.self_attn.q_proj" in refused(model, tmp_path / "adapter", tmp_path / "fused").message


def test_an_adapter_on_packed_experts_is_refused_by_name(tmp_path: Path) -> None:
    model = make_mxfp4(tmp_path / "model", tokenizer=False)
    trained(model, tmp_path / "adapter", "lora")
    error = refused(model, tmp_path / "adapter", tmp_path / "fused")
    assert "mlp.experts." in error.message and "packed" in error.message and "unquantised" in error.hint


def test_a_checkpoint_that_lacks_an_expert_is_refused_by_its_name(tmp_path: Path) -> None:
    model = make_tiny("qwen3_moe", tmp_path / "model", tokenizer=False)
    trained(model, tmp_path / "adapter", "lora")
    arrays = load_file(model / "model.safetensors")
    del arrays["model.layers.2.mlp.experts.1.down_proj.weight"]
    save_file(arrays, model / "model.safetensors", {"format": "pt"})
    assert "model.layers.2.mlp.experts.1.down_proj.weight" in refused(model, tmp_path / "adapter", tmp_path / "fused").message


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("half", "up_proj.weight has lora_b and not lora_a"),
        ("shape", "up_proj.weight [4, 48, 64] does not take lora_a [4, 2, 64]"),
        ("nan", "up_proj.weight has numbers that are not finite"),
        ("other model", "experts_mlp.down_proj.weight is not made of the tensors of the checkpoint"),
    ],
)
def test_a_broken_adapter_is_one_line_and_leaves_nothing(damage: str, said: str, tmp_path: Path) -> None:
    model = make_tiny("qwen3_moe", tmp_path / "model", tokenizer=False)
    trained(model, tmp_path / "adapter", "lora")
    path = tmp_path / "adapter" / "adapters.safetensors"
    arrays = load_file(path)
    name = "model.layers.0.mlp.switch_mlp.up_proj.lora_a"
    if damage == "half":
        del arrays[name]
    elif damage == "other model":
        arrays = {key.replace("switch_mlp", "experts_mlp"): array for key, array in arrays.items()}
    else:
        arrays[name] = arrays[name][:, :-1] if damage == "shape" else np.full_like(arrays[name], np.nan)
    save_file(arrays, path)
    assert said in refused(model, tmp_path / "adapter", tmp_path / "fused").message
