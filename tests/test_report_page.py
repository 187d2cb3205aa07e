"""The page of a report in a real browser: it opens, sorts, fits, can be read in any light, prints, and runs nothing of a log."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from browser import Page
from finished_runs import make_base, make_run
from reported_runs import HOSTILE, evaluation, long_metrics, name_model, write_answers, write_evaluation, write_metrics
from test_inspect import contrast

from mlx_finetune.cli import main

SHOWN = "e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """whole: of a finished run with everything; bare: of one that has only just begun."""
    root = tmp_path_factory.mktemp("made")
    make_base(root)
    name_model(root)
    whole = make_run(root, "torch")
    shutil.copytree(whole, root / "bare", ignore=shutil.ignore_patterns("checkpoints", "best", "latest", "*.jsonl"))
    write_metrics(whole, long_metrics(300, (143, 200)))
    write_evaluation(whole, note=HOSTILE)
    write_answers(whole)
    for run in (whole, root / "bare"):
        with pytest.raises(SystemExit) as exit:
            main(["report", str(run)])
        assert not exit.value.code
    return {"whole": whole / "report.html", "bare": root / "bare" / "report.html"}


def column(page: Page, table: str, number: int) -> list[str]:
    """Texts of a column, from top to bottom."""
    rows = f"[...document.querySelectorAll('table')].find(t => t.caption.textContent.startsWith('{table}')).tBodies[0].rows"
    return list(page.ask(f"[...{rows}].map(r => r.cells[{number}].textContent.trim())"))


@pytest.mark.parametrize("name", ["whole", "bare"])
def test_it_opens_without_an_error_and_asks_nothing_of_the_network(name: str, pages: dict[str, Path], page: Page) -> None:
    page.log.clear()
    page.look(1200)
    page.open(pages[name])
    assert page.log == []
    assert page.ask("performance.getEntriesByType('resource').length") == 0
    assert page.ask("document.images.length + document.querySelectorAll('link, iframe, object, embed').length") == 0


def test_nothing_of_a_conversation_runs_and_all_of_it_can_be_read(pages: dict[str, Path], page: Page) -> None:
    page.open(pages["whole"])
    assert page.ask("document.title") == "base, tuned" and page.ask("document.scripts.length") == 1
    assert page.ask("document.querySelector('article b:not(h3 b)')") is None
    assert "<script>document.title = 'owned'</script> &amp;" in page.ask("document.querySelector('#samples .question').textContent")


def test_a_table_sorts_by_number_with_mouse_and_keyboard(pages: dict[str, Path], page: Page) -> None:
    page.look(1200)
    page.open(pages["whole"])
    name, losses = "Loss", [f"{row['base']:.3f}" for row in evaluation("")["rows"]]
    assert column(page, name, 1) == losses
    page.click("table.sortable th:nth-child(2) button")
    assert column(page, name, 1) == sorted(losses, key=float) != sorted(losses)  # 10.500 is the largest
    sorted_by = "[...document.querySelector('table.sortable').tHead.rows[0].cells].map(c => c.getAttribute('aria-sort'))"
    assert page.ask(sorted_by) == ["none", "ascending", "none", "none", None, "none", "none"]
    for key, place, expected in (("Enter", 1, sorted(losses, key=float, reverse=True)), (" ", 1, sorted(losses, key=float))):
        page.press(key)  # the button that was clicked has the focus
        assert column(page, name, place) == expected
    page.press("Tab")
    assert page.ask("document.activeElement.getAttribute('aria-label')") == "Sort by tuned"
    page.press("Enter")
    assert column(page, name, 2) == sorted((f"{row['tuned']:.3f}" for row in evaluation("")["rows"]), key=float)
    page.click("table.sortable th:first-child button")
    names = [cell.split()[0] for cell in column(page, name, 0)]
    assert names == ["<script>document.title", "all", "first", "gptme", "inside", "token"]
    assert page.ask(sorted_by)[:2] == ["ascending", "none"]


def test_what_has_no_value_stands_last_either_way(pages: dict[str, Path], page: Page) -> None:
    page.open(pages["whole"])
    table = "[...document.querySelectorAll('table')].find(t => t.caption.textContent.startsWith('Answers'))"
    for _ in range(2):
        page.ask(f"{table}.tHead.rows[0].cells[1].lastChild.click()")
        assert column(page, "Answers", 1) == ["12 %", "\u2013"]


@pytest.mark.parametrize("name", ["whole", "bare"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_fits_and_can_be_read(name: str, width: int, scheme: str, pages: dict[str, Path], page: Page) -> None:
    page.look(width, 900, scheme)
    page.open(pages[name])
    page.ask("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert page.ask("document.documentElement.scrollWidth <= innerWidth")
    cut = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.wide, .commands, svg') && !e.matches('.unseen')"
    assert page.ask(f"{cut} && {SHOWN} && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)") == []
    colours = page.ask(f"""[...document.querySelectorAll('body *')].filter(e => {SHOWN}).map(e => {{
        const text = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
        let ground = e; while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
        const style = getComputedStyle(e);
        return text ? [e.closest('svg') ? style.fill : style.color, getComputedStyle(ground).backgroundColor] : null }})""")
    pairs = {tuple(pair) for pair in colours if pair}
    assert len(pairs) >= (10 if name == "whole" else 4)
    assert min(contrast(*pair) for pair in pairs) >= 4.5, pairs  # WCAG 2.2, 1.4.3
    ground = page.ask("getComputedStyle(document.body).backgroundColor")
    assert (contrast("rgb(255, 255, 255)", ground) > 10) == (scheme == "dark")
    sizes = page.ask(f"""[...document.querySelectorAll('figure svg text')].filter(e => {SHOWN}).map(e =>
        e.getScreenCTM().a * parseFloat(getComputedStyle(e).fontSize) || 99)""")
    assert min(sizes, default=99) >= 9  # in pixels, after the figure has been made to fit


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_curves_stand_out_from_the_ground_in_any_scheme(scheme: str, pages: dict[str, Path], page: Page) -> None:
    page.look(1400, 900, scheme)
    page.open(pages["whole"])
    curves = page.ask(f"""[...document.querySelectorAll('.curve path[class], .curve use')].filter(e => {SHOWN}).map(e =>
        [e.getAttribute('class'), getComputedStyle(e).stroke])""")
    ground = page.ask("getComputedStyle(document.body).backgroundColor")
    found = {name: colour for name, colour in curves if "soft" not in name}  # each step lies behind its running mean
    assert len(found) >= 4 and all(contrast(colour, ground) >= 3 for colour in found.values())  # WCAG 2.2, 1.4.11


@pytest.mark.parametrize(("width", "shape"), [(400, "narrow"), (1400, "wide")])
def test_every_figure_is_named_and_one_shape_of_it_is_shown(width: int, shape: str, pages: dict[str, Path], page: Page) -> None:
    page.look(width)
    page.open(pages["whole"])
    shown = page.ask(
        f"[...document.querySelectorAll('figure svg')].filter(e => {SHOWN}).map(e => [e.className.baseVal, e.clientWidth])"
    )
    assert [kind for kind, _ in shown] == [f"{shape}-shape", "", "", "", "", ""] and all(300 < wide <= width for _, wide in shown)
    tree = page.send("Accessibility.getFullAXTree")["nodes"]
    figures = [node["name"]["value"] for node in tree if node.get("role", {}).get("value") == "image"]
    assert figures == [f"{name}, by step" for name in (
        "Loss", "Held-out loss by source", "Learning rate", "Gradient norm", "Speed", "Peak memory")]  # fmt: skip
    heads = page.ask("[...document.querySelectorAll('th')].map(e => e.scope)")
    assert set(heads) == {"col", "row"}


def test_on_paper_there_are_no_buttons_and_nothing_is_cut_off(pages: dict[str, Path], page: Page, tmp_path: Path) -> None:
    page.look(1000, 900, "dark")
    page.open(pages["whole"])
    page.send("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.ask(f"[...document.querySelectorAll('button, nav')].filter(e => {SHOWN}).length") == 0
    assert "tuned" in page.ask("document.querySelector('table.sortable thead').innerText")
    assert page.ask("[...document.querySelectorAll('.text')].filter(e => e.scrollHeight > e.clientHeight + 1).length") == 0
    assert page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"  # also of who likes it dark
    printed: dict[str, Any] = page.send("Page.printToPDF", printBackground=False)
    assert len(printed["data"]) > 50_000
    page.send("Emulation.setEmulatedMedia", media="")


def test_what_scrolls_can_be_reached_by_the_keyboard(pages: dict[str, Path], page: Page) -> None:
    page.look(400)
    page.open(pages["whole"])
    boxes = page.ask("""[...document.querySelectorAll('.text, .wide, .commands')].filter(e => e.checkVisibility())
        .map(e => [e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1, e.tabIndex])""")
    assert {tuple(box) for box in boxes} == {(True, 0), (False, -1)}
    links = page.ask("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href').slice(1))")
    assert links == page.ask("[...document.querySelectorAll('section')].map(s => s.id)") and len(links) == 8


def test_the_style_has_no_name_that_the_page_does_not_use(pages: dict[str, Path]) -> None:
    html = pages["whole"].read_text(encoding="utf-8")
    style = html[html.index("<style>") : html.index("</style>")]
    used = {name for quoted in re.findall(r'class=(?:"([^"]*)"|([\w-]+))', html) for name in " ".join(quoted).split()}
    named = set(re.findall(r"\.([a-z][\w-]*)", re.sub(r"\{[^{}]*\}", "{}", style)))
    assert {name for name in named - used if not name.startswith(("fill-", "stroke-"))} <= {"missing", "other"}
