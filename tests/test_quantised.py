"""The torch engine on quantised bases, and with moments in 8 bits: bitsandbytes runs on a CPU too."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft_oracle import loss_and_norm, put
from test_engines import config, random_batch, spread
from tiny_models import make_tiny

from mlx_finetune.engines import Engine, open_engine
from mlx_finetune.errors import UserError

pytest.importorskip("bitsandbytes", reason="bitsandbytes has no wheel for this machine")
WIDE = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("wide") / "model", tokenizer=False, changes=WIDE)


def opened(model: Path, **settings: Any) -> Engine:
    engine = open_engine(config("torch", **settings), model)
    spread(engine)
    return engine


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_loss_and_gradient_on_a_quantised_base_are_those_of_peft(bits: str, kind: str, wide: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    engine, batch = opened(wide, quantization=bits, fine_tune_type=kind, max_grad_norm=1e9, weight_decay=0.0), random_batch(1)
    state = engine.state()
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    how = BitsAndBytesConfig(**four if bits == "4bit" else {"load_in_8bit": True})
    base = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32, quantization_config=how, device_map={"": "cpu"})
    made = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=kind == "dora"))
    made.train()  # else a CPU packs the weights anew, and peft reads those as if they were not
    put(state, made)
    loss, norm = loss_and_norm(made, batch)
    result = engine.step([batch], 1e-3, seed=0)
    assert result.loss == pytest.approx(loss, rel=1e-4 if bits == "4bit" else 1e-2)
    assert result.grad_norm == pytest.approx(norm, rel=1e-3 if bits == "4bit" else 0.05)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_is_small_and_is_learned_on(bits: str, wide: Path) -> None:
    engine: Any = opened(wide, quantization=bits)
    layer = engine.model.get_submodule("model.layers.0.mlp.up_proj").base
    assert layer.weight.element_size() == 1 and layer.weight.numel() == 128 * 256 // (2 if bits == "4bit" else 1)
    batch = random_batch(0)
    before = engine.loss_sum(batch)
    for step in range(10):
        engine.step([batch], 1e-2, seed=step)
    assert engine.loss_sum(batch) < before - 1


def test_moments_in_8_bits_are_resumed_bit_identical_and_read_by_the_other_engine(wide: Path) -> None:
    def steps(engine: Engine, first: int, last: int) -> None:
        for step in range(first, last):
            engine.step([random_batch(step)], 1e-3, seed=step)

    straight = opened(wide, optimizer="adamw_8bit", rank=64)
    steps(straight, 0, 6)
    halfway = straight.state()
    assert any(
        "uint8" in str(v.dtype) for s in straight._updater.optimizer.state.values() for v in s.values() if hasattr(v, "dtype")
    )  # type: ignore[attr-defined]
    resumed = open_engine(config("torch", optimizer="adamw_8bit", rank=64), wide)
    resumed.load_state(halfway, 6)
    steps(straight, 6, 12)
    steps(resumed, 6, 12)
    expected, found = straight.state(), resumed.state()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    wide_moments = open_engine(config("mlx", rank=64), wide)
    wide_moments.load_state(halfway, 6)
    assert wide_moments.state().keys() == {name for name in expected if "_absmax/" not in name}


def test_moments_in_8_bits_step_much_like_those_in_32(wide: Path) -> None:
    batch, losses = random_batch(0), {}
    for optimizer in ("adamw", "adamw_8bit"):
        engine = opened(wide, optimizer=optimizer, rank=64)
        losses[optimizer] = [engine.step([batch], 1e-3, seed=step).loss for step in range(20)]
    np.testing.assert_allclose(losses["adamw"], losses["adamw_8bit"], rtol=0.02)
    assert losses["adamw_8bit"][-1] < losses["adamw_8bit"][0] - 0.1


def test_a_quantised_base_is_refused_where_weights_are_trained(wide: Path) -> None:
    with pytest.raises(UserError, match="quantization is for adapters"):
        opened(wide, quantization="4bit", fine_tune_type="full")


def test_what_is_not_installed_is_named_with_the_extra_that_brings_it(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else found(name, *more))
    with pytest.raises(UserError, match="quantization = 4bit needs bitsandbytes") as error:
        opened(wide, quantization="4bit")
    assert error.value.hint == "pip install 'mlx-finetune[qlora]'"


def test_a_run_with_moments_in_8_bits_and_a_quantised_base_goes_on_with_mlx_in_full_precision(
    tiny_llama: Path, tmp_path: Path
) -> None:
    from short_runs import cut_after, losses, prepared, run, settings

    from mlx_finetune.training.remarks import moved
    from mlx_finetune.training.run import execute, plan_resume

    values = settings(tiny_llama, prepared(tiny_llama, tmp_path, "ls"), tmp_path / "whole", "torch", rank=64)
    whole = run(values | {"optimizer": "adamw_8bit", "quantization": "8bit"})
    exact = cut_after(whole, 5, tmp_path / "exact")
    execute(plan_resume(exact, {}), lambda done, steps, note: None)
    assert losses(exact, "train") == losses(whole, "train")
    plan = plan_resume(cut_after(whole, 5, tmp_path / "moved"), {"engine": "mlx", "optimizer": "adamw", "quantization": "none"})
    assert moved(plan) == (
        "goes on with engine torch -> mlx, quantization 8bit -> none, optimizer adamw_8bit -> adamw: "
        "adapter, optimizer and place in the data are the same; rounding differs"
    )
    execute(plan, lambda done, steps, note: None)
    np.testing.assert_allclose(losses(plan.run, "train"), losses(whole, "train"), rtol=0.02)


@pytest.mark.parametrize("checkpointed", [0, 1])
def test_the_gradient_through_8_bits_is_that_of_what_they_stand_for(checkpointed: int, tmp_path: Path) -> None:
    import torch

    engine = open_engine(
        config("torch", quantization="8bit", grad_checkpoint=checkpointed), make_tiny("llama", tmp_path / "m", tokenizer=False)
    )
    base = next(module.base for module in engine.model.modules() if type(getattr(module, "base", None)).__name__ == "Linear8bitLt")
    layer = next(module for module in engine.model.modules() if getattr(module, "base", None) is base)
    x = torch.randn(5, base.in_features, requires_grad=True)
    columns = base(torch.eye(base.in_features)).detach()  # [in, out]
    upstream = torch.randn(5, base.out_features)
    layer(x).backward(upstream)
    assert torch.allclose(x.grad, upstream @ columns.T, rtol=1e-3, atol=1e-3 * float(x.grad.abs().max()))


def test_what_goes_into_8_bits_is_not_kept_where_layers_are_computed_again(tmp_path: Path) -> None:
    import torch
    from torch.utils.checkpoint import checkpoint

    engine = open_engine(config("torch", quantization="8bit"), make_tiny("llama", tmp_path / "m", tokenizer=False))
    base = next(module.base for module in engine.model.modules() if type(getattr(module, "base", None)).__name__ == "Linear8bitLt")
    layer = next(module for module in engine.model.modules() if getattr(module, "base", None) is base)
    x, given = torch.randn(5, base.in_features, requires_grad=True), []
    columns = base(torch.eye(base.in_features)).detach()  # [in, out]
    upstream = torch.randn(5, base.out_features)

    def doubled(x: torch.Tensor) -> torch.Tensor:
        twice = 2 * x
        given.append(weakref.ref(twice))
        return layer(twice)

    output = checkpoint(doubled, x, use_reentrant=False)
    gc.collect()
    assert given[0]() is None
    output.backward(upstream)
    assert torch.allclose(x.grad, 2 * upstream @ columns.T, rtol=1e-3, atol=1e-3 * float(x.grad.abs().max()))
