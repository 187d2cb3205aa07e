"""Conversations as JSON Lines: what is written comes back, and what is wrong is named with its line."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chats import conversation_of, random_chat

from mlx_finetune.data.conversation import Conversation, Message, read_conversations, write_conversations
from mlx_finetune.errors import UserError

GOOD = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}\n'


def line(*messages: object, **rest: object) -> str:
    return json.dumps({"messages": messages, **rest}) + "\n"


def test_random_conversations_come_back_as_they_were(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    written = [
        Conversation(tuple(random_chat(random, 0.2)), "gptme", f"log {i} ☃", "private", {"title": "a\nb", "n": [i]})
        for i in range(60)
    ]
    assert write_conversations(tmp_path / "a.jsonl", written) == 60
    read = list(read_conversations(tmp_path / "a.jsonl"))
    assert read == written
    assert [one.id for one in read] == [one.id for one in written]


def test_the_id_is_that_of_the_content_and_the_same_everywhere() -> None:
    one = conversation_of([Message("user", "snow ☃"), Message("assistant", "yes")])
    assert one.id == "a70105b15dad182f"
    assert one.id == conversation_of([Message("user", "snow ☃"), Message("assistant", "yes")], "other", "chat").id
    others = [
        [Message("user", "snow ☃"), Message("assistant", "yes ")],
        [Message("user", "snow ☃yes"), Message("assistant", "")],
        [Message("system", "snow ☃"), Message("assistant", "yes")],
    ]
    assert len({one.id, *(conversation_of(other).id for other in others)}) == 4


def test_a_weight_stands_in_the_file_only_where_it_is_not_one(tmp_path: Path) -> None:
    messages = (Message("user", "a"), Message("assistant", "b", 0.0), Message("assistant", "c", 0.5))
    write_conversations(tmp_path / "a.jsonl", [conversation_of(messages)])
    row = json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))
    assert [message.get("weight") for message in row["messages"]] == [None, 0.0, 0.5]
    (read,) = read_conversations(tmp_path / "a.jsonl")
    assert read.messages == messages
    assert read.assistant_turns == 1


def test_any_file_of_messages_is_read_and_each_line_is_a_group_of_its_own(tmp_path: Path) -> None:
    other = GOOD.replace("hi", "ho")
    none = other.replace('{"messages"', '{"group": null, "source": null, "license": null, "meta": null, "messages"')
    (tmp_path / "a.jsonl").write_text(GOOD + "\n  \n" + none, encoding="utf-8")
    first, second = read_conversations(tmp_path / "a.jsonl")
    assert (first.source, first.group, first.license, first.meta) == ("chat", first.id, "unknown", {})
    assert (second.source, second.group, second.license, second.meta) == ("chat", second.id, "unknown", {})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"messages": [', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"messages": [{"role": "user", "content": "a", "weight": ' + "9" * 5000 + "}]}", "not JSON"),
        ("[]", 'no list "messages"'),
        ("3", 'no list "messages"'),
        ('{"text": "a"}', 'no list "messages"'),
        ('{"messages": {"role": "user"}}', 'no list "messages"'),
        (line("hi"), "message 1: no text in content"),
        (line({"role": "user", "content": "a"}, {"role": "user"}), "message 2: no text in content"),
        (line({"role": "user", "content": None}), "message 1: no text in content"),
        (line({"role": "user", "content": [{"text": "a"}]}), "message 1: no text in content"),
        (line({"role": "bot", "content": "a"}), "message 1: role 'bot' is not one of system, user, assistant, tool"),
        (line({"role": ["user"], "content": "a"}), "is not one of"),
        (line({"content": "a"}), "message 1: role None is not one of"),
        (line({"role": "user", "content": "a", "weight": -1}), "weight -1 is not a number"),
        (line({"role": "user", "content": "a", "weight": float("nan")}), "weight nan is not a number"),
        (line({"role": "user", "content": "a", "weight": float("inf")}), "weight inf is not a number"),
        (line({"role": "user", "content": "a", "weight": 10**400}), "is not a number"),
        (line({"role": "user", "content": "a", "weight": "1"}), "weight '1' is not a number"),
        (line({"role": "user", "content": "a", "weight": None}), "weight None is not a number"),
        (line({"role": "user", "content": "a \ud83d"}), "half a character"),
        (line({"role": "user", "content": "a"}, group="\ud83d"), "half a character"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path: Path, bad: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + "\n" + bad.rstrip("\n") + "\n" + GOOD, encoding="utf-8")
    lines = read_conversations(path)
    assert next(lines).assistant_turns == 1
    with pytest.raises(UserError, match=reason) as error:
        next(lines)
    assert error.value.message.startswith(f"{path}:3: ")
    assert error.value.hint and "\n" not in error.value.message + error.value.hint
    assert len(error.value.message) < 600


def test_what_is_no_text_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    for path, reason in ((tmp_path / "a.jsonl", "not UTF-8"), (tmp_path, "directory"), (tmp_path / "b", "No such file")):
        with pytest.raises(UserError, match=reason) as error:
            list(read_conversations(path))
        assert error.value.message.startswith(str(path))


def test_an_error_while_writing_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> Iterator[Conversation]:
        yield conversation_of([Message("user", "a")])
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_conversations(tmp_path / "a.jsonl", broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weight", ["1e300", "1e-50", "1001"])
def test_a_weight_that_float32_sums_cannot_hold_is_refused(weight: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "a", "weight": %s}]}\n' % weight)  # noqa: UP031
    with pytest.raises(UserError, match="is not a number that is 0 or from"):
        list(read_conversations(path))
