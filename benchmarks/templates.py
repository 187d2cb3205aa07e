"""What becomes of random chats with every chat template that the installed trl and transformers ship, in one run:

    .venv/bin/python benchmarks/templates.py [--seeds 4] [--only qwen] [--out benchmarks/results/templates.json]

A line for each template: its role policy, and how many turns are exact (behind the very tokens that a server feeds), learned in
another context, refused, and wrong. Shapes and contents are those of the tests, half of them full of control tokens' names.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from shipped_chats import SHAPES  # noqa: E402
from shipped_templates import Row, row_of, shipped, table  # noqa: E402

PACKAGES = ("trl", "transformers", "mlx-lm", "tokenizers")


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="random chats of each shape for each template")
    parser.add_argument("--only", default="", help="templates with this in their name")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    start, rows = time.perf_counter(), []
    for one in shipped():
        if arguments.only in one.name:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(row_of(Path(folder), one, list(SHAPES), range(arguments.seeds)))
    print(table(rows))
    figures = summary(rows) | {"seeds": arguments.seeds, "seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(figures, indent=1, ensure_ascii=False))
    if arguments.out:
        versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
        result = {"versions": versions, "summary": figures, "templates": {row.name: row.to_json() for row in rows}}
        arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def summary(rows: list[Row]) -> dict[str, Any]:
    """Over all templates: how turns fared, by which policy, and why those that are not exact are not."""
    totals = [row.total for row in rows]
    inexact, refused = (sum((getattr(total, name) for total in totals), Counter[str]()) for name in ("inexact", "refused"))
    return {
        "templates": len(rows),
        "refused whole": {row.name: row.why for row in rows if not row.verdicts},
        "policies": dict(Counter(row.policy for row in rows if row.verdicts)),
        "turns exact": sum(total.exact for total in totals),
        "turns inexact": dict(inexact.most_common()),
        "turns refused": dict(refused.most_common()),
        "wrong": sum(len(total.wrong) for total in totals),
    }


if __name__ == "__main__":
    main()
