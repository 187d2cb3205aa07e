"""The kinds of a GGUF: how near the stored numbers are to the model's, and what llama.cpp makes of them."""

from pathlib import Path

import numpy as np
import pytest
from llama_cpp import library, opened
from safetensors.numpy import load_file
from test_gguf_write import PROBE, logits_of
from tiny_models import make_tiny

from mlx_finetune.errors import UserError
from mlx_finetune.export import gguf_kinds
from mlx_finetune.export.gguf_write import write_gguf

# Of the largest number of a block of 32 (of a row for floats), as the kind rounds; and how llama.cpp's logits then correlate
# with transformers' on the exact weights: it rounds activations as well, and random layers magnify what is rounded.
ROUNDED = {"f16": (2.0**-11, 0.9999), "bf16": (2.0**-8, 0.999), "q8_0": (0.5 / 127 + 2.0**-11, 0.99), "q4_0": (0.126, 0.6)}


@pytest.mark.parametrize("kind", ROUNDED)
def test_each_kind_keeps_the_stored_numbers_as_near_as_its_rounding_lets_it(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader, dequantize

    summary = write_gguf(tiny_llama, tmp_path / "model.gguf", kind)
    tensor = next(t for t in GGUFReader(tmp_path / "model.gguf").tensors if t.name == "blk.1.ffn_down.weight")
    stored = load_file(tiny_llama / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].reshape(-1, 32)
    found = dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32)
    bound, correlation = ROUNDED[kind]
    assert (np.abs(found - stored) <= bound * np.abs(stored).max(axis=1, keepdims=True)).all()
    with opened(tmp_path / "model.gguf") as llama:
        assert np.corrcoef(llama.logits(PROBE).ravel(), logits_of(tiny_llama).ravel())[0, 1] > correlation
    assert (summary.architecture, summary.kind, summary.bytes) == ("llama", kind, (tmp_path / "model.gguf").stat().st_size)


@pytest.mark.parametrize(("kind", "bound"), [("q4_k_m", 0.15), ("q5_k_m", 0.08), ("q6_k", 0.04)])
def test_k_quants_are_llama_cpps_own_and_give_the_outer_layers_more_bits(kind: str, bound: float, tmp_path: Path) -> None:
    from gguf import GGUFReader, dequantize

    library()
    changes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64}
    model = make_tiny("llama", tmp_path / "model", tokenizer=True, changes=changes)
    write_gguf(model, tmp_path / "model.gguf", kind)
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    most = {"q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K"}[kind]
    assert [types[f"blk.{layer}.attn_v.weight"] == "Q6_K" for layer in range(8)] == [
        layer in (0, 3, 6, 7) or most == "Q6_K" for layer in range(8)
    ]
    assert (types["blk.0.attn_q.weight"], types["output.weight"], types["output_norm.weight"]) == (most, "Q6_K", "F32")
    stored = load_file(model / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    found = dequantize(tensors["blk.1.ffn_up.weight"].data, tensors["blk.1.ffn_up.weight"].tensor_type)
    assert np.sqrt(np.mean((found - stored) ** 2)) < bound * stored.std()  # 0.075, 0.036 and 0.018 measured
    with opened(tmp_path / "model.gguf") as llama:
        assert np.isfinite(llama.logits(PROBE[:4])).all()


def test_k_quants_without_llama_cpp_say_what_to_install(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_kinds, "LIBRARIES", {})
    gguf_kinds._ggml.cache_clear()
    with pytest.raises(UserError, match="not installed") as refused:
        write_gguf(tiny_llama, tmp_path / "model.gguf", "q4_k_m")
    assert "pip install xllamacpp" in refused.value.hint
    assert list(tmp_path.iterdir()) == []
