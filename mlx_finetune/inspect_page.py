"""The page of `inspect --html`: one file that needs nothing else, in which every text of a conversation is only text."""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.data.shown import Folded, Run, ShownExample, folded, visible
from mlx_finetune.files import atomic_file
from mlx_finetune.inspect_terminal import TURNS, template_lines

BARS, WIDTH, HEIGHT, MARGIN = 32, 640, 140, 22  # of the histogram
SHARE = 160  # width of the bar of a learned share


def write_page(path: Path, statistics: Mapping[str, Any], shown: Sequence[ShownExample], lengths: np.ndarray) -> None:
    """Writes the page, whole or not at all. `lengths`: int [N], tokens of every example of the split, shown or not."""
    with atomic_file(path) as file:
        file.writelines(page(statistics, shown, lengths))


def page(statistics: Mapping[str, Any], shown: Sequence[ShownExample], lengths: np.ndarray) -> Iterator[str]:
    """The page, part by part."""
    beside = Path(__file__).parent
    style, script = ((beside / f"inspect_page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    title = _text(f"{statistics['split']} of {statistics['dataset']}")
    yield f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    yield f'<meta name="viewport" content="width=device-width">\n<style>{style}</style>\n</head>\n<body>\n'
    yield f"<h1>{title}</h1>\n<p class=faint>As {_text(statistics['model'])} reads it: tokens and weights as training is fed.</p>\n"
    yield from _statistics(statistics, lengths)
    yield from _controls(statistics, shown)
    for each in shown:
        yield from _article(each)
    yield f"<script>{script}</script>\n</body>\n</html>\n"


def _digest(text: str) -> str:
    """As Content-Security-Policy names the only script and the only style that a browser may take."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


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
    yield f"<h2>Learned share by source</h2>\n{_table([*rows, ('all', *_counts(statistics))], header)}"
    yield f"<h2>Lengths in tokens</h2>\n<figure>{histogram(lengths)}<figcaption>All {len(lengths):,} examples: at most "
    yield f"{statistics['max_length']:,} tokens; the median is {statistics['median_tokens']:,.0f}.</figcaption></figure>\n"
    longest = [
        (f"{e['example']}", _text(e["source"]), _text(e["conversation"]), f"{e['tokens']:,}", f"{e['learned_tokens']:,}")
        for e in statistics["longest"]
    ]
    turns = [(text, f"{statistics[name]:,}") for name, text in TURNS.items()]
    yield f"<div class=columns><div><h2>Turns</h2>\n{_table(turns)}</div>\n<div><h2>Longest examples</h2>\n"
    yield f"{_table(longest, ('example', 'source', 'conversation', 'tokens', 'learned'))}</div></div>\n"
    yield "<h2>Chat template</h2>\n" + "".join(f"<p>{escape(line)}</p>\n" for line in template_lines(statistics))


def _counts(counts: Mapping[str, Any]) -> tuple[str, ...]:
    share = counts["learned_share"]
    numbers = (f"{counts[key]:,}" for key in ("examples", "conversations", "tokens", "learned_tokens"))
    bar = (
        f'<svg width="{SHARE}" height="10" role="img" aria-label="{100 * share:.1f} % learned"><rect class="rest" width="{SHARE}" '
    )
    bar += f'height="10"/><rect class="bar" width="{SHARE * share:.1f}" height="10"/></svg>'
    return (*numbers, f"{100 * share:.1f} %", bar)


def histogram(lengths: np.ndarray) -> str:
    """How many examples are how long, as SVG; each bar tells its numbers to a pointer that rests on it."""
    counts, edges = np.histogram(lengths, bins=BARS, range=(0, max(int(lengths.max()), BARS)))
    wide, most = WIDTH / BARS, int(counts.max())
    bars = []
    for i, count in enumerate(counts.tolist()):
        tall = (HEIGHT - MARGIN) * count / most
        told = f"{count:,} examples of {edges[i]:,.0f} to {edges[i + 1]:,.0f} tokens"
        bars.append(f'<rect class="bar" x="{i * wide + 1:.1f}" y="{MARGIN + HEIGHT - MARGIN - tall:.1f}" width="{wide - 2:.1f}" ')
        bars.append(f'height="{tall:.1f}"><title>{told}</title></rect>')
    ticks = []
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        value = f"{edges[-1] * share:,.0f}"
        ticks.append(f'<text x="{WIDTH * share:.0f}" y="{HEIGHT + 16}" text-anchor="{anchor}">{value}</text>')
    base = f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/><text x="0" y="12">{most:,} examples</text>'
    size = f'width="{WIDTH}" height="{HEIGHT + MARGIN}" viewBox="0 0 {WIDTH} {HEIGHT + MARGIN}"'
    return f'<svg {size} role="img" aria-label="Histogram of lengths">{"".join(bars)}{base}{"".join(ticks)}</svg>'


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


def _article(each: ShownExample) -> Iterator[str]:
    facts = " · ".join(map(_text, each.facts))
    yield f'<article data-source="{_text(each.example.source)}"><h3><b>example {each.number}</b> · {facts}</h3><div class="text">'
    for part in folded(each.runs):
        if isinstance(part, Folded):
            inside = "".join(map(_run, part.runs))
            yield f"<details><summary>… {part.tokens:,} tokens of context …</summary>{inside}</details>"
        else:
            yield _run(part)
    yield "</div></article>\n"


def _run(run: Run) -> str:
    text = f"<i>{_text(run.text)}</i>" if run.special else _text(run.text)
    if not run.learned:
        return text
    return f"<mark>{text}</mark>" if run.weight == 1 else f'<mark class="other" data-weight="{run.weight:g}">{text}</mark>'
