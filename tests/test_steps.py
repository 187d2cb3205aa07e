"""Whatever way an engine computes a step (blocks, layers again, trees), loss and gradient are those of plain padded rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import VOCABULARY, make_tiny, mostly_long

from mlx_finetune.config import make_config
from mlx_finetune.data.batches import Batch, Example
from mlx_finetune.engines import open_engine
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.mlx_proven import PROVEN

RELATIVE = 1e-4
PLAIN = {"attention": "fused", "share_prefixes": "never"}
WAYS: dict[str, dict[str, Any]] = {
    "blocks": {"attention": "blocks", "share_prefixes": "never"},
    "every layer again": PLAIN | {"grad_checkpoint": 1},
    "every second layer again": PLAIN | {"grad_checkpoint": 2},
    "trees": {"share_prefixes": "always"},
    "trees, every layer again": {"share_prefixes": "always", "grad_checkpoint": 1},
    "small trees": {"share_prefixes": "always", "pack_length": 400},
}
OWN_ATTENTION = ("gemma2", *(name for name, one in PROVEN.items() if one.own_attention))
# Of each way to attend, or not to, one: plain, in windows, with sinks, compressed, with slopes, recurrent, both, mixtures.
SOME = "gemma3_text gpt_oss granitemoehybrid llama mamba2 mixtral mpt qwen3_next stablelm".split()
MODELS = mostly_long(sorted(PROVEN.keys() - {"gpt_neox"}), *SOME)


def example(tokens: Sequence[int], learned: Sequence[tuple[int, int]], weight: float = 1.0) -> Example:
    weights = np.zeros(len(tokens), np.float32)
    for start, end in learned:
        weights[start:end] = weight
    return Example(np.array(tokens, np.int32), weights, "gptme", "id", (1,))


def family(seed: int = 0) -> list[Example]:
    """Rows as they come of real data: a common prompt, windows of one conversation, answers to one question, one that is alone."""
    random = np.random.default_rng(seed)

    def text(count: int) -> list[int]:
        return random.integers(3, VOCABULARY, count).tolist()

    prompt, question, start = text(150), text(60), text(90)
    rows = [example([*prompt, *(own := text(count))], [(len(prompt) + 5, len(prompt) + len(own))]) for count in (20, 130, 61)]
    rows += [example([*prompt, *question, *text(40)], [(len(prompt) + len(question), 250)], 0.5) for _ in range(2)]
    rows.append(example([*prompt, *start, *text(12)], [(170, 180), (240, 252)]))
    rows.append(example([*prompt, *start, *text(30)], [(170, 180), (241, 270)]))
    return [*rows, example(text(310), [(40, 60), (300, 310)])]


def batches(examples: Sequence[Example], size: int = 4) -> list[Batch]:
    return [Batch.of(examples[i : i + size]) for i in range(0, len(examples), size)]


def first_step(model: Path, given: Sequence[Batch], **settings: Any) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of a step and the gradient of each adapter, whose B is not zero."""
    values = {"engine": "mlx", "dtype": "float32", "rank": 4, "max_grad_norm": 1e9, "weight_decay": 0.0}
    engine = open_engine(make_config(values | settings, "test"), model)
    state, random = engine.state(), np.random.default_rng(5)
    for name, array in sorted(state.items()):
        if name.startswith("adapter/") and "lora_B" in name:
            state[name] = 0.02 * random.standard_normal(array.shape).astype(np.float32)
    engine.load_state(state, 0)
    loss = engine.step(given, 1e-3, seed=3).loss
    return loss, {name: array for name, array in engine.state().items() if name.startswith("m/")}


def check_alike(one: tuple[float, dict[str, np.ndarray]], other: tuple[float, dict[str, np.ndarray]]) -> None:
    assert abs(one[0] - other[0]) < 1e-5 * abs(one[0])
    fewest = 8 if any("mixer" in name for name in one[1]) else 11  # mamba2 adapts one layer in each of its four blocks
    assert one[1].keys() == other[1].keys() and len(one[1]) >= fewest
    for name, gradient in one[1].items():
        largest = np.abs(gradient).max()
        assert largest > 0, name
        assert np.abs(gradient - other[1][name]).max() < RELATIVE * largest, name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_tiny(name, folder / name, tokenizer=False) for name in PROVEN.keys() - {"gpt_neox"}}


def asks_for_blocks(settings: dict[str, Any]) -> bool:
    return settings.get("share_prefixes") == "always" or settings.get("attention") == "blocks"


@pytest.mark.parametrize("model_type", MODELS)
def test_blocks_trees_and_layers_computed_again_give_the_loss_and_gradient_of_plain_rows(
    model_type: str, models: dict[str, Path]
) -> None:
    given = batches(family(), 8)
    ways = ["every second layer again"] if model_type in OWN_ATTENTION else ["blocks", "trees, every layer again"]
    plain = first_step(models[model_type], given, **PLAIN)
    for way in ways:
        check_alike(plain, first_step(models[model_type], given, **WAYS[way]))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_and_any_cut_of_micro_batches_gives_the_same(way: str, models: dict[str, Path]) -> None:
    plain = first_step(models["llama"], batches(family(), 8), **PLAIN)
    check_alike(plain, first_step(models["llama"], batches(family(), 3), **WAYS[way]))


@pytest.mark.parametrize("model_type", mostly_long(OWN_ATTENTION, "gemma2", "mamba2"))
def test_what_attends_in_its_own_way_is_refused_by_name_where_blocks_or_trees_are_asked_for(
    model_type: str, models: dict[str, Path]
) -> None:
    for settings in filter(asks_for_blocks, WAYS.values()):
        with pytest.raises(UserError, match="not there for this architecture"):
            first_step(models[model_type], batches(family()), **settings)
    check_alike(*(first_step(models[model_type], batches(family()), **settings) for settings in (PLAIN, {})))


def test_rows_that_share_nothing_go_through_the_attention_that_was_asked_for(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_into_blocks(*arguments: Any) -> Any:
        raise AssertionError("blocks where nothing is shared")

    alone = example(range(3, 103), [(40, 60)])  # what stands behind the last learned token is no reason for a tree
    monkeypatch.setattr("mlx_finetune.engines.mlx.attention.flash_attention", cut_into_blocks)
    first_step(models["llama"], batches([alone], 1), attention="fused")
    with pytest.raises(AssertionError, match="nothing is shared"):
        first_step(models["llama"], batches([alone, alone], 1), attention="fused")


def test_logits_in_chunks_of_any_size_give_the_same(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = first_step(models["gemma3_text"], batches(family()), **PLAIN)
    for fewest, most in ((1, 7), (5000, 5000)):
        monkeypatch.setattr("mlx_finetune.engines.mlx.loss.FEWEST", fewest)
        monkeypatch.setattr("mlx_finetune.engines.mlx.loss.MOST", most)
        check_alike(plain, first_step(models["gemma3_text"], batches(family()), **PLAIN))


@pytest.mark.parametrize("block", [16, 100])
def test_attention_in_blocks_of_any_size_gives_the_same(
    block: int, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = first_step(models["gemma3_text"], batches(family()), **PLAIN)
    monkeypatch.setattr("mlx_finetune.engines.mlx.attention.BLOCK", block)
    for way in ("blocks", "trees"):
        check_alike(plain, first_step(models["gemma3_text"], batches(family()), **WAYS[way]))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_layers_computed_again_drop_the_same_inputs(rate: float, models: dict[str, Path]) -> None:
    given = batches(family(), 8)
    once, again = (first_step(models["llama"], given, **PLAIN, dropout=rate, grad_checkpoint=k) for k in (0, 1))
    check_alike(once, again)
    if rate:
        other = first_step(models["llama"], given, **PLAIN)
        assert abs(other[0] - once[0]) > 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_learns_alike_in_every_way(bits: int, models: dict[str, Path], tmp_path: Path) -> None:
    from mlx_lm.utils import quantize_model, save_config, save_model

    from mlx_finetune.engines.mlx.load import load_model

    config = read_json(models["llama"] / "config.json")
    model, config = quantize_model(load_model(models["llama"], "float32"), config, group_size=32, bits=bits)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    plain = first_step(tmp_path, batches(family()), **PLAIN)
    for settings in [*WAYS.values()][-1 if bits == 8 else 0 :]:
        check_alike(plain, first_step(tmp_path, batches(family()), **settings))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_an_adapter_on_a_half_precision_base_has_the_gradient_of_float32_copies(
    rate: float, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx.core as mx

    settings = PLAIN | {"dtype": "bfloat16", "dropout": rate}
    given = batches(family())
    ours = [first_step(models["llama"], given, **settings, grad_checkpoint=again) for again in (0, 1)]
    monkeypatch.setattr("mlx_finetune.engines.mlx.lora._product", lambda x, a: x.astype(mx.float32) @ a.T)
    plain = first_step(models["llama"], given, **settings)
    for one in ours:
        check_alike(one, plain)


def test_only_the_last_layers_learn_and_what_lies_below_is_not_computed_again(models: dict[str, Path]) -> None:
    given = batches(family())
    plain = first_step(models["llama"], given, **PLAIN, num_layers=2)
    check_alike(plain, first_step(models["llama"], given, num_layers=2, grad_checkpoint=1))


@pytest.mark.parametrize("model_type", MODELS)
def test_torch_gives_the_loss_and_gradient_of_plain_rows_in_trees_and_with_layers_computed_again(
    model_type: str, models: dict[str, Path]
) -> None:
    given, torch = batches(family(), 8), {"engine": "torch"}
    plain = first_step(models[model_type], given, **torch, share_prefixes="never")
    rows = model_type in (*OWN_ATTENTION, "mpt", "stablelm")
    way = "every second layer again" if rows else "trees, every layer again"
    check_alike(plain, first_step(models[model_type], given, **torch, **WAYS[way] | {"attention": "auto"}))


def test_torch_folds_into_small_trees_and_refuses_by_name_what_only_mlx_has(models: dict[str, Path]) -> None:
    given, torch = batches(family(), 3), {"engine": "torch"}
    plain = first_step(models["qwen3"], given, **torch, share_prefixes="never")
    check_alike(plain, first_step(models["qwen3"], given, **torch, pack_length=400))
    engine = open_engine(make_config(torch | {"rank": 4}, "test"), models["qwen3"])
    rows, folded = engine.step(given, 0.0, 0).computed, sum(batch.inputs.size for batch in given)
    assert rows < 0.7 * folded
    for settings in ({"attention": "blocks"}, {"cache_trunk": True}):
        with pytest.raises(UserError, match=next(iter(settings))):
            first_step(models["qwen3"], given, **torch, **settings)
    with pytest.raises(UserError, match="not there for this architecture"):
        first_step(models["gemma2"], given, **torch, share_prefixes="always")


def test_memory_of_a_step_grows_with_its_length_and_not_with_its_square(models: dict[str, Path]) -> None:
    import mlx.core as mx

    random, peaks = np.random.default_rng(0), []
    for length in (512, 1024, 2048):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        row = example(random.integers(3, VOCABULARY, length).tolist(), [(10, length)])
        first_step(models["llama"], [Batch.of([row])], grad_checkpoint=1)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[2] - peaks[1] < 2.3 * (peaks[1] - peaks[0])
