"""Which characters of a rendered chat came from which message, proven and never guessed.

Every ASCII letter, digit and harmless sign of message k is moved to an unassigned code point that carries k. One more render
with the moved text then names the owner of each character, and undoing the move must give the real render back: proof that the
template did not look at the letters.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mlx_finetune.data.conversation import Message

Render = Callable[[Sequence[Message]], str]

BASE, TOP, STEP = 0x40000, 0xE0000, 128  # planes 4 to 13 of Unicode hold no characters
MOST_MESSAGES = (TOP - BASE) // STEP
MOVED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789`.,:;!?*#-_+=()$%@~^")
IS_MOVED = np.array([chr(code) in MOVED for code in range(STEP)])  # no character beyond ASCII; the last of ASCII is none
UTF32 = ("utf-32-le", "surrogatepass")
# Templates look for text such as </think> or [INST] in a message, so what looks like a tag stays as it is.
TAG = re.compile(r"</?[A-Za-z][\w|:.-]*>|<\|[^|>]*\|>|<｜[^｜]*｜>|\[/?[A-Z_]+\]")
LONG = 4000  # characters
SENTINEL = "\ue000SENTINEL\ue001"


class Refused(Exception):
    """The template does not render this conversation in a way that can be learned from; the text says why."""


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` (exclusive) of the rendered text."""

    start: int
    end: int


def locate(render: Render, messages: Sequence[Message], lenient: bool = False) -> tuple[str, list[Span | None]]:
    """The rendered text and, for each message, where its content stands in it; None for a message of blanks.

    `lenient`: what the template makes of assistant messages is let pass: where it stands, None where nothing is left of it.

    Raises:
        Refused: the template drops, repeats, mixes or rewrites the text of a message.
    """
    if len(messages) > MOST_MESSAGES:
        raise Refused(f"more than {MOST_MESSAGES} messages in one window")
    text = render(messages)
    if not text.isascii() and _is_moved(_codes(text)).any():
        raise Refused("unassigned characters in a message")
    tainted = [_tainted(message.content, k) for k, message in enumerate(messages)]
    codes = _codes(render([replace(message, content=taint.moved) for message, taint in zip(messages, tainted, strict=True)]))
    if _undo(codes) != text:
        raise Refused("the template treats a message by what its words are")
    spans: list[Span | None] = []
    for k, (message, positions) in enumerate(zip(messages, _positions(codes, len(messages)), strict=True)):
        try:
            spans.append(_span(render, messages, k, text, positions, tainted[k]))
        except Refused:
            if not lenient or message.role != "assistant":
                raise
            spans.append(_rest(render, messages, k, text, positions))
    return text, spans


def locate_one(render: Render, messages: Sequence[Message], text: str) -> Span | None:
    """Where the content of the last message stands in `text`, its rendering; None where the template rewrites it."""
    k = len(messages) - 1
    taint = _tainted(messages[k].content, k)
    codes = _codes(render([*messages[:k], replace(messages[k], content=taint.moved)]))
    if _undo(codes) != text:
        return None
    try:
        return _span(render, messages, k, text, _positions(codes, k + 1)[k], taint)
    except Refused:
        return None


def _span(render: Render, messages: Sequence[Message], k: int, text: str, positions: np.ndarray, taint: "_Taint") -> Span | None:
    content, role = messages[k].content, messages[k].role
    if not content.strip():
        return None
    if taint.begin < 0:
        return _span_by_sentinel(render, messages, k, text)
    if not positions.size:
        raise Refused(f"the template drops a message of role {role}")
    first, last = int(positions[0]), int(positions[-1])
    begin, end = taint.begin, taint.end
    before, inside, after = content[:begin], content[begin:end], content[end:]
    if role == "tool" and text[first : last + 1] != inside:  # Llama 3 writes the result of a tool as JSON
        before, inside, after = (json.dumps(part, ensure_ascii=False)[1:-1] for part in (before, inside, after))
    if text[first : last + 1] != inside:
        raise Refused(f"the template rewrites a message of role {role}")
    # A template may trim blanks at the edges of a message, and nothing else.
    head = next((h for h in (before, before.lstrip()) if text[:first].endswith(h)), None)
    tail = next((t for t in (after, after.rstrip()) if text.startswith(t, last + 1)), None)
    if head is None or tail is None:
        raise Refused(f"the template rewrites a message of role {role}")
    return Span(first - len(head), last + 1 + len(tail))


def _span_by_sentinel(render: Render, messages: Sequence[Message], k: int, text: str) -> Span:
    """For a message without a single ASCII letter or digit: rendered once more with a sentinel in its place."""
    content, role = messages[k].content, messages[k].role
    probe = render([*messages[:k], replace(messages[k], content=SENTINEL), *messages[k + 1 :]])
    head, found, tail = probe.partition(SENTINEL)
    span = Span(len(head), len(text) - len(tail))
    written = text[span.start : span.end]
    trimmed = written in (content, content.lstrip(), content.rstrip(), content.strip())
    if not found or not trimmed or not (text.startswith(head) and text.endswith(tail)):
        raise Refused(f"the template drops or rewrites a message of role {role}")
    return span


def _rest(render: Render, messages: Sequence[Message], k: int, text: str, positions: np.ndarray) -> Span | None:
    """Where that stands which the template keeps of a message (no thinking, say), without blanks around it."""
    content = messages[k].content
    if positions.size:
        start, end = int(positions[0]), int(positions[-1]) + 1
        marked = np.flatnonzero(_movable(content))
        for own in (marked[-positions.size :], marked[: positions.size]):  # a template takes something off the start, or the end
            begin, stop = int(own[0]), int(own[-1]) + 1
            if content[begin:stop] == text[start:end]:  # then signs around it, which were not moved, are told by being the same
                start -= _alike(content[:begin][::-1], text[max(start - begin, 0) : start][::-1])
                end += _alike(content[stop:], text[end : end + len(content) - stop])
                break
    else:  # not a letter: where would more of it stand?
        more = render([*messages[:k], replace(messages[k], content=content + SENTINEL), *messages[k + 1 :]])
        head, found, tail = more.partition(SENTINEL)
        if not found or head + tail != text:
            return None
        end = len(head)
        start = end - _alike(content[::-1], head[: -len(content) - 1 : -1])
    kept = text[start:end]
    return Span(end - len(kept.lstrip()), start + len(kept.rstrip())) if kept.strip() else None


def _alike(one: str, other: str) -> int:
    """How many characters they have in common before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class _Taint:
    """A content with its letters `moved`; the first of them is at `begin`, none behind `end`. Without letters `begin` is -1."""

    moved: str
    begin: int
    end: int


def _tainted(content: str, k: int) -> _Taint:
    return _taint_of_long(content, k) if len(content) >= LONG else _taint_of(content, k)


@lru_cache(maxsize=16)
def _taint_of_long(content: str, k: int) -> _Taint:
    """Remembered, for many chats begin with the same prompt."""
    return _taint_of(content, k)


def _taint_of(content: str, k: int) -> _Taint:
    codes, movable = _codes(content), _movable(content)
    if not movable.any():
        return _Taint(content, -1, -1)
    moved = np.add(codes, np.uint32(BASE + k * STEP), out=codes.copy(), where=movable).tobytes().decode(*UTF32)
    return _Taint(moved, int(movable.argmax()), len(codes) - int(movable[::-1].argmax()))


def _positions(codes: np.ndarray, messages: int) -> list[np.ndarray]:
    """Of each message, int64 [letters]: where its moved letters stand in a rendered text."""
    places = np.flatnonzero(_is_moved(codes))
    owners = (codes[places] - BASE) // STEP
    if (owners[1:] < owners[:-1]).any():  # the template does not keep their order, or repeats one
        order = np.argsort(owners, kind="stable")
        places, owners = places[order], owners[order]
    return np.split(places, np.searchsorted(owners, np.arange(1, messages)))


def _movable(content: str) -> np.ndarray:
    """bool [characters]: those that may be moved."""
    codes = _codes(content)
    movable: np.ndarray = IS_MOVED[np.minimum(codes, STEP - 1)]
    if "<" in content or "[" in content:
        for tag in TAG.finditer(content):
            movable[tag.start() : tag.end()] = False
    return movable


def _codes(text: str) -> np.ndarray:
    """uint32 [characters]: their code points."""
    return np.frombuffer(text.encode(*UTF32), "<u4")


def _is_moved(codes: np.ndarray) -> np.ndarray:
    return (codes >= BASE) & (codes < TOP)


def _undo(codes: np.ndarray) -> str:
    plain = np.where(_is_moved(codes), codes & (STEP - 1), codes)  # BASE is a multiple of STEP, a power of 2
    return plain.tobytes().decode("utf-32-le")
