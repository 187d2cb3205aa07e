"""A GGUF adapter on the base's GGUF gives, in llama.cpp, the logits of the fused model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import opened
from test_gguf_write import PROBE
from tiny_models import make_tiny

from mlx_finetune.errors import UserError
from mlx_finetune.export.fuse import fuse
from mlx_finetune.export.gguf_adapter import write_gguf_adapter
from mlx_finetune.export.gguf_write import write_gguf

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS: dict[str, tuple[str, Sequence[str], dict[str, Any]]] = {
    "llama": ("llama", LINEARS, {}),
    "rsLoRA": ("llama", ("q_proj", "down_proj"), {"use_rslora": True}),
    "embeddings and head": ("llama", ("k_proj", "embed_tokens", "lm_head"), {}),
    "qwen3": ("qwen3", LINEARS, {}),
    "phi3": ("phi3", ("qkv_proj", "gate_up_proj"), {}),
}


def checkpoint_of(model: Path, folder: Path, modules: Sequence[str], **settings: Any) -> Path:
    """As peft saves it; A and B are random."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(modules), task_type="CAUSAL_LM", **settings))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_base_and_adapter_give_the_logits_of_the_fused_model(name: str, tmp_path: Path) -> None:
    architecture, modules, settings = KINDS[name]
    model = make_tiny(architecture, tmp_path / "model", tokenizer=True)
    checkpoint = checkpoint_of(model, tmp_path / "checkpoint", modules, **settings)
    fuse(model, checkpoint, tmp_path / "fused")
    write_gguf(tmp_path / "fused", tmp_path / "fused.gguf", "f32")
    write_gguf(model, tmp_path / "base.gguf", "f32")
    write_gguf_adapter(checkpoint, model, tmp_path / "adapter.gguf")
    with opened(tmp_path / "fused.gguf") as llama:
        fused = llama.logits(PROBE)
    with opened(tmp_path / "base.gguf") as llama:
        base = llama.logits(PROBE)
        llama.adapt(tmp_path / "adapter.gguf")
        adapted = llama.logits(PROBE)
    assert np.abs(adapted - fused).max() < 1e-3 < 0.5 < np.abs(base - fused).max()  # float32 in another order: 1e-4 measured


def test_dora_shared_embeddings_and_existing_files_are_refused_by_name(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", tokenizer=True)
    tied = make_tiny("llama", tmp_path / "tied", tokenizer=True, changes={"tie_word_embeddings": True})
    dora = checkpoint_of(model, tmp_path / "dora", ["q_proj"], use_dora=True)
    with pytest.raises(UserError, match="DoRA has no place"):
        write_gguf_adapter(dora, model, tmp_path / "adapter.gguf")
    both = checkpoint_of(tied, tmp_path / "both", ["embed_tokens"])
    with pytest.raises(UserError, match="embed_tokens"):
        write_gguf_adapter(both, tied, tmp_path / "adapter.gguf")
    other = make_tiny("llama", tmp_path / "other", tokenizer=True, changes={"hidden_size": 32})
    with pytest.raises(UserError, match="q_proj"):
        write_gguf_adapter(checkpoint_of(model, tmp_path / "lora", ["q_proj"]), other, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()
    (tmp_path / "adapter.gguf").touch()
    with pytest.raises(UserError, match="exists already"):
        write_gguf_adapter(tmp_path / "lora", model, tmp_path / "adapter.gguf")
