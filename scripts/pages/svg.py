"""Small drawings as SVG text: readable on light and on dark pages, since each brings its own ground."""

from collections.abc import Iterable
from xml.sax.saxutils import escape

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
# Of each kind: light, dark. Learned and only read differ in lightness too, for those who do not see the colours.
COLOURS = {
    "ground": ("#ffffff", "#1e2129"),
    "text": ("#1f2933", "#e4e7eb"),
    "faint": ("#616e7c", "#9aa5b1"),
    "line": ("#cbd2d9", "#4a5361"),
    "system": ("#d5dae0", "#3c4451"),
    "user": ("#a9c9ee", "#33527a"),
    "output": ("#ecdcb6", "#5b4f33"),
    "read": ("#c9e3cd", "#2f5038"),
    "learned": ("#1f7a44", "#46b873"),
    "wrong": ("#d64545", "#e66a6a"),
    "onlearned": ("#ffffff", "#0d1f14"),
}


def rect(x: float, y: float, width: float, height: float, kind: str, extra: str = "") -> str:
    """A block of that kind."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" class="{kind}"{extra}/>'


def text(x: float, y: float, content: str, kind: str = "text", size: int = 14, anchor: str = "start", mono: bool = False) -> str:
    """A line of text whose base line is at y."""
    font = ' font-family="' + MONO.replace('"', "'") + '"' if mono else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" font-size="{size}" text-anchor="{anchor}"{font} xml:space="preserve">'
        f"{escape(content)}</text>"
    )


def line(x: float, y: float, x2: float, y2: float, kind: str = "stroke") -> str:
    """A thin line."""
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def circle(x: float, y: float, radius: float, kind: str) -> str:
    """A dot."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{kind}"/>'


def legend(x: float, y: float, entries: Iterable[tuple[str, str]]) -> list[str]:
    """Kinds of blocks and what they are, in a row."""
    parts = []
    for kind, words in entries:
        parts += [rect(x, y - 11, 14, 14, kind), text(x + 19, y, words, "faint", 13)]
        x += 19 + 6.9 * len(words) + 16
    return parts


def drawing(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A whole file; the title is what is read out where nothing is seen."""
    light = " ".join(f".{name}{{fill:{pair[0]}}}" for name, pair in COLOURS.items())
    dark = " ".join(f".{name}{{fill:{pair[1]}}}" for name, pair in COLOURS.items())
    stroke = [".stroke{{stroke:{};stroke-width:1.3;fill:none}}".format(COLOURS["faint"][which]) for which in (0, 1)]
    style = f"{light} {stroke[0]} @media (prefers-color-scheme: dark) {{ {dark} {stroke[1]} }}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
    body = "\n".join([rect(0, 0, width, height, "ground", ' rx="6"'), *parts])
    return f'{head} font-family="{FONT}"><title>{escape(title)}</title><style>{style}</style>\n{body}\n</svg>\n'
