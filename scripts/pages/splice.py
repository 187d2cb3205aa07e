"""What stands in the docs between `<!-- KIND: NAME -->` and `<!-- /KIND -->` is made from the code: help texts, settings, plans."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # as a module of a test too

from memory_table import memory_table

from mlx_finetune.config import FIELDS, RunConfig, default
from mlx_finetune.road import SECTIONS

DOCS = Path(__file__).parents[2] / "docs"
WIDTH = 88  # of help texts, whatever the terminal
MARKED = re.compile(r"(<!-- (help|settings|road|memory|verbs): ?(.*?) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
GROUPS = (  # of the table of settings: its title, and the first setting in it
    ("Which model, data and machine", "model"),
    ("Of prepare", "max_length"),
    ("What is trained", "fine_tune_type"),
    ("Steps", "optimizer"),
    ("Memory and speed", "grad_checkpoint"),
    ("How long", "epochs"),
    ("Looking and keeping", "eval_every"),
)


def verbs() -> list[str]:
    """All of them, in the order of --help."""
    return list(_commands())


def help_text(verb: str) -> str:
    """What `mlx-finetune VERB --help` says, as plain text; of the settings only where they stand."""
    command = _commands()[verb]
    command.rich_markup_mode, command.epilog = None, None
    context = command.make_context(
        f"mlx-finetune {verb}", [], resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH
    )
    return f"```text\n{command.get_help(context).rstrip()}\n```\n"


def settings_table(_: str = "") -> str:
    """Every setting with its default and what it says of itself, in groups."""
    starts = {first: title for title, first in GROUPS}
    lines = []
    for name in FIELDS:
        if name in starts:
            lines += [f"\n## {starts[name]}\n", "| setting | default | what |", "|---|---|---|"]
        described = (RunConfig.model_fields[name].description or "").replace("|", "\\|")
        lines.append(f"| `{name}` | {_shown(default(name))} | {described} |")
    return "\n".join(lines) + "\n\n"


def road_table(_: str = "") -> str:
    """What the file of `run` may hold beside those."""
    lines = []
    for section, (kind, what) in SECTIONS.items():
        lines += [f"\n## {section}\n", f"{what}\n", "| setting | default | what |", "|---|---|---|"]
        lines += [
            f"| `{n}` | {_shown(kind.default(n))} | {kind.describe(n).replace('|', chr(92) + '|')} |" for n in kind.model_fields
        ]
    return "\n".join(lines) + "\n\n"


def verbs_table(_: str = "") -> str:
    """Every verb and its first sentence."""
    rows = (f"| [`{name}`]({name}.md) | {' '.join((command.help or '').split())} |" for name, command in _commands().items())
    return "\n".join(["| verb | what it does |", "|---|---|", *rows]) + "\n"


MAKERS: dict[str, Callable[[str], str]] = {
    "help": help_text,
    "settings": settings_table,
    "road": road_table,
    "memory": memory_table,
    "verbs": verbs_table,
}


def spliced(text: str) -> str:
    """The page with all marked parts made anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{MAKERS[found[2]](found[3]).strip()}\n\n{found[4]}", text)


def pages() -> list[Path]:
    """Every page that has marked parts."""
    return sorted(path for path in DOCS.rglob("*.md") if MARKED.search(path.read_text(encoding="utf-8")))


def _commands() -> dict[str, Any]:
    import typer.main

    from mlx_finetune.cli import app

    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def _shown(value: Any) -> str:
    if value in (None, "", ()):
        return "none"
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def main() -> None:
    """Writes the pages that are no longer as the code says."""
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (new := spliced(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
