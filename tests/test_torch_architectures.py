"""Any causal model of transformers is trained as transformers and peft train it, or refused in one line."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft_oracle import greedy, loss_and_norm, put
from test_engines import config, random_batch, spread
from tiny_models import VOCABULARY

from mlx_finetune.engines import open_engine
from mlx_finetune.engines.supported import COMPILERS
from mlx_finetune.errors import UserError

SMALL: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
TRAINED: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "starcoder2": {},
    "phi": {},
    "olmo": {},
    "gemma": {"head_dim": 16},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({"n_embd": 64, "n_layer": 2, "n_head": 4}, "no linear layers that can be adapted"),
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, "its head needs more than its layers give"),
}


def made(model_type: str, folder: Path, changes: dict[str, Any]) -> Path:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SMALL | changes), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", TRAINED)
def test_it_is_trained_as_transformers_and_peft_train_it(model_type: str, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, batch = made(model_type, tmp_path / "model", TRAINED[model_type]), random_batch(1)
    engine = open_engine(config("torch", max_grad_norm=1e9, weight_decay=0.0), folder)
    spread(engine)
    state = engine.state()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=sorted(engine.targets)))
    put(state, reference)
    assert list(engine.generate([5, 9, 17], 4, frozenset())) == greedy(reference, [5, 9, 17], 4)
    loss, norm = loss_and_norm(reference, batch)
    result = engine.step([batch], 1e-3, seed=0)
    assert result.loss == pytest.approx(loss, rel=1e-5) and result.grad_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_line(model_type: str, tmp_path: Path) -> None:
    changes, said = REFUSED[model_type]
    folder = made(model_type, tmp_path / "model", changes)
    with pytest.raises(UserError, match=said) as error:
        open_engine(config("torch"), folder)
    assert "\n" not in error.value.message and error.value.hint


def test_what_mambas_kernels_pass_by_is_left_alone_and_refused_where_it_is_named(tmp_path: Path) -> None:
    folder = made("falcon_h1", tmp_path / "model", TRAINED["falcon_h1"])
    targets = open_engine(config("torch"), folder).targets
    assert any(name.endswith("mamba.in_proj") for name in targets) and not any(name.endswith("mamba.out_proj") for name in targets)
    with pytest.raises(UserError, match=r"out_proj is of Mamba, whose fused kernels read its weight past an adapter"):
        open_engine(config("torch", target_modules="out_proj"), folder)


@pytest.mark.parametrize("way", [{}, {"grad_checkpoint": 1}, {"fine_tune_type": "dora"}, {"dtype": "bfloat16"}])
def test_attention_with_biases_and_partly_adapted_layers_give_the_same_in_fewer_passes(
    way: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_models import make_tiny

    model = make_tiny("qwen2", tmp_path / "model", tokenizer=False)
    for targets in ("all-linear", "q_proj,gate_proj", "k_proj,v_proj,down_proj"):
        states = []
        for taken in (True, False):
            with monkeypatch.context() as patched:
                if not taken:
                    patched.setattr("mlx_finetune.engines.torch.engine.take_over", lambda *_, **__: None)
                engine = open_engine(config("torch", target_modules=targets, max_grad_norm=1e9, **way), model)
            spread(engine)
            engine.step([random_batch(1)], 1e-3, seed=0)
            states.append(engine.state())
        for name in states[0]:
            if name.startswith("m/"):
                largest = np.abs(states[1][name]).max()
                tolerance = 0.05 if way.get("dtype") else 1e-4
                np.testing.assert_allclose(states[0][name], states[1][name], atol=tolerance * largest, err_msg=name)


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
@pytest.mark.parametrize("checkpointed", [0, 1])
def test_compiled_layers_train_as_those_that_are_not(checkpointed: int, tiny_llama: Path) -> None:
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # else what another test compiled is used again
    told = []
    for compiled in (False, True):
        counters.clear()
        engine = open_engine(config("torch", torch_compile=compiled, grad_checkpoint=checkpointed), tiny_llama)
        spread(engine)
        told.append([engine.step([random_batch(i)], 1e-3, seed=i) for i in range(3)])
        assert (counters["stats"]["unique_graphs"] > 0) is compiled
    for plain, other in zip(*told, strict=True):
        assert other.loss == pytest.approx(plain.loss, abs=1e-5) and other.grad_norm == pytest.approx(plain.grad_norm, rel=3e-5)
