"""Steps that stand out: spikes of the loss, and those that were not applied, with the conversations that were in them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mlx_finetune.evaluation.spikes import JUMP, WINDOW, not_applied, spikes
from mlx_finetune.report.html import paragraph, text
from mlx_finetune.report.of_run import OfRun

SHOWN, NAMED = 10, 8  # steps; conversations of a step


def marked(of: OfRun) -> str:
    """What the marks in the figure of the loss mean, and which steps they are; empty where there are none."""
    rows = {row["step"]: row for row in of.train}
    jumps, skipped = spikes(of.train), not_applied(of.train)
    parts = []
    if jumps:
        told = f"Spike: a loss above the running mean by more than {JUMP:g} standard deviations of the {WINDOW} steps before."
        parts.append(_list(told, (f"step {step}, loss {rows[step]['loss']:.3f}{_in_step(of, step)}" for step in jumps), len(jumps)))
    if skipped:
        told = "Not applied: a step whose loss or gradient was not finite. It changed neither weights nor optimizer."
        parts.append(_list(told, (f"step {step}{_blamed(rows[step])}" for step in skipped), len(skipped)))
    return "".join(parts)


def _list(told: str, lines: Iterator[str], count: int) -> str:
    shown = [f"<li>{text(line)}" for line, _ in zip(lines, range(SHOWN), strict=False)]
    more = [f"<li>and {count - SHOWN:,} more: metrics.jsonl has all"] if count > SHOWN else []
    return f"{paragraph(told, 'faint')}<ul class=marked>{''.join(shown + more)}</ul>\n"


def _in_step(of: OfRun, step: int) -> str:
    """The conversations that it learned from, where the data is there to ask."""
    if of.dataset is None:
        return ""
    places = [place for micro_batch in of.dataset.examples_at(step - 1, of.config) for place in micro_batch]
    return f": {_named(of.dataset.train[place].conversation for place in places)}"


def _blamed(row: Mapping[str, Any]) -> str:
    """The conversations that are not finite alone."""
    found, of = [one["conversation"] for one in row.get("offending", [])], row.get("examples", 0)
    if not of:
        return ""
    if row.get("every", len(found) == of):
        return ": none of its examples is finite alone, which is the model's doing"
    return f": {_named(found)}, not finite alone" if found else ": each of its examples is finite alone"


def _named(conversations: Iterable[str]) -> str:
    names = list(dict.fromkeys(conversations))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"conversation{'s' if len(names) > 1 else ''} {', '.join(names[:NAMED])}{more}"
