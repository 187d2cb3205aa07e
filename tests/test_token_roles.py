"""Each token is counted for the role whose text it is, in one rendering and in a context of its own."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from chats import STRIPS_THINKING, chat, conversation_of, random_chat, template_of
from tiny_models import CHATML

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Message, write_conversations
from mlx_finetune.data.encoding import Encoded
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.provenance import Refused, Span
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.token_roles import TEMPLATE, tokens_by_role

END = "<|im_end|>"


def test_a_token_is_of_the_first_message_of_which_it_holds_anything() -> None:
    starts, ends = np.array([0, 2, 2, 4, 6, 8, 10]), np.array([2, 2, 4, 6, 8, 10, 12])
    roles, spans = ("assistant", "user", "system", "user"), (Span(7, 11), Span(3, 4), None, Span(4, 5))
    assert tokens_by_role(roles, spans, starts, ends) == {TEMPLATE: 2, "user": 2, "assistant": 3}
    assert tokens_by_role((), (), starts, ends) == {TEMPLATE: 7}


def counted(template: ChatTemplate, encoded: Encoded, parts: Iterable[tuple[str, str]]) -> Counter[str]:
    """By the texts of the tokens: `parts` are texts with whose they are, and join to the whole rendered text."""
    owners = [whose for text, whose in parts for _ in text]
    pieces = template.pieces(encoded.tokens.tolist())
    found: Counter[str] = Counter()
    for piece, end in zip(pieces, accumulate(map(len, pieces)), strict=True):
        inside = owners[end - len(piece) : end] or owners[end : end + 1]  # a part of a character is of the whole one
        found[next((whose for whose in inside if whose != TEMPLATE), TEMPLATE)] += 1
    assert sum(map(len, pieces)) == len(owners)
    return found


def chatml(messages: Sequence[Message], learned: Iterable[int]) -> list[tuple[str, str]]:
    """As ChatML writes them, with whose each part is; that of a message of blanks is nobody's."""
    parts: list[tuple[str, str]] = []
    for i, message in enumerate(messages):
        whose = message.role if message.content.strip() else TEMPLATE
        parts += [(f"<|im_start|>{message.role}\n", TEMPLATE), (message.content, whose)]
        parts += [(END, "assistant" if i in learned else TEMPLATE), ("\n", TEMPLATE)]
    return parts


def without_thinking(message: Message) -> Message:
    kept = message.content.split("</think>")[-1].lstrip() if message.role == "assistant" else message.content
    return Message(message.role, kept)


def test_in_one_rendering_the_tokens_of_each_role_are_those_of_its_messages(tmp_path: Path) -> None:
    template, random = template_of(tmp_path, CHATML), np.random.default_rng(11)
    seen: Counter[str] = Counter()
    for _ in range(300):
        messages = template.as_learned(random_chat(random))
        try:
            encoded = template.encode(messages)
        except Refused:
            continue
        assert sum(encoded.by_role.values()) == len(encoded.tokens)
        assert +encoded.by_role == counted(template, encoded, chatml(messages, encoded.turns))
        seen += encoded.by_role
    assert min(seen[role] for role in ("system", "user", "assistant", "tool", TEMPLATE)) > 100


def test_in_a_context_of_its_own_too_where_the_template_takes_thinking_out(tmp_path: Path) -> None:
    template, random = template_of(tmp_path, STRIPS_THINKING), np.random.default_rng(12)
    rewritten = 0
    for _ in range(300):
        messages = template.as_learned([*random_chat(random), Message("user", "q"), Message("assistant", "it is so")])
        thoughts = [Message(m.role, "<think>好</think>\n" + m.content) if m.role == "assistant" else m for m in messages]
        try:
            encoded = template.encode_turn(thoughts[:-1] + messages[-1:])
        except Refused:
            continue
        fed = [*(without_thinking(m) if i + 2 < len(thoughts) else m for i, m in enumerate(thoughts[:-1])), messages[-1]]
        parts = chatml(fed, [len(fed) - 1])[:-1]
        assert +encoded.by_role == counted(template, encoded, parts)
        rewritten += any(m.role == "assistant" for m in fed[:-1])
    assert rewritten > 50


@pytest.mark.parametrize("kept", ["好", "(好)", "…", "", " \n", "ok", "「x」 y。", "<b>"])
def test_what_is_left_of_a_turn_is_found_also_where_it_has_no_letters(tmp_path: Path, kept: str) -> None:
    template = template_of(tmp_path, STRIPS_THINKING)
    messages = chat("a", f"<think>\nwhy\n</think>\n\n{kept}", "b", "c")
    encoded = template.encode_turn(messages)
    parts = chatml([without_thinking(m) for m in template.as_learned(messages)], [3])[:-1]
    assert +encoded.by_role == counted(template, encoded, parts)


def test_a_prepared_folder_says_the_tokens_of_each_role_by_source_and_they_add_up(tmp_path: Path) -> None:
    template = template_of(tmp_path / "model", STRIPS_THINKING)
    thinking = "<think>why</think>\n"
    conversations = [
        conversation_of(chat("a", thinking + "one", "b", thinking + "two", "c", "three"), "1"),
        conversation_of([Message("system", "be kind"), *chat("x", "y")], "2", "a/b"),
    ]
    write_conversations(tmp_path / "all.jsonl", conversations)
    settings = make_config({"valid_fraction": 0.0}, "test")
    tally = prepare([tmp_path / "all.jsonl"], template, settings, tmp_path / "dataset", {"model": "tiny"})["train"]
    by_role = tally["tokens_by_role"]
    assert set(by_role) == {"gptme", "a/b"} and set(by_role["a/b"]) == {"system", "user", "assistant", TEMPLATE}
    assert sum(sum(counts.values()) for counts in by_role.values()) == tally["tokens"]
    assert tally["turns_of_own_context"] > 0 and by_role["a/b"]["assistant"] == len(template.prompt_tokens("y" + END))
