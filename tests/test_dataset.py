"""The prepared folder: every turn is learned or counted with its reason, and what is on the disk is what training sees."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import DEFAULT_PROMPT, ZEPHYR, chat, conversation_of, random_chat, template_of, to_learn
from tiny_models import CHATML

import mlx_finetune
from mlx_finetune.config import make_config
from mlx_finetune.data.batches import Batch, Example
from mlx_finetune.data.conversation import Conversation, Message, read_conversations, write_conversations
from mlx_finetune.data.dataset import Dataset, write_dataset
from mlx_finetune.data.prepare import collected_files, prepare
from mlx_finetune.data.sources import gather, gptme, openassistant
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError

SAMPLE = Path(mlx_finetune.__file__).parent / "sample"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return template_of(tmp_path_factory.mktemp("template"), CHATML)


@pytest.fixture(scope="module")
def sample() -> list[Conversation]:
    trees = gather(openassistant.read(SAMPLE / "openassistant.trees.jsonl", openassistant.EVERYTHING)).conversations
    return [*gather(gptme.read(SAMPLE / "gptme-logs")).conversations, *trees]


def random_examples(seed: int, count: int, length: int = 40) -> list[Example]:
    random, examples = np.random.default_rng(seed), []
    for i in range(count):
        tokens = random.integers(0, 50_000, random.integers(2, length)).astype(np.int32)
        weights = random.choice((0.0, 1.0, 0.1), len(tokens)).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        examples.append(
            Example(tokens, weights, str(random.choice(("gptme", "openassistant"))), f"c{i}", (1, 2 * i), i % 3, i % 2 == 0)
        )
    return examples


def write(folder: Path, train: Sequence[Example], valid: Sequence[Example] = (), test: Sequence[Example] = ()) -> Dataset:
    folder.mkdir(parents=True)
    write_dataset(folder, {"train": train, "valid": valid, "test": test}, lambda: {"max_length": 40})
    return Dataset.open(folder)


def prepared(folder: Path, conversations: Sequence[Conversation], template: ChatTemplate, **settings: Any) -> Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    write_conversations(folder / "all.jsonl", conversations)
    prepare([folder / "all.jsonl"], template, make_config(settings, "test"), folder / "dataset", {"model": "tiny"})
    return Dataset.open(folder / "dataset")


def assert_equal(one: Example, other: Example) -> None:
    assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.weights, other.weights)
    assert (one.tokens.dtype, one.weights.dtype) == (np.int32, np.float32)
    assert (one.source, one.conversation, one.turns) == (other.source, other.conversation, other.turns)
    assert (one.exact_turns, one.own_context) == (other.exact_turns, other.own_context)


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


def of_times(count: int, source: str = "gptme") -> list[Conversation]:
    """One conversation a day, each in a group of its own."""
    return [
        Conversation(
            tuple(chat(f"{source} {i}", f"answer {i}")),
            source,
            f"{source}-{i}",
            "private",
            {"time": f"2026-01-{i + 1:02}T00:00:00+00:00"},
        )
        for i in range(count)
    ]


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


def test_the_id_is_of_tokens_and_weights_in_order(tmp_path: Path) -> None:
    examples = random_examples(0, 3)
    weights = examples[1].weights.copy()
    weights[-1] = 0.5
    changed = Example(examples[1].tokens, weights, *(getattr(examples[1], name) for name in ("source", "conversation", "turns")))
    splits: Mapping[str, tuple[list[Example], list[Example]]] = {
        "same": (examples, []),
        "weight": ([examples[0], changed, examples[2]], []),
        "order": (examples[::-1], []),
        "split": (examples[:2], examples[2:]),
    }
    ids = {name: write(tmp_path / name, *split).id for name, split in splits.items()}
    assert len(set(ids.values())) == 4
    assert ids["same"] == "dc79e524992c2c50"


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    train, valid = random_examples(1, 30), random_examples(2, 7)
    dataset = write(tmp_path / "d", train, valid)
    for store, written in ((dataset.train, train), (dataset.valid, valid)):
        assert len(store) == len(written)
        for one, other in zip(store, written, strict=True):
            assert_equal(one, other)
        assert store.lengths == tuple(len(example.tokens) for example in written)
        assert store.sources == tuple(example.source for example in written)
    assert_equal(dataset.train[29], train[29])


def test_a_split_may_be_empty(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", random_examples(1, 3))
    assert (len(dataset.valid), dataset.valid.lengths, dataset.held_out(2), list(dataset.valid)) == (0, (), {}, [])


def test_held_out_batches_have_each_example_once_and_by_source(tmp_path: Path) -> None:
    valid = random_examples(4, 23)
    batches = write(tmp_path / "d", random_examples(3, 1), valid).held_out(4)
    assert list(batches) == ["gptme", "openassistant"]
    for source, group in batches.items():
        expected = [Batch.of([example]) for example in valid if example.source == source]
        rows = [row[weights > 0].tolist() for batch in group for row, weights in zip(batch.targets, batch.weights, strict=True)]
        assert sorted(rows) == sorted(batch.targets[batch.weights > 0].tolist() for batch in expected)
        assert sum(batch.learned for batch in group) == pytest.approx(sum(batch.learned for batch in expected), rel=1e-12)


def test_a_step_is_a_pure_function_of_data_seed_and_step(tmp_path: Path) -> None:
    examples, config = random_examples(5, 11), make_config({"batch_size": 2, "gradient_accumulation": 2}, "test")
    one, other = write(tmp_path / "a", examples), write(tmp_path / "b", examples)
    assert one.steps_per_epoch(config) == 3
    late = one.batches_at(5, config)
    for step in range(6):
        for mine, same in zip(one.batches_at(step, config), other.batches_at(step, config), strict=True):
            assert np.array_equal(mine.inputs, same.inputs) and np.array_equal(mine.weights, same.weights)
    assert all(np.array_equal(a.targets, b.targets) for a, b in zip(late, one.batches_at(5, config), strict=True))
    learned = [sum(b.learned for step in range(3) for b in one.batches_at(3 * epoch + step, config)) for epoch in range(2)]
    assert learned == pytest.approx([sum(float(e.weights.sum(dtype=np.float64)) for e in examples)] * 2, rel=1e-12)


READ = """
import sys
from pathlib import Path
import pyarrow
from mlx_finetune.data.dataset import Dataset
dataset = Dataset.open(Path(sys.argv[1]))
total = sum(int(example.tokens.sum()) for example in dataset.train)
print(total, pyarrow.total_allocated_bytes())
"""


def test_the_data_stay_on_the_disk_and_no_cache_appears_in_the_home(tmp_path: Path) -> None:
    examples = random_examples(6, 400, length=8000)
    dataset = write(tmp_path / "d", examples)
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(dataset.folder)],
        env=kept | {"HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    total, allocated = map(int, done.stdout.split())
    assert total == sum(int(example.tokens.sum()) for example in examples)
    assert (dataset.folder / "train.arrow").stat().st_size > 10_000_000 > 20 * allocated
    assert list(home.rglob("*")) == []
    assert {path.name for path in dataset.folder.iterdir()} == {"train.arrow", "valid.arrow", "test.arrow", "dataset.json"}


def cut_off(folder: Path) -> None:
    path = folder / "train.arrow"
    path.write_bytes(path.read_bytes()[:-1])


def other_version(folder: Path) -> None:
    info = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    (folder / "dataset.json").write_text(json.dumps(info | {"version": 1}), encoding="utf-8")


def no_sizes(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"version": 6, "id": "a"}', encoding="utf-8")


def garbled(folder: Path) -> None:
    path = folder / "train.arrow"
    path.write_bytes(b"x" * path.stat().st_size)


def one_bit(folder: Path) -> None:
    path = folder / "train.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swapped(folder: Path) -> None:
    """As long as the right one."""
    size = (folder / "valid.arrow").stat().st_size
    (folder / "valid.arrow").write_bytes((folder / "train.arrow").read_bytes().ljust(size, b"\0")[:size])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_off, "train.arrow: missing or not whole"),
        (lambda folder: (folder / "valid.arrow").unlink(), "valid.arrow: missing or not whole"),
        (garbled, "train.arrow: not what prepare wrote"),
        (swapped, "valid.arrow: not what prepare wrote"),
        (one_bit, "train.arrow: not what prepare wrote"),
        (other_version, "version 1, not 6"),
        (no_sizes, "not whole"),
        (lambda folder: (folder / "dataset.json").write_text("[]"), "version None, not 6"),
        (lambda folder: (folder / "dataset.json").write_text("5"), "version None, not 6"),
        (lambda folder: (folder / "dataset.json").write_text('{"version": 6, "id": "a", "bytes": [1]}'), "not whole"),
        (lambda folder: (folder / "dataset.json").write_text('{"version": 6, "bytes": {}}'), "not whole"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "dataset.json").unlink(), "not a prepared data set"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    write(tmp_path / "d", random_examples(7, 3), random_examples(8, 2))
    damage(tmp_path / "d")
    with pytest.raises(UserError, match=reason) as error:
        Dataset.open(tmp_path / "d")
    assert error.value.message.startswith(str(tmp_path / "d"))


@pytest.mark.parametrize(
    ("conversations", "settings", "reason"),
    [
        ([], {}, "no assistant turn"),
        ([conversation_of([Message("user", "a")])], {}, "no assistant turn"),
        ([conversation_of(chat("a", "b " * 500))], {"max_length": 64}, r"turn longer than a window \(1\)"),
        ([conversation_of(chat("a", " "))], {}, r"a turn of blanks \(1\)"),
        ([conversation_of(chat("\U00050041", "b"))], {}, r"unassigned characters in a message \(1\)"),
    ],
)
def test_nothing_to_learn_is_refused_and_leaves_no_folder(
    tiny: ChatTemplate, tmp_path: Path, conversations: list[Conversation], settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        prepared(tmp_path, conversations, tiny, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["all.jsonl"]


def test_a_bad_line_or_a_folder_that_exists_changes_nothing(tiny: ChatTemplate, tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text('{"messages": []}\n{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"all\.jsonl:2: "):
        prepare([tmp_path / "all.jsonl"], tiny, make_config({}, "test"), tmp_path / "out", {})
    assert [path.name for path in tmp_path.iterdir()] == ["all.jsonl"]
    (tmp_path / "out").mkdir()
    write_conversations(tmp_path / "all.jsonl", [conversation_of(chat("a", "b"))])
    with pytest.raises(UserError, match="exists already"):
        prepare([tmp_path / "all.jsonl"], tiny, make_config({}, "test"), tmp_path / "out", {})
    assert list((tmp_path / "out").iterdir()) == []


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


def test_helpers_that_cannot_start_are_said_and_not_waited_for(tmp_path: Path) -> None:
    """A program without the usual guard starts itself again in each helper, which ends at once."""
    write_conversations(tmp_path / "all.jsonl", [conversation_of(chat("a", "b"))])
    template_of(tmp_path / "model", CHATML)
    program = f"""
from pathlib import Path
import mlx_finetune.data.examples
mlx_finetune.data.examples.MUCH = 0
mlx_finetune.data.examples.workers = lambda: 2
from mlx_finetune.config import make_config
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
folder = Path({str(tmp_path)!r})
template = ChatTemplate.load(folder / "model")
template.filling = "x" * 10_000_000
prepare([folder / "all.jsonl"], template, make_config({{}}, "test"), folder / "out", {{}})
"""
    (tmp_path / "unguarded.py").write_text(program, encoding="utf-8")
    ended = subprocess.run([sys.executable, tmp_path / "unguarded.py"], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1 and "a helper process was ended from outside" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_is_done_where_nothing_has_changed_and_nothing_stale_is_used(tiny: ChatTemplate, tmp_path: Path) -> None:
    def again(template: ChatTemplate = tiny, update: bool = False, model: str = "tiny", **settings: Any) -> dict[str, Any]:
        paths = [tmp_path / "all.jsonl"]
        return prepare(paths, template, make_config(settings, "test"), tmp_path / "dataset", {"model": model}, update=update)

    chats = of_times(6)
    first = prepared(tmp_path, chats, tiny)
    stamp = (tmp_path / "dataset").stat().st_ino
    assert again()["unchanged"] and again(update=True)["id"] == first.id and (tmp_path / "dataset").stat().st_ino == stamp
    other = template_of(tmp_path / "other", ZEPHYR, eos="<|im_end|>")
    with pytest.raises(UserError, match="prepared with max_length 8192"):
        again(max_length=4096)
    with pytest.raises(UserError, match="prepared with another tokenizer or chat template"):
        again(other)
    with pytest.raises(UserError, match="prepared with model tiny"):
        again(model="large")
    assert Dataset.open(tmp_path / "dataset").id == first.id
    write_conversations(tmp_path / "all.jsonl", chats[:-1])
    with pytest.raises(UserError, match="prepared with other conversations") as error:
        again()
    assert "--update" in error.value.hint
    assert again(update=True)["id"] != first.id and again()["unchanged"]
    assert again(other, update=True)["tokenizer"] == other.fingerprint == Dataset.open(tmp_path / "dataset").info["tokenizer"]
    (tmp_path / "dataset" / "valid.jsonl").unlink()
    with pytest.raises(UserError, match="files that are no longer whole"):
        again(other)
    assert "unchanged" not in again(other, update=True) and again(other)["unchanged"]


def test_an_interrupted_writing_leaves_no_folder(tiny: ChatTemplate, tmp_path: Path) -> None:
    write_conversations(tmp_path / "all.jsonl", [conversation_of(chat("a", str(i)), str(i)) for i in range(9)])

    def stop(done: int, total: int) -> None:
        assert total == 9
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([tmp_path / "all.jsonl"], tiny, make_config({}, "test"), tmp_path / "out", {}, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["all.jsonl"]


def test_a_folder_stands_for_the_conversations_that_collect_put_into_it(tmp_path: Path) -> None:
    for name in ("gptme.jsonl", "openassistant.jsonl", "rejected.jsonl", "train.jsonl", "test.jsonl", "collect.json", "train.csv"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    assert [path.name for path in collected_files([tmp_path])] == ["gptme.jsonl", "openassistant.jsonl"]
    assert collected_files([tmp_path / "train.jsonl"]) == [tmp_path / "train.jsonl"]
    for path, reason in ((tmp_path / "empty", "no conversations in this folder"), (tmp_path / "none", "no such file or folder")):
        with pytest.raises(UserError, match=reason):
            collected_files([path])


def test_what_is_said_of_the_data_is_asked_when_all_examples_are_through(tmp_path: Path) -> None:
    def stream(read: list[Example]) -> Iterator[Example]:
        for example in random_examples(9, 5):
            read.append(example)
            yield example

    (tmp_path / "d").mkdir()
    read: list[Example] = []
    info = write_dataset(tmp_path / "d", {"train": stream(read), "valid": stream(read), "test": []}, lambda: {"read": len(read)})
    assert info["read"] == 10 and info["examples"] == {"train": 5, "valid": 5, "test": 0}
