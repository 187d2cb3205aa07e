"""OpenAssistant makes up so large a share of the learned tokens, and of its trees the same ones are taken."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import chat, conversation_of, template_of
from tiny_models import CHATML

from mlx_finetune.commands import prepare_command
from mlx_finetune.config import make_config
from mlx_finetune.data.clusters import place
from mlx_finetune.data.conversation import Conversation, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.mixture import GIVE_UP, Mixture
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.prepared import show_dataset


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return template_of(tmp_path_factory.mktemp("template"), CHATML)


def made(count: int, source: str, longest: int = 30, seed: int = 0) -> list[Conversation]:
    """Conversations of random lengths, each in a group of its own; the same ones for a larger count, and more."""
    random = np.random.default_rng((seed, len(source)))
    sizes = random.integers(1, longest, 2000)[:count]
    return [conversation_of(chat(f"{source} {i}", "so " * int(n)), f"{source}-{i}", source) for i, n in enumerate(sizes)]


def prepared(folder: Path, conversations: Sequence[Conversation], template: ChatTemplate, **settings: Any) -> Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    write_conversations(folder / "all.jsonl", conversations)
    config = make_config({"valid_fraction": 0, "openassistant_valid_fraction": 0} | settings, "test")
    prepare([folder / "all.jsonl"], template, config, folder / "dataset", {})
    return Dataset.open(folder / "dataset")


def learned(dataset: Dataset, *sources: str) -> int:
    return sum(int((example.weights > 0).sum()) for example in dataset.train if example.source in sources)


def taken(dataset: Dataset, conversations: Sequence[Conversation]) -> set[str]:
    groups = {one.id: one.group for one in conversations}
    return {groups[example.conversation] for example in dataset.train if example.source == "openassistant"}


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5, 0.9])
def test_openassistant_is_as_good_as_its_share_of_the_learned_tokens_and_never_more(
    tiny: ChatTemplate, tmp_path: Path, share: float
) -> None:
    conversations = [*made(150, "openassistant"), *made(8, "gptme"), *made(4, "chat")]
    dataset = prepared(tmp_path, conversations, tiny, openassistant_share=share)
    trees, others = learned(dataset, "openassistant"), learned(dataset, "gptme", "chat")
    reached = trees / (trees + others)
    assert reached == dataset.info["openassistant_share_reached"] <= share
    assert reached >= share - 0.03 or dataset.info["left_out"] == {}
    by_source = dataset.info["train"]["learned_tokens_by_source"]
    assert by_source.get("openassistant", 0) == trees and by_source["gptme"] + by_source["chat"] == others
    left = 150 - len(taken(dataset, conversations))
    reason = f"beyond the share of OpenAssistant, {share:g} of the learned tokens"
    assert dataset.info["left_out"] == ({reason: left} if left else {})
    assert dataset.info["train"]["conversations"].get("openassistant", 0) == 150 - left


def test_as_other_sources_or_the_share_grow_what_was_taken_stays(tiny: ChatTemplate, tmp_path: Path) -> None:
    trees, before = made(120, "openassistant", longest=4), set[str]()
    for step, (count, share) in enumerate([(2, 0.2), (4, 0.2), (4, 0.4), (8, 0.5), (60, 0.9)]):
        now = taken(prepared(tmp_path / str(step), [*made(count, "gptme"), *trees], tiny, openassistant_share=share), trees)
        assert before < now
        order = sorted((tree.group for tree in trees), key=place)
        last = max(order.index(group) for group in now)
        assert len(set(order[:last]) - now) < GIVE_UP  # all but a few large ones, and none from far behind
        before = now
    assert len(before) == 120


def test_as_openassistant_grows_the_first_by_hash_are_taken(tiny: ChatTemplate, tmp_path: Path) -> None:
    few, many = made(100, "openassistant"), made(300, "openassistant")
    now, later = (taken(prepared(tmp_path / str(len(t)), [*made(20, "gptme"), *t], tiny), t) for t in (few, many))
    order = sorted((tree.group for tree in many), key=place)
    last = max(order.index(group) for group in later)
    assert len(set(order[:last]) - later) < GIVE_UP and len(later - now) >= 5
    assert {group for group in now if order.index(group) < last - GIVE_UP} <= later


def test_a_tree_that_would_overshoot_is_passed_over_for_a_smaller_one(tiny: ChatTemplate, tmp_path: Path) -> None:
    small = [conversation_of(chat(f"q{i}", "so"), f"s{i}", "openassistant") for i in range(20)]
    large = [conversation_of(chat(f"q{i}", "so " * 200), f"l{i}", "openassistant") for i in range(5)]
    dataset = prepared(tmp_path, [*large, *small, conversation_of(chat("a", "b " * 50))], tiny, openassistant_share=0.4)
    assert {group[0] for group in taken(dataset, [*small, *large])} == {"s"}


def test_where_there_is_nothing_else_all_of_openassistant_is_taken(tiny: ChatTemplate, tmp_path: Path) -> None:
    trees = made(30, "openassistant")
    for share in (0.0, 0.3):
        dataset = prepared(tmp_path / str(share), trees, tiny, openassistant_share=share)
        assert len(taken(dataset, trees)) == 30 and dataset.info["openassistant_share_reached"] == 1
        assert dataset.info["left_out"] == {}


def test_where_nothing_of_the_others_can_be_learned_openassistant_does_not_take_their_place(
    tiny: ChatTemplate, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"a turn of blanks \(1\); beyond the share of OpenAssistant.* \(30\)"):
        prepared(tmp_path, [conversation_of(chat("a", " ")), *made(30, "openassistant")], tiny)


def test_looking_ends_soon_after_the_share_is_reached() -> None:
    mixture, looked = Mixture(0.5), 0
    assert mixture.takes("gptme", 100)
    while not mixture.full:
        mixture.takes("openassistant", 30)
        looked += 1
    assert (looked, mixture.taken, mixture.reached) == (3 + GIVE_UP, 90, 90 / 190)


@pytest.mark.parametrize(
    ("trees", "share", "said"),
    [
        (5, 0.9, r"OpenAssistant: \d+\.\d % of the learned tokens, asked 90 %: all there is was taken"),
        (150, 0.3, r"OpenAssistant: (29\.\d|30\.0) % of the learned tokens(, asked 30 %: the next would go beyond)?"),
    ],
)
def test_a_share_that_cannot_be_reached_is_said(
    tiny: ChatTemplate, tmp_path: Path, capsys: pytest.CaptureFixture[str], trees: int, share: float, said: str
) -> None:
    dataset = prepared(tmp_path, [*made(trees, "openassistant"), *made(12, "gptme")], tiny, openassistant_share=share)
    assert dataset.info["openassistant_all_taken"] == (trees == 5)
    show_dataset(dataset.info)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("OpenAssistant:")]
    assert re.fullmatch(said, line)


@pytest.mark.parametrize("trees", [0, 30])
def test_nothing_is_said_of_a_share_that_was_not_to_be_had_or_is_all(
    tiny: ChatTemplate, tmp_path: Path, capsys: pytest.CaptureFixture[str], trees: int
) -> None:
    only = made(trees, "openassistant") or made(5, "gptme")
    dataset = prepared(tmp_path, only, tiny)
    show_dataset(dataset.info)
    said = capsys.readouterr().out
    assert ("OpenAssistant: 100.0 % of the learned tokens\n" in said) == bool(trees)
    assert "asked" not in said


def test_a_share_of_all_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--openassistant-share 1: ") as error:
        prepare_command([tmp_path], "model", tmp_path / "out", {"openassistant_share": 1.0}, False)
    assert "openassistant.jsonl" in error.value.hint
