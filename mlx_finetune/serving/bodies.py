"""What a server writes: objects of OpenAI's API, whole and in pieces."""

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_finetune.data.conversation import ToolCall
from mlx_finetune.serving.answer import Answer, Thought

DONE = "data: [DONE]\n\n"
WAITING = ": waiting\n\n"  # a comment, which clients skip: the line is alive


@dataclass(frozen=True)
class Reply:
    """The answer to one request, under one id."""

    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Sequence[str], answer: Answer) -> dict[str, Any]:
        """The object of a request that is not streamed."""
        text = "".join(piece for piece in pieces if not isinstance(piece, Thought))
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not answer.calls else None}
        if thought := "".join(piece for piece in pieces if isinstance(piece, Thought)):
            message["reasoning_content"] = thought.rstrip()
        if answer.calls:
            message["tool_calls"] = [call.to_json() for call in answer.calls]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.reason}
        return self._head("chat.completion") | {"choices": [choice], "usage": self.usage(answer)}

    def opening(self) -> str:
        """The first event of a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> str:
        """An event with some of the text."""
        return self._chunk({"reasoning_content" if isinstance(text, Thought) else "content": text})

    def ending(self, answer: Answer, with_usage: bool) -> Iterator[str]:
        """The last events: calls, why it ended, what it took."""
        if answer.calls:
            yield self._chunk({"tool_calls": [_numbered(call, place) for place, call in enumerate(answer.calls)]})
        yield self._chunk({}, answer.reason)
        if with_usage:
            yield _event(self._head("chat.completion.chunk") | {"choices": [], "usage": self.usage(answer)})
        yield DONE

    def usage(self, answer: Answer) -> dict[str, int]:
        """Tokens read and written; the one that ends a turn is not counted."""
        written = len(answer.tokens)
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": written, "total_tokens": self.prompt_tokens + written
        }  # fmt: skip

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _event(self._head("chat.completion.chunk") | {"choices": [choice]})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _numbered(call: ToolCall, place: int) -> dict[str, Any]:
    return {"index": place} | call.to_json()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def error_event(error: dict[str, Any]) -> str:
    """What ends a stream that failed."""
    return _event(error)
