"""Pieces of a page. What comes from a file is made text by `text`, here or where it is put in; all else is HTML."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mlx_finetune.data.shown import visible

MINUS = "\u2212"


def text(value: object) -> str:
    """As text only: nothing in it does anything, also no sign that would turn the direction of writing."""
    return escape(visible(str(value)))


def digest(code: str) -> str:
    """As Content-Security-Policy names the only script and the only style that a browser may take."""
    return f"sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}"


def count(number: int, one: str) -> str:
    """`1 turn`, `2,000 turns`."""
    return f"{number:,} {one}{'s'[number == 1 :]}"


def signed(number: float, digits: int = 3) -> str:
    """With its sign, the minus as long as the plus."""
    return f"{number:+.{digits}f}".replace("-", MINUS)


def percent(share: float | None) -> str:
    """Of a share; a dash where there is none. 0 % is none of them, and 100 % all."""
    if share is None:
        return "\u2013"
    if 0 < share <= 0.005:
        return "under 1 %"
    return "over 99 %" if 0.995 <= share < 1 else f"{100 * share:.0f} %"


@dataclass(frozen=True)
class Cell:
    """`html` as it is shown; `value`: what a column of numbers is sorted by; `kind`: class for its look."""

    html: str
    value: float | None = None
    kind: str = ""


def cells(*values: object) -> list[Cell]:
    """Text as text; whole numbers so that they sort as numbers."""
    return [Cell(f"{value:,}", value) if isinstance(value, int) else Cell(text(value)) for value in values]


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]], sortable: bool = True) -> str:
    """The first cell of a row is its heading; columns after the first are on the right. Sorting is offered by the script."""
    if not rows:
        return ""
    kind = " class=sortable" if sortable and len(rows) > 1 else ""
    heads = "".join(f"<th scope=col>{text(name)}" for name in header)
    lines = []
    for row in rows:
        first, *others = (f"{_attributes(cell)}>{cell.html}" for cell in row)
        lines.append(f"<tr><th scope=row{first}{''.join(f'<td{each}' for each in others)}\n")
    body = f"<caption>{caption}</caption>\n<thead><tr>{heads}\n<tbody>{''.join(lines)}"
    return f'<div class=wide role=region aria-label="{caption}"><table{kind}>{body}</table></div>\n'


def _attributes(cell: Cell) -> str:
    value = "" if cell.value is None else f' data-value="{cell.value:.12g}"'
    return value + (f' class="{cell.kind}"' if cell.kind else "")


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page that the contents lead to; empty where it would hold nothing."""
    inside = "".join(parts)
    return f'<section id="{name}"><h2>{title}</h2>\n{inside}</section>\n' if inside.strip() else ""


def paragraph(html: str, kind: str = "") -> str:
    """A paragraph; empty where there is nothing to say."""
    return f"<p{f' class={kind}' if kind else ''}>{html}</p>\n" if html else ""


def commands(*lines: str) -> str:
    """For a terminal."""
    return f"<pre class=commands><code>{text(chr(10).join(lines))}</code></pre>\n"
