"""Curves as SVG inside the page: drawn by matplotlib, its colours those of the page in light and dark."""

import importlib.util
import io
import re
from typing import Any
from xml.etree import ElementTree

from mlx_finetune.errors import UserError
from mlx_finetune.report.curves import Curves, Line
from mlx_finetune.report.html import text

WIDE, NARROW, SMALL = (1080, 380), (380, 300), (380, 250)  # in the page's pixels, 72 to an inch
FONT = 11
# Colours that stand for names in style.css; no two are alike, and matplotlib writes them as they are.
NAMES = ("ink", "faint", "line", "ground", "c0", "c1", "c2", "c3", "soft", "spike")
COLOURS = {name: f"#0000{16 + number:02x}" for number, name in enumerate(NAMES)}
BY_COLOUR = {colour: name for name, colour in COLOURS.items()}
LOOKS: dict[str, dict[str, Any]] = {
    "raw": {"color": "soft", "linewidth": 1},
    "train": {"color": "c0", "linewidth": 2},
    "held": {"color": "c1", "linewidth": 2, "marker": "o", "markersize": 5},
    "spike": {"color": "spike", "linestyle": "none", "marker": "x", "markersize": 8, "markeredgewidth": 2},
    "skipped": {"color": "ink", "linestyle": "none", "marker": "v", "markersize": 7, "markerfacecolor": "none"},
    "source0": {"color": "c1", "linewidth": 2, "marker": "o", "markersize": 5},
    "source1": {"color": "c2", "linewidth": 2, "marker": "s", "markersize": 5, "linestyle": "--"},
    "source2": {"color": "c3", "linewidth": 2, "marker": "^", "markersize": 5, "linestyle": "-."},
    "source3": {"color": "c0", "linewidth": 2, "marker": "D", "markersize": 4, "linestyle": ":"},
    "rate": {"color": "c0", "linewidth": 2},
    "norm": {"color": "c0", "linewidth": 1.2},
    "limit": {"color": "c1", "linewidth": 1.5, "linestyle": "--"},
    "computed": {"color": "c2", "linewidth": 1.2},
    "learned": {"color": "c0", "linewidth": 1.2},
    "memory": {"color": "c3", "linewidth": 1.5},
}
ALONE = ("o", 5)  # marker and its size of a curve that is one point
SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"


def figure(curves: Curves) -> str:
    """One figure with its caption; the loss in two shapes, of which style.css shows the one that fits."""
    shapes = {"wide-shape": WIDE, "narrow-shape": NARROW} if curves.name == "loss" else {"": SMALL}
    drawn = "".join(
        _inline(_draw(curves, *size), f"{curves.name}{kind and '-' + kind}", kind, curves) for kind, size in shapes.items()
    )
    return f'<figure id="figure-{curves.name}" class="{curves.name}"><figcaption>{curves.title}</figcaption>{drawn}</figure>\n'


def check_matplotlib() -> None:
    """Raises UserError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the figures of a report are drawn by matplotlib, which is not installed", hint="pip install matplotlib")


def _draw(curves: Curves, width: int, height: int) -> str:
    """SVG as matplotlib writes it."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    settings = {"svg.fonttype": "none", "svg.hashsalt": f"{curves.name}{width}", "font.size": FONT, "text.parse_math": False}
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), COLOURS["ink"])
    settings |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), COLOURS["faint"])
    with matplotlib.rc_context(settings):
        drawing = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = drawing.add_subplot()
        for number, line in enumerate(curves.lines):
            _plot(axes, line, number)
        axes.set(xlabel="step", ylabel=curves.unit)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.6g}"))
        if curves.name in ("speed", "memory", "rate", "norm"):
            axes.set_ylim(bottom=0)
        axes.grid(color=COLOURS["line"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves.lines) > 1:
            columns = len(curves.lines) if width > NARROW[0] else 2
            legend = drawing.legend(
                loc="outside lower center", ncols=columns, frameon=False, fontsize=FONT - 0.5, columnspacing=1.2
            )
            legend.set_gid("legend")
        file = io.StringIO()
        drawing.savefig(file, format="svg", transparent=True)
    return file.getvalue()


def _plot(axes: Any, line: Line, number: int) -> None:
    look = LOOKS[line.look] | {"color": COLOURS[LOOKS[line.look]["color"]]}
    if len(line.steps) == 1 and "marker" not in look:
        look |= dict(zip(("marker", "markersize"), ALONE, strict=True))
    axes.plot(line.steps, line.values, label=line.label, gid=f"curve-{number}", **look)


def _inline(svg: str, name: str, kind: str, curves: Curves) -> str:
    """Part of the page: no style but its own, no name but what is pointed at, a title and a description."""
    root = ElementTree.fromstring(svg)  # noqa: S314  what matplotlib has just written
    root.remove(root.find(f"{SVG}metadata"))  # type: ignore[arg-type]  # matplotlib always writes it
    for style in root.findall(f"{SVG}defs[{SVG}style]"):
        root.remove(style)  # the page has its own
    pointed = set(re.findall(r"#([\w-]+)", svg))
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        _restyle(element, pointed)
    box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib |= {"viewBox": box, "role": "img", "aria-labelledby": f"{name}-title", "aria-describedby": f"{name}-desc"} | (
        {"class": kind} if kind else {}
    )
    inside = "".join(ElementTree.tostring(child, encoding="unicode") for child in root)
    start = "".join(f'{key}="{value}" ' for key, value in root.attrib.items())
    told = f'<title id="{name}-title">{text(curves.title)}, by step</title><desc id="{name}-desc">{text(curves.told)}</desc>'
    return f"<svg {start.strip()}>{told}{inside}</svg>"


def _restyle(element: ElementTree.Element, pointed: set[str]) -> None:
    """Colours become classes; the rest of a style becomes attributes, since the page allows no style in an element."""
    classes = []
    for declaration in element.attrib.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if value in BY_COLOUR:
            classes.append(f"{key}-{BY_COLOUR[value]}")
        elif key == "font":
            element.set("font-size", re.search(r"[\d.]+px", value)[0])  # type: ignore[index]  # matplotlib always writes it
        elif key and key != "font-family":
            element.set(key, value)
    if link := element.attrib.pop(LINK, ""):
        element.set("href", link)
    name = element.attrib.get("id", "")
    if name and name not in pointed:
        del element.attrib["id"]
    if name == "legend" or name.startswith("curve-"):
        classes.append(name.partition("-")[0])
    if classes:
        element.set("class", " ".join(classes))
