"""What a model writes in a turn, read off its chat template: where the turn ends, and what stands around its content."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.provenance import Refused, Span, locate, locate_one
from mlx_finetune.data.rows import check_written

if TYPE_CHECKING:
    from mlx_finetune.data.template import ChatTemplate

Tools = Sequence[dict[str, Any]]
NO_END = "no end-of-turn token follows an assistant message: the model would not learn to stop"
OTHERWISE = "the template writes what stands before a {} in another way than a server would"
THINK = ("<think>", "</think>")
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
CLOSED = "\n</think>\n\n"  # ends at once the thinking that a prompt begins; as DeepSeek R1 itself skips it
ASKED = (Message("user", "U"), Message("assistant", "A"))


@dataclass(frozen=True)
class Turn:
    """A learned turn: characters `start` to `end`, where the control token `ending` begins.

    `missing`: the last of the text to `ending`, where the template leaves it out behind the last turn of all.
    """

    start: int
    end: int
    ending: str
    missing: str = ""

    @property
    def span(self) -> Span:
        """All that is learned of it."""
        return Span(self.start, self.end + len(self.ending))

    def closed(self, text: str) -> str:
        """The rendered chat, with what is missing behind its last turn in place of the blanks that may stand there."""
        return text[: self.span.end - len(self.missing)] + self.missing if self.missing else text


@dataclass(frozen=True)
class Ends:
    """The control tokens at which turns end, longest first.

    `missing` is that of the last turn of all, where the template leaves it open and ends it only once the other side has its turn;
    `before` is what stands between content and it then. A model cannot know which turn is the last: it is to end each one alike.
    """

    tokens: tuple[str, ...]
    stops: bool  # whether a server stops at them
    missing: str = ""
    before: str = ""

    def at(self, text: str, specials: Sequence[str], end: int) -> tuple[int, str] | None:
        """The first of them behind the content that ends at `end`, with nothing but blanks and control tokens between."""
        for place, special in _behind(text, specials, end):
            if special in self.tokens:
                return place, special
        return None

    def first(self, text: str, start: int) -> tuple[int, str] | None:
        """The first of them from `start` on."""
        found = [(place, -len(token), token) for token in self.tokens if (place := text.find(token, start)) >= 0]
        return (min(found)[0], min(found)[2]) if found else None


def ends_of(template: "ChatTemplate") -> Ends:
    """Asks the template how it ends a turn; a server's own stops come first (of `<|end|><|stop|>` it is the second).

    Raises:
        Refused: no control token follows a turn, or only one that begins the next turn and at which no server stops.
    """
    specials, stops = template.special_texts, template.stop_texts
    last, inner = (_behind_answer(template, messages) for messages in (ASKED, (*ASKED, ASKED[0])))
    if any(special in stops for _, special in last):
        return Ends(stops, stops=True)
    if last:
        return Ends(tuple(s for s in specials if s == last[0][1] or s in stops), stops=False)
    for before, special in inner:
        if special in stops:
            return Ends(stops, True, special, before)
    raise Refused(NO_END)


def _behind_answer(template: "ChatTemplate", messages: Sequence[Message]) -> list[tuple[str, str]]:
    """The control tokens behind the answer, each with all that stands between the two."""
    text, spans = locate(template.render, messages)
    assert spans[1]
    end = spans[1].end
    return [(text[end:place], special) for place, special in _behind(text, template.special_texts, end)]


def _behind(text: str, specials: Sequence[str], end: int) -> list[tuple[int, str]]:
    """The control tokens that follow, only blanks between them."""
    found: list[tuple[int, str]] = []
    while True:
        while text[end : end + 1].isspace():
            end += 1
        special = next((special for special in specials if text.startswith(special, end)), None)
        if special is None:
            return found
        found.append((end, special))
        end += len(special)


def turn_at(template: "ChatTemplate", text: str, span: Span) -> Turn:
    """A turn of text: from its content to the control token that ends it, which need not stand there behind the last of all.

    Raises:
        Refused: none does.
    """
    ends = template.ends
    if found := ends.at(text, template.special_texts, span.end):
        return Turn(span.start, *found)
    if ends.missing and not text[span.end :].strip():
        return Turn(span.start, span.end + len(ends.before), ends.missing, ends.before + ends.missing)
    raise Refused(NO_END)


def turn_with_calls(
    template: "ChatTemplate", messages: Sequence[Message], index: int, text: str, span: Span | None, tools: Tools
) -> Turn:
    """A turn with native calls: all that the template writes between the prompt for it and its end-of-turn token."""
    before, through = template.render(messages[:index], True, tools), _through_calls(template, messages[: index + 1], tools)
    if not text.startswith(before):
        raise Refused(OTHERWISE.format("tool call"))
    start = len(before)
    if span and span.start < start:
        raise Refused("the template writes the text of a message with a tool call outside of its turn")
    # Not the end of `through` itself: some templates (Qwen3) write the last turn of all in another way than this one.
    begin = span.end if span else start
    last = template.ends.first(through, begin if through.startswith(text[:begin]) else start)
    if last is None:
        raise Refused(NO_END)
    end, missing = text.find(last[1], begin), ""
    if end < 0 and template.ends.missing and index == len(messages) - 1:
        before = through[len(through[: last[0]].rstrip()) : last[0]]
        end, missing = len(text.rstrip()) + len(before), before + last[1]
    if end < 0:
        raise Refused(NO_END)
    written = text[start:end] if not span else text[start : span.start] + text[span.end : end]
    check_written(messages[index].tool_calls, written)
    return Turn(start, end, last[1], missing)


def _through_calls(template: "ChatTemplate", messages: Sequence[Message], tools: Tools) -> str:
    """Rendered to the end of the calls in the last message; where the template leaves it open, a result ends them."""
    if template.ends.missing:
        messages = [*messages, Message("tool", "R", tool_call_id=messages[-1].tool_calls[0].id)]
    return template.render(messages, tools=tools)


@dataclass(frozen=True)
class Emission:
    """What the model is to write behind a prompt: `core` is of the message, the rest is the template's."""

    lead: str
    core: str
    tail: str
    ending: str  # a control token

    @property
    def written(self) -> str:
        """All before the end-of-turn token."""
        return self.lead + self.core + self.tail


def emission(template: "ChatTemplate", messages: Sequence[Message], prompt: str, tools: Tools) -> Emission:
    """What the model is to write behind the prompt for the last message.

    An empty think block that the template would write before the turn is left out where the prompt has none; thinking that the
    prompt begins is ended at once where the turn has none.

    Raises:
        Refused: the template rewrites the turn, or writes nothing that ends it.
    """
    content, text = messages[-1].content, template.render(messages, tools=tools)
    span = locate_one(lambda each: template.render(each, tools=tools), messages, text) if content else None
    opened = prompt.rstrip().endswith(THINK[0])
    thought = opened and THINK[1] in content  # the prompt begins it, and the turn goes on with it
    core = content.removeprefix(THINK[0]).lstrip() if thought else content
    base = prompt if text.startswith(prompt) or not opened else prompt.rstrip()  # an empty thought may have no line break
    follows = text.startswith(base)
    if messages[-1].tool_calls:
        if not follows:
            raise Refused(OTHERWISE.format("tool call"))
        return _with_calls(template, messages[-1], core, _through_calls(template, messages, tools), len(base), span)
    if span is None:
        return _rewritten(template, core, thought, text, len(base) if follows else -1)
    turn, start = turn_at(template, text, span), span.end - len(core)
    text = turn.closed(text)
    lead, tail = text[len(base) : start], text[span.end : turn.end]
    if not follows:
        if _header(template, prompt) != _header(template, text[: span.start]):
            raise Refused(OTHERWISE.format("turn"))
        lead = CLOSED if opened and not thought else ""
    elif start < len(base):
        raise Refused("the turn is a thought without an end")
    elif thought or (lead.strip() and EMPTY_THOUGHT.fullmatch(lead)):
        lead = ""
    return Emission(lead, core, tail, turn.ending)


def _header(template: "ChatTemplate", text: str) -> str:
    """What stands last in it, from the last control token on, without outer blanks and without a thought begun or empty."""
    header = text[max((text.rfind(special) for special in template.special_texts), default=0) :].rstrip()
    return EMPTY_THOUGHT.sub("", header.removesuffix(THINK[0])).strip()


def _rewritten(template: "ChatTemplate", core: str, thought: bool, text: str, start: int) -> Emission:
    """A turn that the template writes with other blanks, or without the thought that the prompt (text before `start`) began."""
    after = core.rpartition(THINK[1])[2].strip()
    place = text.rfind(after)
    if after and place >= 0 and not template.names_control_token(core):
        turn = turn_at(template, text, Span(place, place + len(after)))
        text = turn.closed(text)
        written = text[start : turn.end] if start >= 0 else ""
        if written and "".join(written.split()) == "".join(core.split()):
            return Emission("", written, "", turn.ending)
        if thought:
            return Emission("", core, text[place + len(after) : turn.end], turn.ending)
    raise Refused("the template rewrites a message of role assistant")


def _with_calls(template: "ChatTemplate", turn: Message, core: str, text: str, start: int, span: Span | None) -> Emission:
    begin, end = (span.end - len(core), span.end) if span else (start, start)
    if (turn.content and not span) or begin < start:
        raise Refused("the template rewrites the text of a message with a tool call")
    last = template.ends.first(text, end)
    if last is None:
        raise Refused(NO_END)
    lead, tail = text[start:begin], text[end : last[0]]
    check_written(turn.tool_calls, lead + tail)
    return Emission(lead, core, tail, last[1])
