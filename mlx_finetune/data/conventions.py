"""Calls in conventions that older versions of gptme executed and today's does not, and the same turns in today's convention.

Found in gptme's history (first commit and release with it, first without it):

| what stood in the turn                | it was  | since                        | until                                    |
|---------------------------------------|---------|------------------------------|------------------------------------------|
| ```bash, ```sh                        | shell   | 5003ab1bd v0.1.1 2023-05     | 578adcc92 v0.20.0 2024-10: only ```shell |
| ```terminal                           | shell   | 5003ab1bd v0.1.1 2023-05     | 0aebbffd9 v0.9.1 2023-10                 |
| ```terminal with new_session …        | tmux    | 0c0f987cc v0.12.3 2024-08    | v0.14.0 2024-08, renamed ```tmux         |
| ```python                             | ipython | 5003ab1bd v0.1.1 2023-05     | 42ee56ab7 v0.14.0 2024-08                |
| ```python, once more                  | ipython | v0.15.0 2024-09              | e0c79a41a v0.17.0 2024-09                |
| ```hello.py, ```src/a.py              | save    | dc7e31523 v0.5.0 2023-09     | dd99731c6 v0.26.0 2025-01                |
| `// save: hello.py` below a block     | save    | 5003ab1bd v0.1.1 2023-05     | 9b54cec03 v0.3.0 2023-09                 |
| a line `terminal: ls`, `python: 1`    | both    | 5003ab1bd v0.1.1 2023-05     | 0e3a7c5b5 v0.4.0 2023-09                 |
| `<python>` in `<tool-use>`            | ipython | v0.17.0 2024-09              | d4407e308 v0.26.0 2025-01                |
| `@shell: {…}`, no id                  | any     | v0.25.0 2024-12              | 1934fcf11 v0.26.0 2024-12                |
| ```tmux with new_session, send_keys … | tmux    | 0c0f987cc v0.12.3 2024-08    | e1119abee v0.30.0 2025-11: new-session   |
| ```todoread, ```todowrite             | todo    | ce3bfe72b v0.28.1 2025-08    | 76732bca0 2026-02: ```todo read          |
| ```youtube                            | youtube | v0.16.0 2024-09              | e97772965 2026-03: a plugin              |
| ```view_anchored, ```patch_anchored   | these   | 74713885e 2026-06            | not in 0.35.1                            |

```py, ```ipython, ```save, ```append and ```patch of any age run today. There was no block that reads a file: `cat` did.
Fences that were indented, or closed behind other text on their line, ran until v0.10.5; they are not recognised.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from mlx_finetune.data.fences import Lines
from mlx_finetune.data.native import arguments_of, json_end
from mlx_finetune.data.tool_calls import DEFAULT_TOOLS, FORMER_TAGS, PARAMETERS, Call, calls_in, former_tag
from mlx_finetune.data.xml_calls import xml_calls

FENCE = re.compile(r"(`{3,})(.*)", re.DOTALL)
SAVE_LINE = re.compile(r"\s*// save:\s*(\S[^:]*)\Z")
PATH = re.compile(r"[^\s{}<>|*?\"'`:]+(?: [^\s{}<>|*?\"'`:]+)*")
COMMAND_LINE = re.compile(r"(terminal|python): (\S[^\r\n]*)")
OLD_TMUX = re.compile(r"\s*(?:new_session|send_keys|inspect_pane|kill_session|list_sessions)\b")
NO_ID = re.compile(r"^@(\w+):\s*(?=\{)", re.MULTILINE)
# What most turns do not hold, and then nothing more is looked for: a fence that is neither bare nor of today's commonest tools...
MAY_HOLD = re.compile(
    r"^(?:`{3,}(?!(?:shell|ipython|(?:save|append|patch) [^\n]*)?[ \t]*$)|[ \t]*// save:|terminal: |python: |@\w+:)|<python|\r",
    re.MULTILINE,
)
RENAMED = {"todoread": "read", "todowrite": "write"}
MOST_RESULTS = 100  # of one tool after one turn
MOST_BLOCKS = 1000  # of one turn that are looked at
GONE = frozenset({"youtube", "view_anchored", "patch_anchored"})

# The first line of a result, by the tool that gives it (v0.1.1 to 0.35.1).
FRAMES = {
    "shell": re.compile(r"^Ran command:\s*(?:```bash\n)?", re.MULTILINE),
    "ipython": re.compile(r"^Executed code block\.|\A>>> ", re.MULTILINE),  # >>> in v0.1.1
    "save": re.compile(r"^Saved to (.+)$", re.MULTILINE),
    "append": re.compile(r"^Appended to ", re.MULTILINE),
    "patch": re.compile(r"^Patch (?:successfully )?applied", re.MULTILINE),
    "tmux": re.compile(r"^(?:Running ['`]|Sent '|Pane content|Killed tmux session|Active tmux sessions)", re.MULTILINE),
    "todo": re.compile(r"^(?:(?:Added|Updated|Removed) todo|Cleared \d+|[^\w\n]{0,8}Todo (?:List|list is empty))", re.MULTILINE),
}
# Results that name no tool: whatever ran, failed.
FAILED = re.compile(
    r"^(?:An error occurred: |Error during execution: |Error: Unknown command|Unknown command: |SyntaxError: |Patch failed: "
    r"|Syntax error during compilation|Here is a summary of the response:)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class LegacyCall:
    """One call in a convention of the past. `tool` is today's name of what ran; `argument` a path.

    `modern` is what stands in today's convention from `start` to `end`; None where none of it, with the content as it is, would
    run today.
    """

    tool: str
    argument: str
    content: str
    start: int
    end: int
    modern: str | None


def legacy_calls(text: str) -> list[LegacyCall]:
    """Everything in the text that some older version would have executed and today's would not, in order."""
    if not MAY_HOLD.search(text):
        return []
    fenced, plain = _fenced_and_plain(text)
    found = [*fenced, *_command_lines(text, plain), *_without_id(text, plain), *_old_xml(text)]
    return sorted(found, key=lambda call: call.start)


def ran_legacy(text: str, result: str) -> bool:
    """Whether a legacy call of this turn ran, by the tool results that follow the turn. One that was declined did not run."""
    return bool(result.strip()) and bool(_that_ran(text, legacy_calls(text), result))


def modernise(text: str, result: str | None = None) -> str:
    """The turn in today's convention: its fence lines (and `// save:` lines) change, its content does not.

    With the tool results that follow the turn, those calls change that they show to have run; what was only shown stays. Without
    them, a turn that makes a call of today's stays as it is; where it ends in a legacy block only that one changes, because
    generation stopped there; else all of its blocks do. A turn whose calls, read by today's rules, would not be the same stays.
    """
    legacy = legacy_calls(text)
    if result is not None:
        legacy = _that_ran(text, legacy, result)
    else:
        legacy = [] if _runs_today(text) else [call for call in legacy if _surely(call, text)]
        legacy = legacy[-1:] if legacy and not text[legacy[-1].end :].strip() else legacy
    changed = [call for call in legacy if call.modern is not None]
    if not changed or len(legacy) >= MOST_BLOCKS:
        return text
    parts, place = [], 0
    for call in changed:
        parts += [text[place : call.start], call.modern or ""]
        place = call.end
    modern = "".join([*parts, text[place:]])
    tool_format = "xml" if xml_calls(modern) else "markdown"
    meant = [*map(_said, calls_in(text, tool_format)), *map(_said, changed)]
    return modern if sorted(map(_said, calls_in(modern, tool_format))) == sorted(meant) else text


def _surely(call: LegacyCall, text: str) -> bool:
    """Whether it needs no result to be told from prose, and from "```js src/a.js"."""
    return " " not in call.argument and not COMMAND_LINE.match(text[call.start : call.end])


def _said(call: Call | LegacyCall) -> tuple[str, str, str]:
    return call.tool, call.argument, call.content


def _that_ran(text: str, legacy: Sequence[LegacyCall], result: str) -> list[LegacyCall]:
    """Those of the legacy calls that the results name; a failure that names no tool belongs to the last one."""
    if not legacy or not result.strip():
        return []
    frames = {tool: list(islice(frame.finditer(result), MOST_RESULTS)) for tool, frame in FRAMES.items()}
    today = {(call.tool, _key(call)) for call in _runs_today(text)}
    ran = []
    for call in legacy:
        other = bool(today) if call.tool not in FRAMES else call.modern is not None and (call.tool, _key(call)) in today
        if not other and _named(call, frames.get(call.tool), result):
            ran.append(call)
    if not ran and not today and FAILED.search(result):
        return [legacy[-1]]
    # Results of ipython do not repeat the code: where there are fewer than blocks, the last blocks it is.
    shown = sum(call.tool == "ipython" for call in ran) - len(frames["ipython"])
    kept = []
    for call in ran:
        shown -= call.tool == "ipython"
        if call.tool != "ipython" or shown < 0:
            kept.append(call)
    return kept


def _runs_today(text: str) -> list[Call]:
    return [call for tool_format in ("tool", "xml") for call in calls_in(text, tool_format)]


def _key(call: Call | LegacyCall) -> str:
    """What the results of a tool repeat of its call: the command, the path."""
    if call.tool == "shell":
        return call.content.strip().removeprefix("$ ")
    return re.sub(r"^(?:~/|\.{1,2}/)+", "", call.argument) if call.tool == "save" else ""


def _named(call: LegacyCall, frames: Sequence[re.Match[str]] | None, result: str) -> bool:
    """Whether there is a result of this call: of the same command or path, where results repeat it; any, for a tool now gone."""
    key = _key(call)
    if call.tool == "shell":
        return bool(key) and any(result.startswith((f"`{key}`", f"{key}\n"), ran.end()) for ran in frames or ())
    if call.tool == "save":
        return any(f"/{saved[1].strip('` ')}".endswith(f"/{key}") for saved in frames or ())
    return frames is None or bool(frames)


def _fenced_and_plain(text: str) -> tuple[list[LegacyCall], list[int]]:
    """The legacy calls in fences, by the plain rule of the old versions (any bare fence closes), and where each line outside
    of all fences begins."""
    lines = Lines(text, 0)
    calls: list[LegacyCall] = []
    plain: list[int] = []
    first = 0
    while first < len(lines.text) and len(calls) < MOST_BLOCKS:
        opening = FENCE.match(lines.text[first])
        if not opening:
            plain.append(lines.start[first])
            first += 1
            continue
        bare = (i for i in range(first + 1, len(lines.text)) if lines.text[i].rstrip() == opening[1])
        last = next(bare, None)
        if last is None:
            break
        calls += _in_fence(text, lines, first, last, opening)
        first = last + 1
    return calls, plain


def _in_fence(text: str, lines: Lines, first: int, last: int, opening: re.Match[str]) -> Iterator[LegacyCall]:
    """The call that a block was, if any, with the block in today's convention."""
    fence, info = opening[1], opening[2].strip()
    content = "\n".join(lines.text[first + 1 : last])
    start, body = lines.start[first], lines.start[first] + len(lines.text[first])
    below = next((i for i in range(last + 1, min(last + 3, len(lines.text))) if lines.text[i].strip()), None)
    saved = SAVE_LINE.match(lines.text[below]) if below is not None else None
    if saved and below is not None:
        path, place = saved[1].strip(), lines.start[below]
        modern = f"{fence}save {path}{text[body:place]}"  # where the line was, a blank one stays
        yield LegacyCall("save", path, content, start, place + len(lines.text[below]), modern)
    elif call := _meaning(info, content):
        tool, argument, today = call
        end = lines.start[last] + len(lines.text[last])
        gap = "\n" if tool == "save" and below == last + 1 else ""  # else the fence would not close
        yield LegacyCall(tool, argument, content, start, end, today and f"{fence}{today}{text[body:end]}{gap}")


def _meaning(info: str, content: str) -> tuple[str, str, str | None] | None:
    """Tool, argument and today's info string of a block that runs no more; None where it never ran, or still does."""
    word, _, argument = info.partition(" ")
    if word in GONE:
        return word, argument, None
    if info in ("tmux", "terminal") and OLD_TMUX.match(content):
        return "tmux", "", None
    if info in RENAMED:
        return "todo", RENAMED[info], f"todo {RENAMED[info]}"
    tool = former_tag(info)
    if tool == "save":
        return (tool, info, f"save {info}") if PATH.fullmatch(info) and word not in FORMER_TAGS else None
    return (tool, "", tool) if tool else None


def _command_lines(text: str, plain: Sequence[int]) -> Iterator[LegacyCall]:
    for start in plain:
        if command := COMMAND_LINE.match(text, start):
            tool = "shell" if command[1] == "terminal" else "ipython"
            yield LegacyCall(tool, "", command[2], start, command.end(), f"```{tool}\n{command[2]}\n```")


def _without_id(text: str, plain: Sequence[int]) -> Iterator[LegacyCall]:
    starts, end = set(plain), 0
    for call in NO_ID.finditer(text):
        if call.start() < end or call.start() not in starts or call[1] not in DEFAULT_TOOLS | {"python"}:
            continue
        stop = json_end(text, call.end())
        if stop is None:
            return
        arguments, end = arguments_of(text[call.end() : stop]), stop
        if arguments is not None:
            tool = "ipython" if call[1] == "python" else call[1]
            argument, content = (str(arguments.get(key, "")) for key in PARAMETERS.get(tool, ("", "")))
            yield LegacyCall(tool, argument, content, call.start(), end, None)


def _old_xml(text: str) -> Iterator[LegacyCall]:
    for call in xml_calls(text):
        element = text[call.start : call.end]
        if call.tool == "python" and not call.invoked and element.endswith("</python>"):
            modern = f"<ipython{element.removeprefix('<python').removesuffix('</python>')}</ipython>"
            yield LegacyCall("ipython", call.argument, call.content, call.start, call.end, modern)
