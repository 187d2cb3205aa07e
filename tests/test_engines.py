"""Both engines compute the same thing, from the same numbers, in the same order."""

from pathlib import Path

import numpy as np
import pytest
from tiny_models import SEEING, make_seeing, make_tiny

from mlx_finetune.config import RunConfig, make_config
from mlx_finetune.data.batches import Batch, Example
from mlx_finetune.engines import Engine, open_engine
from mlx_finetune.engines.adapter import Target, choose_targets, initial_adapter
from mlx_finetune.errors import UserError
from mlx_finetune.models.mlx_proven import PROVEN

VOCABULARY = 320


def config(engine: str, **values: object) -> RunConfig:
    adapter = {} if values.get("fine_tune_type") == "full" else {"rank": 4, "alpha": 8}
    return make_config({"engine": engine, "dtype": "float32", "weight_decay": 0.01} | adapter | values, "test")


def random_batch(seed: int, rows: int = 2, length: int = 24) -> Batch:
    random = np.random.default_rng(seed)
    examples = []
    for _ in range(rows):
        n = int(random.integers(length // 2, length))
        tokens = random.integers(0, VOCABULARY, n).astype(np.int32)
        weights = (random.random(n) < 0.4).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        examples.append(Example(tokens, weights, "test", "c", (0,)))
    return Batch.of(examples)


def spread(engine: Engine, seed: int = 1, scale: float = 0.02) -> None:
    """B away from zero, so that gradients reach A too; its standard deviation is `scale`."""
    random = np.random.default_rng(seed)
    state = engine.state()
    for name in sorted(state):
        if name.startswith("adapter/") and "lora_B" in name:
            state[name] = random.normal(0, scale, state[name].shape).astype(np.float32)
    engine.load_state(state, updates=0)


def test_the_loss_is_the_weighted_cross_entropy_of_transformers_logits(engine_name: str, tiny_llama: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    batch = random_batch(0)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)(torch.from_numpy(batch.inputs).long()).logits
    log_probabilities = torch.log_softmax(logits.double(), -1).numpy()
    chosen = np.take_along_axis(log_probabilities, batch.targets[..., None].astype(np.int64), -1)[..., 0]
    expected = -(chosen * batch.weights).sum()
    assert open_engine(config(engine_name), tiny_llama).loss_sum(batch) == pytest.approx(expected, rel=1e-6)


def test_padding_and_unlearned_tokens_carry_no_loss(engine_name: str, tiny_llama: Path) -> None:
    engine = open_engine(config(engine_name), tiny_llama)
    batch = random_batch(0)
    targets = np.where(batch.weights == 0, 7, batch.targets).astype(np.int32)
    assert engine.loss_sum(Batch(batch.inputs, targets, batch.weights)) == pytest.approx(engine.loss_sum(batch), rel=1e-6)


def test_four_micro_batches_step_like_one_batch(engine_name: str, tiny_llama: Path) -> None:
    examples = random_batch(3, rows=4, length=40)
    rows = [Batch(examples.inputs[i : i + 1], examples.targets[i : i + 1], examples.weights[i : i + 1]) for i in range(4)]
    states, results = [], []
    for micro_batches in (rows, [examples]):
        engine = open_engine(config(engine_name), tiny_llama)
        spread(engine)
        results.append(engine.step(micro_batches, 1e-3, seed=0))
        states.append(engine.state())
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-5)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)
    assert results[0].tokens == results[1].tokens == int((examples.weights > 0).sum())
    # Moments are linear in the gradient; the adapter is not, where a gradient is as small as epsilon.
    for name in states[0]:
        if name.startswith("m/"):
            np.testing.assert_allclose(states[0][name], states[1][name], atol=1e-6)


def test_weights_scale_what_a_token_counts(engine_name: str, tiny_llama: Path) -> None:
    engine, batch = open_engine(config(engine_name), tiny_llama), random_batch(5)
    doubled = Batch(batch.inputs, batch.targets, batch.weights * 2)
    assert engine.loss_sum(doubled) == pytest.approx(2 * engine.loss_sum(batch), rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"target_modules": "q_proj,v_proj"}, {"num_layers": 2}, {"max_grad_norm": 0.01}])
def test_twenty_steps_on_either_engine_end_alike(tiny_llama: Path, settings: dict) -> None:
    losses = {}
    for name in ("mlx", "torch"):
        engine = open_engine(config(name, **settings), tiny_llama)
        losses[name] = [engine.step([random_batch(i), random_batch(i + 100)], 1e-3, seed=i).loss for i in range(20)]
    # Two orders of summation in float32, twenty steps deep: measured 2e-6.
    np.testing.assert_allclose(losses["mlx"], losses["torch"], atol=1e-5)


def test_both_engines_adapt_the_same_modules_and_start_from_the_same_numbers(tiny_llama: Path) -> None:
    states = [open_engine(config(name), tiny_llama).state() for name in ("mlx", "torch")]
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
    assert len(states[0]) == 3 * 2 * 7 * 4  # adapter and two moments, A and B, seven linears, four layers
    assert not any("lm_head" in name or "embed" in name for name in states[0])


def test_a_fresh_adapter_and_a_zero_adapter_are_the_base_model(engine_name: str, tiny_llama: Path) -> None:
    engine, batch = open_engine(config(engine_name), tiny_llama), random_batch(0)
    base = engine.loss_sum(batch)
    engine.step([batch], 1e-2, seed=0)
    assert engine.loss_sum(batch) < base
    engine.load_state(engine.initial(), updates=0)
    assert engine.loss_sum(batch) == base


def test_evaluating_and_generating_leave_training_untouched(engine_name: str, tiny_llama: Path) -> None:
    runs = []
    for look in (False, True):
        engine = open_engine(config(engine_name, dropout=0.1), tiny_llama)
        for i in range(3):
            if look:
                engine.loss_sum(random_batch(50 + i))
                list(engine.generate([1, 2, 3], 4, frozenset()))
            engine.step([random_batch(i)], 1e-3, seed=i)
        runs.append(engine.state())
    assert all(np.array_equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_dropout_acts_while_training_and_never_while_evaluating(engine_name: str, tiny_llama: Path) -> None:
    batch, losses = random_batch(0), {}
    for dropout in (0.0, 0.5):
        engine = open_engine(config(engine_name, dropout=dropout), tiny_llama)
        spread(engine)
        losses[dropout] = (engine.loss_sum(batch), engine.step([batch], 0.0, seed=1).loss, engine.step([batch], 0.0, seed=2).loss)
    assert losses[0.0][0] == losses[0.5][0]
    assert losses[0.0][1] == pytest.approx(losses[0.0][2], abs=1e-6)
    assert abs(losses[0.5][1] - losses[0.5][2]) > 1e-4


def test_a_step_whose_gradient_is_not_finite_changes_nothing(engine_name: str, tiny_llama: Path) -> None:
    engine, batch = open_engine(config(engine_name), tiny_llama), random_batch(0)
    engine.step([batch], 1e-3, seed=0)
    before = engine.state()
    broken = Batch(batch.inputs, batch.targets, np.where(batch.weights > 0, np.float32(np.inf), 0).astype(np.float32))
    result = engine.step([broken], 1e-3, seed=1)
    assert not np.isfinite(result.loss) or not np.isfinite(result.grad_norm)
    after = engine.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_greedy_generation_is_what_the_logits_say_and_stops_before_a_stop_token(engine_name: str, tiny_llama: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    prompt = [5, 17, 90, 200, 31]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = list(prompt)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = ids[len(prompt) :]
    engine = open_engine(config(engine_name), tiny_llama)
    assert list(engine.generate(prompt, 6, frozenset())) == expected
    assert list(engine.generate(prompt, 6, frozenset({expected[3]}))) == expected[: expected.index(expected[3])]


LINEARS = {f"model.layers.{i}.self_attn.{n}": Target(8, 8) for i in range(12) for n in ("q_proj", "v_proj")}
LINEARS |= {"lm_head": Target(9, 8)}


def test_the_last_layers_are_chosen_by_number_not_by_name() -> None:
    chosen = choose_targets(LINEARS, make_config({"num_layers": 3}, "test"))
    assert sorted({int(name.split(".")[2]) for name in chosen}) == [9, 10, 11]
    assert "lm_head" not in chosen and len(chosen) == 6


def test_a_wrong_target_is_named_with_the_nearest_right_one() -> None:
    with pytest.raises(UserError) as error:
        choose_targets(LINEARS, make_config({"target_modules": "qproj"}, "test"))
    assert "'qproj'" in error.value.message and error.value.hint == "did you mean q_proj?"
    with pytest.raises(UserError, match="num_layers = 13: the model has 12"):
        choose_targets(LINEARS, make_config({"num_layers": 13}, "test"))


def test_the_adapter_starts_from_its_seed_within_its_bound() -> None:
    targets = {"a.0.x": Target(6, 16), "a.1.x": Target(5, 9)}
    first, again, other = (initial_adapter(targets, make_config({"rank": 4, "seed": seed}, "test")) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["a.0.x.lora_A.weight"], other["a.0.x.lora_A.weight"])
    assert np.abs(first["a.0.x.lora_A.weight"]).max() <= 0.25 and not first["a.0.x.lora_B.weight"].any()


def test_an_engine_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="engine = 'jax'"):
        make_config({"engine": "jax"}, "test")


# With the weights of seed 0 a choice of experts hangs on the last bit: torch's own gradients move by 2e-4 where they are rounded.
SEEDS = {"qwen3_5_moe_text": 2}


@pytest.mark.parametrize("model_type", sorted(PROVEN.keys() - {"gpt_neox"}))
def test_both_engines_agree_on_loss_and_gradient_for_every_proven_architecture(model_type: str, tmp_path: Path) -> None:
    both_agree(make_tiny(model_type, tmp_path / model_type, tokenizer=False, seed=SEEDS.get(model_type, 0)), model_type)


@pytest.mark.parametrize(("model_type", "text"), SEEING)
def test_both_engines_train_the_text_model_of_one_that_sees_alike(model_type: str, text: str, tmp_path: Path) -> None:
    engine = both_agree(make_seeing(model_type, text, tmp_path / model_type, seed=SEEDS.get(text, 0)), text)
    assert not any("vis" in name for name in engine.targets)


def both_agree(model: Path, model_type: str) -> Engine:
    results, states = {}, {}
    for name in ("mlx", "torch"):
        engine = open_engine(config(name, max_grad_norm=1e9), model)
        spread(engine)
        results[name] = engine.step([random_batch(1), random_batch(2)], 1e-3, seed=0)
        states[name] = engine.state()
    assert results["mlx"].loss == pytest.approx(results["torch"].loss, rel=1e-5)
    # torch's own norm moves by as much where each weight of this one is moved by float32's rounding, 6e-8 of itself
    close = 4e-4 if model_type == "qwen3_next" else 1e-4
    assert results["mlx"].grad_norm == pytest.approx(results["torch"].grad_norm, rel=close)
    assert states["mlx"].keys() == states["torch"].keys()
    for name in states["mlx"]:
        if name.startswith("m/"):
            largest = np.abs(states["torch"][name]).max()
            np.testing.assert_allclose(states["mlx"][name], states["torch"][name], atol=close * largest + 1e-7)
    return engine


def test_a_model_whose_head_is_not_apart_is_refused_by_name(tmp_path: Path) -> None:
    model = make_tiny("gpt_neox", tmp_path / "neox", tokenizer=False)
    with pytest.raises(UserError, match="its head is not apart"):
        open_engine(config("mlx"), model)


def test_weights_that_mlx_lm_changes_as_it_reads_them_are_not_trained_themselves(tmp_path: Path) -> None:
    model = make_tiny("qwen3_5_text", tmp_path / "model", tokenizer=False)
    with pytest.raises(UserError, match="changes it as it reads it"):
        open_engine(make_config({"engine": "mlx", "fine_tune_type": "full", "target_modules": "q_norm"}, "test"), model)


@pytest.mark.parametrize(("model_type", "text"), SEEING[:1])
def test_weights_of_a_model_that_sees_are_trained_themselves_and_fused(
    model_type: str, text: str, engine_name: str, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    from mlx_finetune.export.fuse import fuse
    from mlx_finetune.models.weights import read_float32, tensor_headers

    model = make_seeing(model_type, text, tmp_path / "model")
    settings = {"engine": engine_name, "fine_tune_type": "full", "target_modules": "o_proj", "optimizer": "adamw"}
    engine = open_engine(make_config(settings, "test"), model)
    engine.step([random_batch(1)], 1e-2, seed=0)
    trained = {name.removeprefix("adapter/"): a for name, a in engine.state().items() if name.startswith("adapter/")}
    (tmp_path / "checkpoint").mkdir()
    save_file(trained, tmp_path / "checkpoint" / "model.safetensors")
    (tmp_path / "checkpoint" / "progress.json").write_text("{}")
    fuse(model, tmp_path / "checkpoint", tmp_path / "fused")
    headers = tensor_headers(tmp_path / "fused")
    for number in range(4):
        found = read_float32(headers[f"language_model.model.layers.{number}.self_attn.o_proj.weight"])
        assert np.array_equal(found, trained[f"model.language_model.layers.{number}.self_attn.o_proj.weight"])
