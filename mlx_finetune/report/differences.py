"""How an answer differs from what was logged, word by word, or line by line where both are long."""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

from mlx_finetune.report.html import text

WORDS = re.compile(r"\w+|\s+|[^\w\s]")
MOST = 4_000_000  # pairs of words that are compared; beyond it lines are
WORTH_MARKING = 1 / 3  # less in common, and marks would be all there is to see


@dataclass(frozen=True)
class Compared:
    """`html`: the answer, with what is not in the log and what is missing marked. `alike`: share of both that is common."""

    html: str
    alike: float


def compared(logged: str, answer: str) -> Compared:
    """An answer beside what was logged; empty space at the ends does not count."""
    logged, answer = logged.strip(), answer.strip()
    before, after = WORDS.findall(logged), WORDS.findall(answer)
    if len(before) * len(after) > MOST:
        before, after = logged.splitlines(keepends=True), answer.splitlines(keepends=True)
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    same = sum(len("".join(after[m.b : m.b + m.size])) for m in matcher.get_matching_blocks())
    alike = 2 * same / max(len(logged) + len(answer), 1)
    if alike < WORTH_MARKING:
        return Compared(text(answer), alike)
    parts = []
    for kind, i, j, k, m in matcher.get_opcodes():
        gone, new = text("".join(before[i:j])), text("".join(after[k:m]))
        parts += [new] if kind == "equal" else [f"<del>{gone}</del>" if gone else "", f"<ins>{new}</ins>" if new else ""]
    return Compared("".join(parts), alike)
