"""Whose text each token of a rendered chat is: that of a message, and so of its role, or the template's own."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mlx_finetune.data.provenance import Span

# What no message says: names of roles, control tokens, schemas of tools, calls of turns that are only read, a prompt of its own.
TEMPLATE = "template"


def tokens_by_role(roles: Sequence[str], spans: Sequence[Span | None], starts: np.ndarray, ends: np.ndarray) -> Counter[str]:
    """How many tokens each role has, and `TEMPLATE`; together all of them.

    `roles` and `spans`: of each message, its role and where it stands in the text, None where nowhere. `starts`, `ends`: int64 [T],
    the characters of each token, the last one exclusive. A token that holds characters of a message and of the template is the
    message's; one that holds some of two messages is that of the first.
    """
    placed = sorted((span.start, span.end, role) for role, span in zip(roles, spans, strict=True) if span)
    begins, closes = (np.array([each[i] for each in placed], np.int64) for i in (0, 1))
    following = np.searchsorted(closes, starts, side="right")  # the first message that ends behind the token's first character
    inside = np.append(begins, np.iinfo(np.int64).max)[following] < ends
    counts = np.bincount(np.where(inside, following, len(placed)), minlength=len(placed) + 1).tolist()
    found = Counter({TEMPLATE: counts.pop()})
    for (_, _, role), count in zip(placed, counts, strict=True):
        found[role] += count
    return found
