"""Native tool calls in what a model wrote, in the few ways that chat templates write them; anything else stays text.

A way is taken only where it is proven: it has to read back, call for call, what the model's own template writes of a call.
"""

import json
import re
import secrets
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_finetune.data.conversation import Message, ToolCall
from mlx_finetune.data.emission import THINK, Tools, emission
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.template import ChatTemplate

Found = list[ToolCall]
LETTERS = string.ascii_letters + string.digits
TAGGED = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>\s*", re.DOTALL)
FUNCTION = re.compile(r"<function=([^>\s]+)>(.*)</function>", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
HEADED = re.compile(r"\s*(?:\[TOOL_CALLS\])?\s*([\w.-]+)(?:\[CALL_ID\]([\w-]+))?\[ARGS\]\s*")
DECODER = json.JSONDecoder(strict=False)  # models write line ends into strings
ASKED = Message("user", "What is here?")
SCHEMAS: tuple[dict[str, Any], ...] = tuple(
    {"type": "function", "function": {"name": name, "description": "D", "parameters": {"type": "object", "properties": values}}}
    for name, values in (
        ("shell", {"command": {"type": "string"}}),
        ("save", {"path": {"type": "string"}, "times": {"type": "integer"}}),
    )
)
PROOF = (
    ("", (("call00001", "shell", {"command": 'echo "a"\nls <b> && \u00e9'}),)),
    ("", (("call00001", "save", {"path": "5", "times": 3}),)),
    ("I look.", (("call00001", "shell", {"command": "ls"}),)),
    ("", (("call00001", "shell", {"command": "ls"}), ("call00002", "save", {"path": "b.py"}))),
)


@dataclass(frozen=True)
class Written:
    """A way to write calls. `marks` begin them, `inside` are others of its marks that may be control tokens.

    `whole`: an answer is nothing but a call, or has none.
    """

    name: str
    marks: tuple[str, ...]
    read: Callable[[str, Tools], Found | None]  # of the text from the first mark on; None where it is not calls to its end
    inside: tuple[str, ...] = ()
    whole: bool = False


def new_id() -> str:
    """Of nine letters and digits: templates of Mistral take no other."""
    return "".join(secrets.choice(LETTERS) for _ in range(9))


def decoder(template: ChatTemplate) -> Callable[[list[int]], str]:
    """Text of tokens with the control tokens among them."""
    return lambda ids: str(template.special.decode(ids, skip_special_tokens=False))


def hidden_of(template: ChatTemplate, way: Written | None) -> set[int]:
    """Control tokens, but for those of thoughts, and those with which calls are written."""
    marks = (*THINK, *((*way.marks, *way.inside) if way else ()))
    return set(template.special_ids) - {template.special.token_to_id(mark) for mark in marks}


def written_text(template: ChatTemplate, way: Written, tokens: Sequence[int]) -> str:
    """What the tokens of a turn say, with what `read_calls` looks for."""
    hidden = hidden_of(template, way)
    return decoder(template)([token for token in tokens if token not in hidden])


def written_by(template: ChatTemplate) -> Written | None:
    """The way in which the template writes calls; None where it writes none, or in another way than those known here."""
    if template.native_refusal:
        return None
    return next((way for way in WAYS if _proven(way, template)), None)


def read_calls(way: Written, text: str, tools: Tools) -> tuple[str, Found]:
    """What an answer says beside its calls, and the calls; all of it text and none where they are not whole."""
    start = _start(way, text)
    found = way.read(text[start:], tools) if start >= 0 else None
    return (text[:start].rstrip(), found) if found else (text, [])


def _start(way: Written, text: str) -> int:
    places = [place for mark in way.marks if (place := text.find(mark)) >= 0]
    if way.whole and any(text[:place].strip() for place in places):
        return -1
    return min(places, default=-1)


def _proven(way: Written, template: ChatTemplate) -> bool:
    """Whether it reads what the template writes: at least of one call, and of every other chat that the template takes."""
    read = [_reads(way, template, said, calls) for said, calls in PROOF]
    return read[0] is True and False not in read


def _reads(way: Written, template: ChatTemplate, said: str, calls: Sequence[tuple[str, str, dict[str, Any]]]) -> bool | None:
    """None where the template does not take the chat."""
    made = tuple(ToolCall(identifier, name, json.dumps(arguments)) for identifier, name, arguments in calls)
    messages = [ASKED, Message("assistant", said, tool_calls=made)]
    try:
        wrote = emission(template, messages, template.render(messages[:1], True, SCHEMAS), SCHEMAS).written
    except Refused:
        return None
    beside, found = read_calls(way, wrote, SCHEMAS)
    same = [(one.name, json.loads(one.arguments)) for one in found] == [(name, arguments) for _, name, arguments in calls]
    return same and beside.rpartition(THINK[1])[2].strip() == said  # before it stands an empty thought, of the template itself


def _call(value: Any, *names: str) -> ToolCall | None:
    """Of a JSON object with a name and arguments under one of `names`."""
    if not isinstance(value, Mapping) or not _is_word(value.get("name")):
        return None
    arguments: Any = next((value[name] for name in names if name in value), {})
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["id"] if _is_word(value.get("id")) else new_id(), value["name"], _text(arguments))


def _is_word(value: Any) -> bool:
    """Whether it is some text without line ends and halves of characters."""
    return isinstance(value, str) and value != "" and value.isprintable()


def _text(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _json(text: str) -> Any:
    """The value; None where it is none."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _all(found: Iterator[ToolCall | None]) -> Found | None:
    calls = list(found)
    return [call for call in calls if call] if all(calls) else None


def _in_tags(text: str, of: Callable[[str], ToolCall | None]) -> Found | None:
    """Neighbouring <tool_call> elements and nothing else."""
    end, inner = 0, []
    while match := TAGGED.match(text, end):
        inner.append(match[1])
        end = match.end()
    return _all(map(of, inner)) if inner and not text[end:].strip() else None


def _hermes(text: str, tools: Tools) -> Found | None:
    return _in_tags(text, lambda inner: _call(_json(inner), "arguments"))


def _in_xml(text: str, tools: Tools) -> Found | None:
    return _in_tags(text, lambda inner: _function(inner, tools))


def _function(text: str, tools: Tools) -> ToolCall | None:
    match = FUNCTION.fullmatch(text)
    if not match:
        return None
    types = _types(match[1], tools)
    arguments = {name: _typed(value, types.get(name)) for name, value in PARAMETER.findall(match[2])}
    return ToolCall(new_id(), match[1], _text(arguments))


def _types(function: str, tools: Tools) -> dict[str, Any]:
    """Of the parameters, as the schemas have them."""
    for tool in tools:
        described = tool.get("function")
        if isinstance(described, Mapping) and described.get("name") == function:
            schema = described.get("parameters")
            properties = schema.get("properties") if isinstance(schema, Mapping) else None
            each = properties.items() if isinstance(properties, Mapping) else ()
            return {name: value.get("type") for name, value in each if isinstance(value, Mapping)}
    return {}


def _typed(text: str, kind: Any) -> Any:
    """A value that stands without quotes: text, unless the schema says otherwise and it is so."""
    if kind in (None, "string") or (isinstance(kind, list) and "string" in kind):
        return text
    value = _json({"True": "true", "False": "false", "None": "null"}.get(text.strip(), text))
    return text if value is None and text.strip() not in ("null", "None") else value


def _of_mistral(text: str, tools: Tools) -> Found | None:
    """A JSON list, or a name with its arguments for each."""
    listed = _json(text.removeprefix("[TOOL_CALLS]"))
    if isinstance(listed, list) and listed:
        return _all(_call(one, "arguments") for one in listed)
    calls: Found = []
    end = 0
    while match := HEADED.match(text, end):
        try:
            arguments, end = DECODER.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            return None
        if not isinstance(arguments, dict):
            return None
        calls.append(ToolCall(match[2] or new_id(), match[1], _text(arguments)))
    return calls if calls and not text[end:].strip() else None


def _of_llama(text: str, tools: Tools) -> Found | None:
    return _all(iter([_call(_json(text.strip().removeprefix("<|python_tag|>")), "parameters")]))


WAYS = (
    Written("hermes", ("<tool_call>",), _hermes, ("</tool_call>",)),
    Written("xml", ("<tool_call>",), _in_xml, ("</tool_call>",)),
    Written("mistral", ("[TOOL_CALLS]",), _of_mistral, ("[ARGS]", "[CALL_ID]")),
    Written("llama", ('{"name"', "<|python_tag|>"), _of_llama, whole=True),
)
