"""The role policy: the first that neither raises nor loses text, as a template that any server applies; and what is odd in one."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from chats import DEFAULT_PROMPT, DROPS_SYSTEM, LLAMA3, PROMPT, RAISES, STRIPS_THINKING, chat, chatml_with, template_of
from tiny_models import CHATML

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.policies import policy_of
from mlx_finetune.data.template import GPTME, ChatTemplate
from mlx_finetune.export.fuse import write_template

ALTERNATES = (
    "{% set first = 1 if messages[0].role == 'system' else 0 %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% if not loop.first %}{{ raise_exception('one system message') }}{% endif %}"
    "{% elif (m.role == 'user') != (loop.index0 % 2 == first) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% endfor %}"
) + CHATML
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ALTERNATES
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


def contents(text: str, messages: Sequence[Message]) -> list[int]:
    """Where the content of each message stands."""
    return [text.index(message.content) for message in messages]


@pytest.mark.parametrize(
    ("jinja", "policy"), [(CHATML, "as it is"), (DROPS_SYSTEM, "folded"), *((jinja, name) for name, jinja in HELPED.items())]
)
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
    if name in ("merged", "system in user"):  # the others leave the parts of user messages to the server
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
    found = [one for one in template_of(tmp_path, jinja).oddities if "pads" not in one]
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
    assert [one for one in template_of(tmp_path, CHATML).oddities if "pads" not in one] == []
