"""Which turns of a gptme conversation teach something: those that did not go wrong in a way that a person or gptme itself marked.

A turn that is bad keeps its place as context, with weight 0 and the reason; the conversation around it is learned. The texts of
results are those of gptme 0.19 to 0.35.1 (tools/shell.py, hooks/cli_confirm.py, util/ask_execute.py, constants.py, complete.py).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mlx_finetune.data.conventions import legacy_calls, modernise, ran_legacy
from mlx_finetune.data.conversation import LEAST_WEIGHT, MOST_WEIGHT, Message
from mlx_finetune.data.tool_calls import Call, calls_in, fingerprint

# How a text ends that was cut off by the person: at the terminal, by the server since 0.29, by the server before.
INTERRUPTED_TEXT = ("^C Interrupted", " [INTERRUPTED]", "\n\n[INTERRUPTED]", "\n\n[interrupted]")
INTERRUPTED = re.compile(
    r"^(?:Interrupted by user|(?:Command|Process) interrupted|Tool '[^'\n]*' was not executed \(interrupted\)"
    r"|MCP operation interrupted)"
    r"|(?:\A|\n\n)Interrupted[ ]?(?=\n\n|\s*\Z)",  # 0.19 to 0.25
    re.MULTILINE,
)
DECLINED = re.compile(
    r"^(?:Declined by user|Execution declined by user|Operation aborted: user chose not to run"
    r"|Aborted, user chose not to run|Execution aborted: user chose not to|(?:Save|Append|Patch) aborted: user (?:refused|chose)"
    r"|User chose not to (?:run command\.|execute this \S+ tool\.)|hashline_edit: operation cancelled by user"
    r"|(?:Editing is not supported|Editing returned no content|Edited content was not confirmed)[^;\n]*; execution aborted)"
    r"|(?:\A|\n\n)(?:(?:Save|Append|Operation|Command execution|Restart) cancelled\.|Cancelled|(?:Selection|Form) cancelled"
    r"|Elicitation cancelled by user|Skipped by user|Operation skipped|Skipped tool \S+|Unknown response: [^\n]*"
    r"|Help shown, please re-run|(?:Copied to clipboard|No changes made), execution skipped)(?=\n\n|\s*\Z)",
    re.MULTILINE,
)
# Small parts of those, found fast: where none of them stands, nothing more is looked for.
INTERRUPTED_PART = ("nterrupted",)
DECLINED_PARTS = ("eclined", "ancelled", "kipped", "chose", "aborted", "Unknown response", "Help shown")
EDITED = re.compile(r"^\(content was edited by user\)", re.MULTILINE)
NO_CALL = re.compile(r"\A\s*<system>\s*No tool call detected")
STUCK = re.compile(r"\A\s*<system>\s*You appear stuck")
HARNESS = re.compile(r"\A\s*<system>")  # user messages that gptme writes itself
CUT_OFF = re.compile(r"^(?:Potential markdown codeblock cut-off detected|Stopped: reached max steps limit)", re.MULTILINE)
FAILED = re.compile(
    r"^(?:Return code: [1-9-]|Traceback \(most recent call last\)|Error during execution|Error executing tool"
    r"|Exception during execution|Command denied|Command timed out|Save aborted|File not found:|Tool '[^'\n]*' is not available"
    r"|(?:=+ )?(?:\d+ passed, )?[1-9]\d* (?:failed|errors?)\b|(?:FAILED|ERROR) \S+::|make: \*\*\*|[A-Za-z.]*Error: )",
    re.MULTILINE,
)
FAILED_ANYWHERE = ("command not found", "No such file or directory", "Patch failed", "chunk not found", "chunk not unique")
READ_ONLY = re.compile(r"\A\s*Ran allowlisted command: ")
RAN = re.compile(r"^Ran (allowlisted )?command: ", re.MULTILINE)
SHOWS = re.compile(r"\s*(?:cat|head|tail|less|nl|grep|rg|sed -n)\b[^|&;<>`$\n]*\Z")  # a command that prints what is in files
ASKS = re.compile(r"\b(?:again|once more|re-?(?:run|try|test|check|do|start)|run|try|test|check|execute|edited|changed|fixed)\b")
# In a text of small letters.
APOLOGY = re.compile(r"\bi(?:'m| am)? (?:deeply |sincerely |very |so )?(?:apologi[sz]e|sorry)\b|\bmy apologies\b")
WAITS = re.compile(r"\A\s*(?:output|wait|jobs|kill|inspect-pane|list-sessions|sleep)\b")  # asks what another process does
WITHOUT_DIGITS = dict.fromkeys(range(ord("0"), ord("9") + 1))
ALWAYS_RUN = frozenset(["shell", "ipython", "save", "append", "patch"])  # tools that no session leaves out unless told to
NO_RESULT = "undone or declined: no result"
SAME_TEXT = 20  # characters; shorter answers ("Done.") may well be given twice
STUCK_TURNS, STUCK_SHARE = 3, 0.3
APOLOGIES, APOLOGY_SHARE = 3, 0.5


@dataclass(frozen=True)
class TurnRules:
    """`modernise`: old conventions become today's instead of context only; `recovery_weight`: of a success after a failure."""

    modernise: bool = False
    recovery_weight: float = 1.0

    def __post_init__(self) -> None:
        assert LEAST_WEIGHT <= self.recovery_weight <= MOST_WEIGHT


@dataclass(frozen=True)
class _Turn:
    """One assistant message with what followed it, up to the next one."""

    place: int
    text: str
    calls: tuple[Call, ...]
    results: str  # what tools and gptme answered
    frame: str  # the same without the output of programs, in which anything may stand
    users: tuple[str, ...]

    @cached_property
    def failed(self) -> bool:
        return _fails(self.results) and not (self._only_shows and not _fails(self.frame))

    @property
    def _only_shows(self) -> bool:
        """Whether its calls printed what stands in files, where failures of others may stand too."""
        if not self.calls or "```stderr" in self.results or "\nstderr:" in self.results:
            return False
        ran = [match[1] for match in RAN.finditer(self.frame)]
        return all(call.tool == "read" or (call.tool == "shell" and SHOWS.match(call.content)) for call in self.calls) or (
            len(ran) == len(self.calls) and all(ran)
        )

    @cached_property
    def asked(self) -> tuple[str, ...]:
        """What a person, not gptme, wrote after it."""
        return tuple(text.strip() for text in self.users if not HARNESS.search(text))

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(fingerprint(call) for call in self.calls)


def _fails(text: str) -> bool:
    return any(part in text for part in FAILED_ANYWHERE) or bool(FAILED.search(text))


def judge(
    messages: Sequence[Message], tool_format: str, rules: TurnRules, tools: frozenset[str] = frozenset()
) -> tuple[Message, ...]:
    """The same messages; an assistant turn that should not be learned has weight 0 and the reason.

    `tools`: those that the session had loaded, as far as they are known.
    """
    turns = _turns(messages, tool_format)
    repeats = _repeats(turns)
    unanswered = _unanswered(turns, ALWAYS_RUN & tools if tools else ALWAYS_RUN)
    judged = list(messages)
    failed_before = False
    for turn in turns:
        message = messages[turn.place]
        if rules.modernise and ran_legacy(turn.text, turn.results):
            message = replace(message, content=modernise(turn.text, turn.results))
            reason = _reason(turn, modern=message.content != turn.text)  # some cannot be written in today's convention
        else:
            reason = _reason(turn, modern=False)
        reason = (
            reason
            or ("repeats an earlier turn" if turn.place in repeats else "")
            or (NO_RESULT if turn.place in unanswered else "")
        )
        recovered = failed_before and bool(turn.calls) and not turn.failed
        weight = 0.0 if reason else rules.recovery_weight if recovered else 1.0
        reason = reason or ("recovers" if recovered else "")
        if reason or weight != 1:
            message = replace(message, weight=message.weight * weight, reason=reason)
        judged[turn.place] = message
        failed_before = turn.failed if turn.calls else failed_before
    return tuple(judged)


def reason_to_reject_turns(messages: Sequence[Message]) -> str | None:
    """Why a judged conversation as a whole is not worth learning: it goes in circles, or mostly apologises."""
    turns = [message for message in messages if message.role == "assistant"]
    repeated = sum(message.reason == "repeats an earlier turn" for message in turns)
    if repeated >= max(STUCK_TURNS, STUCK_SHARE * len(turns)):
        return "goes in circles: repeats its own turns"
    apologies = sum(_apologises(message.content) for message in turns)
    if apologies >= max(APOLOGIES, APOLOGY_SHARE * len(turns)):
        return "apologises in most of its turns"
    return None


def _apologises(text: str) -> bool:
    folded = text.lower()
    return ("apolog" in folded or "sorry" in folded) and bool(APOLOGY.search(folded))


def calls_of(message: Message, tool_format: str) -> list[Call]:
    """The calls of a turn, whichever of the formats its conversation has."""
    return calls_in(message.content, tool_format if tool_format in ("markdown", "xml", "tool") else "markdown")


def failed_turns(messages: Sequence[Message], tool_format: str) -> frozenset[int]:
    """Places of the assistant turns that tools or gptme answered with a failure."""
    return frozenset(turn.place for turn in _turns(messages, tool_format) if turn.failed)


def _turns(messages: Sequence[Message], tool_format: str) -> list[_Turn]:
    places = [i for i, message in enumerate(messages) if message.role == "assistant"]
    turns = []
    for place, following in zip(places, [*places[1:], len(messages)], strict=True):
        after = messages[place + 1 : following]
        results = "\n\n".join(m.content for m in after if m.role in ("system", "tool"))
        users = tuple(m.content for m in after if m.role == "user")
        calls = tuple(calls_of(messages[place], tool_format))
        turns.append(_Turn(place, messages[place].content, calls, results, _outside_fences(results)[0], users))
    return turns


def _outside_fences(text: str) -> tuple[str, bool]:
    """The lines outside of code blocks, and whether the last block is still open."""
    if "```" not in text:
        return text, False
    outside, fence, end, line = [], "", 0, 0
    while (at := text.find("```", line)) >= 0:
        start = text.rfind("\n", line, at) + 1 or line
        stop = text.find("\n", at)
        line = stop + 1 if stop >= 0 else len(text)
        if text[start:at].strip():
            continue
        marks = text[at : stop if stop >= 0 else len(text)].rstrip()
        if not fence and "`" not in marks.lstrip("`"):
            outside.append(text[end:start])
            fence = marks[: len(marks) - len(marks.lstrip("`"))]
        elif fence and marks == fence:
            fence, end = "", line
    return "".join(outside) + ("" if fence else text[end:]), bool(fence)


def _holds(text: str, parts: Iterable[str], pattern: re.Pattern[str]) -> bool:
    return any(part in text for part in parts) and bool(pattern.search(text))


def _reason(turn: _Turn, modern: bool) -> str:
    if f"\n\n{turn.text.strip()[-20:]}".endswith(INTERRUPTED_TEXT) or _holds(turn.frame, INTERRUPTED_PART, INTERRUPTED):
        return "interrupted"
    if _holds(turn.frame, DECLINED_PARTS, DECLINED):
        return "declined by the person"
    if EDITED.search(turn.frame):
        return "edited by the person before it ran"
    if any(NO_CALL.search(text) for text in turn.users):
        return "no tool call detected"
    if any(STUCK.search(text) for text in turn.users):
        return "repeats an earlier turn"
    if CUT_OFF.search(turn.frame) or (not turn.calls and _outside_fences(turn.text)[1]):
        return "cut off"
    if not modern and ran_legacy(turn.text, turn.results):
        return "out-of-date convention"
    return ""


def _unanswered(turns: Sequence[_Turn], tools: frozenset[str]) -> frozenset[int]:
    """Places of turns that made a call which gptme of their time would have run, and to which only the person answered."""
    places = set()
    of_old: frozenset[str] | None = None  # found out where it matters
    for turn in turns:
        if not turn.asked or turn.results.strip():
            continue
        if any(call.tool in tools or call.format == "tool" for call in turn.calls):
            places.add(turn.place)
        elif legacy := legacy_calls(turn.text):
            of_old = _run_of_old(turns) if of_old is None else of_old
            places |= {turn.place} if any(call.tool in of_old for call in legacy) else set()
    return frozenset(places)


def _run_of_old(turns: Iterable[_Turn]) -> frozenset[str]:
    """Tools that this conversation called in a convention of the past."""
    ran = (turn for turn in turns if turn.results and ran_legacy(turn.text, turn.results))
    return frozenset(call.tool for turn in ran for call in legacy_calls(turn.text))


def _repeats(turns: Iterable[_Turn]) -> frozenset[int]:
    """Places of turns that make a call again, or say the same again, although nothing has changed since.

    A change is another call that may have written something, or a word of the person: any that is new, or asks for it again. A
    call that answers differently the second time had its reason.
    """
    seen: dict[Any, tuple[int, int, str]] = {}  # call -> changes by calls, words of the person, its result
    calls = words = 0
    said: set[str] = set()
    repeats = set()
    for turn in turns:
        key: Any = turn.key or (turn.text.strip() if len(turn.text.strip()) >= SAME_TEXT else None)
        waits = bool(turn.calls) and all(WAITS.search(call.content) for call in turn.calls)
        writes = bool(turn.calls) and not READ_ONLY.search(turn.results) and not _wrote_nothing(turn)
        before = seen.get(key) if key and not waits else None
        again = before is not None and before[0] == calls and _alike(before[2], turn.results)
        if before and again and (before[1] == words or not turn.calls):
            repeats.add(turn.place)
        elif writes and not again:
            calls += 1
        if key:
            seen[key] = (calls, words, turn.results)
        words += any(text not in said or ASKS.search(text.lower()) for text in turn.asked)
        said.update(turn.asked)
    return frozenset(repeats)


def _alike(one: str, other: str) -> bool:
    """Equal but for times and counts, which differ each time."""
    return one.translate(WITHOUT_DIGITS) == other.translate(WITHOUT_DIGITS)


def _wrote_nothing(turn: _Turn) -> bool:
    """A file tool that failed left everything as it was."""
    return turn.failed and all(call.tool in ("save", "append", "patch", "patch_many", "morph") for call in turn.calls)
