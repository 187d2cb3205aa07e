"""Messages of a log, and messages as plain tuples to compare."""

from mlx_finetune.data.conversation import Message


def said(role: str, content: str, call_id: str = "") -> Message:
    return Message(role, content, tool_call_id=call_id)  # type: ignore[arg-type]


def flat(messages: tuple[Message, ...]) -> list[tuple[str, str, list[tuple[str, str, str]], str]]:
    return [(m.role, m.content, [(c.id, c.name, c.arguments) for c in m.tool_calls], m.tool_call_id) for m in messages]
