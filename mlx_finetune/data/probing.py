"""A chat template is asked with small chats: which role policy serves it, and what it makes of native tool calls."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mlx_finetune.data.conversation import Message, ToolCall
from mlx_finetune.data.encoding import encode, encode_turn
from mlx_finetune.data.policies import POLICIES, joins_answers
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.rows import DROPPED

if TYPE_CHECKING:
    from mlx_finetune.data.template import ChatTemplate

REMEDY = "collect with --tool-calls text"
CONTINUES = "it goes on from an assistant's message, and with this template no server is asked for that"
PROBE = (Message("system", "S"), Message("user", "U"), Message("assistant", "A"), Message("user", "V"), Message("assistant", "B"))
# As gptme sends a chat: three system messages first, the output of tools as later ones, and sometimes a role twice.
GPTME = (
    *(Message("system", text) for text in ("prompt", "boundary", "date")),
    *(Message("user", "do it"), Message("assistant", "call"), Message("system", "output"), Message("assistant", "done")),
    *(Message("user", "why"), Message("user", "tell me"), Message("assistant", "so"), Message("system", "note")),
    *(Message("system", "more"), Message("assistant", "end")),
)
# Two answers in a row, which gptme never sends; other chats have them.
TWICE = (*PROBE[:3], Message("assistant", "A2"), *PROBE[3:])
SCHEMAS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "shell",
            "description": "Runs it.",
            "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
        },
    },
)


def _calling(*ids: str, content: str = "") -> Message:
    calls = tuple(ToolCall(one, "shell", '{"command": "ls"}') for one in ids)
    return Message("assistant", content, tool_calls=calls)


def _session(*calling: Message, notes: bool = False) -> tuple[Message, ...]:
    """A chat in gptme's format tool: each turn of calls with its results, a notice behind them where there are `notes`."""
    body = [Message("system", "prompt"), *([Message("system", "date")] if notes else []), Message("user", "do it")]
    for turn in calling:
        body += [turn, *(Message("tool", "output", tool_call_id=call.id) for call in turn.tool_calls)]
        body += [Message("system", "note")] if notes else []
    return (*body, Message("assistant", "done"), Message("user", "why"), Message("assistant", "so"))


# The least that native calls take, in ids that every template takes; and as gptme sends them, with notices of its own.
NATIVE = _session(_calling("call00001"))
NOTICED = _session(_calling("call00001"), _calling("call00002"), notes=True)
BESIDE = _session(_calling("call00001", content="I look."))
SEVERAL = _session(_calling("call00001", "call00002"))
LONG_IDS = _session(_calling("call_259721471462"))


def chosen(first: "ChatTemplate", own: str) -> "ChatTemplate":
    """The model's `own` template behind the first policy with which it neither raises nor loses text of a chat as gptme sends it.

    Of such policies the first that also serves native tool calls, where one does: a template that cannot write them is still
    one for chats without. Where no policy helps, as it is.
    """
    trim = keeps_blanks(first.with_source(own, POLICIES[0]))
    able: list[ChatTemplate] = []
    fair: list[ChatTemplate] = []  # of those the ones that keep the order of messages
    reasons: list[str] = []
    for policy in POLICIES:
        template = _in_turn(first.with_source(policy.before(own, trim), policy), own)
        refusal = template.refusal_of(PROBE) or template.refusal_of(GPTME)
        reasons.append(refusal or template.misplaces(GPTME))
        able += [] if refusal else [template]
        fair += [] if reasons[-1] else [template]
        if fair == [template] and native_refusal(template) == DROPPED:
            break  # no other policy would help
        if not reasons[-1] and not native_refusal(template, NOTICED):
            template.why = _why(template, fair[0], reasons[0])
            return template
    best = next(iter(fair or able), None) or first.with_source(POLICIES[0].before(own, trim), POLICIES[0])
    best.why = _why(best, best, reasons[0])
    return best


def _why(best: "ChatTemplate", plain: "ChatTemplate", reason: str) -> str:
    """`plain`: with the policy that would do for chats without native calls; `reason`: why not as it is."""
    if best is not plain:
        return f"without it, for native tool calls: {native_refusal(plain, NOTICED)}"
    if not reason:
        return ""
    return f"without it: {reason}" if best.policy.jinja else f"no policy helps: {reason}"


def _in_turn(template: "ChatTemplate", own: str) -> "ChatTemplate":
    """Two answers in a row become one where the template would not take them, and does then."""
    try:
        template.render(TWICE)
    except Refused:
        joining = template.with_source(template.policy.before(own, trim=True, join=True), template.policy)
        return template if _turn_refusal(joining, TWICE) else joining
    return template


def keeps_blanks(template: "ChatTemplate") -> bool:
    """Whether it writes the outer blanks of an assistant's message, which are taken off where it is learned."""
    for chat, place in ((PROBE, 2), (BESIDE, 2)):
        tools = SCHEMAS if chat[place].tool_calls else ()
        blank = [replace(m, content=f"\n {m.content}\n") if i == place else m for i, m in enumerate(chat)]
        try:
            if template.render(blank, tools=tools) != template.render(chat, tools=tools):
                return True
        except Refused:
            continue
    return False


def native_refusal(template: "ChatTemplate", messages: Sequence[Message] = NATIVE) -> str:
    """Why a chat with native tool calls cannot be learned from, neither in one rendering nor turn by turn; empty where it can."""
    try:
        encode(template, messages, SCHEMAS)
    except Refused:
        turns = [messages[: place + 1] for place, message in enumerate(messages) if message.role == "assistant"]
        return next(filter(None, (_turn_refusal(template, turn) for turn in turns)), "")
    return ""


def _turn_refusal(template: "ChatTemplate", messages: Sequence[Message]) -> str:
    try:
        encode_turn(template, messages, SCHEMAS)
    except Refused as reason:
        return str(reason)
    return ""


def check_asked(template: "ChatTemplate", messages: Sequence[Message]) -> None:
    """Looks for what no server would be asked for with this template.

    Raises:
        Refused: native tool calls that it does not write; or a turn that would become a part of the assistant's message before it.
    """
    if any(message.tool_calls for message in messages) and template.native_refusal:
        raise Refused(f"native tool calls cannot be learned with this template ({template.native_refusal}): {REMEDY}")
    behind = (m for before, m in pairwise(messages) if before.role == m.role == "assistant")
    if joins_answers(template.source) and any(message.weight > 0 for message in behind):
        raise Refused(CONTINUES)


def native_oddities(template: "ChatTemplate") -> Iterator[str]:
    """What the template does with native tool calls that a person should know before collecting such; a sentence each."""
    if template.native_refusal:
        yield f"native tool calls cannot be learned with this chat template ({template.native_refusal}): {REMEDY}"
        return
    if native_refusal(template, BESIDE):
        yield "the chat template does not write the text beside a native tool call"
    if native_refusal(template, SEVERAL):
        yield "the chat template takes one native tool call a turn"
    if refusal := native_refusal(template, LONG_IDS):
        yield f"the chat template does not take all ids of native tool calls: {refusal}"
    if native_refusal(template, NOTICED):
        yield "the chat template does not take gptme's notices behind the results of native tool calls"
