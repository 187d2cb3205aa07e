"""Which conversations are not worth learning from, and why."""

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.sources import gptme


def reason_to_reject(conversation: Conversation) -> str | None:
    """None for a conversation to keep, else a reason that a count can be kept of."""
    if conversation.source == gptme.SOURCE and (reason := _reason_in_name(conversation.group)):
        return reason
    if not conversation.messages:
        return "no messages"
    if not any(message.role == "user" for message in conversation.messages):
        return "no user turn"
    if not conversation.assistant_turns:
        return "no assistant turn"
    return None


def _reason_in_name(name: str) -> str | None:
    """gptme's own exclusions (logmanager/conversations.py): its tests and its evaluations."""
    if "gptme-evals-" in name:
        return "a gptme evaluation: would leak into evaluation"
    if name.startswith(("tmp", "test-")):
        return "a temporary or test log of gptme"
    return None
