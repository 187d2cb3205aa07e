"""Base and tuned answer the same held-out turns, greedily; each answer is judged, and the rates are compared."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mlx_finetune.data.conversation import Message, ToolCall
from mlx_finetune.data.emission import THINK, Tools
from mlx_finetune.data.native import with_calls_as_text
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.tool_calls import fingerprint
from mlx_finetune.data.turns import calls_of
from mlx_finetune.data.written_calls import Written, read_calls, written_by, written_text
from mlx_finetune.engines import Engine
from mlx_finetune.evaluation.bootstrap import compare_means, sums_of
from mlx_finetune.evaluation.judging import RATES, Asked, judge
from mlx_finetune.evaluation.known_files import known_files
from mlx_finetune.evaluation.token_kinds import AFTER, AFTER_ERROR, LearnedTurn, Told
from mlx_finetune.training.held_out import judged_by
from mlx_finetune.training.samples import TAIL

LOOKED_AT = 8  # tokens at the end of a prompt


@dataclass(frozen=True)
class Question:
    """A turn to be answered: the tokens that training fed before it, and what the answer is measured by.

    `lead`: what the template has a turn begin with before its text, which is taken off an answer. `thinks`: whether the prompt
    begins a thought, with which an answer then goes on. `way`: how native calls are written, where the conversation has some.
    """

    conversation: str
    turn: int  # place of the message in its conversation
    after: int  # of AFTER
    prompt: list[int]
    lead: str
    thinks: bool
    last: str  # tail of the message that it answers
    asked: Asked
    way: Written | None = None
    tools: Tools = ()


@dataclass(frozen=True)
class Answer:
    """What a model wrote, with native calls as gptme has them in its log, and the verdicts that apply."""

    text: str
    judged: dict[str, bool]


@dataclass(frozen=True)
class Rate:
    """How often a verdict was good, of the turns to which it applies; None where there is none."""

    name: str
    of: int  # turns to which it applies for one of the models or both
    of_base: int
    of_tuned: int
    base: float | None
    tuned: float | None
    difference: float | None
    low: float | None
    high: float | None


def questions(told: Sequence[Told], template: ChatTemplate, most: int, limit: int) -> tuple[list[Question], int]:
    """Up to `most` learned turns, as many of each conversation as can be; and how many could not be asked.

    Those are turns that take more than `limit` tokens in the log, and turns with native calls that cannot be read off what the
    template writes of them. OpenAssistant is asked only where nothing else was held out.
    """
    judged = judged_by({one.example.source for one in told})
    native = {one.example.conversation for one in told if any(message.tool_calls for message in one.messages)}
    known = written_by(template) if native else None
    by_conversation: dict[str, list[tuple[Told, int, Written | None]]] = {}
    left_out = 0
    for one in told:
        way = known if one.example.conversation in native else None
        for number, turn in enumerate(one.turns if one.example.source in judged else ()):
            if turn.stop - turn.start >= limit or not _is_read_back(one, turn, way, template):
                left_out += 1
            else:
                by_conversation.setdefault(one.example.conversation, []).append((one, number, way))
    chosen = spread({name: len(turns) for name, turns in by_conversation.items()}, most)
    return [_question(*by_conversation[name][i], template) for name, places in chosen.items() for i in places], left_out


def _is_read_back(told: Told, turn: LearnedTurn, way: Written | None, template: ChatTemplate) -> bool:
    """Whether the very tokens of the log, as an answer, hold the native calls that it holds; of other turns always."""
    calls = told.messages[turn.place].tool_calls
    return not calls or [call.name for call in _as_answer(told, turn, way, template)[1]] == [call.name for call in calls]


def spread(counts: Mapping[str, int], most: int) -> dict[str, list[int]]:
    """Up to `most` places, from each name's `counts` as evenly as they go: of each name, then within it."""
    names = [name for name in counts if counts[name]]
    if len(names) > most:
        names = [names[i] for i in np.linspace(0, len(names) - 1, most).round().astype(int)] if most else []
    taken = dict.fromkeys(names, 0)
    while (open_ := [name for name in names if taken[name] < counts[name]]) and sum(taken.values()) < most:
        for name in open_[: most - sum(taken.values())]:
            taken[name] += 1
    return {name: np.linspace(0, counts[name] - 1, taken[name]).round().astype(int).tolist() for name in names}


def _question(told: Told, number: int, way: Written | None, template: ChatTemplate) -> Question:
    turn, example = told.turns[number], told.example
    *before, logged = with_calls_as_text(told.messages[: turn.place + 1])
    failed = _failed_calls(before, told.format) if turn.after == AFTER_ERROR else frozenset()
    asked = Asked(logged.content.strip(), told.format, turn.after == AFTER_ERROR, failed, known_files(before, told.format))
    prompt, last = example.tokens[: turn.start].tolist(), before[-1].content[-TAIL:] if before else ""
    said, _ = _as_answer(told, turn, way, template)
    lead = said[: max(said.rfind(told.messages[turn.place].content.strip()), 0)]  # of a turn without words all of it
    thinks = _thinks(told, turn, template)
    return Question(example.conversation, example.turns[number], turn.after, prompt, lead, thinks, last, asked, way, told.tools)


def _failed_calls(before: Sequence[Message], tool_format: str) -> frozenset[tuple[str, str, str, str]]:
    last = next(m for m in reversed(before) if m.role == "assistant")
    return frozenset(fingerprint(call) for call in calls_of(last, tool_format))


def _thinks(told: Told, turn: LearnedTurn, template: ChatTemplate) -> bool:
    prompt_end = told.example.tokens[max(turn.start - LOOKED_AT, 0) : turn.start]
    return template.decode(prompt_end.tolist()).rstrip().endswith(THINK[0])


def _as_answer(told: Told, turn: LearnedTurn, way: Written | None, template: ChatTemplate) -> tuple[str, list[ToolCall]]:
    """What the tokens of the log say, and the calls in them, read as an answer is."""
    tokens = told.example.tokens[turn.start : turn.stop].tolist()
    return _taken_apart(tokens, way, told.tools, _thinks(told, turn, template), template)


def answer_all(
    engine: Engine,
    template: ChatTemplate,
    asked: Sequence[Question],
    limit: int,
    advance: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """An answer to each, of at most `limit` tokens; it ends where the model ends its turn."""
    written = engine.generate_all([question.prompt for question in asked], limit, template.stop_ids | template.end_ids, advance)
    answers = []
    for question, tokens in zip(asked, written, strict=True):
        text = _as_gptme_has_it(tokens, question, template)
        answers.append(Answer(text, judge(text, len(tokens) < limit, question.asked)))
    return answers


def _as_gptme_has_it(tokens: Sequence[int], question: Question, template: ChatTemplate) -> str:
    """Without its lead, and with native calls as text.

    A thought begins with its tag, though the prompt had that already: nothing in it is a call.
    """
    said, calls = _taken_apart(tokens, question.way, question.tools, question.thinks, template)
    if question.lead and said.startswith(question.lead):
        said = said.removeprefix(question.lead)
    elif question.thinks:
        said = f"{THINK[0]}\n{said}"
    (turn,) = with_calls_as_text([Message("assistant", said, tool_calls=tuple(calls))])
    return turn.content


def _taken_apart(
    tokens: Sequence[int], way: Written | None, tools: Tools, thinks: bool, template: ChatTemplate
) -> tuple[str, list[ToolCall]]:
    """What is said, and the native calls; in a thought that the prompt began is none."""
    if way is None:
        return template.decode(tokens), []
    written = written_text(template, way, tokens)
    thought, end, answer = written.partition(THINK[1]) if thinks else ("", "", written)
    if thinks and not end:
        return written, []
    said, calls = read_calls(way, answer, tools)
    return thought + end + said, [replace(call, id=f"call_{number}") for number, call in enumerate(calls, 1)]  # many have none


def rates_of(asked: Sequence[Question], base: Sequence[Answer], tuned: Sequence[Answer] | None, seed: int) -> list[Rate]:
    """Every verdict that applies to some answer."""
    numbers: dict[str, int] = {}
    whose = np.array([numbers.setdefault(question.conversation, len(numbers)) for question in asked])
    rates = []
    for name in RATES:
        scored = [_scores(answers or [Answer("", {})] * len(asked), name) for answers in (base, tuned)]
        (good_base, of_base), (good_tuned, of_tuned) = scored
        if of := int(((of_base + of_tuned) > 0).sum()):
            found = compare_means(sums_of(whose, good_base, good_tuned, of_base, of_tuned), seed)
            rates.append(Rate(name, of, int(of_base.sum()), int(of_tuned.sum()), **asdict(found)))
    return rates


def _scores(answers: Sequence[Answer], name: str) -> tuple[np.ndarray, np.ndarray]:
    """float64 [answers] each: whether the verdict was good, and whether there was one."""
    verdicts = [answer.judged.get(name) for answer in answers]
    return np.array([v is True for v in verdicts], float), np.array([v is not None for v in verdicts], float)


def generation_json(
    asked: Sequence[Question], left_out: int, limit: int, base: Sequence[Answer], tuned: Sequence[Answer] | None, seed: int
) -> dict[str, Any]:
    """What stands in evaluation.json: rates, and the answers themselves."""
    return {
        "turns": len(asked),
        "conversations": len({question.conversation for question in asked}),
        "left_out": left_out,
        "limit": limit,
        "format": Counter(question.asked.format for question in asked).most_common(1)[0][0],
        "rates": [asdict(rate) for rate in rates_of(asked, base, tuned, seed)],
        "samples": [_sample(question, base[i], tuned[i] if tuned else None) for i, question in enumerate(asked)],
    }


def _sample(question: Question, base: Answer, tuned: Answer | None) -> dict[str, Any]:
    return {
        "conversation": question.conversation,
        "turn": question.turn,
        "after": AFTER[question.after],
        "question": question.last,
        "logged": question.asked.logged,
        "base": base.text,
        "tuned": tuned.text if tuned else None,
        "judged": {"base": base.judged, "tuned": tuned.judged if tuned else None},
    }
