"""What came of it: the headline, the tables of base and tuned, and the answers beside each other."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mlx_finetune.evaluating import FEW, TITLES
from mlx_finetune.evaluation.judging import RATES
from mlx_finetune.report.differences import compared
from mlx_finetune.report.files_of_run import Answer, Evaluation, Generation, GptmeEval, Rate, Row, Sample
from mlx_finetune.report.html import Cell, cells, count, paragraph, percent, section, signed, table, text
from mlx_finetune.report.of_run import OfRun

SHOWN, UNFOLDED = 12, 4  # samples on the page, and those that are open at first
STEPS_SHOWN = 4  # answers to a prompt
VALID = "valid call"
GROUPS = {"all": "", "source": "source", "kind": "kind of token", "turn": "kind of turn"}


def headline(of: OfRun) -> str:
    """The one result, or how to get it."""
    found = of.evaluation
    if found is None:
        return f"<p class=missing>Not evaluated yet: <code>mlx-finetune evaluate {text(of.typed)}</code></p>\n"
    whole = next((row for row in found.rows if row.group == "all"), None)
    before, after = f"{found.base.loss:.3f}", f"{found.tuned.loss:.3f}"
    change = whole or Row(
        group="all", name="", tokens=found.base.tokens, conversations=0, **_change(found.base.loss, found.tuned.loss)
    )
    over = f"{count(change.conversations, 'held-out conversation')}, " if change.conversations else "held out, "
    notes = [f"nats a token, lower is better; {over}{count(change.tokens, 'token')}"]
    cards = [
        _card("Held-out loss", before, after, interval(change.difference, change.low, change.high), verdict(change, False), notes)
    ]
    if found.generation and (rate := next((rate for rate in found.generation.rates if rate.name == VALID), None)):
        notes = [f"runnable by gptme's rules; of {count(rate.of, 'answered turn')}"]
        cards.append(
            _card(
                "Valid tool calls", percent(rate.base), percent(rate.tuned), _points(rate) + " points", verdict(rate, True), notes
            )
        )
    if found.gptme_eval:
        cards.append(_passed(found.gptme_eval))
    return f"<div class=cards>{''.join(cards)}</div>\n" + paragraph(text(found.note), "faint")


def _change(base: float, tuned: float) -> dict[str, float]:
    return {"base": base, "tuned": tuned, "difference": tuned - base}


def _passed(found: GptmeEval) -> str:
    name, of = f"gptme-eval {text(found.suite)}", f" of {found.tests}"
    return _card(name, f"{found.base.passed}", f"{found.tuned.passed}{of}", "", "", ["tests passed; no interval"])


def _card(title: str, before: str, after: str, change: str, kind: str, notes: Sequence[str]) -> str:
    arrow = "<span class=arrow><span class=unseen>base, then tuned:</span>\u2192</span>"
    changed = f'<p class="change {kind}">{change}</p>' if change else ""
    numbers = f"<p class=numbers><span>{before}</span> {arrow} <strong>{after}</strong></p>"
    return f"<div class=card><h2>{title}</h2>{numbers}{changed}{''.join(f'<p class=faint>{note}</p>' for note in notes)}</div>"


def interval(difference: float | None, low: float | None, high: float | None, scale: float = 1.0, digits: int = 3) -> str:
    """`-0.309 (-0.350 to -0.268)`; without the brackets where there is no interval."""
    if difference is None:
        return "\u2013"
    told = signed(scale * difference, digits)
    return (
        told
        if low is None or high is None
        else f"{told} <span class=faint>({signed(scale * low, digits)} to {signed(scale * high, digits)})</span>"
    )


def verdict(change: Row | Rate, higher_is_better: bool) -> str:
    """better, worse, or nothing where the interval holds 0 or there is none."""
    if change.low is None or change.high is None or change.low <= 0 <= change.high:
        return ""
    return "better" if (change.low > 0) == higher_is_better else "worse"


def _points(rate: Rate) -> str:
    small = any(0 < abs(share) < 0.01 for share in (rate.difference, rate.low, rate.high) if share is not None)
    return interval(rate.difference, rate.low, rate.high, 100, int(small))


def before_after(of: OfRun) -> str:
    """Tables of what was evaluated."""
    found = of.evaluation
    if found is None:
        return ""
    rates = rate_table(found.generation) if found.generation else ""
    tests = _tests(found.gptme_eval) if found.gptme_eval else ""
    beside = f'<div class="columns"><div>{rates}</div><div>{tests}</div></div>\n'
    return section("results", "Before and after", _how(found), loss_table(found), beside)


def _how(found: Evaluation) -> str:
    split = {"valid": "held-out conversations", "test": "conversations of the frozen test split"}.get(
        found.split, text(found.split)
    )
    told = f"Base model and {text(found.checkpoint)} on the same {split}, computed by {text(found.engine)}."
    if found.bootstrap:
        told += (
            f" Brackets: 95 % interval of the difference, by {found.bootstrap.samples:,} bootstrap samples"
            f" over {text(found.bootstrap.unit)}s; a difference is coloured where the interval leaves out 0."
        )
    measured = max((row.conversations for row in found.rows if row.group == "all"), default=FEW)
    if measured < FEW:
        told += f" Only {count(measured, 'conversation')} held out: the true intervals are wider than these."
    return paragraph(told, "faint")


def loss_table(found: Evaluation) -> str:
    """By group; where the file has no groups, by source."""
    rows = found.rows or [
        Row(group="source", name=source, tokens=found.base.tokens_by_source.get(source, 0), conversations=0, **_change(base, tuned))
        for source, base in found.base.by_source.items()
        if (tuned := found.tuned.by_source.get(source)) is not None
    ]
    ends = [0.0, *(end for row in rows for end in (row.low, row.high, row.difference) if end is not None)]
    lines = [
        [
            Cell(text(TITLES.get(row.name, row.name)) + _faint(GROUPS.get(row.group, row.group))),
            Cell(f"{row.base:.3f}", row.base),
            Cell(f"<b>{row.tuned:.3f}</b>", row.tuned),
            Cell(interval(row.difference, row.low, row.high), row.difference, verdict(row, False)),
            Cell(_whisker(row, min(ends), max(ends)), kind="drawn"),
            *cells(row.tokens, row.conversations),
        ]
        for row in rows
    ]
    header = ("tokens of", "base", "tuned", "difference", "", "learned", "conversations")
    return table("Loss, nats a learned token: lower is better", header, lines)


def _faint(told: str) -> str:
    return f" <span class=faint>{text(told)}</span>" if told else ""


def _whisker(row: Row, left: float, right: float) -> str:
    """The interval beside 0, for the eye; the numbers stand in the table. `left`, `right`: the furthest ends of all rows, and 0."""
    if left == right:
        return ""
    values = [row.difference if value is None else value for value in (row.low, row.high, row.difference)]
    low, high, middle, zero = (f"{4 + 92 * (value - left) / (right - left):.1f}" for value in (*values, 0.0))
    parts = f'<line class=zero x1="{zero}" x2="{zero}" y1="0" y2="14" /><line x1="{low}" x2="{high}" y1="7" y2="7" />'
    parts += f'<circle cx="{middle}" cy="7" r="3" />'
    return f'<svg class="whisker {verdict(row, False)}" viewBox="0 0 100 14" aria-hidden="true">{parts}</svg>'


def rate_table(found: Generation) -> str:
    """Shares of the answered turns."""
    lines = []
    for rate in found.rates:
        lines.append(
            [
                Cell(text(rate.name)),
                Cell(percent(rate.base), rate.base),
                Cell(f"<b>{percent(rate.tuned)}</b>", rate.tuned),
                Cell(_points(rate), rate.difference, verdict(rate, True)),
                Cell(_of(rate), rate.of),
            ]
        )
    wrote = f" in gptme's {text(found.format)} format" if found.format else ""
    told = f"Of {count(found.turns, 'turn')} in {count(found.conversations, 'conversation')}, answered greedily by both{wrote}."
    return (
        table("Answers, share of turns", ("what", "base", "tuned", "points", "answers"), lines)
        + paragraph(told, "faint")
        + _terms(found)
    )


def _of(rate: Rate) -> str:
    """How many answers it could be told of: those of the base / those of the tuned model, where they are not as many."""
    each = (rate.of if number is None else number for number in (rate.of_base, rate.of_tuned))
    return " / ".join(dict.fromkeys(f"{number:,}" for number in each))


def _terms(found: Generation) -> str:
    """What each rate is the share of."""
    named = [rate.name for rate in found.rates if rate.name in RATES]
    terms = "".join(f"<dt>{text(name)}<dd>{text(RATES[name])}" for name in named)
    return f"<details class=terms><summary>What each is the share of</summary><dl>{terms}</dl></details>\n" if terms else ""


def _tests(found: GptmeEval) -> str:
    kinds = {"pass": "better", "fail": "worse"}
    lines = [
        [Cell(text(row.test)), *(Cell(text(each), kind=kinds.get(each, "")) for each in (row.base, row.tuned))]
        for row in found.rows
    ]
    return table(f"gptme-eval {text(found.suite)}", ("test", "base", "tuned"), lines)


def samples(of: OfRun) -> str:
    """Held-out turns with the answers of both models, what differs from the log marked."""
    generation = of.evaluation.generation if of.evaluation else None
    if generation is None or not generation.samples:
        return ""
    chosen = [generation.samples[i] for i in evenly(len(generation.samples), SHOWN)]
    told = "Held-out turns that neither model was trained on. " + _KEY
    if len(chosen) < len(generation.samples):
        told += f" {len(chosen)} of {len(generation.samples)} are here; evaluation.json has all."
    return section(
        "samples", "Answers side by side", paragraph(told, "faint"), *map(_sample, chosen[:UNFOLDED]), _folded(chosen[UNFOLDED:])
    )


def _folded(others: Sequence[Sample]) -> str:
    return f"<details><summary>{len(others)} more</summary>{''.join(map(_sample, others))}</details>" if others else ""


_KEY = "Beside the log, <ins>what it does not have</ins> and <del>what is missing</del> are marked, where enough is alike."


def evenly(of: int, most: int) -> list[int]:
    """Places spread over all, first and last among them."""
    return sorted(set(np.linspace(0, of - 1, min(of, most)).astype(int).tolist()))


def _sample(sample: Sample) -> str:
    after = {"": "", "first": ", its first turn"}.get(sample.after, f", {text(sample.after)}")
    head = f"<h3>Conversation {text(sample.conversation)}, message {sample.turn}{after}</h3>"
    columns = _block("in the log", text(sample.logged.strip()))
    for name, title in (("base", "base"), ("tuned", "tuned")):
        found = compared(sample.logged, getattr(sample, name))
        badges = _badges(sample.judged.get(name, {}))
        columns += _block(f"{title} <span class=faint>{percent(found.alike)} alike</span>", found.html, badges, title)
    return f"<article>{head}{_question(sample.question)}<div class=answers>{columns}</div></article>\n"


def _question(question: str) -> str:
    return f'<div class=question><h4>asked</h4><div class="text">{text(question.strip())}</div></div>'


def _block(title: str, inside: str, badges: str = "", kind: str = "") -> str:
    empty = "<span class=faint>nothing</span>"
    return f'<div class="answer {kind}"><h4>{title}</h4><div class="text">{inside or empty}</div>{badges}</div>'


def _badges(judged: Mapping[str, bool | None]) -> str:
    marks = {True: ("yes", "\u2713"), False: ("no", "\u2717")}
    told = [(name, *marks[value]) for name, value in judged.items() if value is not None]
    inside = "".join(
        f'<li class={kind}><span aria-hidden="true">{sign}</span> {text(name)}<span class=unseen>: {kind}</span>'
        for name, kind, sign in told
    )
    return f"<ul class=badges>{inside}</ul>" if inside else ""


def learning_samples(of: OfRun) -> str:
    """The same held-out prompts, answered again and again during training."""
    prompts: dict[int, dict[int, Answer]] = {}
    for answer in of.answers:
        prompts.setdefault(answer.prompt, {})[answer.step] = answer  # a resumed run answers some again
    told = "The same held-out prompts, answered at each look at the held-out loss. " + _KEY
    return section("while", "While it learned", paragraph(told, "faint"), *_prompts(prompts)) if prompts else ""


def _prompts(prompts: Mapping[int, Mapping[int, Answer]]) -> Iterator[str]:
    for number, by_step in sorted(prompts.items()):
        answers = [by_step[step] for step in sorted(by_step)]
        alike = [compared(answer.logged, answer.answer) for answer in answers]
        course = " \u2192 ".join(percent(each.alike) for each in (alike[i] for i in evenly(len(alike), 8)))
        blocks = _block("in the log", text(answers[-1].logged.strip()))
        for i in evenly(len(answers), STEPS_SHOWN):
            step = f"step {answers[i].step}" if answers[i].step else "before the first step"
            blocks += _block(f"{step} <span class=faint>{percent(alike[i].alike)} alike</span>", alike[i].html)
        head = f"<h3>Prompt {number + 1} <span class=faint>alike with the log: {course}</span></h3>"
        yield f'<article>{head}{_question(answers[-1].question)}<div class="answers many">{blocks}</div></article>\n'
