"""The role policy: the first that neither raises nor loses text, as a template that any server applies; and what is odd in one."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alternating import ALTERNATES, GEMMA, GEMMA2, MINISTRAL, NEMO, NO_SYSTEM
from chats import (
    DEFAULT_PROMPT,
    DROPS_SYSTEM,
    LLAMA3,
    PROMPT,
    RAISES,
    STRIPS_THINKING,
    SYSTEM_LAST,
    chat,
    chatml_with,
    conversation_of,
    template_of,
)
from tiny_models import CHATML, tiny_tokenizer
from tool_chats import MISTRAL, QWEN, TOOLS, call, calling, result, session

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.exact import pieces_of
from mlx_finetune.data.policies import POLICIES, Policy, policy_of
from mlx_finetune.data.probing import CONTINUES, GPTME, NOTICED
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.rows import rows_of
from mlx_finetune.data.template import ChatTemplate, Encoded, Tools
from mlx_finetune.data.windows import cut
from mlx_finetune.export.fuse import write_template

ONLY_LEAD = (
    "{% set ns = namespace(lead=true) %}{% for m in messages %}{% if m.role != 'system' %}{% set ns.lead = false %}"
    "{% elif not ns.lead %}{{ raise_exception('late') }}{% endif %}"
    "{% if m.role == 'user' and '<system>' in m.content %}{{ raise_exception('tags') }}{% endif %}{% endfor %}"
) + CHATML
NEITHER = (
    "{% for m in messages %}{% if m.role == 'tool' or '<system>' in m.content %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
) + DROPS_SYSTEM
EMPTY_BLOCK = chatml_with(
    "('<think>\n\n</think>\n\n' if loop.last and message['role'] == 'assistant' else '') + message['content']"
)
DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
HELPED = {"folded": RAISES, "merged": ALTERNATES, "system in user": NO_SYSTEM, "tool role": ONLY_LEAD}
HELPED |= {"merged into results": MINISTRAL, "merged into results and user": NEMO}
RAISES_WITH_TOOLS = RAISES.removesuffix(CHATML) + QWEN
# Nothing but an answer may follow the result of a tool.
NO_NOTICE = (
    "{% for m in messages %}{% if not loop.first and messages[loop.index0 - 1].role == 'tool' and m.role in ('user', 'system') %}"
    "{{ raise_exception('only an answer after a result') }}{% endif %}"
    "{% if m.role == 'tool' and (not m.tool_call_id or '<system>' in m.content) %}{{ raise_exception('no notice') }}{% endif %}"
    "{% endfor %}"
) + QWEN
SHOWN = "{{ messages | tojson }}"  # what a policy makes of a chat


def contents(text: str, messages: Sequence[Message]) -> list[int]:
    """Where the content of each message stands."""
    return [text.index(message.content) for message in messages]


@pytest.mark.parametrize(
    ("jinja", "policy"),
    [
        (CHATML, "as it is"), (DROPS_SYSTEM, "folded"), (QWEN, "as it is"), (GEMMA, "merged"), (GEMMA2, "system in user"),
        *((jinja, name) for name, jinja in HELPED.items()),
    ],
)  # fmt: skip
def test_the_first_policy_that_loses_nothing_is_chosen_with_its_reason(tmp_path: Path, jinja: str, policy: str) -> None:
    template = template_of(tmp_path, jinja)
    assert template.policy.name == template.to_json()["role_policy"]["name"] == policy
    assert bool(template.why) == (policy != "as it is")
    named = [replace(message, content=f"word{i}.") for i, message in enumerate(GPTME)]
    places = contents(template.render(named), named)
    assert places == sorted(places)
    assert template.refusal_of(GPTME) == ""


def test_where_no_policy_helps_the_template_stays_as_it_is_and_the_reason_is_kept(tmp_path: Path) -> None:
    template = template_of(tmp_path, NEITHER)
    assert template.policy.name == "as it is" and template.why.startswith("no policy helps: the template drops")


@pytest.mark.parametrize("name", HELPED)
def test_the_template_that_applies_the_policy_is_served_by_anyone_who_has_its_text(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    template = template_of(tmp_path, HELPED[name])
    write_template(tmp_path, template.source)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = [{"role": message.role, "content": message.content} for message in GPTME]
    parts = [{"role": m.role, "content": [{"type": "text", "text": m.content}]} for m in GPTME]  # as gptme sends them
    expected = template.render(GPTME, generation_prompt=True)
    assert tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True) == expected
    if name.startswith("merged") or name == "system in user":  # the others leave the parts of user messages to the server
        assistants_as_text = [row if row["role"] == "assistant" else part for row, part in zip(rows, parts, strict=True)]
        assert tokenizer.apply_chat_template(assistants_as_text, tokenize=False, add_generation_prompt=True) == expected
    again = ChatTemplate.load(tmp_path)  # the export, prepared for once more
    assert again.source == template.source and policy_of(again.source) == name
    assert ChatTemplate.load(tmp_path, template.source).fingerprint == template.fingerprint


def test_a_policy_changes_nothing_where_gptme_folded_already(tmp_path: Path) -> None:
    template = template_of(tmp_path, RAISES)
    folded = [GPTME[0], *(m if m.role != "system" else Message("user", f"<system>\n{m.content}\n</system>") for m in GPTME[1:])]
    assert template.render(folded) == template.render(GPTME)


def test_the_template_behind_a_policy_begins_as_it_does_alone(tmp_path: Path) -> None:
    for jinja in ("\n" + RAISES, "  x\n" + RAISES):
        template = template_of(tmp_path / str(len(jinja)), jinja)
        assert template.render(chat("a", "b")) == template.with_source(jinja, template.policy).render(chat("a", "b"))


def test_recorded_requests_are_what_training_renders(tmp_path: Path, shared: Path) -> None:
    template = template_of(tmp_path, RAISES)
    requests = json.loads((shared / "data" / "gptme-requests" / "markdown_qwen3.5_folded_system.json").read_text(encoding="utf-8"))
    for request in requests:
        sent = [Message(m["role"], "".join(part["text"] for part in m["content"])) for m in request["body"]["messages"]]
        assert [m.role for m in sent].count("system") == 1 < len(sent)
        logged = [sent[0]]
        for message in sent[1:]:
            inside = message.content.removeprefix("<system>\n").removesuffix("\n</system>")
            logged.append(Message("system", inside) if inside != message.content else message)
        assert "system" in [m.role for m in logged[1:]]
        assert template.render(logged, True) == template.render(sent, True)


def policy_named(name: str) -> Policy:
    (policy,) = [one for one in POLICIES if one.name == name]
    return policy


@cache
def _tokenizer() -> Any:
    return tiny_tokenizer()


def shown(policy: Policy, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """What a template behind the policy is handed."""
    jinja = policy.before(SHOWN, trim=True, join=True)
    rows = json.loads(str(_tokenizer().apply_chat_template(rows_of(messages), chat_template=jinja, tokenize=False)))
    return [row | {"content": _text(row["content"])} for row in rows]


def _text(content: str | list[dict[str, str]]) -> str:
    if isinstance(content, str):
        return content
    (part,) = content
    assert part["type"] == "text" and len(part) == 2
    return part["text"]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_no_policy_touches_calls_or_parts_them_from_their_results(policy: Policy) -> None:
    notice = Message("system", "note")
    chat = [*session(" Look.\n"), notice, Message("user", "go on"), calling(call("a"), call("b"))]
    chat += [result("a", " one\n"), result("b", ""), notice, notice, Message("assistant", "end")]
    found = shown(policy, chat)
    rows = [row for row in rows_of(chat) if row.get("tool_calls")]
    assert [row["tool_calls"] for row in found if row.get("tool_calls")] == [row["tool_calls"] for row in rows]
    assert [row["content"] for row in found if row.get("tool_calls")] == ["Look.", "", ""]
    results = [row for row in found if row["role"] == "tool" and row.get("tool_call_id")]
    assert [row["tool_call_id"] for row in results] == ["call00001", "call00002", "a", "b"]
    for row, content in zip(results, ['a.txt\n"b".txt\n', "Saved.", " one\n", ""], strict=True):
        assert row["content"].startswith(content) and ("note" in row["content"]) == (
            "into" in policy.name and row["tool_call_id"] == "b"
        )
    order = [(place, row) for place, row in enumerate(found) if row.get("tool_calls")]
    for place, row in order:
        ids = [each["id"] for each in row["tool_calls"]]
        assert [after.get("tool_call_id") for after in found[place + 1 : place + 1 + len(ids)]] == ids


@pytest.mark.parametrize("name", ["merged", "system in user", "merged into results", "merged into results and user"])
@pytest.mark.parametrize("seed", range(5))
def test_a_merging_policy_gives_roles_in_turn_and_loses_no_word(name: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(20):
        roles = ["system", "user", *random.choice(["system", "user", "assistant"], random.integers(1, 12)).tolist()]
        chat = [Message(role, f"\n text{i}. \n" if role == "assistant" else f" text{i}. ") for i, role in enumerate(roles)]
        found = shown(policy_named(name), chat)
        lead = [row["role"] for row in found].count("system")
        assert lead == ("user" not in name and name != "system in user") and all(row["role"] != "system" for row in found[lead:])
        assert [row["role"] for row in found[lead:]] == [("user", "assistant")[i % 2] for i in range(len(found) - lead)]
        said = "\n\n".join(row["content"] for row in found)
        first = next(i for i, m in enumerate(chat) if m.role != "system")
        bare = [m.content.strip() if m.role == "assistant" else m.content for m in chat]
        wrapped = [
            f"<system>\n{text}\n</system>" if chat[i].role == "system" and i > first else text for i, text in enumerate(bare)
        ]
        assert said == "\n\n".join(wrapped)


@pytest.mark.parametrize("jinja", [GEMMA, GEMMA2, ALTERNATES, MINISTRAL, NEMO])
def test_of_two_answers_in_a_row_the_second_is_read_as_one_with_the_first_where_roles_must_alternate(
    tmp_path: Path, jinja: str
) -> None:
    template = template_of(tmp_path, jinja)
    messages = [*GPTME[:4], *(Message("assistant", text) for text in ("One.", "Two.")), *chat("more", "three")]
    learned, refused = contexts(template, messages)
    assert refused == {CONTINUES: 1}
    assert sorted(learned) == [4, 7]
    for place, before in learned.items():
        assert before == template.prompt(messages[:place]).tolist()
    text = template.render(messages)
    assert "One.\n\nTwo." in text and text.count("three") == 1
    kept = [replace(m, weight=0.0) if m.content == "Two." else m for m in messages]
    assert contexts(template, kept) == (learned, {})


@pytest.mark.parametrize("jinja", [CHATML, QWEN, RAISES, SYSTEM_LAST])
def test_of_two_answers_in_a_row_each_is_learned_where_the_template_takes_both(tmp_path: Path, jinja: str) -> None:
    template = template_of(tmp_path, jinja)
    messages = [Message("user", "a"), Message("assistant", "One."), Message("assistant", "Two.")]
    learned, refused = contexts(template, messages)
    assert sorted(learned) == [1, 2] and refused == {}


def contexts(template: ChatTemplate, messages: Sequence[Message], tools: Tools = ()) -> tuple[dict[int, list[int]], dict[str, int]]:
    """The tokens before each learned turn, and the others by reason, as `prepare` makes them."""
    (window,) = cut(conversation_of(messages), template.count, 10_000).windows
    try:
        once: Encoded | Refused = template.encode(window.messages, tools)
    except Refused as reason:
        once = reason
    pieces = pieces_of(window, once, template, tools, 10_000)
    assert not pieces.inexact
    learned = {}
    for piece in pieces.pieces:
        starts = np.flatnonzero(np.diff(np.concatenate([[0], piece.encoded.weights > 0])) > 0)
        for place, start in zip(piece.window.turns, starts.tolist(), strict=True):
            learned[place] = piece.encoded.tokens[:start].tolist()
    return learned, dict(pieces.refused)


@pytest.mark.parametrize("jinja", [QWEN, MINISTRAL, NEMO, RAISES_WITH_TOOLS])
def test_a_chat_of_native_calls_with_notices_is_served_as_trained(tmp_path: Path, jinja: str) -> None:
    template = template_of(tmp_path, jinja)
    assert template.native_refusal == ""
    learned, refused = contexts(template, NOTICED, TOOLS)
    assert refused == {} and len(learned) == sum(message.role == "assistant" for message in NOTICED)
    for place, before in learned.items():
        assert before == template.prompt(NOTICED[:place], TOOLS).tolist()


@pytest.mark.parametrize("jinja", [CHATML, RAISES, GEMMA, GEMMA2])
def test_a_template_without_native_calls_serves_chats_without_and_says_what_to_do_about_the_others(
    tmp_path: Path, jinja: str
) -> None:
    template = template_of(tmp_path, jinja)
    assert template.refusal_of(GPTME) == ""
    (said,) = [line for line in template.remarks if "native" in line]
    assert said.startswith("native tool calls cannot be learned") and said.endswith("collect with --tool-calls text")
    learned, refused = contexts(template, session(), TOOLS)
    (reason,) = refused
    assert learned == {} and refused[reason] == 3 and reason.endswith("collect with --tool-calls text")


@pytest.mark.parametrize(
    ("jinja", "sentences"),
    [
        (QWEN, []),
        (MINISTRAL, []),
        (MISTRAL, ["does not write the text beside a native tool call", "does not take all ids of native tool calls"]),
        (QWEN.replace("m.content %}", "false %}"), ["does not write the text beside a native tool call"]),
        (QWEN.replace("for call in m.tool_calls %}", "for call in m.tool_calls[:1] %}"), ["takes one native tool call a turn"]),
        (RAISES_WITH_TOOLS.replace("<system>' in", "nowhere' in"), []),
        (NO_NOTICE, ["does not take gptme's notices behind the results"]),
    ],
)
def test_what_a_template_does_not_take_of_native_calls_is_said(tmp_path: Path, jinja: str, sentences: list[str]) -> None:
    found = [one for one in template_of(tmp_path, jinja).oddities if "native" in one]
    assert len(found) == len(sentences)
    assert all(sentence in one for sentence, one in zip(sentences, found, strict=True))


def test_the_date_that_a_template_prints_stays_that_of_the_day_of_preparing(tmp_path: Path) -> None:
    template = template_of(tmp_path, DATED)
    today = datetime.now().astimezone().strftime("%d %b %Y")
    assert f"Today is {today}" in template.render(chat("a", "b"))
    later = ChatTemplate.load(tmp_path, template.source.replace(today, "01 Jan 2020"))
    assert "Today is 01 Jan 2020" in later.render(chat("a", "b")) and later.fingerprint != template.fingerprint


@pytest.mark.parametrize(
    ("jinja", "oddity"),
    [
        (DATED, "prints the date"),
        (LLAMA3, "takes blanks off the edges"),
        (STRIPS_THINKING, "takes thinking out of earlier turns"),
        (DEFAULT_PROMPT, "writes a system prompt of its own"),
        (CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"), "begins the thinking in the prompt"),
        (
            EMPTY_BLOCK,
            "writes an empty think block",
        ),
    ],
)
def test_what_is_odd_in_a_template_is_said(tmp_path: Path, jinja: str, oddity: str) -> None:
    found = [one for one in template_of(tmp_path, jinja).oddities if "pads" not in one and "native" not in one]
    assert len(found) == 1 and oddity in found[0]


@pytest.mark.parametrize(("header", "agree"), [(False, True), (True, False)])
def test_marks_of_what_a_model_writes_are_compared_with_what_is_learned(tmp_path: Path, header: bool, agree: bool) -> None:
    start, end = (
        ("", "{% generation %}{{ '<|im_start|>assistant\n' }}")
        if header
        else ("{{ '<|im_start|>assistant\n' }}", "{% generation %}")
    )
    marked = start + end + "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    other = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    jinja = (
        f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{marked}{{% else %}}{other}{{% endif %}}{{% endfor %}}{PROMPT}"
    )
    template = template_of(tmp_path, jinja)
    assert template.render(chat("a", "b")) == template_of(tmp_path / "plain", CHATML).render(chat("a", "b"))
    assert any("generation" in oddity for oddity in template.oddities) != agree


def test_nothing_is_odd_in_chatml(tmp_path: Path) -> None:
    assert [one for one in template_of(tmp_path, CHATML).oddities if "pads" not in one and "native" not in one] == []
