"""The calls in an assistant's text, by gptme's own rules, in its three tool formats.

The rules are those of gptme 0.35.1 (tools/base.py, `ToolUse.iter_from_content`) for a finished message. While it streams, gptme
also stops at the first call, and at a save or patch only once a blank line follows its fence; neither changes what a finished
message holds, so neither is a rule here.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from mlx_finetune.data.conversation import Message, ToolCall
from mlx_finetune.data.fences import blocks
from mlx_finetune.data.native import HEAD, arguments_of, json_end, native_calls
from mlx_finetune.data.xml_calls import xml_calls

Format = Literal["markdown", "xml", "tool"]
FORMATS: tuple[str, ...] = get_args(Format)

# Of 0.35.1's tools (tools/*.py, ToolSpec) those that execute something. gh, morph and tmux are there where their program or
# key is; browser, vision, rag, subagent, screenshot and computer are functions to call in ipython, so no block runs them.
DISABLED_BY_DEFAULT = frozenset(
    ["choice", "complete", "elicit", "form", "hashline_edit", "progress", "read", "request_tool_change", "restart", "watch"]
)  # complete and progress are on in autonomous sessions
WITHOUT_BLOCK = frozenset({"convert", "recall"})  # run in the formats xml and tool only
DEFAULT_TOOLS = frozenset(["append", "gh", "ipython", "mcp", "memory", "morph", "patch", "patch_many", "save", "shell", "tmux"])
DEFAULT_TOOLS |= frozenset({"todo", "vent"}) | DISABLED_BY_DEFAULT | WITHOUT_BLOCK
ALIASES = {"py": "ipython"}
PARAMETERS = {  # of a native call: what stands behind the fence, and in the block
    "shell": ("", "command"),
    "ipython": ("", "code"),
    "save": ("path", "content"),
    "append": ("path", "content"),
    "patch": ("path", "patch"),
    "morph": ("path", "edit"),
    "hashline_edit": ("path", "edit"),
    "read": ("path", ""),
    "patch_many": ("", "patches"),
    "tmux": ("", "command"),
    "gh": ("", "command"),
    "mcp": ("", "command"),
}
FORMER_TAGS = {"bash": "shell", "sh": "shell", "terminal": "shell", "python": "ipython"}  # what older versions ran, and as what
OPENING = re.compile(rf"```[^\S\n]*(?:{'|'.join(sorted(DEFAULT_TOOLS))}|py)\b")
MAY_CLOSE = re.compile(r"^.*(?:```|</think).*$", re.MULTILINE)
SORTED = json.JSONEncoder(sort_keys=True)
MOST_READ_AGAIN = 2_000_000  # characters of one turn
TOOL_USE = re.compile(r"^[ \t]*<(?:tool-use|function_calls)>", re.MULTILINE)


@dataclass(frozen=True)
class Call:
    """One runnable call. `argument` is what stands behind the tool's name, such as a path; `arguments` those of a native call.

    `start` and `end` are places in the text: of the block with its fences, of the tool's xml element, of `@name(id): {…}`.
    """

    tool: str
    argument: str
    content: str
    start: int
    end: int
    format: Format
    id: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


def calls_in(text: str, tool_format: str = "markdown", tools: frozenset[str] = DEFAULT_TOOLS) -> list[Call]:
    """The calls that gptme runs of a finished message, in the order in which it runs them.

    `tools` are the names of the tools that count as loaded. In the format tool, markdown blocks run too, and first. In xml the
    whole message must be well-formed (as where gptme has no lxml, which it does not require): else there is no call.
    """
    assert tool_format in ("markdown", "xml", "tool"), tool_format
    if tool_format == "xml":
        return [call for call in _xml_calls(text) if call.tool in tools]
    calls = list(_markdown_calls(text, tools))
    if tool_format == "tool":
        calls += [call for call in _native_calls(text) if call.tool in tools]
    return calls


def fingerprint(call: Call) -> tuple[str, str, str, str]:
    """Equal for calls that do the same, in whichever format they are written."""
    more = ""
    if call.arguments:
        known = PARAMETERS.get(call.tool, ())
        unknown = {key: value for key, value in call.arguments.items() if key not in known or not isinstance(value, str)}
        more = SORTED.encode(unknown) if unknown else ""
    return call.tool, call.argument.strip(), call.content.strip(), more


def format_of(texts: Iterable[str]) -> Format | None:
    """The tool format of a conversation, by what most of its assistant turns hold; None where they hold no call.

    A call that is only shown, in a code block or in another format's call, does not count. Where nothing runs today, blocks
    that older versions ran (```bash, ```hello.py) and xml that is not well-formed still tell.
    """
    votes: dict[Format, int] = {"tool": 0, "xml": 0, "markdown": 0}
    hints = votes.copy()
    for text in texts:
        found, sure = _format_of_turn(text)
        if found:
            (votes if sure else hints)[found] += 1
    counted = votes if any(votes.values()) else hints
    best = max(counted, key=lambda kind: counted[kind])
    return best if counted[best] else None


def format_against(texts: Iterable[str], stated: str) -> Format | None:
    """The one other format of all turns that call; None where a turn has the stated one, or they differ, or none calls."""
    others: set[Format] = set()
    for text in texts:
        found, sure = _format_of_turn(text)
        if found and sure:
            if found == stated:
                return None
            others.add(found)
    return others.pop() if len(others) == 1 else None


def _format_of_turn(text: str) -> tuple[Format | None, bool]:
    """The format of the turn's first call, and whether it is one that runs today."""
    if any(native_calls(text)):
        return "tool", True
    fenced = list(blocks(text))
    first = fenced[0].start if fenced else len(text)
    begun = TOOL_USE.search(text)
    if begun and begun.start() < first:
        return "xml", bool(xml_calls(text))
    if any(_tool_of(block.info) in DEFAULT_TOOLS for block in fenced):
        return "markdown", True
    return ("markdown", False) if any(former_tag(block.info) for block in fenced) else (None, False)


def former_tag(info: str) -> str:
    """The tool that a fence meant to older versions and does not mean today ("" for none): see conventions.py."""
    word = info.partition(" ")[0]
    if word in DEFAULT_TOOLS or word in ALIASES:
        return ""
    return FORMER_TAGS.get(info, "save" if "." in info or "/" in info else "")


def to_native(messages: Sequence[Message]) -> tuple[Message, ...]:
    """A log of the format tool as gptme sends it to an OpenAI-compatible server; what is native already stays as it is.

    Calls in an assistant's text become `tool_calls`; a system message with a `tool_call_id` becomes role tool, or role user
    where no turn before it made that call; neighbouring results of one call become one. Other messages between a call and its
    results come behind them. A call without a result stays without. Source: 0.35.1, llm/llm_openai.py, `_handle_tools`.
    """
    sent: list[Message] = []
    late: list[Message] = []
    made: set[str] = set()
    waiting: set[str] = set()
    for message in messages:
        answers = message.tool_call_id if message.role in ("system", "tool") else ""
        if message.role == "assistant":
            message = _native_turn(message)
            waiting = {call.id for call in message.tool_calls} - {""}
            made |= waiting
        elif answers in made and answers:
            sent.append(replace(message, role="tool"))
            waiting.discard(answers)
            continue
        elif answers:
            message = replace(message, role="user", tool_call_id="")
        if waiting and message.role != "assistant":
            late.append(message)
        else:
            sent += [*late, message]
            late = []
    return tuple(_joined_results([*sent, *late]))


def _joined_results(messages: Iterable[Message]) -> Iterator[Message]:
    last: Message | None = None
    for message in messages:
        if last and last.role == message.role == "tool" and last.tool_call_id == message.tool_call_id:
            last = replace(last, content=f"{last.content}\n\n{message.content}")
            continue
        if last:
            yield last
        last = message
    if last:
        yield last


def _native_turn(message: Message) -> Message:
    """The turn with its calls taken out of its text, as gptme does it, line by line.

    What stands before a call is sent; the rest of the call's last line is not, nor what follows the last call or block that
    runs. A turn of so many blocks that reading them again for each line would take seconds stays text.
    """
    if message.tool_calls:
        return message
    text, begin, read = message.content, 0, 0
    spoken: list[str] = []
    calls: list[ToolCall] = []
    while read <= MOST_READ_AGAIN:
        native = _next_native(text, begin)
        limit = native.line_end if native else len(text)
        block_end, again = _first_block_end(text, begin, limit)
        read += limit - begin + again
        if block_end is not None:
            spoken.append(text[begin:block_end].removesuffix("\n") + "\n")
            begin = block_end
        elif native:
            if text[begin : native.start].strip():
                spoken.append(text[begin : native.start])
            calls.append(native.call)
            begin = limit
        else:
            said = "".join(spoken) if spoken or calls else text
            return replace(message, content=said, tool_calls=tuple(calls))
    return message


@dataclass(frozen=True)
class _Native:
    call: ToolCall
    start: int
    line_end: int


def _next_native(text: str, begin: int) -> _Native | None:
    """The next native call, also in a code block: gptme reads only up to the call, where the block is still open."""
    while head := HEAD.search(text, begin):
        end = json_end(text, head.end())
        if end is None:
            return None
        arguments = arguments_of(text[head.end() : end])
        if arguments is not None:
            call = ToolCall(head[2], _transport_name(head[1]), json.dumps(arguments))
            return _Native(call, head.start(), text.find("\n", end) + 1 or len(text))
        begin = end
    return None


def _transport_name(name: str) -> str:
    """Names that OpenAI's format does not allow, as those of MCP servers may be, are sent under another (native_names.py)."""
    if re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name):
        return name
    return f"{re.sub(r'[^a-zA-Z0-9_-]', '_', name)[:48]}_{hashlib.sha256(f'{name}:0'.encode()).hexdigest()[:12]}"


def _first_block_end(text: str, begin: int, limit: int) -> tuple[int | None, int]:
    """Behind which line the first runnable block is complete, where one is, and how many characters were read for it."""
    read = 0
    opening = OPENING.search(text, begin, limit)
    if opening:
        for line in MAY_CLOSE.finditer(text, opening.end(), limit):
            end = min(line.end() + 1, len(text))
            read += end - begin
            if read > MOST_READ_AGAIN:
                break
            if any(_markdown_calls(text[begin:end], DEFAULT_TOOLS)):
                return end, read
    return None, read


def _tool_of(info: str) -> str:
    word = info.partition(" ")[0]
    return ALIASES.get(word, word)


def _markdown_calls(text: str, tools: frozenset[str]) -> Iterator[Call]:
    runnable = tools - WITHOUT_BLOCK
    for block in blocks(text):
        tool = _tool_of(block.info)
        if tool in runnable:
            yield Call(tool, block.info.partition(" ")[2], block.content, block.start, block.end, "markdown")


def _native_calls(text: str) -> Iterator[Call]:
    for call in native_calls(text):
        tool = ALIASES.get(call.name, call.name)
        argument, content = (call.arguments.get(key) for key in PARAMETERS.get(tool, ("", "")))
        yield Call(
            tool,
            argument if isinstance(argument, str) else "",
            content if isinstance(content, str) else "",
            call.start,
            call.end,
            "tool",
            call.id,
            call.arguments,
        )


def _xml_calls(text: str) -> Iterator[Call]:
    for call in xml_calls(text):
        yield Call(ALIASES.get(call.tool, call.tool), call.argument, call.content, call.start, call.end, "xml")
