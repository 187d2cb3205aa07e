"""What became of the turns of one split: every turn is learned or stands here with the reason."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.exact import Piece


@dataclass
class Tally:
    """Counts that add up over conversations."""

    conversations: Counter[str] = field(default_factory=Counter)  # by source
    examples: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    learned_tokens_by_source: Counter[str] = field(default_factory=Counter)
    tokens_by_role: Counter[tuple[str, str]] = field(default_factory=Counter)  # and by source, which stands first
    placeholder_tokens: int = 0  # in learned turns, where a secret was: read, not learned
    learned_turns: int = 0
    exact_turns: int = 0  # learned turns that stand after exactly the tokens that a server feeds for the same messages
    exact_in_one_rendering: int = 0  # how many it would be if each window were rendered once
    served_as_trained: int = 0  # exact turns before which nothing of the conversation was cut
    turns_of_own_context: int = 0  # examples that exactness takes, and their tokens
    tokens_of_own_contexts: int = 0
    turns_behind_control_text: int = 0  # after text that names a control token, kept as text
    turns_inexact: Counter[str] = field(default_factory=Counter)  # learned in another context than is served, by reason
    turns_too_long: int = 0
    messages_shortened: int = 0
    windows_with_short_prompt: int = 0  # which begin with a part of the system prompt
    messages_left_out: int = 0  # only read, and no window had room for them
    turns_refused: Counter[str] = field(default_factory=Counter)  # by reason
    # Tokens by the count that windows are cut by, a few more a turn than there are.
    turn_tokens: int = 0  # of all turns that are to be learned
    turn_tokens_learned: int = 0  # of those that are
    turn_tokens_by_truncation: int = 0  # if each conversation were cut off at the length of a window, as is usual

    def count(self, piece: Piece, conversation: Conversation) -> None:
        """Counts one example."""
        encoded, turns = piece.encoded, len(piece.window.turns)
        learned = int((encoded.weights > 0).sum())
        self.examples += 1
        self.tokens += len(encoded.tokens)
        self.learned_tokens += learned
        self.learned_tokens_by_source[conversation.source] += learned
        self.tokens_by_role.update({(conversation.source, role): count for role, count in encoded.by_role.items()})
        self.placeholder_tokens += encoded.placeholders
        self.learned_turns += turns
        self.exact_turns += encoded.served
        self.turns_behind_control_text += sum(encoded.as_text)
        whole = piece.window.whole and not conversation.meta.get("not_reproduced")
        self.served_as_trained += encoded.served if whole else 0
        self.turns_of_own_context += piece.own
        self.tokens_of_own_contexts += len(encoded.tokens) if piece.own else 0

    def add(self, other: "Tally") -> None:
        """Counts what the other has counted as well."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        by_role: dict[str, dict[str, int]] = {}
        for (source, role), count in self.tokens_by_role.items():
            by_role.setdefault(source, {})[role] = count
        plain = {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}
        return plain | {"tokens_by_role": by_role}
