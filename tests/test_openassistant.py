"""What is taken of OpenAssistant's trees, against real exports in every layout; the rows written here are our own."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oasst_rows import node, paths_of, read_all, tree, write

from mlx_finetune.data.sources import oasst_files
from mlx_finetune.data.sources.openassistant import BAD_LABELS, EVERYTHING, Options

HUB_LAYOUTS = (
    *("oasst1_hub_messages_en.jsonl", "oasst1_ready.trees.jsonl.gz", "oasst1_ready.messages.jsonl.gz"),
    "hub_layout/oasst1",
)
EXPORTS = {"oasst_export_trees_en_2023-02.jsonl": 90, "oasst_export_rootnodes_en_2023-02.jsonl": 23}
ANY = Options(relevant="any")


@pytest.fixture
def real(shared: Path) -> Path:
    folder = shared / "data" / "openassistant"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: it holds the OpenAssistant samples, which are no part of the project")
    return folder


def usable(message: dict[str, Any]) -> bool:
    return message.get("review_result") is True and not message.get("deleted") and not message.get("synthetic")


def best_by_hand(message: dict[str, Any]) -> list[str]:
    """expected.json's policy once more, written from the leaves up."""
    ranked = sorted(
        (reply for reply in message.get("replies") or [] if usable(reply)),
        key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0),
    )
    tail = best_by_hand(ranked[0]) if ranked else []
    return [message["message_id"], *tail] if tail or message["role"] == "assistant" else []


@pytest.mark.parametrize("name", HUB_LAYOUTS)
def test_the_best_paths_are_the_expected_ones_in_every_layout(real: Path, name: str) -> None:
    expected = json.loads((real / "expected.json").read_text(encoding="utf-8"))["hub"]
    read = read_all(real / name)
    ours = paths_of(read)
    assert sorted(ours) == sorted(expected["best_paths"])
    if name != "hub_layout/oasst1":  # cut into train and validation, so in another order
        assert ours == expected["best_paths"]
    lost = 0 if "trees.jsonl" in name else expected["trees_by_id"] - expected["roots"]
    assert Counter(one.reason for one in read.rejected) == ({"the first message is not in the file": lost} if lost else {})
    assert not read.bad_lines


def test_every_layout_gives_the_same_conversations_with_the_rules_on(real: Path) -> None:
    reads = [read_all(real / name, Options()) for name in HUB_LAYOUTS]
    every = [sorted((one.name, one.id, one.meta["time"]) for one in read.conversations) for read in reads]
    assert every[0] == every[1] == every[2] == every[3]
    assert len(every[0]) == 14


@pytest.mark.parametrize("name", EXPORTS)
def test_every_early_export_gives_the_best_paths_and_accounts_for_every_tree(real: Path, name: str) -> None:
    rows = [json.loads(line) for line in (real / name).read_text(encoding="utf-8").splitlines()]
    read = read_all(real / name)
    roots = [row.get("prompt", row) for row in rows]
    assert paths_of(read) == [path for root in roots if usable(root) and (path := best_by_hand(root))]
    assert len(read.conversations) == EXPORTS[name]
    assert len(read.conversations) + len(read.rejected) == len(rows)
    assert {one.reason for one in read.rejected} == {"first message is synthetic"}


@pytest.mark.parametrize("name", [*HUB_LAYOUTS, *EXPORTS])
def test_every_conversation_begins_with_a_question_and_ends_with_an_answer(real: Path, name: str) -> None:
    conversations = read_all(real / name, ANY).conversations
    for conversation in conversations:
        roles = [message.role for message in conversation.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert (conversation.source, conversation.license) == ("openassistant", "Apache-2.0")
        assert conversation.group == conversation.name
        assert not re.search("open ?assistant|laion", " ".join(m.content for m in conversation.messages[1::2]), re.IGNORECASE)
        assert all(message.content.strip() for message in conversation.messages)
    assert len({conversation.group for conversation in conversations}) == len(conversations) > 20


def test_rows_in_any_order_give_the_same_trees(real: Path, tmp_path: Path) -> None:
    lines = (real / "oasst1_hub_messages_en.jsonl").read_text(encoding="utf-8").splitlines()
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(lines[i] for i in np.random.default_rng(0).permutation(len(lines))), encoding="utf-8")
    before, after = read_all(real / "oasst1_hub_messages_en.jsonl"), read_all(shuffled)
    assert {one.name for one in before.conversations} == {one.name for one in after.conversations}
    assert sorted(one.id for one in before.rejected) == sorted(one.id for one in after.rejected)
    # all answers are ranked where there are several, so the first pair is the same; several questions are not
    assert sorted(path[:2] for path in paths_of(before)) == sorted(path[:2] for path in paths_of(after))


def test_a_filtered_file_loses_its_trees_one_by_one_and_nothing_else(real: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (real / "oasst1_hub_messages_en.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if np.random.default_rng(int(row["message_id"][:8], 16)).random() < 0.6]
    read = read_all(write(tmp_path / "t.jsonl", *kept))
    assert len(read.conversations) + len(read.rejected) == len({row["message_tree_id"] for row in kept})
    assert not read.bad_lines and read.conversations


def test_datasets_gives_the_rows_of_the_hub_layout(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    by_datasets = [row.value for row in oasst_files.hub_rows(str(real / "hub_layout" / "oasst1"))]
    by_pyarrow = [row.value for row in oasst_files.read_rows(real / "hub_layout" / "oasst1")]
    assert by_datasets == by_pyarrow
    assert len(by_datasets) == 1035


def test_the_lowest_rank_wins_and_no_rank_only_where_none_has_one(tmp_path: Path) -> None:
    ranked = node("p1", node("a-none"), node("a-second", rank=1), node("a-best", node("p2"), rank=0), node("a-gone", rank=-1))
    ranked["replies"][3]["deleted"] = True
    unranked = node("p3", node("a-first", node("p4", node("a-last"))), node("a-other"))
    read = read_all(write(tmp_path / "t.jsonl", tree(ranked), tree(unranked)))
    assert paths_of(read) == [["p1", "a-best"], ["p3", "a-first", "p4", "a-last"]]
    assert [conversation.group for conversation in read.conversations] == ["tree-p1", "tree-p3"]
    assert [(m.role, m.content) for m in read.conversations[0].messages] == [
        ("user", "text of p1"),
        ("assistant", "text of a-best"),
    ]


def test_every_tree_that_is_not_kept_has_its_reason(tmp_path: Path) -> None:
    unreviewed = node("p3", node("a3"))
    del unreviewed["review_result"]
    rows = [
        tree(node("p1", node("a1")), "aborted_low_grade"),
        tree(node("p2", node("a2"), deleted=True)),
        tree(unreviewed),
        tree(node("p4", node("a4"), synthetic=True)),
        tree(node("p5")),
        tree(node("p6", node("a6", review_result=None))),
        tree(node("p7", node("a7")), None),
        tree(node("p8", node("a8")), "17 is no state"),
        tree(node("a9", node("p9"))),
        tree(node("p10", node("p11"))),
        tree(node("p12", node("a12"), text=" \n")),
        tree(node("p7", node("a7"))),
    ]
    read = read_all(write(tmp_path / "t.jsonl", *rows))
    assert [(one.id, one.reason) for one in read.rejected] == [
        ("tree-p1", "tree is aborted_low_grade, not ready_for_export"),
        ("tree-p2", "first message is deleted"),
        ("tree-p3", "first message did not pass review"),
        ("tree-p4", "first message is synthetic"),
        ("tree-p5", "no reply"),
        ("tree-p6", "no reply is left: the best did not pass review"),
        ("tree-p8", "tree is in a state that is not known"),
        ("tree-a9", "first message is no question"),
        ("tree-p10", "no reply"),
        ("tree-p12", "first message is empty"),
        ("tree-p7", "another tree has the same id"),
    ]
    assert paths_of(read) == [["p7", "a7"]]


def test_meta_says_what_a_person_chooses_by(tmp_path: Path) -> None:
    root = node("p1", node("a1", created_date="2023-02-01T00:30:00+02:00"), created_date="2023-01-31T22:29:59.5")
    (one,) = read_all(write(tmp_path / "t.jsonl", tree(root))).conversations
    expected = {"name": "tree-p1", "lang": "en", "message_ids": ["p1", "a1"], "time": "2023-01-31T22:30:00Z"}
    assert one.meta == expected
    for odd in ("yesterday", "0001-01-01T00:00:00+14:00", 17, [[]], None, "\ud800"):
        root = node("p1", node("a1", created_date=odd))
        (one,) = read_all(write(tmp_path / "t.jsonl", tree(root))).conversations
        assert "time" not in one.meta


def test_a_badly_labelled_message_falls_away_with_its_replies_and_the_next_best_is_taken(tmp_path: Path) -> None:
    def labelled(**labels: float) -> dict[str, Any]:
        return {"labels": {name: {"value": value, "count": 3} for name, value in labels.items()}}

    weak = node("a-weak", node("p2", node("a2")), rank=0, **labelled(quality=0.49))
    rows = [tree(node("p1", weak, node("a-sound", rank=1, **labelled(quality=0.5))))]
    rows += [tree(node(f"p-{name}", node("a"), **labelled(**{name: 0.5}))) for name in BAD_LABELS]
    rows += [tree(node("p-low", node("a", **labelled(quality=0.2))))]
    rows += [tree(node("p-fine", node("a"), **labelled(quality=0, violence=1, spam=0.49)))]
    path = write(tmp_path / "t.jsonl", *rows)
    read = read_all(path, ANY)
    assert paths_of(read) == [["p1", "a-sound"], ["p-fine", "a"]]
    assert [one.reason for one in read.rejected] == [
        *(f"first message is labelled {name}" for name in BAD_LABELS),
        "no reply is left: the best is of low quality",
    ]
    assert len(read_all(path).conversations) == len(rows)
    assert paths_of(read_all(path, EVERYTHING))[0] == ["p1", "a-weak", "p2", "a2"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 2, 10**400, None, "1", [], {"value": 1}, {"value": "x"}])
def test_a_label_that_is_no_number_from_0_to_1_counts_as_not_given(tmp_path: Path, value: Any) -> None:
    for labels in ({"spam": {"value": value}}, {"name": ["spam"], "value": [value]}, [{"name": "spam", "value": value}]):
        path = write(tmp_path / "t.jsonl", tree(node("p1", node("a1"), labels=labels)))
        assert len(read_all(path, ANY).conversations) == 1


def test_labels_are_read_in_all_three_forms(tmp_path: Path) -> None:
    forms = (
        {"quality": {"value": 0.5, "count": 1}, "spam": {"value": 1, "count": 2}},
        {"name": ["quality", "spam"], "value": [0.5, 1.0], "count": [1, 2]},
        [{"name": "quality", "value": 0.5, "count": 1}, {"name": "spam", "value": 1.0, "count": 2}],
    )
    for labels in forms:
        path = write(tmp_path / "t.jsonl", tree(node("p1", node("a1"), labels=labels)))
        assert [one.reason for one in read_all(path, ANY).rejected] == ["first message is labelled spam"]


def test_every_message_is_in_a_wanted_language(tmp_path: Path) -> None:
    rows = [
        tree(node("p1", node("a1", node("p2", lang="de")))),
        tree(node("p3", node("a3", lang="de", rank=0), node("a4", rank=1))),
        tree(node("p5", node("a5", lang="pt-BR"), lang="pt-BR")),
        tree(node("p6", node("a6", lang=None), lang=None)),
    ]
    path = write(tmp_path / "t.jsonl", *rows)
    read = read_all(path, ANY)
    assert paths_of(read) == [["p1", "a1"]]
    assert {one.reason for one in read.rejected} == {"not all of it is in a wanted language"}
    assert paths_of(read_all(path, replace(ANY, languages=("pt",)))) == [["p5", "a5"]]
    assert paths_of(read_all(path, replace(ANY, languages=("EN", "de")))) == [["p1", "a1"], ["p3", "a3"]]
    assert len(read_all(path, replace(ANY, languages=())).conversations) == 4
    (one,) = read_all(path, replace(ANY, languages=("en", "pt-br"))).conversations[1:]
    assert [message.content for message in one.messages] == ["text of p5", "text of a5"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I am Open Assistant.", "names Open Assistant or LAION"),
        ("openassistant answers", "names Open Assistant or LAION"),
        ("I was made by LAION", "names Open Assistant or LAION"),
        ("As an AI language model, I cannot", "speaks as an AI"),
        ("as a large language model I can", "speaks as an AI"),
        ("Sorry, I'm just an AI.", "speaks as an AI"),
        ("I\u2019m an artificial intelligence", "speaks as an AI"),
        ("I am ChatGPT", "speaks as an AI"),
        ("I was trained by volunteers", "speaks as an AI"),
        ("a language model trained by OpenAI", "speaks as an AI"),
        ("```\npythonCopy code\nimport os\n```", "is pasted from another assistant's page"),
        ("So:\n\nCopy code\nls\n", "is pasted from another assistant's page"),
    ],
)
def test_an_answer_that_says_who_it_is_ends_the_conversation_before_it(tmp_path: Path, text: str, reason: str) -> None:
    first = tree(node("p1", node("a1", node("p2", node("a2")), text=text)))
    later = tree(node("p3", node("a3", node("p4", node("a4", node("p5", node("a5")), text=text)))))
    path = write(tmp_path / "t.jsonl", first, later)
    read = read_all(path, ANY)
    assert [one.reason for one in read.rejected] == [f"its first answer {reason}"]
    assert paths_of(read) == [["p3", "a3"]]
    assert read.conversations[0].meta["cut"] == f"the next answer {reason}"
    assert paths_of(read_all(path)) == [["p1", "a1", "p2", "a2"], ["p3", "a3", "p4", "a4", "p5", "a5"]]


@pytest.mark.parametrize(
    "text",
    [
        "The network is trained by gradient descent.",
        "An assistant professor opened it.",
        "I am an airline pilot",
        "Press the button: Copy code from the editor, then run it",
        "It was developed by Guido van Rossum",
        "Use it as a language for scripts",
    ],
)
def test_an_answer_that_only_sounds_like_it_is_kept(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "t.jsonl", tree(node("p1", node("a1", text=text), text="Are you Open Assistant, an AI by LAION?")))
    assert paths_of(read_all(path, ANY)) == [["p1", "a1"]]


def test_only_what_is_about_code_is_taken_unless_any_is_asked_for(tmp_path: Path) -> None:
    rows = [tree(node("p1", node("a1"), text="How do I undo a git commit?")), tree(node("p2", node("a2"), text="A cake, please"))]
    path = write(tmp_path / "t.jsonl", *rows)
    read = read_all(path, Options())
    assert paths_of(read) == [["p1", "a1"]]
    assert [one.reason for one in read.rejected] == ["not about programming, the shell or developer tools"]
    assert len(read_all(path, ANY).conversations) == 2


def test_options_are_written_as_json() -> None:
    written = {"relevant": "code", "languages": ["en"], "min_quality": 0.5, "max_bad": 0.5, "identity": True}
    assert json.loads(json.dumps(Options().to_json())) == written
