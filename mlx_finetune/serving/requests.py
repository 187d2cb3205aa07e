"""A chat request of OpenAI's API, checked: what of it is read, and what is refused because it could not be honoured."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from mlx_finetune.data.conversation import Message, Role, ToolCall
from mlx_finetune.serving.sampling import Sampling

MOST_STOPS, LONGEST_STOP = 16, 1000  # stop strings, and characters of one
ROLES: tuple[Role, ...] = get_args(Role)
ROLE_NAMES = {"system": "developer"}  # OpenAI's newer name
# Settings that change what is to be answered and are not there, with the values that ask for nothing.
NOT_THERE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "tool_choice": ("auto", "none"),
}


class Refusal(Exception):
    """A request that is not answered, in the words of OpenAI's errors."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def to_json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = {401: "authentication_error", 403: "permission_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class ChatRequest:
    """What was asked. `limit`: most tokens of the answer; None where nothing was said."""

    model: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    limit: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    one_call: bool
    stream: bool
    with_usage: bool


def read_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request; raises Refusal where it is none."""
    try:
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise Refusal("half a character (a lone surrogate) in the body", code="invalid_json") from error
    except (ValueError, RecursionError) as error:  # ValueError: also more digits than Python reads, and NaN
        raise Refusal(f"the body is not JSON: {getattr(error, 'msg', str(error))[:200]}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise Refusal("the body is not a JSON object", code="invalid_json")
    return value


def read_request(body: Mapping[str, Any]) -> ChatRequest:
    """Raises Refusal, with the name of the field, for what is of a wrong kind or not there."""
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise Refusal("model is missing, or not a name", "model")
    for name, idle in NOT_THERE.items():
        if body.get(name) is not None and body[name] not in idle:
            raise Refusal(f"{name} = {_short(body[name])} is not supported here", name, "unsupported_parameter")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal("messages is missing, or not a list of messages", "messages")
    tools = () if body.get("tool_choice") == "none" else _tools(body.get("tools"))
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    limit = _number(body, name, 1, None, whole=True)
    return ChatRequest(
        model=body["model"],
        messages=tuple(_message(one, f"messages[{place}]") for place, one in enumerate(messages)),
        tools=tools,
        limit=None if limit is None else int(limit),
        sampling=_sampling(body),
        stop=_stop(body.get("stop")),
        one_call=not _flag(body, "parallel_tool_calls", True),
        stream=_flag(body, "stream"),
        with_usage=_flag(_options(body), "include_usage"),
    )


def _sampling(body: Mapping[str, Any]) -> Sampling:
    """As OpenAI's API has it, a request that says nothing of the temperature is answered at 1."""
    temperature, top_p = _number(body, "temperature", 0, 2), _number(body, "top_p", 0, 1)
    top_k, min_p = _number(body, "top_k", -1, None, whole=True), _number(body, "min_p", 0, 1)
    seed = _number(body, "seed", None, None, whole=True)
    return Sampling(
        temperature=1.0 if temperature is None else float(temperature),
        top_p=1.0 if top_p is None else float(top_p),
        top_k=max(0, int(top_k or 0)),
        min_p=float(min_p or 0),
        seed=None if seed is None else int(seed) % 2**64,
    )


def _number(body: Mapping[str, Any], name: str, least: float | None, most: float | None, whole: bool = False) -> float | int | None:
    value = body.get(name)
    if value is None:
        return None
    kind = "an integer" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise Refusal(f"{name} = {_short(value)} is not {kind}", name)
    low, high = -math.inf if least is None else least, math.inf if most is None else most
    if not low <= value <= high:
        span = f"{least:g} or more" if most is None else f"from {least:g} to {most:g}"
        raise Refusal(f"{name} = {_short(value)} is not {kind} {span}", name)
    return value


def _flag(body: Mapping[str, Any], name: str, otherwise: bool = False) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise Refusal(f"{name} = {_short(value)} is neither true nor false", name)
    return otherwise if value is None else value


def _options(body: Mapping[str, Any]) -> Mapping[str, Any]:
    value = body.get("stream_options")
    if not isinstance(value, Mapping | None):
        raise Refusal("stream_options is not an object", "stream_options")
    return value or {}


def _stop(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise Refusal("stop is neither a string nor a list of strings", "stop")
    if len(given) > MOST_STOPS or any(len(one) > LONGEST_STOP for one in given):
        raise Refusal(f"stop has more than {MOST_STOPS} strings, or one of more than {LONGEST_STOP} characters", "stop")
    return tuple(one for one in given if one)


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    given = [] if value is None else value
    if not isinstance(given, list):
        raise Refusal("tools is not a list", "tools")
    for place, tool in enumerate(given):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refusal(f"tools[{place}] is no function with a name", f"tools[{place}]")
    return tuple(given)


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise Refusal(f"{place} is not an object", place)
    role = _role(value.get("role"), f"{place}.role")
    calls = _calls(value.get("tool_calls"), place) if role == "assistant" else ()
    content = _content(value.get("content"), f"{place}.content", bool(calls) or role == "assistant")
    answers = value.get("tool_call_id") if role == "tool" else ""
    if not isinstance(answers or "", str):
        raise Refusal(f"{place}.tool_call_id is not text", f"{place}.tool_call_id")
    return Message(role, content, tool_calls=calls, tool_call_id=answers or "")


def _role(value: Any, place: str) -> Role:
    for role in ROLES:
        if value in (role, ROLE_NAMES.get(role, role)):
            return role
    raise Refusal(f"{place} = {_short(value)} is not one of {', '.join(ROLES)}", place)


def _content(value: Any, place: str, may_be_empty: bool) -> str:
    """Text, or parts of text, joined as mlx-lm's server joins them."""
    if isinstance(value, str):
        return value
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, list):
        raise Refusal(f"{place} is neither text nor a list of parts", place)
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            what = f"of type {_short(kind)}: this model reads text only" if isinstance(part, dict) else "no object"
            raise Refusal(f"{place}[{index}] is {what}", f"{place}[{index}]", "unsupported_content")
        if not isinstance(part.get("text"), str):
            raise Refusal(f"{place}[{index}].text is not text", f"{place}[{index}].text")
        texts.append(part["text"])
    return "".join(texts)


def _calls(value: Any, place: str) -> tuple[ToolCall, ...]:
    if not isinstance(value, list | None):
        raise Refusal(f"{place}.tool_calls is not a list", f"{place}.tool_calls")
    calls = []
    for index, call in enumerate(value or ()):
        where = f"{place}.tool_calls[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        name, arguments = (function.get(key) if isinstance(function, dict) else None for key in ("name", "arguments"))
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise Refusal(f"{where} has no function with a name and its arguments as text", where)
        try:
            read = json.loads(arguments or "{}")
            json.dumps(read, ensure_ascii=False).encode()  # no half characters
        except (ValueError, RecursionError) as error:
            raise Refusal(f"{where}.function.arguments is not JSON", where) from error
        if not isinstance(read, dict):
            raise Refusal(f"{where}.function.arguments is not a JSON object", where)
        calls.append(ToolCall(str(call.get("id") or ""), name, arguments))
    return tuple(calls)


def _short(value: Any) -> str:
    """For an error: never more than a few words of what was sent."""
    return repr(value)[:40]
