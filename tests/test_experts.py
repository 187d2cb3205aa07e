"""Experts of a mixture are adapted alike on both engines, as peft reads it, and only where they are asked for."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architecture_row import written
from peft_oracle import loss_sum
from test_engines import config, random_batch, spread
from test_parity import ADAPTER, FALLING, LOSS, NORM, check_parity
from test_torch_architectures import SMALL, made
from tiny_models import make_tiny

from mlx_finetune.engines import Engine, open_engine
from mlx_finetune.engines.optimizers import rule_of, slots_of, update
from mlx_finetune.training.schedule import learning_rate

MIXTURES = ("qwen3_moe", "mixtral", "olmoe")
BOTH = {"target_modules": "all-linear,experts"}
STEPS = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "experts alone, rslora": {"target_modules": "experts", "use_rslora": True},
    "down alone, loraplus": {"target_modules": "experts.down_proj", "loraplus_lr_ratio": 4.0},
    "gate and up, last layers": {"target_modules": "q_proj,experts.gate_proj,experts.up_proj", "num_layers": 2},
    "pattern, checkpointed": {"target_modules": r".*\.[13]\..*(v_proj|experts\..*)", "grad_checkpoint": 1},
    "adafactor": {"optimizer": "adafactor"},
    "muon, rows alone": {"optimizer": "muon", "share_prefixes": "never"},
}
# As the torch engine alone has them; a layer without experts comes first, or experts that all tokens go to stand beside.
MORE: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1},
        **{"first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8},
        **{"v_head_dim": 16, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    },
    "glm4_moe": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1, "head_dim": 16},
        **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    },
}


def steps(engine: str, model: Path, settings: dict[str, Any]) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    how = config(engine, **FALLING | BOTH | settings)
    opened = open_engine(how, model)
    spread(opened, scale=0.05)
    # Few rows, which mlx-lm multiplies as they come, and many, which it sorts by expert first.
    batches = [random_batch(i, rows=1 + i % 2, length=24) for i in range(STEPS)]
    results = [opened.step([batch], learning_rate(i, STEPS, how), seed=i) for i, batch in enumerate(batches)]
    return [r.loss for r in results], [r.grad_norm for r in results], opened.state()


def check_alike(model: Path, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    (loss, norm, state), (loss_, norm_, state_) = (steps(engine, model, settings) for engine in ("mlx", "torch"))
    np.testing.assert_allclose(loss, loss_, atol=LOSS)
    np.testing.assert_allclose(norm, norm_, rtol=NORM)
    assert state.keys() == state_.keys()
    for name, array in state.items():
        if name.startswith("adapter/"):
            np.testing.assert_allclose(array, state_[name], atol=ADAPTER, err_msg=name)
    return state


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_are_trained_alike_on_either_engine(model_type: str, tmp_path: Path) -> None:
    model = make_tiny(model_type, tmp_path / "model", tokenizer=False)
    check_parity(model, BOTH)
    trained = open_engine(config("mlx", **BOTH), model).trained
    assert trained["model.layers.0.mlp.experts.up_proj.lora_B.weight"][0] == 4
    assert not any(router in name for name in trained for router in (".gate.", ".router."))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_trains_experts_alike(name: str, mixture: Path) -> None:
    state = check_alike(mixture, SETTINGS[name])
    assert any("experts" in each for each in state)


def test_both_engines_begin_with_the_same_numbers_within_their_bound(mixture: Path) -> None:
    states = [open_engine(config(name, **BOTH), mixture).state() for name in ("mlx", "torch")]
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
    a = states[0]["adapter/model.layers.1.mlp.experts.gate_proj.lora_A.weight"]
    assert a.shape == (4, 4, 64) and 0.1 < np.abs(a).max() <= 1 / 8
    assert not states[0]["adapter/model.layers.1.mlp.experts.gate_proj.lora_B.weight"].any()


@pytest.mark.parametrize("settings", [BOTH, {"target_modules": "experts"}])
def test_layers_computed_again_and_dropout_leave_the_same_gradient(
    settings: dict[str, Any], engine_name: str, mixture: Path
) -> None:
    gradients = []
    for every in (0, 1):
        engine = open_engine(config(engine_name, dropout=0.3, grad_checkpoint=every, **settings), mixture)
        spread(engine)
        engine.step([random_batch(1)], 0.0, seed=3)
        gradients.append({name: array for name, array in engine.state().items() if name.startswith("m/")})
    for name, array in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], array, atol=1e-5 * np.abs(array).max(), err_msg=name)


def test_dropout_acts_on_experts_while_training_and_never_while_evaluating(engine_name: str, mixture: Path) -> None:
    losses = {}
    for dropout in (0.0, 0.5):
        engine = open_engine(config(engine_name, dropout=dropout, target_modules="experts"), mixture)
        spread(engine, scale=0.1)
        batch = random_batch(0)
        losses[dropout] = (engine.loss_sum(batch), *(engine.step([batch], 0.0, seed=seed).loss for seed in (1, 2)))
    assert losses[0.0][0] == losses[0.5][0] and losses[0.0][1] == pytest.approx(losses[0.0][2], abs=1e-6)
    assert abs(losses[0.5][1] - losses[0.5][2]) > 1e-4


@pytest.mark.parametrize("few", [True, False])
def test_an_mlx_expert_drops_anew_for_each_token_and_each_expert_it_is_sent_to(few: bool) -> None:
    import mlx.core as mx
    from mlx_lm.models.switch_layers import SwitchLinear

    from mlx_finetune.engines.adapter import Target
    from mlx_finetune.engines.mlx.experts import LoRASwitch

    layer = LoRASwitch(SwitchLinear(64, 8, 4, bias=False), Target(8, 64, "experts", 4), 2, 1.0, 0.5)
    layer._key = mx.random.key(0)
    x, indices = (mx.ones((3, 1, 1, 64)), mx.zeros((3, 2), mx.uint32)) if few else (mx.ones((6, 1, 64)), mx.zeros((6,), mx.uint32))
    rows = np.array(layer._dropped(x, indices)).reshape(6, 64)
    assert set(np.unique(rows)) == {0.0, 2.0} and len(np.unique(rows, axis=0)) == 6


@pytest.mark.parametrize("is_sorted", [True, False])
def test_what_is_read_in_half_precision_is_multiplied_in_float32(is_sorted: bool) -> None:
    import mlx.core as mx

    from mlx_finetune.engines.mlx.experts import _product

    x = mx.random.normal((9, 1, 16), key=mx.random.key(0)).astype(mx.bfloat16)
    a, indices = mx.random.normal((4, 3, 16), key=mx.random.key(1)), mx.array([0, 0, 0, 1, 1, 3, 3, 3, 3], mx.uint32)

    def loss(x: mx.array, a: mx.array) -> mx.array:
        return _product(x, a, indices, is_sorted).square().sum()

    narrow, wide = (mx.grad(loss, argnums=(0, 1))(each, a) for each in (x, x.astype(mx.float32)))
    assert mx.array_equal(_product(x, a, indices, is_sorted), _product(x.astype(mx.float32), a, indices, is_sorted))
    assert mx.array_equal(narrow[1], wide[1]) and narrow[0].dtype == mx.bfloat16
    assert mx.array_equal(narrow[0], wide[0].astype(mx.bfloat16))


@pytest.mark.parametrize("where", ["torch", "mlx"])
def test_an_adapter_beside_experts_is_the_sum_written_out(where: str) -> None:
    """Outputs, and gradients of the input and of every A and B, against experts whose weights are W + scale * B A."""
    random = np.random.default_rng(0)
    shapes = {"gate_proj": (12, 16), "up_proj": (12, 16), "down_proj": (16, 12)}
    weights = {n: random.normal(0, 0.3, (4, *shape)).astype(np.float32) for n, shape in shapes.items()}
    arrays = {}
    for name, (rows, columns) in shapes.items():
        arrays[f"{name}.lora_A"] = random.normal(0, 0.3, (4, 3, columns)).astype(np.float32)
        arrays[f"{name}.lora_B"] = random.normal(0, 0.3, (4, rows, 3)).astype(np.float32)
    x, chosen = random.normal(size=(50, 16)).astype(np.float32), random.integers(0, 3, (50, 2))  # none goes to the last
    counts = random.random((50, 2)).astype(np.float32)
    ways = _torch_ways if where == "torch" else _mlx_ways
    beside, written = ways(weights, arrays, x, chosen, counts, scale=1.5)
    assert beside.keys() == written.keys() and len(beside) == 8
    for name, array in written.items():
        np.testing.assert_allclose(beside[name], array, atol=2e-6 * max(1, np.abs(array).max()), err_msg=name)


def _torch_ways(weights: Any, arrays: Any, x: Any, chosen: Any, counts: Any, scale: float) -> list[dict[str, np.ndarray]]:
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from mlx_finetune.engines.adapter import Target
    from mlx_finetune.engines.torch.experts import ExpertMatrices, LoRAExperts

    how = Qwen3MoeConfig(num_experts=4, hidden_size=16, moe_intermediate_size=12)
    how._experts_implementation = "eager"
    found = []
    for beside in (True, False):
        base = Qwen3MoeExperts(how)
        base.requires_grad_(False)
        own = {name: torch.from_numpy(array).requires_grad_() for name, array in arrays.items()}
        summed = {n: torch.from_numpy(w) for n, w in weights.items()}
        layer: Any = base
        if beside:
            adapters = {
                n: ExpertMatrices(Target(*w.shape[1:], "experts", 4), 3, scale, 0.0, torch.device("cpu"))
                for n, w in weights.items()
            }
            for name, array in arrays.items():
                projection, _, leaf = name.rpartition(".")
                own[name] = getattr(adapters[projection], leaf)
                own[name].data = torch.from_numpy(array)
            layer = LoRAExperts(base, adapters)
        else:
            summed = {n: w + scale * own[f"{n}.lora_B"] @ own[f"{n}.lora_A"] for n, w in summed.items()}
        parts = {"gate_up_proj": torch.cat([summed["gate_proj"], summed["up_proj"]], 1), "down_proj": summed["down_proj"]}
        given = torch.from_numpy(x).requires_grad_()
        for name in parts:
            del base._parameters[name]
            setattr(base, name, parts[name])
        output = layer(given, torch.from_numpy(chosen), torch.from_numpy(counts))
        output.square().sum().backward()
        found.append(
            {name: array.grad.numpy() for name, array in own.items()} | {"x": given.grad.numpy(), "y": output.detach().numpy()}
        )
    return found


def _mlx_ways(weights: Any, arrays: Any, x: Any, chosen: Any, counts: Any, scale: float) -> list[dict[str, np.ndarray]]:
    import mlx.core as mx
    from mlx_lm.models.switch_layers import SwitchGLU

    from mlx_finetune.engines.adapter import Target
    from mlx_finetune.engines.mlx.experts import LoRASwitch

    found = []
    for beside in (True, False):
        layer = SwitchGLU(16, 12, 4)

        def output(own: dict[str, mx.array], given: mx.array, layer: Any = layer, beside: bool = beside) -> mx.array:
            for name, weight in weights.items():
                a, b = own[f"{name}.lora_A"], own[f"{name}.lora_B"]
                if beside:
                    layer[name].lora_A, layer[name].lora_B = a, b
                else:
                    layer[name].weight = mx.array(weight) + scale * (b @ a)
            return (layer(given, mx.array(chosen)) * mx.array(counts)[..., None]).sum(-2)

        for name, weight in weights.items() if beside else ():
            layer[name].weight = mx.array(weight)
            layer[name] = LoRASwitch(layer[name], Target(*weight.shape[1:], "experts", 4), 3, scale, 0.0)
        own, given = {name: mx.array(array) for name, array in arrays.items()}, mx.array(x)
        of_own, of_x = mx.grad(lambda own, given, f=output: f(own, given).square().sum(), argnums=(0, 1))(own, given)
        made = of_own | {"x": of_x, "y": output(own, given)}
        found.append({name: np.array(array) for name, array in made.items()})
    return found


@pytest.mark.parametrize("rule", ["adafactor", "muon"])
@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 9, 4)])
def test_each_expert_steps_as_a_matrix_of_its_own(rule: str, shape: tuple[int, ...], engine_name: str) -> None:
    random, name = np.random.default_rng(0), "model.layers.0.mlp.experts.up_proj.lora_A.weight"
    array_of: Any = importlib.import_module("mlx.core").array if engine_name == "mlx" else importlib.import_module("torch").tensor
    how = config(engine_name, optimizer=rule)
    parameter, gradients = random.normal(size=shape), [random.normal(size=shape) * [[[1.0]], [[9.0]], [[0.1]]] for _ in range(2)]

    def stepped(parameter: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
        own = rule_of(how, name, parameter.shape)
        now = array_of(parameter.astype(np.float32))
        slots = {slot: array_of(np.zeros(size, np.float32)) for slot, size in slots_of(own, parameter.shape).items()}
        for step, gradient in enumerate(gradients, 1):
            now, slots = update(own, now, array_of(gradient.astype(np.float32)), slots, step, 0.1, 0.01)
            assert {slot: tuple(array.shape) for slot, array in slots.items()} == slots_of(own, parameter.shape)
        return np.array(now)

    alone = [stepped(parameter[i], [gradient[i] for gradient in gradients]) for i in range(len(parameter))]
    np.testing.assert_allclose(stepped(parameter, gradients), alone, atol=1e-6)


CALLED: dict[str, dict[str, Any]] = {
    "granitemoe": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "qwen2_moe": MORE["qwen2_moe"],
    "glm4_moe": MORE["glm4_moe"],
}


@pytest.mark.parametrize("model_type", CALLED)
def test_experts_of_mlx_lm_are_found_by_the_names_that_transformers_has_for_them(model_type: str) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from mlx_finetune.engines.mlx.experts import expert_targets as found_in_mlx
    from mlx_finetune.engines.torch.experts import expert_targets as found_in_torch

    how = CONFIG_MAPPING[model_type](**SMALL | CALLED[model_type])
    with torch.device("meta"):
        expected = found_in_torch(AutoModelForCausalLM.from_config(how))
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    told = how.to_dict() | {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 1.0}
    told["num_experts"] = told.get("num_experts") or told.get("num_local_experts")
    known = inspect.signature(module.ModelArgs).parameters
    model = module.Model(module.ModelArgs(**{name: value for name, value in told.items() if name in known}))
    assert found_in_mlx(model, ()) == expected and expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_multiplied_at_once_give_what_one_after_the_other_gives(dtype: str) -> None:
    import torch

    from mlx_finetune.engines.torch.experts import Sorted

    torch.manual_seed(0)
    chosen = torch.tensor([0] * 7 + [2] * 13 + [3] * 10)
    x, weight = torch.randn(30, 64, dtype=getattr(torch, dtype)), torch.randn(5, 16, 64, dtype=getattr(torch, dtype))
    upstream, rows, found = torch.randn(30, 16, dtype=getattr(torch, dtype)), Sorted(chosen, 5), []
    for way in (rows.at_once, rows.one_by_one):
        both = x.clone().requires_grad_(), weight.clone().requires_grad_()
        product = way(*both)
        product.backward(upstream)
        found.append([product.detach(), *(each.grad for each in both)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def check_peft_reads_it(engine: Engine, model: Path, folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    spread(engine, scale=0.1)
    batch = random_batch(3)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        base = loss_sum(network, batch).item()
        opened = PeftModel.from_pretrained(network, written(engine, folder, model))
        expected = loss_sum(opened, batch).item()
        merged = loss_sum(opened.merge_and_unload(), batch).item()
    assert engine.loss_sum(batch) == pytest.approx(expected, rel=1e-5) == pytest.approx(merged, rel=1e-5)
    assert abs(expected / base - 1) > 1e-4


@pytest.mark.parametrize("settings", [BOTH, *list(SETTINGS.values())[:4], BOTH | {"dropout": 0.2}])
def test_peft_opens_what_is_saved_with_the_same_loss(
    settings: dict[str, Any], engine_name: str, mixture: Path, tmp_path: Path
) -> None:
    check_peft_reads_it(open_engine(config(engine_name, **settings), mixture), mixture, tmp_path / "checkpoint")


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe"])
def test_peft_opens_experts_of_every_mixture_that_mlx_has(model_type: str, tmp_path: Path) -> None:
    model = make_tiny(model_type, tmp_path / "model", tokenizer=False)
    check_peft_reads_it(open_engine(config("mlx", **BOTH), model), model, tmp_path / "checkpoint")


@pytest.mark.parametrize("asked", ["all-linear", "all-linear,experts"])
@pytest.mark.parametrize("model_type", MORE)
def test_peft_opens_experts_and_what_stands_beside_them(model_type: str, asked: str, tmp_path: Path) -> None:
    model = made(model_type, tmp_path / "model", MORE[model_type])
    check_peft_reads_it(open_engine(config("torch", target_modules=asked), model), model, tmp_path / "checkpoint")
