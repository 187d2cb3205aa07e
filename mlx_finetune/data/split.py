"""Who is held out: gptme conversations only, whole groups, by a hash that does not move when the collection grows."""

import hashlib
from collections.abc import Sequence

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.sources.gptme import SOURCE


def place(group: str) -> float:
    """A number in [0, 1) that belongs to the group on every machine and for ever."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64


def is_held_out(conversation: Conversation, groups: frozenset[str]) -> bool:
    """Whether it is for validation; a conversation of another source never is, whatever its group is called."""
    return conversation.source == SOURCE and conversation.group in groups


def held_out_groups(conversations: Sequence[Conversation], fraction: float) -> frozenset[str]:
    """The gptme groups for validation: those whose place lies below `fraction`.

    With few conversations chance may choose none or all: then one group is held out, or one stays, if there are two or more.
    """
    groups = sorted({c.group for c in conversations if c.source == SOURCE}, key=place)
    if fraction == 0 or len(groups) < 2:
        return frozenset()
    chosen = sum(place(group) < fraction for group in groups)
    return frozenset(groups[: min(max(chosen, 1), len(groups) - 1)])
