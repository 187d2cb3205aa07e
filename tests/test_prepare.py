"""What `prepare` learns of a collection: each turn once or counted, and which conversations are held out."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from chats import DEFAULT_PROMPT, ZEPHYR, chat, conversation_of, random_chat, template_of, to_learn
from prepared_chats import of_times, prepared
from tiny_models import CHATML

import mlx_finetune
from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, read_conversations, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.sources import gather, gptme, openassistant
from mlx_finetune.data.template import ChatTemplate

SAMPLE = Path(mlx_finetune.__file__).parent / "sample"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return template_of(tmp_path_factory.mktemp("template"), CHATML)


@pytest.fixture(scope="module")
def sample() -> list[Conversation]:
    trees = gather(openassistant.read(SAMPLE / "openassistant.trees.jsonl", openassistant.EVERYTHING)).conversations
    return [*gather(gptme.read(SAMPLE / "gptme-logs")).conversations, *trees]


def check_tally(dataset: Dataset, conversations: Sequence[Conversation]) -> None:
    """Every turn is learned once or counted, and the counts are those of the examples."""
    held_out = {"gptme": dataset.info["held_out_groups"], "openassistant": dataset.info["held_out_trees"]}
    assert dataset.info["left_out"] == {} and dataset.info["test_conversations"] == []
    for split, store in (("train", dataset.train), ("valid", dataset.valid)):
        tally = dataset.info[split]
        here = [c for c in conversations if (c.group in held_out[c.source]) == (split == "valid")]
        learned = Counter((example.conversation, turn) for example in store for turn in example.turns)
        assert max(learned.values(), default=1) == 1
        assert tally["learned_turns"] == len(learned)
        lost = tally["turns_too_long"] + sum(tally["turns_refused"].values())
        assert tally["learned_turns"] + lost == sum(one.assistant_turns for one in here)
        assert tally["examples"] == len(store) == dataset.info["examples"][split]
        assert tally["tokens"] == sum(store.lengths) and max(store.lengths, default=0) <= dataset.info["max_length"]
        assert tally["learned_tokens"] == sum(int((example.weights > 0).sum()) for example in store)
        assert tally["learned_tokens"] == sum(tally["learned_tokens_by_source"].values())
        assert sum(tally["conversations"].values()) == len(here)
        assert set(learned) <= {(c.id, place) for c in here for place, _, _ in to_learn(c.messages)}


@pytest.mark.parametrize("size", [128, 512, 2048, 8192])
def test_every_turn_of_the_sample_is_learned_once_or_counted(
    tiny: ChatTemplate, sample: list[Conversation], tmp_path: Path, size: int
) -> None:
    dataset = prepared(tmp_path, sample, tiny, max_length=size, valid_fraction=0.3, openassistant_share=0.9)
    check_tally(dataset, sample)
    assert dataset.info["train"]["turns_refused"] == {} == dataset.info["valid"]["turns_refused"]
    assert "gptme" in dataset.valid.sources and len(dataset.info["held_out_trees"]) == 1
    assert set(dataset.train.sources) == ({"gptme", "openassistant"} if size > 128 else {"gptme"})
    if size == 8192:
        assert dataset.info["train"]["served_as_trained"] == dataset.info["train"]["learned_turns"]


def test_every_turn_of_genuine_logs_is_learned_once_or_counted(smollm2: Path, shared: Path, tmp_path: Path) -> None:
    logs = [log for log in gather(gptme.read(shared / "data" / "gptme-logs")).conversations if log.assistant_turns]
    dataset = prepared(tmp_path, logs, ChatTemplate.load(smollm2), max_length=1024)
    check_tally(dataset, logs)
    assert dataset.info["train"]["turns_refused"] == {}
    assert dataset.info["train"]["messages_shortened"] > 50


@pytest.mark.parametrize("size", [64, 200, 1000])
def test_every_turn_of_random_chats_is_learned_once_or_counted(tiny: ChatTemplate, tmp_path: Path, size: int) -> None:
    random = np.random.default_rng(size)
    chats = [conversation_of([*random_chat(random, 0.2), *chat(f"a {i}", "b")], f"g{i}") for i in range(120)]
    dataset = prepared(tmp_path, chats, tiny, max_length=size)
    check_tally(dataset, chats)
    assert set(dataset.info["train"]["turns_refused"]) >= {"unassigned characters in a message", "a turn of blanks"}


def test_what_one_window_cannot_hold_does_not_cost_the_others(tiny: ChatTemplate, tmp_path: Path) -> None:
    messages = chat(*[f"{i} " + "and so " * 10 for i in range(40)])
    messages[20] = Message("user", "\U00050041")
    conversation = conversation_of(messages)
    dataset = prepared(tmp_path, [conversation], tiny, max_length=256)
    check_tally(dataset, [conversation])
    assert 1 <= dataset.info["train"]["turns_refused"]["unassigned characters in a message"] <= 5


def test_a_template_that_drops_tool_output_loses_nothing_without_a_count(tmp_path: Path) -> None:
    template = template_of(tmp_path / "model", ZEPHYR, eos="<|im_end|>")
    with_output = conversation_of([*chat("a", "b"), Message("tool", "output"), *chat("c", "d")], "one")
    conversations = [with_output, conversation_of(chat("a", "b"), "two"), conversation_of(chat("e", "f"), "three")]
    dataset = prepared(tmp_path, conversations, template, valid_fraction=0)
    check_tally(dataset, conversations)
    assert dataset.info["train"]["turns_refused"] == {"the template drops a message of role tool": 1}


@pytest.mark.parametrize("size", [200, 230, 256, 300])
def test_windows_keep_to_the_length_though_the_template_adds_what_no_count_foresees(tmp_path: Path, size: int) -> None:
    template = template_of(tmp_path / "model", DEFAULT_PROMPT)
    conversations = [conversation_of(chat(*["the answer " * n, "the user " * 3] * 9), str(n)) for n in range(1, 9)]
    dataset = prepared(tmp_path, conversations, template, max_length=size)
    check_tally(dataset, conversations)
    assert dataset.info["train"]["turns_too_long"] == 0 and len(dataset.train) > 8


def test_context_and_blank_turns_are_not_among_the_turns_of_an_example(tiny: ChatTemplate, tmp_path: Path) -> None:
    messages = [*chat("a", "b", "c", " \n", "d", "e"), Message("user", "f"), Message("assistant", "g", 0.0), *chat("h", "i")]
    messages[5] = Message("assistant", "e", 0.25)
    dataset = prepared(tmp_path, [conversation_of(messages)], tiny)
    (example,) = dataset.train
    assert example.turns == (1, 5, 9)
    assert sorted(set(example.weights.tolist())) == [0, 0.25, 1]
    assert dataset.info["train"]["turns_refused"] == {"a turn of blanks": 1}


def test_what_another_source_has_of_a_held_out_group_is_left_out(tiny: ChatTemplate, tmp_path: Path) -> None:
    groups = [f"g{i}" for i in range(20)]
    conversations = [conversation_of(chat(f"{s} {g}", "yes"), g, s) for g in groups for s in ("gptme", "openassistant")]
    dataset = prepared(tmp_path, conversations, tiny, valid_fraction=0.5, openassistant_share=0.9)
    assert Counter(dataset.valid.sources) == {"gptme": 10}
    assert Counter(dataset.train.sources) == {"gptme": 10, "openassistant": 10}
    assert dataset.info["left_out"] == {"same group as a held-out conversation": 10}
    assert {dataset.info["train"]["conversations"]["openassistant"], *dataset.info["valid"]["conversations"].values()} == {10}


def groups_in(dataset: Dataset, split: str, conversations: Sequence[Conversation]) -> set[str]:
    groups = {one.id: one.group for one in conversations}
    return {groups[example.conversation] for example in getattr(dataset, split)}


def test_the_newest_conversations_are_held_out_and_a_test_split_stands_apart(tiny: ChatTemplate, tmp_path: Path) -> None:
    conversations = [*of_times(20), *of_times(20, "openassistant")]
    settings = {"test_fraction": 0.2, "valid_fraction": 0.25, "openassistant_share": 0.9}
    dataset = prepared(tmp_path, conversations, tiny, **settings)
    test, valid, train = (groups_in(dataset, split, conversations) for split in ("test", "valid", "train"))
    assert test and test == set(dataset.info["test_conversations"]) and all(name.startswith("gptme") for name in test)
    assert not test & valid and not test & train and not valid & train
    left = sorted((group for group in valid | train if group.startswith("gptme")), key=lambda group: int(group[6:]))
    assert {g for g in valid if g.startswith("gptme")} == set(left[-len(dataset.info["held_out_groups"]) :]) != set()
    rows = list(read_conversations(dataset.folder / "test.jsonl"))
    assert len(rows) == len(dataset.test) == dataset.info["test"]["examples"] == len(test)
    assert dataset.info["bytes"]["test"] == (dataset.folder / "test.arrow").stat().st_size


def test_a_placeholder_is_counted_where_it_is_not_learned(tiny: ChatTemplate, tmp_path: Path) -> None:
    messages = chat("log in with [REDACTED:password:1]", "login [REDACTED:password:1]")
    dataset = prepared(tmp_path, [conversation_of(messages)], tiny)
    encoded, tally = tiny.encode(messages), dataset.info["train"]
    assert tally["placeholder_tokens"] == encoded.placeholders > 5
    assert tally["learned_tokens"] == (encoded.weights > 0).sum() > 1


@pytest.mark.long
def test_a_collection_of_any_size_is_prepared_a_conversation_at_a_time(tiny: ChatTemplate, tmp_path: Path) -> None:
    import gc

    most = 0

    def look(done: int, total: int) -> None:
        nonlocal most
        most = max(most, sum(isinstance(each, Conversation) for each in gc.get_objects()) - before)

    write_conversations(tmp_path / "all.jsonl", (conversation_of(chat(str(i), "yes " * i), str(i)) for i in range(100)))
    gc.collect()
    before = sum(isinstance(each, Conversation) for each in gc.get_objects())
    prepare([tmp_path / "all.jsonl"], tiny, make_config({}, "test"), tmp_path / "out", {}, look)
    assert most <= 3


def test_the_jsonl_beside_holds_the_same_windows(tiny: ChatTemplate, sample: list[Conversation], tmp_path: Path) -> None:
    dataset = prepared(tmp_path, sample, tiny, max_length=512)
    rows = list(read_conversations(dataset.folder / "train.jsonl"))
    assert len(rows) == len(dataset.train)
    for row, example in zip(rows, dataset.train, strict=True):
        encoded = tiny.encode(row.messages)
        assert np.array_equal(encoded.tokens, example.tokens) and np.array_equal(encoded.weights, example.weights)


def test_the_same_conversations_give_the_same_id_wherever_they_are_prepared(
    tiny: ChatTemplate, sample: list[Conversation], tmp_path: Path
) -> None:
    ids = [prepared(tmp_path / name, sample, tiny, max_length=512).id for name in ("one", "another place")]
    assert ids[0] == ids[1]
    assert prepared(tmp_path / "shorter", sample, tiny, max_length=500).id != ids[0]
    assert prepared(tmp_path / "fewer", sample[1:], tiny, max_length=512).id != ids[0]


def test_several_processes_make_the_same_folder_as_one(
    tiny: ChatTemplate, sample: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_length": 1024, "test_fraction": 0.2, "openassistant_share": 0.1}
    alone = prepared(tmp_path / "alone", sample, tiny, **settings)
    monkeypatch.setattr("mlx_finetune.data.examples.MUCH", 0)
    monkeypatch.setattr("mlx_finetune.data.examples.workers", lambda: 2)
    monkeypatch.setattr("mlx_finetune.data.examples.CHUNK", 1)  # many are asked for before the share is known to be reached
    together = prepared(tmp_path / "together", sample, tiny, **settings)
    for path in sorted(alone.folder.iterdir()):
        assert path.read_bytes() == (together.folder / path.name).read_bytes(), path.name
    assert alone.info["left_out"]
