"""The shapes that a row of a chat file can have: which one it is, and where its messages stand.

Formats: OpenAI's chat fine-tuning (`messages`); OpenPipe's datasets and request logs (docs.openpipe.ai: uploading data,
exporting logs); ShareGPT and Alpaca as LLaMA-Factory's data/README.md documents them; prompt and completion, as text or as
messages (TRL, dataset formats); text in which a chat is written down.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlx_finetune.data.sources.chat_messages import Entry, role_of
from mlx_finetune.data.sources.chat_text import turns_of
from mlx_finetune.data.sources.chat_values import CannotLearn, RowError, listed, named, object_of, shown

KNOWN = (
    "known are messages (OpenAI, OpenPipe), conversations (ShareGPT), instruction and output (Alpaca), "
    "prompt and completion, text (of a chat)"
)
FREE_TEXT = "free text without speakers: what is learned is an assistant's answer, and none is marked"
QUESTIONS = ("prompt", "question", "query", "input")
ANSWERS = ("completion", "response", "answer", "output")
CAPTURED = (  # request and response of a chat server, as OpenPipe's export, its API and other recorders name them
    ("input", "output"),
    ("request", "response"),
    ("req_payload", "resp_payload"),
    ("reqPayload", "respPayload"),
    ("body", "response"),
)


class Foreign(RowError):
    """A row of something else than a chat; `hint` says how to read it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Shape:
    """A recognised row. `about` is the object with tools, model and time, `field` what leads to it (such as "input.").

    `entries` gives the messages with their fields; it raises RowError or CannotLearn with the field that is wrong.
    """

    format: str
    about: Mapping[str, Any]
    entries: Callable[[], list[Entry]]
    field: str = ""


def shape_of(value: Any) -> Shape:
    """By the keys that say something; where a row has those of several shapes, the first in the order below wins.

    messages, conversations, recorded requests, Alpaca, prompt and completion, preferences, text.

    Raises:
        RowError: it has those of none.
        Foreign: it is a row of something else.
    """
    if isinstance(value, str):
        if turns_of(value) is None:
            raise RowError(f"text: {FREE_TEXT}")
        return Shape("text", {}, partial(_text, value))
    if isinstance(value, list) and value and role_of(value[0]):
        return Shape("openai", {}, partial(_entries, value, "messages"))
    if not isinstance(value, dict):
        raise RowError(f"{shown(value)} is no chat")
    keys = {key for key in value if value[key] is not None}
    if "messages" in keys:
        openpipe = "rejected_message" in keys or value.get("split") in ("TRAIN", "TEST")
        return Shape("openpipe" if openpipe else "openai", value, partial(_entries, value["messages"], "messages"))
    for key in ("conversations", "conversation"):
        if key in keys:
            return Shape("sharegpt", value, partial(_entries, value[key], key))
    return _captured(value) or _question_and_answer(value, keys)


def _captured(row: Mapping[str, Any]) -> Shape | None:
    for asked, answered in CAPTURED:
        request = object_of(row.get(asked))
        if isinstance(request, dict) and request.get("messages") is not None:
            response = object_of(row.get(answered))
            about = {**(response if isinstance(response, dict) else {}), **request}
            entries = partial(_asked_and_answered, request, asked, response, answered if answered in row else "")
            return Shape("openpipe", about, entries, f"{asked}.")
    return None


def _question_and_answer(row: Mapping[str, Any], keys: set[str]) -> Shape:
    _refuse_foreign(row, keys)
    question = next((key for key in QUESTIONS if key in keys), "")
    answer = next((key for key in ANSWERS if key in keys and key != question), "")
    if "instruction" in keys and answer:
        return Shape("alpaca", row, partial(_alpaca, row, answer))
    if question and answer:
        return Shape("completion", row, partial(_completion, row[question], question, row[answer], answer))
    if "chosen" in keys:
        return Shape("preference", row, _preference)
    if "text" in keys:
        return Shape("text", row, partial(_text, row["text"]))
    if missing := _said_nothing(row, keys):
        raise RowError(f"{missing}: nothing")
    raise RowError(f"no chat: its keys are {', '.join(named(key) for key in list(row)[:8]) or 'none'}")


def _said_nothing(row: Mapping[str, Any], keys: set[str]) -> str:
    """The key that a chat would need and that is null; "" where there is none. A question needs an answer."""
    asked = {"instruction", *QUESTIONS} & keys
    needed = ("messages", "conversations", "conversation", *ANSWERS, *(() if asked else ("instruction", *QUESTIONS)), "text")
    return next((key for key in needed if key in row and key not in keys), "")


def _refuse_foreign(row: Mapping[str, Any], keys: set[str]) -> None:
    nodes = {"parent_id", "replies", "message_tree_id"} & keys
    if "message_tree_id" in keys or ("message_id" in keys and (nodes or row.get("role") == "prompter")):
        raise Foreign("an OpenAssistant row, not a chat", "read this file with --openassistant")
    if {"role", "content", "timestamp"} <= keys:
        raise Foreign("a message of a gptme log, not a chat", "gptme's logs are read with: mlx-finetune collect LOGS")
    if {"role", "content"} <= keys:
        raise Foreign("one message, not a chat", 'write all messages of a chat in one row, as {"messages": [...]}')


def _entries(value: Any, field: str) -> list[Entry]:
    return [(f"{field}[{i}]", one) for i, one in enumerate(listed(value, field))]


def _asked_and_answered(request: Mapping[str, Any], asked: str, response: Any, answered: str) -> list[Entry]:
    """The turns of a recorded request, and the one that answered it where that was recorded."""
    turns = _entries(request["messages"], f"{asked}.messages")
    if not answered:
        return turns
    if role_of(response):
        return [*turns, (answered, response)]
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise CannotLearn("no answer was recorded", f"{answered}.choices")
    if choices[0].get("finish_reason") == "length":
        raise CannotLearn("the answer is cut off", f"{answered}.choices[0].finish_reason", "length")
    return [*turns, (f"{answered}.choices[0].message", choices[0].get("message"))]


def _said(role: str, text: Any, field: str) -> Entry:
    if not isinstance(text, str):
        raise RowError(f"{field}: {shown(text)} is not text")
    if not text.strip():
        raise CannotLearn("empty", field)
    return (field, {"role": role, "content": text})


def _alpaca(row: Mapping[str, Any], answer: str) -> list[Entry]:
    """As LLaMA-Factory has it: the input on a line of its own below the instruction, every answer of the history learned."""
    more = next((key for key in ("input", "context") if row.get(key) is not None and key != answer), "")
    parts = [("instruction", row["instruction"]), *([(more, row[more])] if more else [])]
    for field, text in parts:
        if not isinstance(text, str):
            raise RowError(f"{field}: {shown(text)} is not text")
    entries: list[Entry] = []
    for i, pair in enumerate(listed(row.get("history") or [], "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history[{i}]: not a pair of question and answer")
        entries += [_said("user", pair[0], f"history[{i}][0]"), _said("assistant", pair[1], f"history[{i}][1]")]
    question = "\n".join(text for _, text in parts if text.strip())
    return [*entries, _said("user", question, "instruction"), _said("assistant", row[answer], answer)]


def _completion(asked: Any, question: str, answered: Any, answer: str) -> list[Entry]:
    """Of a prompt with answers in it those are context: only the completion is learned, as in TRL."""
    if isinstance(asked, str) and isinstance(answered, str):
        opened = turns_of(f"{asked}.")  # a rendered chat that ends where the assistant begins
        if opened and opened[-1][1] == "." and role_of({"role": opened[-1][0]}) == "assistant":
            learned_from, turns = len(opened) - 1, _written(turns_of(asked + answered) or [], question)
            return _context(turns[:learned_from]) + (turns[learned_from:] or [_said("assistant", "", answer)])
        blank = answered[:1] == " " and not answered[1:2].isspace()  # which OpenAI's first format asked for
        return [_said("user", asked, question), _said("assistant", answered[1:] if blank else answered, answer)]
    before = [_said("user", asked, question)] if isinstance(asked, str) else _entries(asked, question)
    if role_of(answered):
        return [*_context(before), (answer, answered)]
    after = [_said("assistant", answered, answer)] if isinstance(answered, str) else _entries(answered, answer)
    return _context(before) + after


def _context(entries: list[Entry]) -> list[Entry]:
    unlearned = {"weight": 0, "reason": "part of the prompt"}
    return [(field, {**one, **unlearned} if role_of(one) == "assistant" else one) for field, one in entries]


def _preference() -> list[Entry]:
    raise CannotLearn('a preference, which is not learned; to learn the chosen answer, name it "completion"', "chosen")


def _text(text: Any) -> list[Entry]:
    if not isinstance(text, str):
        raise RowError(f"text: {shown(text)} is not text")
    turns = turns_of(text)
    if turns is None:
        raise CannotLearn(FREE_TEXT, "text")
    return _written(turns, "text")


def _written(turns: list[tuple[str, str]], field: str) -> list[Entry]:
    return [(f"{field}, turn {i}", {"role": role, "content": content}) for i, (role, content) in enumerate(turns, 1)]
