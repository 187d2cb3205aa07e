"""Judges one answer by what gptme would make of it: functions of texts. `bash -n` is asked too, which reads and runs nothing.

The calls of an answer are those that gptme finds in it once it is written (tool_calls.py). While a message streams, gptme stops at
its first call; so it is the first call that counts here. A save or patch needs its closing fence, and a blank line where text
follows it: without, it is no call for gptme either.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from mlx_finetune.data.conventions import legacy_calls
from mlx_finetune.data.fences import blocks, left_open
from mlx_finetune.data.native import HEAD, json_end
from mlx_finetune.data.tool_calls import Call, calls_in, fingerprint
from mlx_finetune.evaluation.known_files import path_of
from mlx_finetune.evaluation.patches import DoesNotApply, Malformed, apply, is_well_formed

# Each is better the higher it is. Of what each is the share:
RATES: Mapping[str, str] = {
    "valid call": "of turns in which the log holds a call that gptme runs: the answer holds one too",
    "same tool": "of the same turns: its first call is of the tool that the log's first call is of",
    "another call after an error": "of those that answer a failed call: its first call is not that call again",
    "fence closed": "of answers that open a code block or call: none is left open",
    "blank line after a file": "of answers with text behind a save, append or patch: a blank line stands before that text",
    "patch well formed": "of answers whose first call is a patch: it is of hunks with all of their markers",
    "patch applies": "of those whose file is known from the conversation: the patch changes it",
    "shell parses": "of answers whose first call is of the shell: bash takes the command for well formed (bash -n)",
    "today's conventions": "of answers with a call of today's or of an older gptme: none is one that only older ones ran",
    "stops by itself": "of all: the answer ended before the limit",
    "no repetition": "of all: nothing is said four times on end, over 32 words and signs or more",
}
FILE_BLOCK = re.compile(r"^(`{3,})(?:save|append|patch) [^\n`]*$", re.MULTILINE)
BLANK_LINE = re.compile(r"[^\S\n]*\n[^\S\n]*(?:\n|\Z)")
PIECE = re.compile(r"\w+|([^\w\s])\1*")  # a word; a sign, or the same sign several times, as in a line that is drawn
TIMES, LEAST = 4, 32
SECONDS = 5


@dataclass(frozen=True)
class Asked:
    """What an answer is measured by. `logged`: the turn in the log; `failed`: fingerprints of the calls that just failed.

    `files`: texts of files, by path, as far as the conversation shows them; `after_error`: whether a failure was just read.
    """

    logged: str
    format: str
    after_error: bool = False
    failed: frozenset[tuple[str, str, str, str]] = frozenset()
    files: Mapping[str, str] = field(default_factory=dict)


def judge(answer: str, stopped: bool, asked: Asked) -> dict[str, bool]:
    """The verdicts that apply to this answer, by their names in RATES. `stopped`: it ended before the limit."""
    logged, calls = calls_in(asked.logged, asked.format), calls_in(answer, asked.format)
    found: dict[str, bool | None] = {}
    if logged:
        found["valid call"] = bool(calls)
        found["same tool"] = bool(calls) and calls[0].tool == logged[0].tool
        if asked.after_error and asked.failed:
            found["another call after an error"] = bool(calls) and fingerprint(calls[0]) not in asked.failed
    found["fence closed"] = _all_closed(answer, asked.format)
    found["blank line after a file"] = blank_line_after_files(answer) if asked.format != "xml" else None
    if calls:
        found |= _of_first_call(calls[0], asked.files)
    legacy = legacy_calls(answer)
    found["today's conventions"] = not legacy if legacy or calls else None
    found["stops by itself"] = stopped
    found["no repetition"] = not repeats_itself(answer)
    return {name: found[name] is True for name in RATES if found.get(name) is not None}


def _of_first_call(call: Call, files: Mapping[str, str]) -> dict[str, bool | None]:
    if call.tool == "patch":
        return {"patch well formed": is_well_formed(call.content), "patch applies": patch_applies(call, files)}
    if call.tool == "shell":
        return {"shell parses": shell_parses(call.content)}
    return {}


def patch_applies(call: Call, files: Mapping[str, str]) -> bool | None:
    """Whether the patch changes its file; None where the file is not known."""
    content = files.get(path_of(call))
    if content is None:
        return None
    try:
        apply(call.content, content)
    except (Malformed, DoesNotApply):
        return False
    return is_well_formed(call.content)


@cache
def _bash() -> str | None:
    return shutil.which("bash")


def shell_parses(script: str) -> bool | None:
    """Whether bash takes it for well formed; None where there is no bash, or it takes too long. Nothing of it is executed."""
    bash = _bash()
    if bash is None:
        return None
    try:  # -n reads without executing; an empty environment, for BASH_ENV would name a file to execute
        done = subprocess.run(
            [bash, "--norc", "--noprofile", "-n"],
            input=script.encode("utf-8", "replace"),
            capture_output=True,
            timeout=SECONDS,
            env={},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode == 0


def _all_closed(text: str, tool_format: str) -> bool | None:
    """Whether nothing that the answer opens stays open; None where it opens nothing."""
    if tool_format == "xml":
        opened, closed = (sum(text.count(f"<{slash}{tag}>") for tag in ("tool-use", "function_calls")) for slash in ("", "/"))
        return opened <= closed if opened else None
    still_open = left_open(text)
    if tool_format == "tool" and (heads := list(HEAD.finditer(text))):
        still_open = bool(still_open) or json_end(text, heads[-1].end()) is None
    return None if still_open is None else not still_open


def blank_line_after_files(text: str) -> bool | None:
    """Whether a blank line stands behind the closing fence of every save, append and patch that text follows; None where none does.

    Where gptme finds no end of such a block, the first bare fence is taken for its end.
    """
    ends = {block.start: block.end for block in blocks(text)}
    found, place = None, 0
    while opening := FILE_BLOCK.search(text, place):
        end = ends.get(opening.start())
        if end is None:
            bare = re.compile(rf"^{opening[1]}[^\S\n]*$", re.MULTILINE).search(text, opening.end())
            end = bare.end() if bare else len(text)
        if text[end:].strip():
            found = found is not False and bool(BLANK_LINE.match(text, end))
        place = end
    return found


def repeats_itself(text: str) -> bool:
    """Whether some stretch of words and signs comes `TIMES` times on end or more, over `LEAST` of them or more."""
    numbers: dict[str, int] = {}
    pieces = np.array([numbers.setdefault(piece[0], len(numbers)) for piece in PIECE.finditer(text)], np.int64)
    for period in range(1, len(pieces) // TIMES + 1):
        same = pieces[period:] == pieces[:-period]
        differ = np.flatnonzero(np.concatenate([[True], ~same, [True]]))
        if np.diff(differ).max() - 1 + period >= max(TIMES * period, LEAST):
            return True
    return False
