"""One answer: tokens become text while they come, up to a stop string, with thoughts and calls taken out where there are any."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from mlx_finetune.data.conversation import Message, ToolCall
from mlx_finetune.data.emission import THINK, emission
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.written_calls import Written, decoder, hidden_of, read_calls
from mlx_finetune.serving.opened import Opened
from mlx_finetune.serving.pieces import Held, Pieces
from mlx_finetune.serving.sampling import Sampling

PROBE = (Message("user", "U"), Message("assistant", "A"))
LAST = 8  # tokens of a prompt that may open a thought


@dataclass(frozen=True)
class Question:
    """What one answer is made from. `way`: how calls are written that are to be taken out; None: they stay text."""

    variant: str
    prompt: list[int]
    limit: int  # of tokens
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    way: Written | None = None
    tools: tuple[dict[str, Any], ...] = ()
    one_call: bool = False  # where it makes several, only the first is told


@dataclass
class Answer:
    """What is known of an answer once its text is through; `reason` in OpenAI's words: stop, length or tool_calls."""

    tokens: list[int] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    reason: str = ""


class Thought(str):
    """A piece of text that belongs to the thought which the prompt began, not to the answer."""


def answer(opened: Opened, question: Question, into: Answer) -> Generator[str]:
    """The text of the answer, piece by piece (some are empty: one comes with each token); `into` is filled meanwhile."""
    way, template = question.way, opened.template
    pieces = Pieces(decoder(template), hidden_of(template, way))
    thinking = _Thinking() if opens_thought(template, question.prompt) else None
    lead = [] if thinking else lead_of(template)
    stops, calls = Held(question.stop), Held(way.marks if way else ())

    def passed_on(text: str, last: bool = False) -> str:
        """What may be given away of the answer's own text."""
        nonlocal calls
        text = stops.add(text)
        text = calls.add(text + stops.rest() if last and not stops.found else text)
        if way and way.whole and text.strip() and calls.marks:  # it began with something else than a call
            text, calls = text + calls.rest(), Held(())
        return text

    tokens = opened.generate(question.variant, question.prompt, question.limit, question.sampling.chooser())
    with closing(tokens):
        for token in _without(lead, tokens, into.tokens):
            text = pieces.add(token) if token is not None else ""
            if thinking:
                thought, text = thinking.parts(text)
                yield thought
            yield passed_on(text)
            if stops.found:
                break
    text = pieces.rest()
    if thinking:
        thought, text = thinking.parts(text, last=True)
        yield thought
    text = passed_on(text, last=True)
    into.reason = "stop" if stops.found or len(into.tokens) < question.limit else "length"
    kept_back = calls.rest()
    if way and calls.found:
        _, found = read_calls(way, kept_back, question.tools)
        into.calls = found[:1] if question.one_call else found
    if into.calls:
        into.reason = "tool_calls"
    yield text if into.calls else text + kept_back


class _Thinking:
    """Parts the thought, which ends with a tag, from the answer; what is blank at their edges is of neither."""

    def __init__(self) -> None:
        self._held = Held((THINK[1],))
        self._thought = self._answered = False  # whether anything of either was said

    def parts(self, text: str, last: bool = False) -> tuple[Thought, str]:
        """What belongs to the thought, and what to the answer."""
        if self._answered:
            return Thought(), text
        thought, text = ("", text) if self._held.found else (self._held.add(text), "")
        if self._held.found or last:
            rest = self._held.rest()
            thought, text = (thought, rest.removeprefix(THINK[1]) + text) if self._held.found else (thought + rest, "")
        thought, text = thought if self._thought else thought.lstrip(), text.lstrip()
        self._thought, self._answered = self._thought or bool(thought), bool(text)
        return Thought(thought), text


def _without(lead: list[int], tokens: Iterator[int], into: list[int]) -> Iterator[int | None]:
    """The tokens behind those that the template writes before every answer, where they begin so; all of them go `into`."""
    waiting: list[int] = []
    for token in tokens:
        into.append(token)
        if len(into) <= len(lead) and into == lead[: len(into)]:
            waiting.append(token)
            yield None
            continue
        if len(waiting) < len(lead):
            yield from waiting
            lead = []
        waiting = []
        yield token
    if len(waiting) < len(lead):
        yield from waiting


def opens_thought(template: ChatTemplate, prompt: list[int]) -> bool:
    """Whether the prompt itself begins a thought, with which the answer then goes on."""
    return decoder(template)(prompt[-LAST:]).rstrip().endswith(THINK[0])


def lead_of(template: ChatTemplate) -> list[int]:
    """The tokens that the model is taught to write before every answer, such as the name of a channel."""
    try:
        lead = emission(template, PROBE, template.render(PROBE[:1], True), ()).lead
    except Refused:
        return []
    return list(template.special.encode(lead, add_special_tokens=False).ids)
