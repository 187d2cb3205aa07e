"""Which conversations are not worth learning from, and why."""

from collections import Counter
from dataclasses import replace

from mlx_finetune.data.conversation import Conversation, Message
from mlx_finetune.data.sources import gptme


def reason_in_name(conversation: Conversation) -> str | None:
    """gptme's own exclusions (logmanager/conversations.py): its tests and its evaluations."""
    if conversation.source != gptme.SOURCE:
        return None
    if "gptme-evals-" in conversation.name:
        return "a gptme evaluation: would leak into evaluation"
    if conversation.name.startswith(("tmp", "test-")):
        return "a temporary or test log of gptme"
    return None


def reason_in_shape(conversation: Conversation) -> str | None:
    """None where somebody asked and the model answered; else a reason that a count can be kept of."""
    if not conversation.messages:
        return "no messages"
    if not any(message.role == "user" for message in conversation.messages):
        return "no user turn"
    turns = [message for message in conversation.messages if message.role == "assistant"]
    if not any(turn.content.strip() or turn.tool_calls for turn in turns):
        return "no assistant turn"
    if not conversation.assistant_turns:
        reasons = Counter(turn.reason or "weight 0" for turn in turns)
        return f"no turn left to learn: {min(reasons, key=lambda reason: (-reasons[reason], reason))}"
    return None


def without_empty_turns(conversation: Conversation) -> Conversation:
    """Turns that say nothing and call nothing become context only."""
    if not any(_is_empty(message) for message in conversation.messages):
        return conversation
    messages = (replace(m, weight=0.0, reason=m.reason or "empty") if _is_empty(m) else m for m in conversation.messages)
    return replace(conversation, messages=tuple(messages))


def _is_empty(message: Message) -> bool:
    return message.role == "assistant" and not (message.tool_calls or message.content.strip())
