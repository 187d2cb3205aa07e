"""What each learned token of an example is: prose, part of a call, the first of its turn, or the token that ends it.

Each learned token is of exactly one kind. The token that ends a turn is "stop", whatever else it is; of the others the first that
is learned of a turn is "first of a turn"; of the others those that hold a character of a call are "inside a call", its fences
among them (in xml the tool's element, in the format tool `@name(id): {...}`); the rest is "prose".
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_finetune.data.batches import Example
from mlx_finetune.data.conversation import Conversation, Message, read_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.emission import THINK, Tools
from mlx_finetune.data.native import with_calls_as_text
from mlx_finetune.data.overview import turn_places
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.tool_calls import FORMATS, calls_in, format_of
from mlx_finetune.data.turns import failed_turns
from mlx_finetune.errors import UserError
from mlx_finetune.training.samples import learned_places

KINDS = ("prose", "inside a call", "first of a turn", "stop")
PROSE, IN_CALL, FIRST_TOKEN, STOP = range(4)
AFTER = ("first", "after success", "after an error")  # first: no turn of the assistant stands before it in the example
FIRST_TURN, AFTER_SUCCESS, AFTER_ERROR = range(3)
NO_THOUGHT = re.compile(r"\s*(?:<think>)?\s*</think>\s*")


@dataclass(frozen=True)
class LearnedTurn:
    """One learned turn of an example.

    `start` and `stop`: its first learned token, and the control token that ends it. `text`: what stands between them, decoded;
    `lead`: how much of that stands before the message's own text. `place`: of the message among those of the example.
    """

    start: int
    stop: int
    text: str
    lead: int
    place: int
    after: int  # of AFTER


@dataclass(frozen=True)
class Told:
    """An example with the messages that it was made of. `format`: the tool format of its conversation."""

    example: Example
    messages: tuple[Message, ...]
    format: str
    turns: tuple[LearnedTurn, ...]
    kinds: np.ndarray  # int8 [T], of KINDS; -1 where nothing is learned
    tools: Tools = ()  # schemas that the model was given

    @property
    def after(self) -> np.ndarray:
        """int8 [T]: of AFTER, of the turn that the token is of; -1 where nothing is learned."""
        found = np.full(len(self.kinds), -1, np.int8)
        for turn in self.turns:
            found[turn.start : turn.stop + 1] = turn.after
        return np.where(self.kinds >= 0, found, np.int8(-1))


def told_examples(dataset: Dataset, split: str, template: ChatTemplate) -> list[Told]:
    """Every example of a split.

    Raises:
        UserError: the messages beside the tokens are gone, or are others.
    """
    store, path = getattr(dataset, split), dataset.folder / f"{split}.jsonl"
    rows = messages_beside(path) if len(store) else []
    if len(rows) != len(store):
        raise UserError(f"{path}: {len(rows)} lines for {len(store)} examples", hint="run mlx-finetune prepare again")
    formats = formats_of(store, rows)
    return [
        tell(example, row.messages, template, formats[example.conversation], f"{path}:{i + 1}", row.tools)
        for i, (example, row) in enumerate(zip(store, rows, strict=True))
    ]


def messages_beside(path: Path) -> list[Conversation]:
    """The lines that `prepare` wrote beside the tokens; raises UserError where they cannot be read."""
    return list(read_conversations(path))


def formats_of(examples: Iterable[Example], rows: Sequence[Conversation]) -> dict[str, str]:
    """Of each conversation, by its id: the tool format of all that is there of it; markdown where nothing is called."""
    turns: dict[str, list[Message]] = {}
    for example, row in zip(examples, rows, strict=True):
        turns.setdefault(example.conversation, []).extend(m for m in row.messages if m.role == "assistant")
    return {name: _format_of(messages) for name, messages in turns.items()}


def _format_of(turns: Sequence[Message]) -> str:
    if any(turn.tool_calls for turn in turns):
        return "tool"
    return format_of(turn.content for turn in turns) or FORMATS[0]


def tell(
    example: Example, messages: Sequence[Message], template: ChatTemplate, tool_format: str, where: str, tools: Tools = ()
) -> Told:
    """The kinds of an example's tokens; raises UserError where `messages` are not those that it was made of."""
    places, ends = learned_places(messages), np.array(sorted(template.end_ids), np.int32)
    segments = turn_places(example.tokens, example.weights, len(example.turns), ends).tolist()
    if not len(places) == len(segments) == len(example.turns):
        counts = f"{len(places)} turns for {len(segments)} in the tokens"
        raise UserError(f"{where}: {counts}", hint="run mlx-finetune prepare again")
    failed = failed_turns(tuple(with_calls_as_text(messages)), tool_format)
    kinds = np.full(len(example.tokens), -1, np.int8)
    turns = []
    for place, (start, behind) in zip(places, segments, strict=True):
        stop = behind - 1
        pieces = template.pieces(example.tokens[start:stop].tolist())
        text, content = "".join(pieces), messages[place].content.strip()
        lead = text.find(content) if messages[place].tool_calls else text.rfind(content)
        turn = LearnedTurn(start, stop, text, max(lead, 0), place, _after(messages, place, failed))
        kinds[start:stop] = np.where(_in_calls(turn, messages[place], pieces, tool_format), np.int8(IN_CALL), np.int8(PROSE))
        kinds[start], kinds[stop] = FIRST_TOKEN, STOP
        turns.append(turn)
    kinds[example.weights == 0] = -1  # placeholders of secrets within a turn
    return Told(example, tuple(messages), tool_format, tuple(turns), kinds, tools)


def _after(messages: Sequence[Message], place: int, failed: frozenset[int]) -> int:
    before = next((i for i in range(place - 1, -1, -1) if messages[i].role == "assistant"), None)
    if before is None:
        return FIRST_TURN
    return AFTER_ERROR if before in failed else AFTER_SUCCESS


def _in_calls(turn: LearnedTurn, message: Message, pieces: Sequence[str], tool_format: str) -> np.ndarray:
    """bool [tokens before the end]: those that hold a character of a call."""
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = ends - np.array([len(piece) for piece in pieces], int)
    inside = np.zeros(len(pieces), bool)
    for start, end in _call_spans(turn, message, tool_format):
        inside |= (starts < end) & (ends > start)
    return inside


def _call_spans(turn: LearnedTurn, message: Message, tool_format: str) -> Iterator[tuple[int, int]]:
    """Where calls stand in the text of a turn. Native ones: all that the template writes behind the words of the message."""
    if message.tool_calls:
        yield _end_of_words(turn.text, message.content.strip()), len(turn.text)
        return
    for call in calls_in(turn.text[turn.lead :], tool_format):
        yield turn.lead + call.start, turn.lead + call.end


def _end_of_words(text: str, words: str) -> int:
    """Where the words of a turn with native calls end; without words, a thought that the template ends for it."""
    if THINK[1] in words and words not in text:  # the prompt began it
        words = words.removeprefix(THINK[0]).lstrip()
    if words:
        return max(text.find(words), 0) + len(words)
    thought = NO_THOUGHT.match(text)
    return thought.end() if thought else 0
