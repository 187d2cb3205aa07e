"""A few held-out turns are answered with each held-out loss, so that one sees a run learn: samples.jsonl."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.data.conversation import LONGEST_CHAT, Message, conversation_of
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.overview import turn_places
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import Engine
from mlx_finetune.errors import UserError
from mlx_finetune.reading import lines_of, open_ordinary
from mlx_finetune.training.held_out import judged_by
from mlx_finetune.training.journal import Journal, Needed

SAMPLES = "samples.jsonl"
NEEDED: Needed = {"step": int, "prompt": int, "question": str, "logged": str, "answer": str}
LOOKED_AT = 200  # examples, the shortest ones
TAIL = 600  # characters of a question that are kept


@dataclass(frozen=True)
class Prompt:
    """The very tokens that stand before a learned turn in its example."""

    tokens: tuple[int, ...]
    conversation: str  # id
    question: str  # tail of the message that is answered
    logged: str  # the answer in the log


@dataclass(frozen=True)
class _Place:
    """Of a turn in the examples. `rank`: how many turns of its conversation have a shorter context."""

    rank: int
    start: int  # tokens before it
    example: int
    number: int  # which turn of the example
    end: int


def choose_prompts(dataset: Dataset, template: ChatTemplate, count: int) -> list[Prompt]:
    """`count` held-out turns at most: of as many conversations as there are, with the shortest contexts.

    Which ones is a pure function of the data. OpenAssistant is asked only where nothing else was held out.

    Raises:
        UserError: the messages beside the tokens are gone, or are others.
    """
    places = sorted(_turns(dataset, template), key=lambda place: (place.rank, place.start, place.example))[:count] if count else []
    lines = _lines(dataset.folder / "valid.jsonl", [place.example for place in places])
    return [_prompt(dataset, template, place, lines) for place in places]


def _turns(dataset: Dataset, template: ChatTemplate) -> Iterator[_Place]:
    store, ends = dataset.valid, np.array(sorted(template.end_ids), np.int32)
    judged = judged_by(set(store.sources))
    fitting = [i for i, source in enumerate(store.sources) if source in judged]
    found: dict[str, list[tuple[int, int, int, int]]] = {}
    for i in sorted(fitting, key=lambda i: (store.lengths[i], i))[:LOOKED_AT]:
        example = store[i]
        turns = turn_places(example.tokens, example.weights, len(example.turns), ends).tolist()
        found.setdefault(example.conversation, []).extend((start, i, number, end) for number, (start, end) in enumerate(turns))
    for turns in found.values():
        yield from (_Place(rank, *turn) for rank, turn in enumerate(sorted(turns)))


def _prompt(dataset: Dataset, template: ChatTemplate, place: _Place, lines: Mapping[int, Sequence[Message]]) -> Prompt:
    example, messages = dataset.valid[place.example], lines[place.example]
    asked = learned_places(messages)
    if len(asked) != len(example.turns):
        raise _others(dataset.folder / "valid.jsonl")
    before = messages[asked[place.number] - 1].content if asked[place.number] else ""
    tokens, logged = example.tokens[: place.start].tolist(), example.tokens[place.start : place.end].tolist()
    return Prompt(tuple(tokens), example.conversation, before[-TAIL:], template.decode(logged))


def learned_places(messages: Sequence[Message]) -> list[int]:
    """Of the messages of an example, those that are learned: a turn of blanks is not."""
    turns = (i for i, message in enumerate(messages) if message.role == "assistant" and message.weight > 0)
    return [i for i in turns if messages[i].content.strip() or messages[i].tool_calls]


def _lines(path: Path, numbers: Sequence[int]) -> dict[int, tuple[Message, ...]]:
    """The messages on those lines of the file, by their number from 0."""
    if not numbers:
        return {}
    try:
        with open_ordinary(path) as file:
            first = enumerate(islice(lines_of(file, LONGEST_CHAT), max(numbers) + 1))
            lines = {i: line.raw or b"" for i, line in first if i in numbers}
        found = {i: conversation_of(json.loads(line), f"{path}:{i + 1}").messages for i, line in lines.items()}
    except (OSError, ValueError, RecursionError) as error:
        raise _others(path) from error
    if len(found) < len(set(numbers)):
        raise _others(path)
    return found


def _others(path: Path) -> UserError:
    return UserError(f"{path}: not the messages that the tokens were made of", hint="run mlx-finetune prepare again")


class Samples:
    """Answers the prompts and writes one line for each; a resumed run first drops what lies after its checkpoint."""

    def __init__(
        self, engine: Engine, template: ChatTemplate, prompts: Sequence[Prompt], limit: int, run: Path, start: int
    ) -> None:
        """`limit`: tokens of an answer; `start`: steps already done."""
        self._engine, self._template, self._prompts, self._limit = engine, template, prompts, limit
        self._stop = template.stop_ids | template.end_ids
        path = run / SAMPLES
        self._journal = Journal(path, start, NEEDED, "samples") if prompts or path.is_file() else None

    def at(self, step: int) -> None:
        """Greedy answers of the model as it is after `step` steps unless an earlier start gave them; training is left as it was."""
        if self._journal and self._prompts and all(row["step"] != step for row in self._journal.kept):
            answers = self._engine.generate_all([prompt.tokens for prompt in self._prompts], self._limit, self._stop)
            self._journal.append(*(self._row(step, number, tokens) for number, tokens in enumerate(answers)))

    def _row(self, step: int, number: int, tokens: Sequence[int]) -> dict[str, Any]:
        asked = self._prompts[number]
        said = {"conversation": asked.conversation, "question": asked.question, "logged": asked.logged}
        return {"step": step, "prompt": number, **said, "answer": self._template.decode(tokens)}
