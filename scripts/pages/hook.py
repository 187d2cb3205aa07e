"""A hook of mkdocs: SECURITY.md and the tables of benchmarks/results stand in the site too, and links to them lead there."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results/"
LISTS = re.compile(r"^(?!- |\s)(.+)\n(?=- )", re.MULTILINE)  # GitHub needs no blank line before a list


def on_files(files: Files, *, config: Any) -> Files:
    """Each result as a page results/NAME.md."""
    for path in sorted((ROOT / RESULTS).glob("*.md")):
        files.append(File.generated(config, f"results/{path.name}", content=path.read_text(encoding="utf-8")))
    security = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "SECURITY.md", content=LISTS.sub(r"\1\n\n", security)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as the repository has them, `../benchmarks/results/x.md` and `../SECURITY.md`, as the site does."""
    for up in ("", "../"):
        markdown = markdown.replace(f"](../{up}{RESULTS}", f"]({up}results/").replace(f"](../{up}SECURITY.md", f"]({up}SECURITY.md")
    return markdown
