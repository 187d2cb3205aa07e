"""Collecting: every conversation is kept once, or named with the reason why not."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from chats import RAISES, template_of

from mlx_finetune.data.clean import reason_to_reject
from mlx_finetune.data.collect import collect, write_rendered
from mlx_finetune.data.conversation import Conversation, Message, Role, read_conversations
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError

DATA = Path(__file__).parents[2] / "shared" / "data"


def conversation(*roles: Role, source: str = "gptme", name: str = "2026-01-01-a-log", text: str = "text") -> Conversation:
    return Conversation(tuple(Message(role, text) for role in roles), source, name, "private")


def write_log(folder: Path, name: str, *messages: tuple[str, str], extra: str = "") -> None:
    (folder / name).mkdir(parents=True)
    lines = [json.dumps({"role": role, "content": content}) + "\n" for role, content in messages]
    (folder / name / "conversation.jsonl").write_text("".join(lines) + extra, encoding="utf-8")


def write_tree(path: Path, question: str, answer: str) -> Path:
    base = {"review_result": True, "deleted": False, "synthetic": False, "lang": "en"}
    reply = base | {"message_id": "a", "text": answer, "role": "assistant", "replies": []}
    root = base | {"message_id": "p", "text": question, "role": "prompter", "replies": [reply]}
    path.write_text(json.dumps({"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": root}) + "\n")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        (conversation(), "no messages"),
        (conversation("system", "assistant"), "no user turn"),
        (conversation("system", "user", "system"), "no assistant turn"),
        (conversation("user", "assistant", name="test-1-x"), "a temporary or test log of gptme"),
        (conversation("user", "assistant", name="tmpabc"), "a temporary or test log of gptme"),
        (
            conversation("user", "assistant", name="2026-07-23-gptme-evals-local--m-markdown-5f2a9c1e"),
            "a gptme evaluation: would leak into evaluation",
        ),
        (conversation("user", "assistant", name="2026-06-03-fix-flaky-test-run"), None),
        (conversation("user", "assistant", name="test-1", source="openassistant"), None),
    ],
)
def test_a_conversation_is_rejected_for_a_reason_or_kept(rejected: Conversation, reason: str | None) -> None:
    assert reason_to_reject(rejected) == reason


def test_the_real_sources_become_one_folder_that_accounts_for_everything(tmp_path: Path) -> None:
    trees = DATA / "openassistant" / "oasst_export_trees_en_2023-02.jsonl"
    if not trees.exists():
        pytest.skip("the data of ../shared is not here")
    out = tmp_path / "collected"
    summary = collect(DATA / "gptme-logs", [trees], out)
    assert summary.conversations == {"gptme": 24, "openassistant": 90}
    assert summary.rejected == {
        "first message is synthetic": 5,
        "a gptme evaluation: would leak into evaluation": 1,
        "no messages": 1,
    }
    assert json.loads((out / "collect.json").read_text(encoding="utf-8")) == summary.to_json()
    assert summary.to_json()["bad_lines"][0]["line"] == 21
    assert summary.to_json()["bad_lines"][0]["file"].endswith("2026-06-22-node-cache-race/conversation.jsonl")
    for source, count in summary.conversations.items():
        kept = list(read_conversations(out / f"{source}.jsonl"))
        assert len(kept) == count
        assert sum(one.assistant_turns for one in kept) == summary.assistant_turns[source]
        assert {one.source for one in kept} == {source}
    assert {row["id"] for row in lines_of(out / "rejected.jsonl") if row["source"] == "gptme"} == {
        "2026-06-26-swimming-angry-cat",
        "2026-07-23-gptme-evals-local--qwen3-coder-markdown-5f2a9c1e",
    }


def test_an_equal_conversation_is_kept_once_whatever_its_source(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_log(tmp_path / "logs", name, ("user", "hello?"), ("assistant", "hi"))
    tree = write_tree(tmp_path / "trees.jsonl", "hello?", "hi")
    summary = collect(tmp_path / "logs", [tree], tmp_path / "out")
    (kept,) = read_conversations(tmp_path / "out" / "gptme.jsonl")
    reason = f"duplicate of {kept.id}"
    assert lines_of(tmp_path / "out" / "rejected.jsonl") == [
        {"id": "two", "source": "gptme", "reason": reason},
        {"id": "t", "source": "openassistant", "reason": reason},
    ]
    assert summary.rejected == {"duplicate": 2}
    assert summary.conversations == {"gptme": 1, "openassistant": 0}


def test_only_what_was_read_is_written(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "trees.jsonl", "hello?", "hi \ud83d")
    collect(None, [tree], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "openassistant.jsonl",
        "rejected.jsonl",
        "collect.json",
    }
    (kept,) = read_conversations(tmp_path / "out" / "openassistant.jsonl")
    assert kept.messages[1].content == "hi ?"


def test_nothing_left_is_refused_with_the_counts_and_leaves_no_folder(tmp_path: Path) -> None:
    write_log(tmp_path / "logs", "a", extra='{"cut')
    write_log(tmp_path / "logs", "b", ("user", "anyone?"))
    write_log(tmp_path / "logs", "c", ("user", "hello?"))
    with pytest.raises(UserError, match="no conversation left after cleaning") as error:
        collect(tmp_path / "logs", [], tmp_path / "out")
    assert "no assistant turn (2); no messages (1); 1 unreadable lines, the first" in error.value.message
    assert error.value.hint
    with pytest.raises(UserError, match="no source"):
        collect(None, [], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"logs"}


def test_an_existing_folder_is_never_touched(tmp_path: Path) -> None:
    write_log(tmp_path / "logs", "a", ("user", "hello?"), ("assistant", "hi"))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already"):
        collect(tmp_path / "logs", [], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def rendered(folder: Path) -> list[str]:
    """The texts of train.csv, which are those of train.jsonl."""
    with (folder / "train.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    with (folder / "train.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line) for line in file]
    assert header == ["text"] and all(len(row) == 1 for row in rows)
    assert texts == [{"text": row[0]} for row in rows]
    return [row[0] for row in rows]


def test_the_rendered_files_give_back_every_text(tmp_path: Path, tiny_llama: Path) -> None:
    texts = ['say "hi", then\nleave', "", "a\r\nb\rc", "snowman ☃\u2028end", "```shell\nls\n```\n"]
    conversations = [conversation("user", "assistant", text=text) for text in texts]
    write_rendered(conversations, ChatTemplate.load(tiny_llama), tmp_path)
    assert rendered(tmp_path) == [
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text.strip()}<|im_end|>\n" for text in texts
    ]


def test_with_a_template_the_collected_conversations_are_rendered_too(tmp_path: Path, tiny_llama: Path) -> None:
    write_log(tmp_path / "logs", "one", ("system", "be kind"), ("user", "list"), ("assistant", "```shell\nls\n```\n"))
    tree = write_tree(tmp_path / "trees.jsonl", "hello?", "hi")
    template = ChatTemplate.load(tiny_llama)
    collect(tmp_path / "logs", [tree], tmp_path / "out", template)
    kept = [one for name in ("gptme", "openassistant") for one in read_conversations(tmp_path / "out" / f"{name}.jsonl")]
    assert rendered(tmp_path / "out") == [template.render(template.as_learned(one.messages)) for one in kept]
    assert rendered(tmp_path / "out")[0].endswith("<|im_start|>assistant\n```shell\nls\n```<|im_end|>\n")


def test_a_conversation_that_the_template_does_not_take_is_named_and_leaves_no_folder(tmp_path: Path) -> None:
    write_log(tmp_path / "logs", "one", ("user", "list"), ("assistant", "ls"), ("system", "a.txt"), ("assistant", "one file"))
    template = template_of(tmp_path / "model", RAISES)
    with pytest.raises(UserError, match=r"^one: the template does not take these messages") as error:
        collect(tmp_path / "logs", [], tmp_path / "out", template)
    assert error.value.hint == "collect without --model"
    assert {path.name for path in tmp_path.iterdir()} == {"logs", "model"}
