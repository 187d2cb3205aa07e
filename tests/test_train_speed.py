"""The pieces of benchmarks/train_speed.py on a tiny model: both sides compute the same loss, and the data is what it says."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pytest import approx

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import train_speed_data as data
from train_speed_report import curve, exponents
from train_speed_steps import Ours, Peer, read_row, write_row

from mlx_finetune.config import FIELDS
from mlx_finetune.data.collect import collect
from mlx_finetune.data.conversation import Conversation, read_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.found import Sources
from mlx_finetune.data.refine import Settings
from mlx_finetune.data.template import ChatTemplate

SAME = 1e-5  # a vocabulary of 320 is summed more exactly than one of 49,152
LAYERS = 2  # of 4 are adapted


@pytest.fixture(scope="module")
def template(tiny_llama: Path) -> ChatTemplate:
    return ChatTemplate.load(tiny_llama)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collections") / "a"
    collect(Sources(data.SAMPLE, ()), Settings(), folder)
    return folder


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory, collected: Path, template: ChatTemplate) -> Dataset:
    return data.windows(collected, template, tmp_path_factory.mktemp("windows") / "prepared", 256)


def generated(collected: Path, seed: int = 0) -> list[Conversation]:
    pools = data.pools_of(read_conversations(collected / "gptme.jsonl"))
    return data.generate(pools, lambda text: len(text.split()), conversations=60, median=300, seed=seed)


@pytest.mark.long
@pytest.mark.parametrize("checkpoint", [False, True])
def test_both_sides_have_the_same_loss_on_the_same_tokens(tiny_llama: Path, windows: Dataset, checkpoint: bool) -> None:
    if checkpoint and "grad_checkpoint" not in FIELDS:
        pytest.skip("RunConfig has no grad_checkpoint")
    from mlx_lm.models import llama

    groups = [[windows.train[i] for i in group] for group in ((0, 1), (2,), (3, 4, 5))]
    plain = llama.TransformerBlock.__call__
    try:  # mlx-lm's checkpointing is put on the class
        found = [side(tiny_llama, LAYERS, checkpoint, {}).step(groups, warm=True) for side in (Ours, Peer)]
    finally:
        llama.TransformerBlock.__call__ = plain
    assert found[0]["loss"] == approx(found[1]["loss"], rel=SAME)
    assert found[0]["learned"] == found[1]["learned"] == sum(int((e.weights > 0).sum()) for group in groups for e in group)
    assert all(one["peak"] > 0 and one["cpu"] > 0 for one in found)


def test_the_loss_sees_the_adapter(tiny_llama: Path, windows: Dataset) -> None:
    side = Peer(tiny_llama, LAYERS, False, {})
    group = [[windows.train[0]]]
    with_adapter = side.step(group, warm=False)["loss"]
    assert side.step(group, warm=False)["loss"] == with_adapter, "a rate of 0 leaves it as it is"
    assert Peer(tiny_llama, 1, False, {}).step(group, warm=False)["loss"] != approx(with_adapter, rel=1e-4)


def test_a_row_is_full_and_learned_to_its_end_as_much_as_all_is(windows: Dataset, tmp_path: Path) -> None:
    row = data.row_of(windows, 512)
    whole = np.concatenate([e.weights for e in windows.train]) > 0
    assert len(row.tokens) == 513 and row.weights[-1] > 0
    assert np.mean(row.weights > 0) == approx(whole.mean(), abs=0.02)
    write_row(tmp_path / "row.npz", row)
    assert np.array_equal(read_row(tmp_path / "row.npz").tokens, row.tokens)


def test_generated_chats_are_the_same_for_the_same_seed(collected: Path) -> None:
    assert generated(collected) == generated(collected) != generated(collected, seed=1)


def test_generated_chats_have_the_shares_and_the_long_tail_that_are_stated(collected: Path) -> None:
    chats = generated(collected)
    words: Counter[str] = Counter()
    for chat in chats:
        for place, message in enumerate(chat.messages):
            words["prompt" if place == 0 else message.role] += len(message.content.split())
    others = words.total() - words["prompt"]
    low, high = data.ASSISTANT_SHARE
    assert words["prompt"] / words.total() == approx(data.PROMPT_SHARE, abs=0.02)
    assert low < words["assistant"] / others < high
    assert len({chat.messages[0] for chat in chats}) == 1
    sizes = np.array([sum(len(message.content.split()) for message in chat.messages[1:]) for chat in chats])
    assert sizes.max() > 4 * np.median(sizes)


def test_what_the_peer_learns_is_counted_on_its_own_batches(tiny_llama: Path, collected: Path, template: ChatTemplate) -> None:
    whole = data.windows(collected, template, collected.parent / "whole", data.WHOLE)
    everything, cut = (data.shipped(whole, tiny_llama, length, 1) for length in (data.WHOLE, 1024))
    last = [max(e.turns) for e in whole.train]
    assert everything.learned == everything.total and everything.nan_batches == 0
    assert len(everything.shapes) == len(last) and 0 < everything.learned_masked < everything.learned / 2
    assert cut.learned < everything.learned and cut.nan_batches > 0
    assert {width for _, width in cut.shapes} == {1023}


def test_a_cut_model_has_the_first_layers(tiny_llama: Path, windows: Dataset, tmp_path: Path) -> None:
    side = Ours(data.cut_model(tiny_llama, tmp_path / "cut", 2), 2, False, {})
    assert len(side.engine.model.layers) == 2


def test_the_curve_passes_through_what_was_measured_and_between_it() -> None:
    key = ("peer", False, False, "row", "a")
    seconds = curve({(*key, 100): {"cpu": 1.0}, (*key, 400): {"cpu": 8.0}}, False, False, "cpu", 400)
    assert seconds and [seconds(width) for width in (50, 100, 200, 400)] == approx([0.5, 1.0, 8**0.5, 8.0])
    assert curve({(*key, 100): {"cpu": 1.0}}, False, False, "cpu", 400) is None


def test_an_exponent_of_one_means_cost_grows_with_the_square() -> None:
    rows = [
        {"tokens": n, "cut_model": False, "checkpointing": False, "peer": {"cpu": n * n / 1e6}, "ours": {"cpu": n / 1e3}}
        for n in (512, 1024, 2048)
    ]
    assert [one["exponent"] for one in exponents(rows)] == approx([1.0, 0.0], abs=1e-9)
