"""The documentation says what the code says: help texts, settings and plans, links, the tutorial, the pictures."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS, PROGRAMS = ROOT / "docs", ROOT / "scripts" / "pages"
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(DOCS.rglob("*.md"))


def program(name: str) -> ModuleType:
    """A file of scripts/pages, which is no package."""
    spec = importlib.util.spec_from_file_location(f"pages_{name}", PROGRAMS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """Where a link may lead inside the page, as the site names headings."""
    from markdown.extensions.toc import slugify

    titles = re.findall(r"^#{1,4} (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {slugify(re.sub(r"[`*]", "", title), "-") for title in titles}


def test_what_stands_between_marks_is_what_the_code_says_now() -> None:
    splice = program("splice")
    stale = [
        page.name for page in splice.pages() if splice.spliced(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")
    ]
    assert len(splice.pages()) > 15 and stale == [], "scripts/docs --splice writes them again"


def test_every_verb_has_a_page_with_its_help_and_a_place_in_the_navigation() -> None:
    verbs = program("splice").verbs()
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for verb in verbs:
        assert f"<!-- help: {verb} -->" in (DOCS / "verbs" / f"{verb}.md").read_text(encoding="utf-8")
        assert f"- {verb}: verbs/{verb}.md" in navigation
    assert {page.stem for page in (DOCS / "verbs").glob("*.md")} == {"index", *verbs}


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted({*named} - {"SECURITY.md"}) == [page.relative_to(DOCS).as_posix() for page in PAGES]
    assert len(named) == len(set(named)) and (ROOT / "SECURITY.md").is_file()  # which a hook puts beside them


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    found = LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8")))
    for target in filter(None, (one or other for one, other in found)):
        if not re.match(r"https?://", target):
            place, _, heading = target.partition("#")
            there = (page.parent / place).resolve() if place else page
            assert there.exists(), target
            assert not heading or heading in anchors(there), target


def test_pages_and_pictures_fetch_nothing_from_a_network() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["theme"]["font"] is False and settings["plugins"] == ["search"] and "extra_javascript" not in settings
    for picture in (DOCS / "images").iterdir():
        content = picture.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert picture.stat().st_size < 150_000 and "http" not in content and "<script" not in content


def test_the_tutorial_shows_output_of_most_of_its_commands_and_a_line_that_is_not_printed_is_found() -> None:
    tutorial = program("tutorial")
    steps = tutorial.steps_of((DOCS / "tutorial.md").read_text(encoding="utf-8"))
    assert len(steps) > 10 and sum(bool(step.shown) for step in steps) > 9
    step = tutorial.Step("true", ("a … c", "last  line"))
    assert tutorial.not_printed(step, "x\na b c\nmore\n last line\n") is None
    assert tutorial.not_printed(step, "last line\na b c\n") == "last  line"


def test_a_command_of_the_tutorial_that_fails_ends_it_with_what_it_said(tmp_path: Path) -> None:
    page = "```bash\nX=here\n```\n\n```bash\necho is $X\nls nowhere\n```\n\n```bash\ntouch later\n```\n"
    (tmp_path / "run").mkdir()
    (problem,) = program("tutorial").execute(page, tmp_path / "run")
    assert "ls nowhere\nended with status" in problem and "is here" in problem and not (tmp_path / "run" / "later").exists()


def test_the_tutorial_runs_as_it_stands() -> None:
    answer = subprocess.run([sys.executable, PROGRAMS / "tutorial.py"], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.long
def test_the_site_is_built_without_a_warning_and_names_no_other_site_in_what_it_loads(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed: scripts/docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    loaded = re.compile(r'<(?:script|img|link rel="(?:stylesheet|preconnect)")[^>]+(?:src|href)="?(https?:[^" >]+)')
    assert [found for page in (tmp_path / "site").rglob("*.html") for found in loaded.findall(page.read_text("utf-8"))] == []


@pytest.mark.long
def test_the_pictures_are_drawn_again_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = program("pictures")
    monkeypatch.setattr(pictures, "IMAGES", tmp_path / "images")
    pictures.main()
    drawn = {path.name: path.read_text("utf-8") for path in (tmp_path / "images").iterdir()}
    assert drawn == {path.name: path.read_text("utf-8") for path in (DOCS / "images").iterdir()}
