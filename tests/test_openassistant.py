"""The reader of OpenAssistant trees, against real exports; the rows written here are our own."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_finetune.data.sources import Read, openassistant
from mlx_finetune.errors import UserError

DATA = Path(__file__).parents[2] / "shared" / "data" / "openassistant"
TREES = {
    "oasst1_ready.trees.jsonl.gz": 98,
    "oasst_export_trees_en_2023-02.jsonl": 90,
    "oasst_export_rootnodes_en_2023-02.jsonl": 23,
}


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip("the OpenAssistant samples of ../shared are not here")
    return DATA / name


def paths_of(read: Read) -> list[list[str]]:
    return [conversation.meta["message_ids"] for conversation in read.conversations]


def node(name: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A reviewed message whose role follows from its name: p... is a prompter's, a... an assistant's."""
    role = "prompter" if name.startswith("p") else "assistant"
    base = {"message_id": name, "text": f"text of {name}", "role": role, "lang": "en", "review_result": True}
    return base | {"deleted": False, "synthetic": False, "replies": list(replies)} | more


def tree(root: dict[str, Any], state: str | None = "ready_for_export") -> dict[str, Any]:
    return {"message_tree_id": "tree-" + root["message_id"], "tree_state": state, "prompt": root}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def best_by_hand(message: dict[str, Any]) -> list[str]:
    """expected.json's policy once more, written from the leaves up."""
    ranked = sorted(
        (reply for reply in message.get("replies") or [] if usable(reply)),
        key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0),
    )
    tail = best_by_hand(ranked[0]) if ranked else []
    return [message["message_id"], *tail] if tail or message["role"] == "assistant" else []


def usable(message: dict[str, Any]) -> bool:
    return message.get("review_result") is True and not message.get("deleted") and not message.get("synthetic")


def test_the_best_paths_of_real_trees_are_the_expected_ones() -> None:
    expected = json.loads(real("expected.json").read_text(encoding="utf-8"))
    assert paths_of(openassistant.read(real("oasst1_ready.trees.jsonl.gz"))) == expected["hub"]["best_paths"]


@pytest.mark.parametrize("name", TREES)
def test_every_export_gives_the_best_paths_and_accounts_for_every_tree(name: str) -> None:
    raw = real(name).read_bytes()
    rows = [json.loads(line) for line in (gzip.decompress(raw) if name.endswith(".gz") else raw).splitlines()]
    read = openassistant.read(DATA / name)
    roots = [row.get("prompt", row) for row in rows]
    by_hand = [path for root in roots if usable(root) and (path := best_by_hand(root))]
    assert paths_of(read) == by_hand
    assert len(read.conversations) == TREES[name]
    assert len(read.conversations) + len(read.rejected) == len(rows)
    assert {one.reason for one in read.rejected} <= {"first message is synthetic"}
    for conversation in read.conversations:
        roles = [message.role for message in conversation.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert (conversation.source, conversation.license) == ("openassistant", "Apache-2.0")
    assert len({conversation.group for conversation in read.conversations}) == TREES[name]


def test_the_lowest_rank_wins_and_no_rank_only_where_none_has_one(tmp_path: Path) -> None:
    ranked = node("p1", node("a-none"), node("a-second", rank=1), node("a-best", node("p2"), rank=0), node("a-gone", rank=-1))
    ranked["replies"][3]["deleted"] = True
    unranked = node("p3", node("a-first", node("p4", node("a-last"))), node("a-other"))
    read = openassistant.read(write(tmp_path / "t.jsonl", tree(ranked), tree(unranked)))
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
    ]
    read = openassistant.read(write(tmp_path / "t.jsonl", *rows))
    assert [(one.id, one.reason) for one in read.rejected] == [
        ("tree-p1", "tree is aborted_low_grade, not ready_for_export"),
        ("tree-p2", "first message is deleted"),
        ("tree-p3", "first message did not pass review"),
        ("tree-p4", "first message is synthetic"),
        ("tree-p5", "no reply that is reviewed, not deleted and not synthetic"),
        ("tree-p6", "no reply that is reviewed, not deleted and not synthetic"),
    ]
    assert paths_of(read) == [["p7", "a7"]]


def test_gzip_is_known_by_its_content_and_a_broken_one_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(json.dumps(tree(node("p1", node("a1")))).encode())
    path = tmp_path / "renamed.jsonl"
    path.write_bytes(packed)
    assert paths_of(openassistant.read(path)) == [["p1", "a1"]]
    path.write_bytes(packed[:-20])
    with pytest.raises(UserError, match=r"renamed\.jsonl: broken gzip") as error:
        openassistant.read(path)
    assert error.value.hint == "download it again"


def test_other_layouts_of_the_release_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"messages\.jsonl\.gz:1: flat messages") as error:
        openassistant.read(real("oasst1_ready.messages.jsonl.gz"))
    assert "ready.trees.jsonl.gz" in error.value.hint
    with pytest.raises(UserError, match=r"parquet: not UTF-8"):
        openassistant.read(real("hub_layout/oasst1/data/train-00000-of-00001.parquet"))
    with pytest.raises(UserError, match=r"t\.jsonl:1: not an OpenAssistant tree: threads"):
        openassistant.read(write(tmp_path / "t.jsonl", {"thread_id": "1", "thread": []}))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no tree in it"),
        ([[1]], r":1: not an OpenAssistant tree, but list"),
        ([{"messages": []}], r":1: not an OpenAssistant tree: keys 'messages'"),
        ([tree(node("p1")), tree(node("p2", node("a2", node("p3", role="bot"))))], r":2: message p3: role 'bot'"),
        ([tree(node("p1", node("a1", text=None)))], r":1: message 'a1' has no message_id or no text"),
        ([tree(node("p1", node("a1", rank="0")))], r":1: message a1: replies is not a list or rank not a number"),
    ],
)
def test_what_is_no_tree_is_refused_with_its_place(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        openassistant.read(write(tmp_path / "t.jsonl", *rows))


def test_a_line_that_is_not_json_is_refused_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", tree(node("p1", node("a1"))))
    path.write_text(path.read_text() + '\n{"message_tree_id": ')
    with pytest.raises(UserError, match=r"t\.jsonl:3: not JSON") as error:
        openassistant.read(path)
    assert error.value.hint
    with pytest.raises(UserError, match="No such file"):
        openassistant.read(tmp_path / "nothing.jsonl")
