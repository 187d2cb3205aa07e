"""Native tool calls as gptme writes them into its log: `@shell(call_1): {"command": "ls"}` at the start of a line.

Source: gptme 0.35.1, tools/base.py (`toolcall_re`, `find_json_end`, `iter_from_content`). gptme hands arguments that are not
JSON to the package json_repair; the mistakes that models and old versions of gptme really make are mended here in the same way
(the `repr` of a dict, which the Anthropic client of v0.26 to v0.31 wrote; trailing commas; line ends in strings; unknown
escapes). What is beyond that is no call here.
"""

import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_finetune.data.conversation import Message

HEAD = re.compile(r"^@([^\r\n]+?)\(([\w\-:.]+)\):\s*(?=\{)", re.MULTILINE)
JSON_TOKEN = re.compile(r'\\.|["{}]', re.DOTALL)
FENCE_LINE = re.compile(r"^(`{3,})(.*)$", re.MULTILINE)
LITERAL = re.compile(r""""[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*'|[^"']+""", re.DOTALL)
ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\", '"': '"', "'": "'"}
TRAILING_COMMA = re.compile(r",\s*(?=[}\]])")
PYTHON_NAMES = {"True": "true", "False": "false", "None": '"None"'}  # None becomes a string, as json_repair has it


@dataclass(frozen=True)
class NativeCall:
    """`@name(id): {arguments}`; `start`, `json_start` and `end` are places in the text."""

    start: int
    json_start: int
    end: int
    name: str
    id: str
    arguments: dict[str, Any]


def native_calls(text: str, begin: int = 0) -> Iterator[NativeCall]:
    """Every call of the text from `begin` on, in order, but for those shown in a code block.

    Reading ends at a call whose arguments do not end, as in gptme: it is still being written, or was cut off.
    """
    if not HEAD.search(text, begin):
        return
    fenced = _fenced(text, begin)
    ends = [end for _, end in fenced]
    while head := HEAD.search(text, begin):
        block = bisect_right(ends, head.start())
        if block < len(fenced) and fenced[block][0] <= head.start():
            begin = ends[block]
            continue
        end = json_end(text, head.end())
        if end is None:
            return
        arguments = arguments_of(text[head.end() : end])
        if arguments is not None:
            yield NativeCall(head.start(), head.end(), end, head[1], head[2], arguments)
        begin = end


def json_end(text: str, start: int) -> int | None:
    """Where the object that opens at `start` ends, by counting braces outside of strings; None where it does not."""
    depth, in_string = 0, False
    for token in JSON_TOKEN.finditer(text, start):
        if token[0] == '"':
            in_string = not in_string
        elif token[0] == "{" and not in_string:
            depth += 1
        elif token[0] == "}" and not in_string:
            depth -= 1
            if depth == 0:
                return token.end()
    return None


def arguments_of(text: str) -> dict[str, Any] | None:
    """The object that the text holds, mended where it is almost JSON; None where there is no telling."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        mended = _mended(text)
        try:
            value = None if mended is None else json.loads(mended)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _mended(text: str) -> str | None:
    """JSON from what is almost JSON, or almost a Python dict; None where a string does not end."""
    parts, place = [], 0
    while place < len(text):
        token = LITERAL.match(text, place)
        if token is None:
            return None
        place = token.end()
        if token[0][0] in "\"'":
            string = ESCAPE.sub(_unescaped, token[0][1:-1])
            parts.append(json.dumps(string.rstrip() if string.endswith("\n") else string))
        else:
            plain = TRAILING_COMMA.sub("", token[0])
            parts.append(re.sub(r"\b(?:True|False|None)\b", lambda name: PYTHON_NAMES[name[0]], plain))
    return "".join(parts)


def _unescaped(escape: re.Match[str]) -> str:
    code = escape[1] or escape[2]
    return chr(int(code, 16)) if code else ESCAPED.get(escape[3], escape[0])


def _fenced(text: str, begin: int) -> list[tuple[int, int]]:
    """Start and end of each closed code block, by the plain rule which gptme has for this: no nesting, any fence opens."""
    fences = [(fence.start(), fence.end(), len(fence[1]), not fence[2].strip()) for fence in FENCE_LINE.finditer(text, begin)]
    closing = defaultdict(list)  # of each number of backticks: which fences stand alone on their line
    for index, (_, _, ticks, bare) in enumerate(fences):
        if bare:
            closing[ticks].append(index)
    found, index = [], 0
    while index < len(fences):
        start, _, ticks, _ = fences[index]
        candidates = closing[ticks]
        following = bisect_right(candidates, index)
        if following < len(candidates):
            index = candidates[following]
            found.append((start, fences[index][1]))
        index += 1
    return found


def with_calls_as_text(messages: Sequence[Message]) -> Iterator[Message]:
    """Native calls and their results as gptme has them in its log, where `collect --tool-calls text` leaves them."""
    for message in messages:
        if message.tool_calls:
            calls = [f"@{call.name}({call.id or 'call'}): {_as_written(call.arguments)}" for call in message.tool_calls]
            said = message.content.removesuffix("\n")
            yield replace(message, content="\n".join([said, *calls] if said else calls), tool_calls=())
        elif message.role == "tool":
            yield replace(message, role="system", tool_call_id="")
        else:
            yield message


def _as_written(arguments: str) -> str:
    """Models write other letters than English ones as they are; gptme sends them escaped.

    Half a character stays escaped, and what is no JSON as it is.
    """
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if any("\ud800" <= letter <= "\udfff" for letter in text) else text
