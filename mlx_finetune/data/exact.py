"""The examples of a window: turns that one rendering serves exactly share it, each other turn has a context of its own."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.emission import Tools
from mlx_finetune.data.encoding import Encoded
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.windows import Window

BLANK = "a turn of blanks"
FIRST = "nothing stands before it that a server could be sent"
TOO_LONG = "longer than a window in the context that is served"


@dataclass(frozen=True)
class Piece:
    """One example to be: what is rendered, and its tokens. `own`: its only turn has this context for itself."""

    window: Window
    encoded: Encoded
    own: bool = False


@dataclass(frozen=True)
class Pieces:
    """All of one window. Turns that are not learned are counted by reason, and so are those learned in another context."""

    pieces: tuple[Piece, ...]
    refused: Counter[str] = field(default_factory=Counter)
    inexact: Counter[str] = field(default_factory=Counter)
    one_rendering: int = 0  # turns that would be exact if the window were rendered once


def pieces_of(window: Window, result: Encoded | Refused, template: ChatTemplate, tools: Tools, max_length: int) -> Pieces:
    """`result`: the window rendered once.

    A turn before which the name of a control token stands stays where it is kept as text; one that cannot have a context of its
    own stays too, counted as inexact.
    """
    turns = dict(zip(learned_places(window.messages), window.turns, strict=True))
    refused, inexact, own = Counter[str](), Counter[str](), list[Piece]()
    said = {place for place in turns if window.messages[place].content.strip() or window.messages[place].tool_calls}
    shared: set[int] = set()
    if isinstance(result, Encoded):
        said &= set(result.turns)
        shared = {p for p, exact, text in zip(result.turns, result.exact, result.as_text, strict=True) if exact or text}
    if blank := len(turns) - len(said):
        refused[BLANK] += blank
    if 0 in said - shared:
        said.remove(0)
        refused[FIRST] += 1
    for place in sorted(said - shared):
        alone = Window((*_read(window.messages[:place]), window.messages[place]), (turns[place],), window.whole)
        try:
            encoded = template.encode_turn(alone.messages, tools)
        except Refused as reason:
            if isinstance(result, Encoded):
                shared.add(place)
                inexact[str(reason)] += 1
            else:
                refused[str(reason)] += 1
            continue
        if len(encoded.tokens) > max_length:
            refused[TOO_LONG] += 1
        else:
            own.append(Piece(alone, encoded, own=True))
    pieces = [_shared(window, result, shared, turns, template, tools)] if isinstance(result, Encoded) and shared else []
    return Pieces((*pieces, *own), refused, inexact, sum(result.exact) if isinstance(result, Encoded) else 0)


def learned_places(messages: Sequence[Message]) -> list[int]:
    """Where the turns stand that are learned."""
    return [i for i, message in enumerate(messages) if message.role == "assistant" and message.weight > 0]


def _shared(
    window: Window, result: Encoded, shared: set[int], turns: dict[int, int], template: ChatTemplate, tools: Tools
) -> Piece:
    """The one rendering, in which only `shared` is learned."""
    if shared == set(result.turns):
        kept = Window(window.messages, tuple(turns[place] for place in result.turns), window.whole)
        return Piece(kept, result)
    read = list(_read(window.messages))
    messages = tuple(message if place in shared else read[place] for place, message in enumerate(window.messages))
    kept = Window(messages[: max(shared) + 1], tuple(turns[place] for place in sorted(shared)), window.whole)
    encoded = template.encode(kept.messages, tools)
    before = zip(result.turns, result.exact, result.as_text, strict=True)
    if _as_served(encoded) < sum(exact or text for place, exact, text in before if place in shared):
        kept = replace(kept, messages=messages)  # what is the last of all this template writes in another way
        encoded = template.encode(messages, tools)
    return Piece(kept, encoded)


def _as_served(encoded: Encoded) -> int:
    """How many turns stand after what is served, or after what is but for text that names a control token."""
    return sum(encoded.exact) + sum(encoded.as_text)


def _read(messages: Sequence[Message]) -> Iterator[Message]:
    """The same messages, none of them learned."""
    return (replace(m, weight=0.0) if m.role == "assistant" else m for m in messages)
