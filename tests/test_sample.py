"""The embedded sample is whole, clean, and in the layouts of the sources that it stands for."""

import json
import re
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import mlx_finetune
from mlx_finetune.data.sources import gather, gptme, openassistant
from mlx_finetune.data.sources.openassistant import EVERYTHING

SAMPLE = Path(mlx_finetune.__file__).parent / "sample"
TREES = SAMPLE / "openassistant.trees.jsonl"
LOGS = SAMPLE / "gptme-logs"
ABOUT_CODE = re.compile(r"```|\b(git|bash|python|sql|docker|ssh|sed|make|command)\b", re.IGNORECASE)
NODE_KEYS = {"message_id", "parent_id", "text", "role", "lang", "review_count", "review_result", "deleted", "rank"}
NODE_KEYS |= {"synthetic", "model_name", "message_tree_id", "tree_state", "emojis", "labels", "replies"}
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
CHAT_KEYS = ["model", "tool_format", "interactive", "name"]


def trees() -> list[dict[str, Any]]:
    return [json.loads(line) for line in TREES.read_text(encoding="utf-8").splitlines()]


def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for reply in node["replies"]:
        yield from nodes(reply)


def logs() -> list[Path]:
    return sorted(LOGS.glob("*/conversation.jsonl"))


def messages(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def usable(node: dict[str, Any]) -> bool:
    return node["review_result"] and not node["deleted"]


@pytest.mark.parametrize("tree", trees(), ids=lambda tree: tree["message_tree_id"][:8])
def test_a_tree_has_the_layout_of_the_openassistant_export(tree: dict[str, Any]) -> None:
    assert set(tree) == {"message_tree_id", "tree_state", "prompt"}
    assert tree["tree_state"] == "ready_for_export"
    assert tree["message_tree_id"] == tree["prompt"]["message_id"]
    assert tree["prompt"]["role"] == "prompter"
    assert tree["prompt"]["parent_id"] is None
    for node in nodes(tree["prompt"]):
        assert set(node) == NODE_KEYS
        assert UUID.fullmatch(node["message_id"])
        assert node["text"] and node["text"] == node["text"].strip()
        assert node["text"].count("```") % 2 == 0
        assert (node["lang"], node["synthetic"], node["emojis"]) == ("en", False, {})
        assert node["labels"]["quality"]["count"] == 3
        for reply in node["replies"]:
            assert reply["parent_id"] == node["message_id"]
            assert {reply["role"], node["role"]} == {"prompter", "assistant"}


@pytest.mark.parametrize("tree", trees(), ids=lambda tree: tree["message_tree_id"][:8])
def test_siblings_are_ranked_from_zero_and_the_best_has_the_best_quality(tree: dict[str, Any]) -> None:
    for node in nodes(tree["prompt"]):
        if node["role"] == "assistant":
            assert all(reply["rank"] is None for reply in node["replies"])
            continue
        fine = [reply for reply in node["replies"] if usable(reply)]
        assert [reply["rank"] for reply in fine] == ([None] if len(node["replies"]) == 1 else list(range(len(fine))))
        qualities = [reply["labels"]["quality"]["value"] for reply in fine]
        assert all(better > worse for better, worse in pairwise(qualities))


def test_the_trees_hold_one_deleted_one_rejected_and_one_unranked_reply() -> None:
    replies = [node for tree in trees() for node in nodes(tree["prompt"]) if node["role"] == "assistant"]
    assert sum(reply["deleted"] for reply in replies) == 1
    assert sum(not reply["review_result"] for reply in replies) == 1
    assert sum(usable(reply) and reply["rank"] is None for reply in replies) == 1


def test_no_message_of_the_trees_occurs_twice() -> None:
    every = [node for tree in trees() for node in nodes(tree["prompt"])]
    assert len({node["message_id"] for node in every}) == len(every)
    assert len({node["text"] for node in every}) == len(every)


def test_twenty_trees_are_read_and_half_of_them_are_about_code() -> None:
    read = gather(openassistant.read(TREES, EVERYTHING))
    assert (read.rejected, read.bad_lines, len(read.conversations)) == ((), (), 20)
    paths = ["\n".join(message.content for message in conversation.messages) for conversation in read.conversations]
    assert sum(bool(ABOUT_CODE.search(path)) for path in paths[:10]) == 10
    assert sum("```" in path for path in paths[10:]) == 0
    assert sum(conversation.assistant_turns == 2 for conversation in read.conversations) == 10


def test_the_best_path_is_the_one_that_is_read() -> None:
    best = {reply["text"] for tree in trees() for reply in tree["prompt"]["replies"] if reply["rank"] == 0}
    read = gather(openassistant.read(TREES, EVERYTHING))
    assert {conversation.messages[1].content for conversation in read.conversations} == best


def test_every_gptme_log_is_read_and_none_is_rejected() -> None:
    read = gather(gptme.read(LOGS))
    assert (read.rejected, read.bad_lines) == ((), ())
    assert len(read.conversations) == len(logs()) >= 10
    assert all(conversation.assistant_turns >= 5 for conversation in read.conversations)
    assert all(conversation.meta.get("not_reproduced", []) == [] for conversation in read.conversations)


def test_every_log_starts_with_the_one_prompt_that_the_readme_shows() -> None:
    prompts = {conversation.messages[0].content for conversation in gather(gptme.read(LOGS)).conversations}
    assert len(prompts) == 1
    prompt = prompts.pop()
    assert 60 <= len(prompt.split()) <= 110
    assert f"```text\n{prompt}\n```" in (SAMPLE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("log", logs(), ids=lambda log: log.parent.name)
def test_a_log_holds_one_prompt_then_turns_and_nothing_that_points_outside(log: Path) -> None:
    lines = messages(log)
    assert [message["role"] for message in lines[:3]] == ["system", "user", "assistant"]
    assert [message for message in lines if message.get("pinned")] == lines[:1]
    for message in lines:
        assert set(message) <= {"role", "content", "timestamp", "pinned", "hide", "metadata"}
        assert set(message.get("metadata", {})) <= {"model"}
    assert any(re.search(r"^```(shell|ipython|save|append|patch)\b", message["content"], re.M) for message in lines[2:])


@pytest.mark.parametrize("path", [*sorted(LOGS.glob("*/*")), TREES], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_file_holds_a_placeholder_or_a_real_home(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"@@\w+@@", text)
    assert set(re.findall(r"/(?:home|Users)/(\w+)", text)) <= {"dev"}


def test_the_configs_hold_four_keys_and_only_the_oldest_log_has_none() -> None:
    without = [log.parent.name for log in logs() if not (log.parent / "config.toml").exists()]
    assert without == ["2025-04-22-walking-happy-mouse"]
    for config in LOGS.glob("*/config.toml"):
        parsed = tomllib.loads(config.read_text(encoding="utf-8"))
        assert list(parsed) == ["chat"]
        assert list(parsed["chat"]) == CHAT_KEYS
        assert parsed["chat"]["tool_format"] == "markdown"
