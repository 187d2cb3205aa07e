"""A run begins on one engine and goes on on the other; an adapter made elsewhere is the start of a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import as_of_old
from peft_oracle import loss_sum
from safetensors.numpy import load_file, save_file
from short_runs import cut_after, losses, prepared, run, settings, tensors
from test_engines import config, random_batch

from mlx_finetune.config import make_config
from mlx_finetune.engines import open_engine
from mlx_finetune.errors import UserError
from mlx_finetune.training.checks import layers_of
from mlx_finetune.training.progress import Standing
from mlx_finetune.training.remarks import moved
from mlx_finetune.training.run import execute, plan_resume, plan_run

# In the middle of a run: micro-batches accumulated, the rate on its way down.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora, linear": {"fine_tune_type": "dora", "lr_schedule": "linear"},
    "rslora, wsd": {"use_rslora": True, "lr_schedule": "wsd", "decay_ratio": 0.5},
    "embeddings": {"target_modules": "q_proj,embed_tokens"},
    "full, last layers": {"fine_tune_type": "full", "num_layers": 2, "learning_rate": 1e-3},
    "adafactor": {"optimizer": "adafactor", "learning_rate": 1e-3},
    "muon": {"optimizer": "muon", "learning_rate": 1e-3},
}
BETWEEN = 1e-5  # two engines in float32, five steps apart: measured 2e-6


@pytest.fixture(scope="module")
def data(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tiny_llama, tmp_path_factory.mktemp("data"), "ls")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "then"), [("mlx", "torch"), ("torch", "mlx")])
def test_a_run_of_any_kind_goes_on_on_the_other_engine(
    kind: str, first: str, then: str, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    whole = run(settings(tiny_llama, data, tmp_path / "whole", first, **KINDS[kind]))
    check_it_goes_on(whole, first, then, tmp_path / "moved")


def check_it_goes_on(whole: Path, first: str, then: str, out: Path) -> dict[str, np.ndarray]:
    """The run `whole`, cut after 5 steps and gone on with on the other engine in `out`: the tensors of its last checkpoint."""
    plan = plan_resume(cut_after(whole, 5, out), {"engine": then})
    assert (moved(plan) or "").startswith(f"goes on with engine {first} -> {then}: ")
    execute(plan, lambda done, steps, note: None)
    np.testing.assert_allclose(losses(plan.run, "train"), losses(whole, "train"), atol=BETWEEN)
    np.testing.assert_allclose(losses(plan.run, "valid"), losses(whole, "valid"), atol=BETWEEN)
    ours, theirs = tensors_of(plan.run), tensors_of(whole)
    assert ours.keys() == theirs.keys() and all(ours[name].shape == theirs[name].shape for name in ours)
    return ours


def tensors_of(run: Path) -> dict[str, np.ndarray]:
    folder = run / "checkpoints" / "step-000010"
    return {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in load_file(path).items()}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_a_run_of_any_kind_is_resumed_bit_identical_on_its_own_engine(
    kind: str, engine_name: str, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    whole = run(settings(tiny_llama, data, tmp_path / "whole", engine_name, **KINDS[kind]))
    resumed = cut_after(whole, 5, tmp_path / "resumed")
    plan = plan_resume(resumed, {})
    assert moved(plan) is None
    execute(plan, lambda done, steps, note: None)
    expected, found = tensors_of(whole), tensors_of(resumed)
    assert expected.keys() == found.keys() and all(np.array_equal(expected[name], found[name]) for name in expected)


def test_the_message_names_dropout_and_precision_where_they_change(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    whole = run(settings(tiny_llama, data, tmp_path / "whole", "mlx", dropout=0.1))
    said = moved(plan_resume(cut_after(whole, 5, tmp_path / "run"), {"engine": "torch", "dtype": "float32"}))
    assert said == (
        "goes on with engine mlx -> torch, dtype auto -> float32: adapter, optimizer and place in the data are the same; "
        "rounding differs, and dropout drops others"
    )


def test_the_message_names_another_device_and_what_weights_are_read_in(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    whole = run(settings(tiny_llama, data, tmp_path / "whole", "torch", dtype="auto"))
    assert moved(plan_resume(whole, {})) is None
    told = json.loads((whole / "latest" / "progress.json").read_text())
    assert told["device"] == open_engine(config("torch"), tiny_llama).device
    as_of_old(whole / "latest", lambda row: row | {"device": "elsewhere"})
    assert f"device elsewhere -> {told['device']} (weights in " in (moved(plan_resume(whole, {})) or "")


def peft_adapter(model: Path, folder: Path, **how: Any) -> tuple[Path, float]:
    """An adapter that peft made and saved, its B not zero, and the loss of a batch with it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # A too is the same in every run
        made = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **how))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
        made.save_pretrained(folder, save_embedding_layers=False)
        return folder, loss_sum(made, random_batch(3)).item()


PEFT = {
    "lora": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "rslora, all": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
    "last layers": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [2, 3]},
    "some layers": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "embeddings": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "embed_tokens"]},
    "patterns": {
        **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
        **{"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 30}},
    },
    "patterns, rslora": {
        **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        **{"rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 3}},
    },
}


@pytest.mark.parametrize("kind", PEFT)
def test_an_adapter_made_by_peft_is_the_start_of_a_run(
    kind: str, engine_name: str, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    adapter, expected = peft_adapter(tiny_llama, tmp_path / "adapter", **PEFT[kind])
    values = settings(tiny_llama, data, tmp_path / "run", engine_name, adapter_path=str(adapter), steps=2)
    plan = plan_run(make_config({n: v for n, v in values.items() if n not in ("rank", "alpha")}, "test"))
    started: list[float] = []

    def look(done: int, steps: int, standing: Standing) -> None:
        started.append(done)

    _, engine = execute(plan, look)
    rows = losses(plan.run, "valid")
    assert set(started) == {0, 1, 2} and len(rows) == 2
    fresh = open_engine(plan.config, tiny_llama)
    from mlx_finetune.training.start import begin

    begin(fresh, plan.config, 4)
    assert fresh.loss_sum(random_batch(3)) == pytest.approx(expected, rel=1e-5)
    assert abs(open_engine(plan.config, tiny_llama).loss_sum(random_batch(3)) / expected - 1) > 1e-3
    assert engine.loss_sum(random_batch(3)) != pytest.approx(expected, rel=1e-4)


MLX_LM: dict[str, Any] = {"rank": 4, "scale": 5.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}


def mlx_lm_adapter(model: Path, kind: str, folder: Path) -> tuple[Path, Any]:
    """An adapter on the last two layers as mlx_lm.lora saves it, its B not zero, and the model with it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_finetune.engines.mlx.load import load_model

    opened = load_model(model, "float32")
    opened.freeze()
    mx.random.seed(0)
    linear_to_lora_layers(opened, 2, MLX_LM, use_dora=kind == "dora")
    arrays = {name: array + 0.02 * mx.random.normal(array.shape) for name, array in tree_flatten(opened.trainable_parameters())}
    opened.load_weights(list(arrays.items()), strict=False)
    folder.mkdir(parents=True)
    save_file({name: np.array(array) for name, array in arrays.items()}, folder / "adapters.safetensors")
    told = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": MLX_LM}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder, opened


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_made_by_mlx_lm_is_the_start_of_a_run(kind: str, engine_name: str, tiny_llama: Path, tmp_path: Path) -> None:
    import mlx.core as mx

    from mlx_finetune.training.start import begin, started

    folder, model = mlx_lm_adapter(tiny_llama, kind, tmp_path / "adapter")
    batch = random_batch(3)
    logits = np.array(model(mx.array(batch.inputs))).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(np.take_along_axis(log_probabilities, batch.targets[..., None], -1)[..., 0] * batch.weights).sum()
    resolved = started(make_config({"engine": engine_name, "dtype": "float32", "adapter_path": str(folder)}, "test"), 4)
    assert (resolved.rank, resolved.alpha, resolved.num_layers, resolved.fine_tune_type) == (4, 20.0, 2, kind)
    assert resolved.target_modules == ("q_proj", "up_proj")
    engine = open_engine(resolved, tiny_llama)
    begin(engine, resolved, 4)
    assert engine.loss_sum(batch) == pytest.approx(expected, rel=1e-5)


def test_an_adapter_that_does_more_or_fits_another_model_is_refused_by_name(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    adapter, _ = peft_adapter(tiny_llama, tmp_path / "adapter", **PEFT["lora"])
    file = adapter / "adapter_config.json"
    found = json.loads(file.read_text())
    values = settings(tiny_llama, data, tmp_path / "run", "torch", adapter_path=str(adapter))
    with pytest.raises(UserError, match=r"alpha = 8\.0, but .* has 6\.0"):
        plan_run(make_config(values, "test"))
    plain = {name: value for name, value in values.items() if name not in ("rank", "alpha")}
    for change, said in (
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "changes more than A and B"),
        ({"init_lora_weights": "pissa"}, "changes more than A and B"),
        ({"peft_type": "IA3"}, "neither peft .LoRA. nor mlx-lm"),
    ):
        file.write_text(json.dumps(found | change))
        with pytest.raises(UserError, match=said):
            plan_run(make_config(plain, "test"))
    file.write_text(json.dumps(found))
    saved = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: array[:, :-1].copy() if "lora_A" in name else array for name, array in saved.items()},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight has \[4, 63\], the model takes \[4, 64\]"):
        execute(plan_run(make_config(plain, "test")), lambda done, steps, note: None)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_our_own_is_the_start_of_another_run_and_opens_in_peft(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for number, kind in enumerate(("dora, linear", "rslora, wsd", "embeddings")):
        first = run(settings(tiny_llama, data, tmp_path / f"first{number}", "mlx", **KINDS[kind], steps=3))
        checkpoint = (first / "latest").resolve()
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        opened, batch = PeftModel.from_pretrained(base, checkpoint), random_batch(3)
        with torch.no_grad():
            expected = loss_sum(opened, batch).item()
        values = {"engine": "torch", "dtype": "float32", "adapter_path": str(checkpoint)}
        from mlx_finetune.training.start import begin, started

        resolved = started(make_config(values, "test"), 4)
        engine = open_engine(resolved, tiny_llama)
        begin(engine, resolved, 4)
        assert engine.loss_sum(batch) == pytest.approx(expected, rel=1e-5)


def test_tied_embeddings_are_saved_for_peft_with_the_head_and_resumed(engine_name: str, data: Path, tmp_path: Path) -> None:
    from tiny_models import make_tiny

    model = make_tiny("llama", tmp_path / "model", tokenizer=True, changes={"tie_word_embeddings": True})
    folder = tmp_path / "data"
    folder.mkdir()
    values = settings(model, prepared(model, folder, "ls"), tmp_path / "whole", engine_name, target_modules="embed_tokens,q_proj")
    whole = run(values)
    saved = tensors(whole, 10)
    assert saved["base_model.model.lm_head.lora_A.weight"].shape == (4, 64)
    resumed = cut_after(whole, 5, tmp_path / "resumed")
    execute(plan_resume(resumed, {}), lambda done, steps, note: None)
    again = tensors(resumed, 10)
    assert saved.keys() == again.keys() and all(np.array_equal(saved[name], again[name]) for name in saved)


def test_a_full_checkpoint_holds_the_weights_by_their_own_names(engine_name: str, tiny_llama: Path) -> None:
    engine = open_engine(config(engine_name, fine_tune_type="full"), tiny_llama)
    names = {name.removeprefix("adapter/") for name in engine.state() if name.startswith("adapter/")}
    assert names == set(load_file(tiny_llama / "model.safetensors"))
    assert engine.targets == {}


def test_the_layers_of_a_model_that_sees_stand_in_the_settings_of_its_text(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    config_file = tmp_path / "model" / "config.json"
    text = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({"model_type": "llava", "num_hidden_layers": None, "text_config": text}))
    assert layers_of(tmp_path / "model") == 4
