"""Answers: several at a time, and with what was read before kept, are those that are given one by one from the start."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_engines import config, random_batch, spread
from tiny_models import VOCABULARY, make_tiny, mostly_long

from mlx_finetune.data.batches import Batch, Example
from mlx_finetune.engines import Engine, answers, open_engine
from mlx_finetune.engines.answers import Kept, in_common, shared, together
from mlx_finetune.models.mlx_proven import PROVEN

BEGINNING = [7, 8, 9, 10, 11, 12]
PROMPTS = [[5, 9, 17], [*BEGINNING, 30, 31, 32, 33], [*BEGINNING, 40], [*BEGINNING, 30, 31, 50, 51, 52, 53, 54], [61, 62]]
LIMIT = 8
# Of each way to keep what was read, one: plain, in windows, compressed, recurrent, mixtures, slopes; --all asks every architecture.
SOME = (
    "cohere2 deepseek_v3 gemma2 gemma3_text gemma4_text gpt_oss granitemoehybrid lfm2 llama mamba2 mpt qwen3_moe qwen3_next".split()
)
MODELS = mostly_long(sorted(PROVEN), *SOME)


def one_by_one(
    engine: Engine, prompts: Sequence[list[int]], limit: int = LIMIT, stop: frozenset[int] = frozenset()
) -> list[list[int]]:
    return [list(engine.generate(prompt, limit, stop)) for prompt in prompts]


def opened(model_type: str, engine_name: str, folder: Path) -> Engine:
    if (engine_name, model_type) == ("mlx", "gpt_neox"):
        pytest.skip("its head is not apart in mlx-lm's class: it is opened with torch only")
    engine = open_engine(config(engine_name), make_tiny(model_type, folder / "model", tokenizer=False))
    spread(engine, scale=0.3)
    return engine


@pytest.mark.parametrize("model_type", MODELS)
def test_every_architecture_answers_several_prompts_as_it_answers_each(model_type: str, engine_name: str, tmp_path: Path) -> None:
    engine = opened(model_type, engine_name, tmp_path)
    assert engine.generate_all(PROMPTS, LIMIT, frozenset()) == one_by_one(engine, PROMPTS)


@pytest.mark.parametrize("model_type", MODELS)
def test_every_architecture_goes_on_from_what_it_read_as_from_the_start(model_type: str, engine_name: str, tmp_path: Path) -> None:
    engine = opened(model_type, engine_name, tmp_path)
    kept = Kept()
    first = list(engine.generate(PROMPTS[1], LIMIT, frozenset(), kept=kept))
    longer = [*PROMPTS[1], *first, 20, 21]  # the next turn of a conversation
    for prompt in (longer, PROMPTS[3], longer[: len(PROMPTS[1])], PROMPTS[0]):  # and others, which begin alike or not at all
        assert list(engine.generate(prompt, LIMIT, frozenset(), kept=kept)) == one_by_one(engine, [prompt])[0]
        assert kept.tokens[: len(prompt)] == prompt


def tokens_read(engine: Engine) -> list[int]:
    """How many tokens each call of the model's layers is given from now on."""
    counts: list[int] = []
    if engine.name == "torch":
        backbone = engine.model.get_submodule(engine._backbone)  # type: ignore[attr-defined]
        backbone.register_forward_pre_hook(lambda module, given: counts.append(given[0].shape[1]))
        return counts
    last = engine._last_logits  # type: ignore[attr-defined]

    def counted(tokens: Any, caches: Any) -> Any:
        counts.append(tokens.shape[1])
        return last(tokens, caches)

    engine._last_logits = counted  # type: ignore[attr-defined]
    return counts


def test_what_was_read_is_not_read_again(engine_name: str, tiny_llama: Path) -> None:
    engine, kept = open_engine(config(engine_name), tiny_llama), Kept()
    prompt, counts = list(range(3, 60)), tokens_read(engine)
    answer = list(engine.generate(prompt, 4, frozenset(), kept=kept))
    assert counts == [len(prompt), 1, 1, 1] and kept.tokens == [*prompt, *answer[:-1]]
    counts.clear()
    next(engine.generate([*prompt, *answer, 99], 1, frozenset(), kept=kept))
    assert counts == [2] and kept.tokens == [
        *prompt,
        *answer,
        99,
    ]  # nothing had read the last of the answer


def test_an_answer_that_is_given_up_leaves_what_was_kept_of_use(engine_name: str, tiny_llama: Path) -> None:
    engine, kept = open_engine(config(engine_name), tiny_llama), Kept()
    going = engine.generate(PROMPTS[1], LIMIT, frozenset(), kept=kept)
    next(going), next(going)
    going.close()
    assert list(engine.generate(PROMPTS[1], LIMIT, frozenset(), kept=kept)) == one_by_one(engine, PROMPTS[1:2])[0]


def test_a_prompt_longer_than_what_is_read_at_once_is_read_in_parts(
    engine_name: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(config(engine_name), tiny_llama)
    whole = one_by_one(engine, PROMPTS)
    monkeypatch.setattr(f"mlx_finetune.engines.{engine_name}.answers.PREFILL", 3)
    assert one_by_one(engine, PROMPTS) == whole == engine.generate_all(PROMPTS, LIMIT, frozenset())


def test_answers_end_before_a_stop_token_and_each_is_told_of_once(engine_name: str, tiny_llama: Path) -> None:
    engine = open_engine(config(engine_name), tiny_llama)
    stop = frozenset(answer[2] for answer in one_by_one(engine, PROMPTS)[:2])
    told: list[tuple[int, int]] = []
    found = engine.generate_all(PROMPTS, LIMIT, stop, lambda done, total: told.append((done, total)))
    assert found == one_by_one(engine, PROMPTS, stop=stop)
    assert any(len(answer) < LIMIT for answer in found) and not any(stop.intersection(answer) for answer in found)
    assert told == [(done, len(PROMPTS)) for done in range(1, len(PROMPTS) + 1)]


def test_as_chosen_from_the_logits_that_the_loss_is_made_of(engine_name: str, tiny_llama: Path) -> None:
    engine = open_engine(config(engine_name), tiny_llama)
    seen: list[np.ndarray] = []

    def least(logits: np.ndarray) -> int:
        seen.append(logits)
        return int(logits.argmin())

    answer = list(engine.generate(PROMPTS[1], 3, frozenset(), choose=least))
    tokens = np.array([*PROMPTS[1], *answer], np.int32)
    weights = np.zeros(len(tokens), np.float32)
    weights[-3:] = 1
    expected = engine.logits(Batch.of([Example(tokens, weights, "test", "one", (0,))]))
    assert answer == expected.argmin(-1).tolist() and seen[0].dtype == np.float32
    np.testing.assert_allclose(np.stack(seen), expected, atol=1e-4)


def test_losses_are_the_cross_entropy_of_each_place_and_sum_to_the_loss(engine_name: str, tiny_llama: Path) -> None:
    engine, batch = open_engine(config(engine_name), tiny_llama), random_batch(4)
    logits, losses = engine.logits(batch).astype(np.float64), engine.losses(batch)
    targets = batch.targets[batch.weights > 0]
    expected = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets]
    assert losses.dtype == np.float32 and losses.shape == targets.shape
    np.testing.assert_allclose(losses, expected, atol=1e-4)
    assert engine.loss_sum(batch) == pytest.approx(float(losses @ batch.weights[batch.weights > 0]), rel=1e-6)


def test_a_model_opened_as_it_is_computes_like_one_with_a_fresh_adapter(engine_name: str, tiny_llama: Path) -> None:
    plain, fresh = open_engine(config(engine_name), tiny_llama, adapted=False), open_engine(config(engine_name), tiny_llama)
    assert plain.trained == {} and plain.state() == plain.initial() == {}
    np.testing.assert_allclose(plain.logits(random_batch(1)), fresh.logits(random_batch(1)), atol=1e-5)
    assert one_by_one(plain, PROMPTS) == one_by_one(fresh, PROMPTS)


def test_prompts_that_begin_alike_are_neighbours_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MOST_TOGETHER", 2)
    rng = np.random.default_rng(0)
    prompts = [[head, *rng.integers(0, VOCABULARY, 5).tolist()] for head in (1, 2, 3, 1, 2, 3)]
    groups = together(prompts, 4)
    assert sorted(i for group in groups for i in group) == list(range(6))
    assert [{prompts[i][0] for i in group} for group in groups] == [{1}, {2}, {3}]
    monkeypatch.setattr(answers, "MOST_TOKENS", 20)  # less than two prompts of 6 tokens with answers of 5
    assert [len(group) for group in together(prompts, 5)] == [1] * 6


def test_what_prompts_begin_with_leaves_each_a_token_to_read() -> None:
    assert in_common([1, 2, 3], [1, 2, 4, 5]) == 2 and in_common([], [1]) == 0 and in_common([1, 2], [1, 2, 3]) == 2
    assert shared([[1, 2, 3], [1, 2, 3]]) == 2 and shared([[1, 2], [1, 2, 3]]) == 1 and shared([[1], [2]]) == 0
