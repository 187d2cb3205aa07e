"""gptme's system prompt: which one a conversation has, and what `gptme --system short` sends in place of the full one.

Source: gptme 0.35.1, prompts/ (`get_prompt`, `prompt_gptme`, `prompt_tools`) and tools/base.py (`get_tool_prompt`). The short
prompt says who gptme is in fewer words, describes the same tools without their examples, and leaves out the skills, the machine
and the date; all else is the same text. So it follows from the full prompt that the log holds, wherever that was written.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal
from xml.sax.saxutils import escape, unescape

from mlx_finetune.data import system_prompt_text as known
from mlx_finetune.data.conversation import Message

System = Literal["keep", "short", "none"]
Kind = Literal["full", "full-noexamples", "short", "other", "none"]

LONGEST_LINE = 2000  # characters of the first line, which names agent and model
LONGEST_CORE = 2**20  # characters up to the end of the tools; beyond, it is no prompt of gptme

_BOUNDARY = """# System Prompt Cache Boundary

Static bootstrap content ends above. Session-volatile context starts below.

---"""
_FIRST_LINE = re.compile(
    r"You are (?:[^\n]+, an agent running in )?gptme v([^\s,]+), [^\n]*\. (?:Currently using model: ([^\n]+))?"
)
_TOOL = re.compile(r"\n\n## (\S+)\n\n\*\*(?:Description|Instructions):\*\* ")
_XML_TOOL = re.compile(r'\n<tool name="([^"\n]*)">\n<(?:description|instructions)>')
_MACHINE = re.compile(
    r"## System Information\n\n\*\*OS:\*\* [^\n]*\n\*\*Working Directory:\*\* ([^\n]*)\n\n## Current Date\n\n"
    r"\*\*Local date:\*\* [^\n]*\n\nDate at session start; per-step time notices give the current time\.(?:\n\n|\Z)"
    r"|<system-info>\n<os>[^\n]*</os>\n<working-directory>([^\n]*)</working-directory>\n</system-info>\n\n"
    r"<current-date>\n[^\n]*\n</current-date>(?:\n\n|\Z)"
)
# What a prompt holds behind the date (then the boundary stays), and what is added to it when the session starts (then it goes).
_RUNTIME = re.compile(
    r"# (?:Agent Config|Project Workspace|Recent Conversation Context)\n\n|## (?:Agent|Project) computed context\n\n"
)
_AT_START = re.compile(r"\Z|<budget:token_budget>|<workspace-agents-warning>")
_FILE_LIST = re.compile(
    r"## Agent Instructions\n\nThe following files contain user-defined rules, preferences, and workflows\. "
    r"\*\*You MUST follow these instructions\*\* - they take precedence over default behaviors\.\n\n(?=- )"
    r"|## Selected files\n\nRead more with `cat`\.\n\n(?=- )"
)
_MEMORY = "## Persistent Memory\n\nThe following memories are shared across sessions (from `"
_WORKSPACE = re.compile(rf"\n\n(?:{_FILE_LIST.pattern}|{re.escape(_MEMORY)}|# Agent Config\n\n)")
_SKILLS = re.compile(r"\n\n## Available Skills\n\nLoad on-demand with `cat <path>`:\n\n- \*\*|\n\n<skills>\n<skill name=")
_SKILLS_END = re.compile(r"`\n\n\*\d+ skills available\*(?=\n\n|\Z)")
_XML_SKILLS_END = re.compile(r"</skill>\n</skills>(?=\n\n|\Z)")
_END_OF_TOOLS = "\n\n*End of Tools List.*\n\n"


@dataclass(frozen=True)
class Prompt:
    """What the leading messages of a conversation are; a field that the text does not tell is empty.

    `reason` says why gptme 0.35.1's own prompt of the same tools cannot be told from it.
    """

    kind: Kind
    version: str = ""
    model: str = ""
    tool_format: str = ""  # empty where only tools are described that read alike in markdown and tool
    tools: tuple[str, ...] = ()
    interactive: bool | None = None
    reason: str = ""


@dataclass(frozen=True)
class Replaced:
    """The leading messages to train on, and the gptme options that serve the same.

    `exact`: gptme 0.35.1 with these options, the same configuration and the same workspace sends these messages, character for
    character. Where it is False, `reason` says why, in few enough wordings to be counted; nothing was then replaced but by "none".
    """

    messages: tuple[Message, ...]
    served_by: tuple[str, ...]
    exact: bool
    reason: str = ""


class _Unknown(ValueError):
    """The prompt has a part of which the short form is not known; the message is the reason."""


def replace_system(
    messages: Sequence[Message], choice: System, tool_format: str, tools: Sequence[str], interactive: bool, model: str
) -> Replaced:
    """The leading system messages of one conversation, kept, shortened or left out.

    They are taken as gptme sends them: merged, files in line. The prompt itself tells its tools, model and mode; what the log says
    of them (`tool_format`, `tools`, `interactive`, `model`; empty where it says nothing) counts only where the prompt does not.
    Later messages are not changed: the numbers in gptme's notices of token usage stay those of the full prompt.
    """
    prompt = describe(messages)
    said = replace(
        prompt,
        tool_format=prompt.tool_format or tool_format,
        tools=prompt.tools or tuple(tools),
        interactive=interactive if prompt.interactive is None else prompt.interactive,
        model=prompt.model or model,
    )
    if choice == "none":
        reason = "gptme has no option to send no system prompt" if messages else ""
        return Replaced((), (), False, reason or prompt.reason)
    if prompt.reason:
        return Replaced(tuple(messages), _options(said), False, prompt.reason)
    if choice == "keep" or prompt.kind == "short":
        return Replaced(tuple(messages), _options(said), True)
    try:
        return Replaced(_shortened(messages), _options(replace(said, kind="short")), True)
    except _Unknown as unknown:
        return Replaced(tuple(messages), _options(said), False, str(unknown))


def describe(messages: Sequence[Message]) -> Prompt:
    """Which prompt the leading messages are: gptme's full or short one, another (a person's own, an older gptme's), or none."""
    if not messages:
        return Prompt("none", reason="no system prompt")
    text = messages[0].content
    start = len("<role>\n") if text.startswith("<role>\n") else 0
    first = _FIRST_LINE.match(text, start, start + LONGEST_LINE)
    if not first:
        return Prompt("other", reason="not gptme's own prompt")
    version, model = first[1], first[2] or ""
    if version != known.VERSION:
        return Prompt("other", version=version, model=model, reason=f"of another gptme than {known.VERSION}")
    core = _core(text)
    if not core:
        return Prompt("other", version=version, model=model, reason="a prompt without tools")
    try:
        prompt, _ = _read_core(core)
    except _Unknown as unknown:
        return Prompt("other", version=version, model=model, reason=str(unknown))
    return prompt


def _options(prompt: Prompt) -> tuple[str, ...]:
    """What to pass to gptme for this prompt, as far as it is known."""
    system = ("--system", prompt.kind) if prompt.kind in ("full", "full-noexamples", "short") else ()
    tools = ("--tools", ",".join(prompt.tools)) if prompt.tools else ()
    tool_format = ("--tool-format", prompt.tool_format) if prompt.tool_format else ()
    alone = ("--non-interactive",) if prompt.interactive is False else ()
    return system + tools + tool_format + alone + (("--model", prompt.model) if prompt.model else ())


def _shortened(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The short prompt in place of a full one. Raises _Unknown where it cannot be told."""
    if len(messages) < 3 or messages[1].content != _BOUNDARY or not (machine := _MACHINE.match(messages[2].content)):
        raise _Unknown("no system information and date where gptme puts them")
    if len(messages) > 3:
        raise _Unknown("the prompt was replaced during the conversation (/model or /tools)")
    first, boundary, last = messages
    core = _core(first.content)
    _, short = _read_core(core)
    context = _without_skills(first.content[len(core) :])
    after = last.content[machine.end() :]
    if _RUNTIME.match(after):
        return (replace(first, content=short + context), boundary, replace(last, content=after))
    if not _AT_START.match(after):
        raise _Unknown("an unknown part behind the date")
    if after:  # no longer parted by the boundary, it is merged into the first message: before the files in line
        text, files = _split_files(context, machine[1] or unescape(machine[2]))
        context = "\n\n".join(part for part in (text, after, files) if part)
        short = short if text else f"{short}\n\n"
    return (replace(first, content=short + context),)


def _core(text: str) -> str:
    """The prompt up to the end of its tools; empty where there are none."""
    start, end = ("\n\n# Tools Overview\n\n## ", _END_OF_TOOLS)
    if text.startswith("<role>\n"):
        start, end = ("\n</role>\n\n<tools>\n<tool name=", "\n</tool>\n</tools>\n\n")
    at = text.find(start, 0, LONGEST_CORE)
    until = text.find(end, at, LONGEST_CORE) if at >= 0 else -1
    return text[: until + len(end)] if until >= 0 else ""


@lru_cache(maxsize=32)  # thousands of logs hold the same few
def _read_core(core: str) -> tuple[Prompt, str]:
    """What a prompt of the known version is, and its short form. Raises _Unknown."""
    xml = core.startswith("<role>\n")
    start = "\n</role>\n\n<tools>" if xml else "\n\n# Tools Overview"
    at = core.index(start)
    kind, interactive, editing, identity = _identity(unescape(core[len("<role>\n") : at]) if xml else core[:at])
    names, sections = _tools(core[at + len(start) :], xml)
    if unknown := [name for name in names if name not in known.OWN_TOOLS]:
        raise _Unknown(f"tools that are not gptme's own: {', '.join(unknown):.80}")
    if editing != " ".join(name for name in ("patch", "save") if name in names):
        raise _Unknown("a prompt that does not fit its tools")
    without = "".join(sections)
    if kind == "full" and core.endswith(without) and known.WITH_EXAMPLES.intersection(names):
        kind = "full-noexamples"
    first = _FIRST_LINE.match(identity, 0, LONGEST_LINE)
    assert first, "the caller has matched it"
    prompt = Prompt(kind, first[1], first[2] or "", "xml" if xml else _format(core, names), names, interactive)
    return prompt, (f"<role>\n{escape(identity)}" if xml else identity) + start + without


def _identity(text: str) -> tuple[Kind, bool, str, str]:
    """Of what stands before the tools: full or short, interactive, the edit tools that it speaks of, and its short form."""
    first, _, rest = text.partition("\n")
    interactive = f"\n\n{known.INTERACTIVE}\n\n" in rest
    paragraph = known.INTERACTIVE if interactive else known.ALONE
    base, _, ending = rest.partition(f"\n\n{paragraph}\n\n")
    call_at_once = known.CALL_AT_ONCE if ending.endswith(known.CALL_AT_ONCE) else ""
    ending = ending.removesuffix(known.CALL_AT_ONCE)
    short_ending = known.SHORT_ENDING + known.SHORT_QUESTION * interactive
    if ending == known.FULL_ENDING + known.FULL_QUESTION * interactive:
        editing_thinking = known.FULL_BASES.get(hashlib.sha256(base.encode()).hexdigest()[:16])
        if editing_thinking:
            short = "\n".join((first, known.short_base(*editing_thinking)))
            return "full", interactive, editing_thinking[0], f"{short}\n\n{paragraph}\n\n{short_ending}{call_at_once}"
    for editing, thinking in known.FULL_BASES.values():
        if ending == short_ending and base == known.short_base(editing, thinking):
            return "short", interactive, editing, text
    raise _Unknown(f"a changed prompt of gptme {known.VERSION}")


def _tools(text: str, xml: bool) -> tuple[tuple[str, ...], list[str]]:
    """The names of the tools, and their descriptions without examples, with what ends the list."""
    found = list((_XML_TOOL if xml else _TOOL).finditer(text))
    if not found or found[0].start() != 0:
        raise _Unknown(f"a changed prompt of gptme {known.VERSION}")
    examples, after = ("\n<examples>\n", "\n</tool>") if xml else ("\n\n### Examples\n\n", "")
    end = len(text) - len("\n</tools>\n\n" if xml else _END_OF_TOOLS)
    sections = []
    for tool, until in zip(found, [*(tool.start() for tool in found[1:]), end], strict=True):
        head, some, _ = text[tool.start() : until].partition(examples)
        sections.append(head + after if some else head)
    return tuple(tool[1] for tool in found), [*sections, text[end:]]


def _format(core: str, names: Sequence[str]) -> str:
    """markdown or tool, by how the tools are described; empty where neither shows."""
    if "code block with the language tag" in core:
        return "markdown"
    called = known.WITH_EXAMPLES.intersection(names)
    if known.WITH_BLOCK.intersection(names) or any(f"\n@{name}: {{" in core for name in called):
        return "tool"
    return "markdown" if any(f"\n```{name}" in core for name in called) else ""


def _without_skills(context: str) -> str:
    """What follows the tools, without the list of skills, which stands before the files of the workspace."""
    workspace = _WORKSPACE.search(context)
    found = list(_SKILLS.finditer(context, 0, workspace.start() if workspace else len(context)))
    if not found:
        return context
    end = (_XML_SKILLS_END if found[0][0].startswith("\n\n<") else _SKILLS_END).search(context, found[0].end())
    if len(found) > 1 or not end:
        raise _Unknown("a list of skills whose end cannot be told")
    return context[: found[0].start()] + context[end.end() :]


def _split_files(context: str, folder: str) -> tuple[str, str]:
    """What follows the tools, parted into its text and the files in line. Raises _Unknown where the text does not tell.

    `folder`: relative to it, gptme names the files that lie in it.
    """
    start = _FILE_LIST.search(context)
    if not start:
        return context, ""
    at, files = start.start(), set[str]()
    while True:
        if listed := _FILE_LIST.match(context, at):
            end = context.find("\n\n", listed.end())
            lines = context[listed.end() : end if end >= 0 else None].split("\n")
            files.update(shown for line in lines for shown in _shown(line.removeprefix("- "), folder))
        elif context.startswith(_MEMORY, at):
            ends = (gap.start() for gap in re.compile(r"\n\n(?=#|````)").finditer(context, at))
            end = next((gap for gap in ends if _FILE_LIST.match(context, gap + 2) or _is_block(context, gap + 2, files)), -1)
        else:
            break
        if end < 0:
            return context, ""
        at = end + 2
    if not _is_block(context, at, files):
        raise _Unknown("files in line that cannot be told from the text")
    return context[: at - 2], context[at:]


def _shown(file: str, folder: str) -> tuple[str, str]:
    return file, file.removeprefix(f"{folder}/")


def _is_block(text: str, at: int, files: set[str]) -> bool:
    """Whether one of the files stands in line here."""
    return text.startswith("````", at) and text[at + 4 : text.find("\n", at)] in files and text.endswith("\n````")
