"""Adapters of experts are kept, handed on and named: between engines, from peft, and back into original checkpoints."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architecture_row import written
from peft_oracle import loss_sum
from safetensors.numpy import load_file, save_file
from short_runs import cut_after, losses, prepared, run, settings
from test_engines import config, random_batch, spread
from test_experts import BOTH, MORE
from test_portable import check_it_goes_on, tensors_of
from test_ranks import SAME, command, finished, start
from test_torch_architectures import TRAINED, made
from tiny_models import make_tiny

from mlx_finetune.config import make_config
from mlx_finetune.engines import open_engine
from mlx_finetune.engines.adapter import Target, choose_targets
from mlx_finetune.engines.experts import EXPERTS, MISREAD, Pair, expert_deltas, from_peft, pairs_of, stored_at, to_peft
from mlx_finetune.engines.supported import COMPILERS
from mlx_finetune.errors import UserError
from mlx_finetune.export.adapter import read_adapter
from mlx_finetune.export.backends import in_transformers
from mlx_finetune.export.fuse import fuse
from mlx_finetune.files import read_json
from mlx_finetune.models.weights import tensor_headers
from mlx_finetune.training.remarks import experts_left_alone
from mlx_finetune.training.run import execute, plan_resume
from mlx_finetune.training.start import begin, started

PATH = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def data(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(mixture, tmp_path_factory.mktemp("data"), "ls")


@pytest.mark.parametrize(("first", "then"), [("mlx", "torch"), ("torch", "mlx")])
def test_a_run_that_adapts_experts_goes_on_on_the_other_engine(
    first: str, then: str, mixture: Path, data: Path, tmp_path: Path
) -> None:
    whole = run(settings(mixture, data, tmp_path / "whole", first, **BOTH))
    ours = check_it_goes_on(whole, first, then, tmp_path / "moved")
    assert f"base_model.model.{PATH}.base_layer.lora_A.weight" in ours


def test_a_run_that_adapts_experts_is_resumed_bit_identical(engine_name: str, mixture: Path, data: Path, tmp_path: Path) -> None:
    how = {"target_modules": "q_proj,experts", "optimizer": "adafactor", "use_rslora": True, "dropout": 0.1}
    whole = run(settings(mixture, data, tmp_path / "whole", engine_name, **how))
    resumed = cut_after(whole, 5, tmp_path / "resumed")
    execute(plan_resume(resumed, {}), lambda done, steps, note: None)
    expected, found = tensors_of(whole), tensors_of(resumed)
    assert expected.keys() == found.keys() and all(np.array_equal(expected[name], found[name]) for name in expected)


@pytest.mark.long
def test_experts_cut_over_two_processes_train_what_one_trains(mixture: Path, data: Path, tmp_path: Path) -> None:
    more = {"gradient_accumulation": 3, "batch_size": 1, "grad_checkpoint": 1, **BOTH}
    for name, launcher in (("one", False), ("two", True)):
        cut = {"fsdp": "true"} if launcher else {}
        _, err = finished(start(command(settings(mixture, data, tmp_path / name, "torch", **more | cut)), "torch", launcher))
        assert (tmp_path / name / "latest").exists(), err
    for split in ("train", "valid"):
        np.testing.assert_allclose(losses(tmp_path / "two", split), losses(tmp_path / "one", split), atol=SAME)


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
def test_compiled_experts_train_as_those_that_are_not(tmp_path: Path) -> None:
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # else what another test compiled is used again
    model, told = make_tiny("qwen3_moe", tmp_path / "model", tokenizer=False, changes={"num_hidden_layers": 1}), []
    for compiled in (False, True):
        counters.clear()
        engine = open_engine(config("torch", torch_compile=compiled, **BOTH), model)
        spread(engine)
        told.append([engine.step([random_batch(i)], 1e-3, seed=i) for i in range(3)])
        assert (counters["stats"]["unique_graphs"] > 0) is compiled
    for plain, other in zip(*told, strict=True):
        assert other.loss == pytest.approx(plain.loss, abs=1e-5) and other.grad_norm == pytest.approx(plain.grad_norm, rel=3e-5)


def test_layers_beside_experts_are_fused_although_peft_is_told_their_weights(mixture: Path, data: Path, tmp_path: Path) -> None:
    checkpoint = (run(settings(mixture, data, tmp_path / "run", "mlx", steps=2)) / "latest").resolve()
    assert "model.layers.0.mlp.up_proj.weight" in read_json(checkpoint / "adapter_config.json")["target_parameters"]
    fuse(mixture, checkpoint, tmp_path / "fused")
    found = in_transformers(mixture, checkpoint, tmp_path / "fused", [[5, 9, 17, 4]], {}, [0]).distances
    assert found.fused.largest < 1e-4 < 1e-3 < found.base.largest


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_experts_is_the_start_of_a_run_on_either_engine(rslora: bool, mixture: Path, tmp_path: Path) -> None:
    first, batch = open_engine(config("mlx", use_rslora=rslora, num_layers=2, **BOTH), mixture), random_batch(3)
    spread(first, scale=0.1)
    folder = written(first, tmp_path / "adapter", mixture)
    for name in ("mlx", "torch"):
        resolved = started(make_config({"engine": name, "dtype": "float32", "adapter_path": str(folder)}, "test"), 4)
        assert (resolved.rank, resolved.num_layers, resolved.use_rslora) == (4, 2, rslora)
        assert resolved.alpha == pytest.approx(8) and "experts.gate_proj" in resolved.target_modules
        engine = open_engine(resolved, mixture)
        begin(engine, resolved, 4)
        assert engine.loss_sum(batch) == pytest.approx(first.loss_sum(batch), rel=1e-6)


def test_an_adapter_that_peft_trained_on_experts_is_the_start_of_a_run(engine_name: str, mixture: Path, tmp_path: Path) -> None:
    """Its B of gate and up is full, and one of its ranks is another."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    how = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters, rank_pattern={"q_proj": 2})
    network, batch = get_peft_model(base, how), random_batch(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
        network.save_pretrained(tmp_path / "adapter")
        expected = loss_sum(network, batch).item()
    resolved = started(
        make_config({"engine": engine_name, "dtype": "float32", "adapter_path": str(tmp_path / "adapter")}, "test"), 4
    )
    assert resolved.rank == 4
    engine = open_engine(resolved, mixture)
    fresh = engine.loss_sum(batch)
    begin(engine, resolved, 4)
    assert engine.loss_sum(batch) == pytest.approx(expected, rel=1e-5) and abs(fresh / expected - 1) > 1e-3


def test_an_adapter_of_peft_that_was_not_trained_yet_is_a_start_too(engine_name: str, mixture: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    how = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters)
    get_peft_model(base, how).save_pretrained(tmp_path / "adapter")
    values = {"engine": engine_name, "dtype": "float32", "adapter_path": str(tmp_path / "adapter")}
    resolved = started(make_config(values, "test"), 4)
    engine, batch = open_engine(resolved, mixture), random_batch(3)
    before = engine.loss_sum(batch)
    begin(engine, resolved, 4)
    assert engine.loss_sum(batch) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "granitemoe"])
@pytest.mark.parametrize("together", [False, True])
def test_the_deltas_of_a_checkpoint_added_to_the_original_weights_are_the_tuned_model(
    model_type: str, together: bool, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    if model_type in MORE:
        made(model_type, model, MORE[model_type])
    else:
        make_tiny(model_type, model, tokenizer=False)
    if together:  # as transformers 5 has them in memory
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(model, save_original_format=False)
    engine, batch = open_engine(config("torch", target_modules="experts", use_rslora=True), model), random_batch(3)
    spread(engine, scale=0.1)
    folder = written(engine, tmp_path / "checkpoint", model)
    weights, shapes = load_file(model / "model.safetensors"), {n: t.shape for n, t in tensor_headers(model).items()}
    stored = {n.removeprefix("base_model.model."): a for n, a in load_file(folder / "adapter_model.safetensors").items()}
    pairs, patched = pairs_of(stored, read_json(folder / "adapter_config.json")), 0
    for parameter, pair in pairs.items():
        for expert in range(4):
            for name, delta in expert_deltas(parameter, stored[pair.a], stored[pair.b], pair, expert).items():
                at = stored_at(shapes, f"{parameter.rpartition('.')[0]}.{name}", expert, *delta.shape)
                assert at is not None and delta.dtype == np.float32
                whole = weights[at.tensor] if at.expert is None else weights[at.tensor][at.expert]
                whole[at.first : at.first + len(delta)] += delta
                patched += 1
    assert patched == len(engine.targets) * 4
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        fused = loss_sum(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), batch).item()
    assert engine.loss_sum(batch) == pytest.approx(fused, rel=1e-6)


def test_what_is_stored_is_read_again_as_it_was() -> None:
    random, arrays = np.random.default_rng(0), dict[str, np.ndarray]()
    for path, names in {f"a.0.{EXPERTS}": ("gate_proj", "up_proj", "down_proj"), f"a.1.{EXPERTS}": ("down_proj",)}.items():
        for name in names:
            rows, columns = (5, 3) if name == "down_proj" else (3, 5)
            arrays[f"{path}.{name}.lora_A.weight"] = random.normal(size=(4, 2, columns)).astype(np.float32)
            arrays[f"{path}.{name}.lora_B.weight"] = random.normal(size=(4, rows, 2)).astype(np.float32)
    arrays["a.0.q_proj.lora_A.weight"] = random.normal(size=(2, 5)).astype(np.float32)
    stored = to_peft(arrays)
    assert stored[f"a.0.{EXPERTS}.base_layer.lora_A.weight"].shape == (4 * 4, 5)
    assert stored[f"a.0.{EXPERTS}.base_layer.lora_B.weight"].shape == (6, 4 * 4)
    assert stored[f"a.1.{EXPERTS}.lora_B.weight"][3, 1 * 4 + 2] == arrays[f"a.1.{EXPERTS}.down_proj.lora_B.weight"][2, 3, 1]
    parameters = [f"a.0.{EXPERTS}.gate_up_proj", f"a.0.{EXPERTS}.down_proj", f"a.1.{EXPERTS}.down_proj"]
    told = {"r": 2, "lora_alpha": 4, "target_parameters": parameters, "rank_pattern": {r"experts\.gate_up_proj": 4}}
    again = from_peft(stored, told)
    assert again.keys() == arrays.keys() and all(np.array_equal(again[name], arrays[name]) for name in arrays)
    with pytest.raises(UserError, match="target_parameters does not say what it changes"):
        from_peft(stored, told | {"target_parameters": parameters[:2]})
    for broken in (told | {"lora_alpha": "x"}, told | {"rank_pattern": {"(": 1}}, {"target_parameters": parameters}):
        with pytest.raises(UserError, match=r"rank and alpha of .* are no numbers"):
            from_peft(stored, broken)
    with pytest.raises(UserError, match="target_parameters does not say"):
        from_peft(stored, [])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="are not those of experts of rank 3"):
        from_peft(stored, told | {"r": 3})
    with pytest.raises(UserError, match="no expert 4, it has 4"):
        a, b = stored[f"a.1.{EXPERTS}.lora_A.weight"], stored[f"a.1.{EXPERTS}.lora_B.weight"]
        expert_deltas(parameters[2], a, b, Pair("", "", 2, 1.0), 4)


MODULES = {f"model.layers.{i}.self_attn.q_proj": Target(8, 8) for i in range(3)}
MODULES |= {f"model.layers.0.mlp.{name}": Target(8, 8) for name in ("gate_proj", "up_proj")}
MODULES |= {f"model.layers.{i}.mlp.shared_experts.up_proj": Target(8, 8) for i in (1, 2)}
MODULES |= {
    f"model.layers.{i}.mlp.experts.{n}": Target(4, 4, "experts", 4) for i in (1, 2) for n in ("gate_proj", "up_proj", "down_proj")
}


@pytest.mark.parametrize(
    ("asked", "experts", "others"),
    [
        ("all-linear", 0, 7),
        ("all-linear,experts", 6, 7),
        ("experts", 6, 0),
        ("up_proj", 0, 3),
        ("q_proj, experts.down_proj", 2, 3),
        ("experts.gate_proj,experts.up_proj", 4, 0),
        (("model.layers.2.mlp.experts.down_proj", "model.layers.2.self_attn.q_proj"), 1, 1),
        (r".*(q|gate|up)_proj", 0, 7),
        (r".*\.(q_proj|experts\.down_proj)", 2, 3),
    ],
)
def test_experts_are_meant_only_where_the_word_is_said(asked: Any, experts: int, others: int) -> None:
    chosen = choose_targets(MODULES, make_config({"target_modules": asked}, "test"))
    kinds = [target.kind for target in chosen.values()]
    assert (kinds.count("experts"), len(kinds) - kinds.count("experts")) == (experts, others)


def test_names_of_experts_that_mean_nothing_are_refused_with_the_right_ones() -> None:
    of_experts = {name: target for name, target in MODULES.items() if target.kind == "experts" or "q_proj" in name}
    for modules, asked, said, hint in (
        (MODULES, "experts.down_proj,experts.up_porj", "matches no layer|no layer of this model is called", ""),
        (of_experts, "down_proj", "only its experts have it", "name experts.down_proj, or experts"),
        ({"model.layers.0.self_attn.q_proj": Target(8, 8)}, "experts", "has no experts that can be adapted", "leave it out"),
    ):
        with pytest.raises(UserError, match=said) as error:
            choose_targets(modules, make_config({"target_modules": asked}, "test"))
        assert (error.value.hint or "").startswith(hint)


def test_gate_without_up_and_dora_are_refused_by_name(engine_name: str, mixture: Path) -> None:
    with pytest.raises(UserError, match=r"experts.gate_proj without experts.up_proj") as error:
        open_engine(config(engine_name, target_modules="experts.gate_proj"), mixture)
    assert error.value.hint == "name both"
    with pytest.raises(UserError, match=rf"dora is not there for {re.escape(PATH)}") as error:
        open_engine(config(engine_name, fine_tune_type="dora", **BOTH), mixture)
    assert error.value.hint == "use lora, or leave the experts out"


def test_layers_that_peft_takes_for_experts_are_refused_with_dora(engine_name: str, mixture: Path) -> None:
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    with pytest.raises(UserError, match=r"qwen3_moe: peft would read .* on model\.layers\.0\.mlp\.down_proj"):
        open_engine(config(engine_name, fine_tune_type="dora"), mixture)
    open_engine(config(engine_name, fine_tune_type="dora", num_layers=3), mixture)  # without the dense layer
    assert all("gate_proj" in _MOE_TARGET_MODULE_MAPPING[_MODEL_TO_CONVERSION_PATTERN[kind]] for kind in MISREAD)


def test_experts_of_another_kind_and_dora_beside_experts_are_refused(tmp_path: Path) -> None:
    other = made("gpt_oss", tmp_path / "other", TRAINED["gpt_oss"])
    with pytest.raises(UserError, match="has no experts that can be adapted"):
        open_engine(config("torch", **BOTH), other)
    beside = made("deepseek_v2", tmp_path / "beside", MORE["deepseek_v2"])
    with pytest.raises(UserError, match=r"peft would read an adapter on model\.layers\.0\.mlp\.down_proj"):
        open_engine(config("torch", fine_tune_type="dora"), beside)


def test_the_remark_says_how_experts_are_named(mixture: Path) -> None:
    assert "name experts in target_modules to adapt them: all-linear,experts" in (
        experts_left_alone(mixture, make_config({}, "test")) or ""
    )
    assert experts_left_alone(mixture, make_config({"target_modules": "experts.down_proj"}, "test")) is None


def test_quantised_experts_are_trained_with_the_gradient_of_what_they_stand_for(tmp_path: Path) -> None:
    from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model

    from mlx_finetune.engines.mlx.load import load_model

    model = make_tiny("qwen3_moe", tmp_path / "model", tokenizer=False, changes={"moe_intermediate_size": 64})
    made, told = quantize_model(load_model(model, "float32"), read_json(model / "config.json"), group_size=32, bits=4)
    plain = {key: value for key, value in told.items() if not key.startswith("quantization")}
    for name, as_is, said in (("small", lambda network: network, told), ("wide", dequantize_model, plain)):
        save_model(tmp_path / name, as_is(made))
        save_config(said, tmp_path / name / "config.json")
    results, batch = [], random_batch(1)
    for name in ("small", "wide"):
        engine = open_engine(config("mlx", **BOTH), tmp_path / name)
        spread(engine)
        results.append(engine.step([batch], 1e-3, seed=0))
        assert ("scales" in engine.model.layers[0].mlp.switch_mlp.gate_proj.linear) is (name == "small")  # type: ignore[attr-defined]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-4)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-3)
    engine = open_engine(config("mlx", **BOTH), tmp_path / "small")
    before = engine.loss_sum(batch)
    for step in range(10):
        engine.step([batch], 1e-2, seed=step)
    assert engine.loss_sum(batch) < before - 1


@pytest.mark.parametrize("side", ["A", "B"])
def test_numbers_of_experts_of_another_kind_than_16_or_32_bits_are_refused(side: str, tmp_path: Path) -> None:
    path = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    arrays = {path.format("A"): np.ones((8, 6), np.float32), path.format("B"): np.ones((5, 8), np.float32)}
    arrays[path.format(side)] = arrays[path.format(side)].astype(np.float64)
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"experts\.down_proj: dtype F64 is not one of"):
        read_adapter(tmp_path)
