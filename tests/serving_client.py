"""A client of the server, by the standard library alone, so that it may also send what no client would."""

import http.client
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Got:
    status: int
    headers: dict[str, str]
    body: Any  # JSON, or text where it is none


@contextmanager
def connected(url: str) -> Iterator[http.client.HTTPConnection]:
    parts = urlsplit(url)
    assert parts.hostname
    with closing(http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)) as connection:
        yield connection


def send(url: str, path: str = CHAT, body: Any = None, method: str = "POST", **headers: str) -> Got:
    """`body`: bytes as they are, anything else as JSON."""
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    with connected(url) as connection:
        connection.request(method, path, raw, sent)
        answer = connection.getresponse()
        text = answer.read().decode()
        kind = answer.headers.get("content-type", "")
        return Got(answer.status, dict(answer.headers), json.loads(text) if kind == "application/json" else text)


def asked(model: str, *texts: str, **more: Any) -> dict[str, Any]:
    """A request: a user's message, an answer, a user's message, and so on; greedy unless told otherwise."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 16} | more


def text_of(got: Got) -> str:
    assert got.status == 200, got
    return str(got.body["choices"][0]["message"]["content"])


def events(got: Got) -> list[dict[str, Any]]:
    """The objects of a stream, up to its end."""
    assert got.status == 200, got
    assert isinstance(got.body, str)
    lines = [part for part in got.body.split("\n\n") if part and not part.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def streamed_text(got: Got) -> str:
    return "".join(each["choices"][0]["delta"].get("content") or "" for each in events(got) if each["choices"])
