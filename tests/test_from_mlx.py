"""What mlx-lm trained, of any architecture that it loads, comes back in the original weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_architectures import RELATIVE, tokens, transformers_logits
from tiny_models import make_tiny

from mlx_finetune.errors import UserError
from mlx_finetune.export.fuse import fuse
from mlx_finetune.models.mlx_config import PROVEN
from mlx_finetune.models.weights import tensor_headers

DORA = ("cohere", "gemma2", "gpt_neox", "llama", "phi3", "qwen2", "qwen3_5_text")
FULL = ("deepseek_v3", "gpt_neox", "lfm2", "llama", "mamba2", "mixtral", "qwen3_5_text", "qwen3_moe", "qwen3_next")


def trained(model: Path, adapter: Path, kind: str) -> np.ndarray:
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
        arrays[name] = array * mx.array(1 + size * noise) if name.endswith(".m") else array + mx.array(size * noise)
    network.load_weights(list(arrays.items()), strict=False)
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), arrays)
    config = {"fine_tune_type": kind, "num_layers": len(network.layers), "lora_parameters": how}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return np.array(network(mx.array(tokens(24))))


def check(model_type: str, kind: str, tmp_path: Path, **how: Any) -> None:
    model = make_tiny(model_type, tmp_path / "model", tokenizer=False, **how)
    expected = trained(model, tmp_path / "adapter", kind)
    fuse(model, tmp_path / "adapter", tmp_path / "fused")
    found, before = (transformers_logits(folder, tokens(24)) for folder in (tmp_path / "fused", model))
    scale = np.abs(expected).max()
    # mlx-lm's qwen3_next is itself 5e-5 away from transformers'
    assert np.abs(found - expected).max() < (3 if model_type == "qwen3_next" else 1) * RELATIVE * scale
    assert np.abs(before - expected).max() > 1e-2 * scale  # the adapter is seen at all
    headers = [tensor_headers(folder) for folder in (model, tmp_path / "fused")]
    assert [(n, one.dtype, one.shape, one.start) for n, one in headers[0].items()] == [
        (n, one.dtype, one.shape, one.start) for n, one in headers[1].items()
    ]


@pytest.mark.parametrize("model_type", sorted(PROVEN))
def test_lora_of_mlx_lm_on_all_that_it_adapts_is_fused_into_the_original(model_type: str, tmp_path: Path) -> None:
    check(model_type, "lora", tmp_path)


@pytest.mark.parametrize("model_type", DORA)
def test_dora_of_mlx_lm_is_fused_into_the_original(model_type: str, tmp_path: Path) -> None:
    check(model_type, "dora", tmp_path)


@pytest.mark.parametrize("model_type", FULL)
def test_weights_that_mlx_lm_trained_themselves_are_handed_back(model_type: str, tmp_path: Path) -> None:
    check(model_type, "full", tmp_path)


@pytest.mark.parametrize("damage", ["half", "shape", "nan", "other model"])
def test_a_broken_adapter_is_one_line_and_leaves_nothing(damage: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

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
    with pytest.raises(UserError) as error:
        fuse(model, tmp_path / "adapter", tmp_path / "fused")
    assert "\n" not in error.value.message and error.value.hint
    assert not (tmp_path / "fused").exists() and {path.name for path in tmp_path.iterdir()} == {"model", "adapter"}
