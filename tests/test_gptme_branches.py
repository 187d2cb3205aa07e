"""What a person took back is not learned: branches, and logs that were compacted by hand."""

import json
from pathlib import Path

import pytest
from gptme_logs import messages_of, read_all, said, write_log

from mlx_finetune.data.sources import Read


def numbered(role: str, content: str, minute: int, **more: object) -> dict:
    return said(role, content, timestamp=f"2026-06-03T08:{minute:02}:00", **more)


BEFORE = [
    numbered("system", "prompt", 0, pinned=True),
    numbered("user", "old task", 1),
    numbered("assistant", "old answer", 2),
    numbered("user", "recent task", 3),
    numbered("assistant", "recent answer", 4),
]
SUMMARY = [numbered("system", "This conversation was compacted.", 5), numbered("assistant", "a summary", 5)]
COMPACTED = [BEFORE[0], *SUMMARY, *BEFORE[3:]]
WRECK = [numbered("user", "wreck it", 7), numbered("assistant", "I wrecked it", 8)]
AFTER = [numbered("user", "add a comment", 10), numbered("assistant", "added", 11)]


def write_compacted(folder: Path, lossless: list[dict], active: list[dict], **branches: list[dict]) -> None:
    """As gptme leaves a log after /compact: lossless.jsonl has every message, and nothing is ever taken out of it."""
    write_log(folder, "log", *active)
    (folder / "log" / "lossless.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lossless))
    (folder / "log" / "branches").mkdir()
    for name, rows in branches.items():
        path = folder / "log" / "branches" / f"main-{name.replace('_', '-')}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def contents(read: Read) -> list[str]:
    return [content for _, content in messages_of(read)]


def test_what_was_undone_after_a_compaction_is_gone_and_what_was_compacted_stays(tmp_path: Path) -> None:
    undo = [*COMPACTED, *WRECK]
    lossless = [*BEFORE, *WRECK, numbered("user", "/undo", 9), *AFTER]
    write_compacted(tmp_path, lossless, [*COMPACTED, *AFTER], undo_0=undo, undo_1=undo[:-1])
    read = read_all(tmp_path)
    kept = ["prompt", "old task", "old answer", "recent task", "recent answer", "add a comment", "added"]
    assert contents(read) == kept
    assert [(one.id, one.reason) for one in read.rejected] == [("log#main-undo-0", "undone: the person took these turns back")]


@pytest.mark.parametrize("name", ["undo_0", "edit_0"])
def test_a_branch_of_before_the_compaction_takes_nothing_out(tmp_path: Path, name: str) -> None:
    early = [*BEFORE[:3], numbered("user", "an early mistake", 2), numbered("assistant", "an early wrong answer", 2)]
    write_compacted(tmp_path, [*BEFORE, *AFTER], [BEFORE[0], *SUMMARY, *AFTER], **{name: early})
    assert contents(read_all(tmp_path))[1:5] == ["old task", "old answer", "recent task", "recent answer"]


def test_what_was_undone_before_a_second_compaction_is_gone_too(tmp_path: Path) -> None:
    again = [numbered("system", "Compacted once more.", 12), numbered("assistant", "a second summary", 12)]
    undo = [*COMPACTED, *WRECK]
    lossless = [*BEFORE, *WRECK, numbered("user", "/undo", 9), *AFTER, numbered("user", "thanks", 13)]
    write_compacted(tmp_path, lossless, [BEFORE[0], *again, numbered("user", "thanks", 13)], undo_0=undo, undo_1=undo[:-1])
    assert contents(read_all(tmp_path))[3:] == ["recent task", "recent answer", "add a comment", "added", "thanks"]


def test_a_turn_that_was_edited_after_a_compaction_is_gone(tmp_path: Path) -> None:
    edited = [WRECK[0], WRECK[1] | {"content": "I did it as the person wrote it"}]
    write_compacted(tmp_path, [*BEFORE, *WRECK, *AFTER], [*COMPACTED, *edited, *AFTER], edit_0=[*COMPACTED, *WRECK])
    assert "I wrecked it" not in contents(read_all(tmp_path))


def test_commands_are_no_messages_but_those_that_gptme_sends(tmp_path: Path) -> None:
    commands = ["/tokens", "/undo now", "/no-such-command", "/shell ls", "/home/me is full"]
    rows = [
        row for i, text in enumerate(commands) for row in (numbered("user", text, 20 + i), numbered("assistant", f"{i}", 20 + i))
    ]
    write_compacted(tmp_path, [*BEFORE, *rows], [BEFORE[0], *SUMMARY])
    users = [content for role, content in messages_of(read_all(tmp_path)) if role == "user"]
    assert users[2:] == ["/shell ls", "/home/me is full"]


@pytest.mark.parametrize("kind", ["empty", "link", "folder", "garbage"])
def test_a_lossless_copy_that_is_of_no_use_is_named_and_the_conversation_read(tmp_path: Path, kind: str) -> None:
    write_log(tmp_path, "log", said("user", "a"), said("assistant", "b"))
    lossless = tmp_path / "log" / "lossless.jsonl"
    if kind == "link":
        lossless.symlink_to(tmp_path / "nowhere")
    elif kind == "folder":
        lossless.mkdir()
    else:
        lossless.write_text("" if kind == "empty" else "no JSON\n")
    read = read_all(tmp_path)
    assert contents(read) == ["a", "b"] and not read.rejected
    assert {bad.path.name for bad in read.bad_lines} == {"lossless.jsonl"}


@pytest.mark.parametrize("kind", ["link", "file"])
def test_branches_that_cannot_be_read_are_named(tmp_path: Path, kind: str) -> None:
    branches = write_log(tmp_path, "log", said("user", "a")).parent / "branches"
    if kind == "link":
        branches.symlink_to(tmp_path, target_is_directory=True)
    else:
        branches.write_text("")
    (bad,) = read_all(tmp_path).bad_lines
    assert (bad.path, bad.line) == (branches, 0) and bad.reason.startswith("cannot be read")


def test_what_was_taken_back_in_another_branch_is_not_learned_and_what_stayed_there_is(tmp_path: Path) -> None:
    start = [said("user", "hello"), said("assistant", "hi")]
    write_log(tmp_path, "log", *start)
    branches = tmp_path / "log" / "branches"
    branches.mkdir()
    stayed = [*start, said("user", "another way"), said("assistant", "so")]
    tails = {
        "alt": stayed,
        "alt-undo-0": [*stayed, said("user", "no"), said("assistant", "wrong")],
        "my-undo-idea": [said("assistant", "x")],
    }
    for name, rows in tails.items():
        (branches / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_all(tmp_path)
    assert [one.name for one in read.conversations] == ["log", "log#alt", "log#my-undo-idea"]
    assert [one.id for one in read.rejected] == ["log#alt-undo-0"]
