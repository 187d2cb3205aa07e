"""The page of `inspect --html`: one file that needs nothing else, in which every text of a conversation is only text."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.data.shown import Folded, Run, ShownExample, folded, visible
from mlx_finetune.files import atomic_file
from mlx_finetune.inspect_terminal import (
    LONGEST_HEADER,
    NOT_COUNTED,
    ROLE_HEADER,
    TURN_HEADER,
    TURNS,
    longest_rows,
    role_rows,
    template_lines,
)
from mlx_finetune.report.html import digest

BARS, WIDTH, HEIGHT = 32, 640, 120  # of the histogram
SHARE = 80  # width of the bar of a learned share


def write_page(path: Path, statistics: Mapping[str, Any], shown: Sequence[ShownExample], lengths: np.ndarray) -> None:
    """Writes the page, whole or not at all. `lengths`: int [N], tokens of every example of the split, shown or not."""
    with atomic_file(path, private=True) as file:
        file.writelines(page(statistics, shown, lengths))


def page(statistics: Mapping[str, Any], shown: Sequence[ShownExample], lengths: np.ndarray) -> Iterator[str]:
    """The page, part by part."""
    beside = Path(__file__).parent
    style, script = ((beside / f"inspect_page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; base-uri 'none'; form-action 'none'"
    title = _text(f"{statistics['split']} of {statistics['dataset']}")
    yield f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    yield f'<meta name="viewport" content="width=device-width">\n<style>{style}</style>\n</head>\n<body>\n'
    yield f"<h1>{title}</h1>\n<p class=faint>As {_text(statistics['model'])} reads it: tokens and weights as training is fed.</p>\n"
    yield from _statistics(statistics, lengths)
    yield from _controls(statistics, shown)
    for each in shown:
        yield article(each)
    yield f"<script>{script}</script>\n</body>\n</html>\n"


def _text(text: object) -> str:
    return escape(visible(str(text)))


def _table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Cells that are HTML already."""
    lines = [
        *(["".join(f"<th>{cell}" for cell in header)] if header else []),
        *("".join(f"<td>{cell}" for cell in row) for row in rows),
    ]
    return "<div class=wide><table>\n" + "".join(f"<tr>{line}\n" for line in lines) + "</table></div>\n"


def _statistics(statistics: Mapping[str, Any], lengths: np.ndarray) -> Iterator[str]:
    rows = [(_text(name), *_counts(counts)) for name, counts in statistics["by_source"].items()]
    header = ("source", "examples", "conversations", "tokens", "learned", "share", "")
    of_all = _table([*rows, ("all", *_counts(statistics))], header)
    yield f"<div class=columns><div class=whole><h2>Learned share by source</h2>\n{of_all}</div>\n"
    yield f"<div><h2>Tokens by role</h2>\n{_roles(statistics)}</div>\n"
    yield f"<div><h2>Lengths in tokens</h2>\n{histogram(lengths)}<p class=faint>{len(lengths):,} in all: at most "
    yield f"{statistics['max_length']:,} tokens; the median is {statistics['median_tokens']:,.0f}.</p></div>\n"
    yield f"<div><h2>Turns</h2>\n{_table([(text, f'{statistics[name]:,}') for name, text in TURNS.items()])}</div>\n"
    for title, name, columns in (
        ("Longest examples", "longest", LONGEST_HEADER),
        ("Longest learned turns", "longest_turns", TURN_HEADER),
    ):
        longest = [tuple(map(_text, row)) for row in longest_rows(statistics[name])]
        yield f"<div><h2>{title}</h2>\n{_table(longest, columns)}</div>\n"
    lines = "".join(f"<p>{escape(line)}</p>\n" for line in template_lines(statistics))
    yield f"<div><h2>Chat template</h2>\n{lines}</div></div>\n"


def _roles(statistics: Mapping[str, Any]) -> str:
    if not statistics["by_role"]:
        return f"<p class=faint>{_text(NOT_COUNTED)}</p>\n"
    rows = [
        (*row, _bar(role["tokens"] / statistics["tokens"], role["learned_tokens"] / statistics["tokens"]))
        for row, role in zip(role_rows(statistics), statistics["by_role"].values(), strict=True)
    ]
    return _table(rows, (*ROLE_HEADER, ""))


def _counts(counts: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = (f"{counts[key]:,}" for key in ("examples", "conversations", "tokens", "learned_tokens"))
    return (*numbers, f"{100 * counts['learned_share']:.1f} %", _bar(1, counts["learned_share"]))


def _bar(read: float, learned: float) -> str:
    """Of all, what is read, and in it what is learned; the numbers stand beside it."""
    rects = (f'<rect class="{kind}" width="{SHARE * of:.1f}" height="10"/>' for kind, of in (("rest", read), ("bar", learned)))
    return f'<svg width="{SHARE}" height="10" aria-hidden="true">{"".join(rects)}</svg>'


def histogram(lengths: np.ndarray) -> str:
    """How many examples are how long, as SVG; each bar tells its numbers to a pointer that rests on it."""
    counts, edges = np.histogram(lengths, bins=BARS, range=(0, max(int(lengths.max()), BARS)))
    wide, most = WIDTH / BARS, int(counts.max())
    bars = []
    for i, count in enumerate(counts.tolist()):
        tall = HEIGHT * count / most
        told = f"{count:,} example{'s'[count == 1 :]} of {edges[i]:,.0f} to {edges[i + 1]:,.0f} tokens"
        bars.append(f'<rect class="bar" x="{i * wide + 1:.1f}" y="{HEIGHT - tall:.1f}" width="{wide - 2:.1f}" ')
        bars.append(f'height="{tall:.1f}"><title>{told}</title></rect>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="Histogram of lengths"'
    ticks = "".join(f"<span>{edges[-1] * share:,.0f}</span>" for share in (0, 0.5, 1))
    base = f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/>'
    highest = f"{most:,} example{'s'[most == 1 :]}"
    return f"<figure><span>{highest}</span><svg {size}>{''.join(bars)}{base}</svg><div class=ticks>{ticks}</div></figure>"


def _controls(statistics: Mapping[str, Any], shown: Sequence[ShownExample]) -> Iterator[str]:
    sources = sorted({each.example.source for each in shown})
    options = "".join(f'<option value="{_text(name)}">{_text(name)}</option>' for name in sources)
    yield '<div class="bar-of"><input id="search" type="search" placeholder="Search conversation or text" aria-label="Search">\n'
    yield f'<select id="source" aria-label="Source"><option value="">all sources</option>{options}</select>\n'
    yield '<button id="unfold" type="button" aria-pressed="false">unfold context</button>\n'
    yield '<span id="counter" class="faint"></span></div>\n'
    yield f"<p class=faint>{len(shown):,} of {statistics['examples']:,} examples are on this page.</p>\n"
    yield '<p class="key text"><span><mark>learned</mark></span><span><mark class="other" data-weight="0.5">learned with another '
    yield "weight than 1</mark></span><span>only read</span><span><i>control token</i></span></p>\n"


def article(each: ShownExample) -> str:
    """One example, its learned tokens marked and its long context folded."""
    return "".join(_article(each))


def _article(each: ShownExample) -> Iterator[str]:
    facts = " · ".join(map(_text, each.facts))
    yield f'<article data-source="{_text(each.example.source)}"><h3><b>example {each.number}</b> · {facts}</h3><div class="text">'
    weight = 0.0  # of the run before
    for part in folded(each.runs):
        if isinstance(part, Folded):
            inside = "".join(_run(run, 0) for run in part.runs)
            yield f"<details><summary>… {part.tokens:,} tokens of context …</summary>{inside}</details>"
        else:
            yield _run(part, weight)
            weight = part.weight
    yield "</div></article>\n"


def _run(run: Run, before: float) -> str:
    """`before`: weight of the run before it; another weight than 1 is said once, at its first run."""
    text = f"<i>{_text(run.text)}</i>" if run.special else _text(run.text)
    if not run.learned:
        return text
    if run.weight == 1:
        return f"<mark>{text}</mark>"
    told = f' data-weight="{run.weight:g}"' if run.weight != before else ""
    return f'<mark class="other"{told}>{text}</mark>'
