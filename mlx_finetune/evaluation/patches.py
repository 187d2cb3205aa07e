"""What gptme's tool `patch` makes of a file: hunks between the markers ORIGINAL and UPDATED.

The rules are those of gptme 0.35.1 (tools/patch.py, `Patch.from_codeblock` and `apply`), written anew.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

ORIGINAL, DIVIDER, UPDATED = "<<<<<<< ORIGINAL\n", "\n=======\n", ">>>>>>> UPDATED"
ONE_MORE_DIVIDER = re.compile(r"\n=======(?!=)")  # a longer line of = may underline a heading
LEFT_OUT = re.compile(r'^[ \t]*(#|//|") \.\.\. ?.*$', re.MULTILINE)  # "# ..." stands for lines that stay as they are


class Malformed(Exception):
    """The text is no patch."""


class DoesNotApply(Exception):
    """The patch is well formed, and this is not the file for it."""


@dataclass(frozen=True)
class Hunk:
    """One change: `original` must stand in the file once."""

    original: str
    updated: str


def hunks_of(patch: str) -> list[Hunk]:
    """Raises Malformed where gptme would."""
    before, *pieces = patch.strip().split(ORIGINAL)
    if before.strip():
        raise Malformed("text before the first ORIGINAL")
    return [small for piece in pieces for small in _around_what_is_left_out(_hunk_of(piece))]


def is_well_formed(patch: str) -> bool:
    """Whether it is one hunk or more, as gptme writes them."""
    try:
        return bool(hunks_of(patch))
    except Malformed:
        return False


def apply(patch: str, content: str) -> str:
    """The file after the patch; each hunk is looked for in what the one before it left.

    Raises:
        Malformed: it is no patch.
        DoesNotApply: a hunk's original is not there, is there more than once, or the hunk changes nothing.
    """
    for hunk in hunks_of(patch):
        content = _applied(hunk, content)
    return content


def _hunk_of(piece: str) -> Hunk:
    original, divider, rest = piece.partition(DIVIDER)
    if not divider:
        raise Malformed("no =======")
    if rest.startswith(UPDATED):
        return Hunk(original, "")
    updated, end, _ = rest.partition(f"\n{UPDATED}")
    if not end:
        raise Malformed("no >>>>>>> UPDATED")
    if ONE_MORE_DIVIDER.search(updated):
        raise Malformed("more than one =======")
    return Hunk(original, updated)


def _around_what_is_left_out(hunk: Hunk) -> Iterator[Hunk]:
    old, new = LEFT_OUT.split(hunk.original), LEFT_OUT.split(hunk.updated)
    if len(old) == len(new) == 1:
        yield hunk
        return
    if len(old) != len(new):
        raise Malformed("more lines are left out on one side than on the other")
    yield from (Hunk(before, after) for before, after in zip(old, new, strict=True) if before != after)


def _applied(hunk: Hunk, content: str) -> str:
    places = content.count(hunk.original)
    if places > 1:
        raise DoesNotApply(f"the original stands there {places} times")
    found = hunk.original if places else _but_for_blanks(hunk.original, content)
    changed = content.replace(found, hunk.updated, 1)
    if changed == content:
        raise DoesNotApply("nothing changes")
    return changed


def _but_for_blanks(original: str, content: str) -> str:
    """The only lines of the content that equal the original, where lines of blanks count as equal."""
    wanted, lines = original.splitlines(keepends=True), content.splitlines(keepends=True)
    spoken = [line if line.strip() else "" for line in wanted]
    there = [line if line.strip() else "" for line in lines]
    starts = [i for i in range(len(there) - len(spoken) + 1) if there[i : i + len(spoken)] == spoken]
    if len(starts) != 1:
        raise DoesNotApply(f"the original stands there {len(starts)} times, blanks aside")
    return "".join(lines[starts[0] : starts[0] + len(wanted)])
