"""Cross entropy of learned tokens alone, a few rows of logits at a time, with the gradient computed on the way forward."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

LOGITS = {"cpu": 2**23, "cuda": 2**27, "mps": 2**25}  # numbers that exist at once
FEWEST = 32  # rows: fewer would read the head's weights too often
Head = Callable[[torch.Tensor], torch.Tensor]  # hidden states [n, D] -> logits [n, V]


def loss_sum(head: Head, vocabulary: int, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor,
             learned: Sequence[torch.Tensor]) -> torch.Tensor:  # fmt: skip
    """Sum of weight times cross entropy (nats). hidden: [n, D]; targets: int64 [n]; weights: [n].

    `learned`: what is trained of the head itself. No array of [n, V] exists where n is large: neither forward nor backward.
    """
    result: torch.Tensor = _Chunked.apply(head, vocabulary, targets, weights, hidden, *learned)
    return result


def losses_of(head: Head, vocabulary: int, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 [n]: the cross entropy (nats) of each, without a gradient."""
    parts = _chunks(vocabulary, hidden, targets)
    return torch.cat([F.cross_entropy(head(part).float(), target, reduction="none") for part, target in parts])


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Head, vocabulary: int, targets: torch.Tensor, weights: torch.Tensor, hidden: torch.Tensor,
                *learned: torch.Tensor) -> torch.Tensor:  # fmt: skip
        total = torch.zeros((), device=hidden.device)
        gradient, place = torch.empty_like(hidden), 0
        of_head: list[torch.Tensor] | None = None
        for part, target, weight in _chunks(vocabulary, hidden.detach(), targets, weights):
            value, (first, *others) = _part_and_gradient(head, part, target, weight, learned)
            gradient[place : place + len(part)] = first
            of_head = others if of_head is None else [one.add_(other) for one, other in zip(of_head, others, strict=True)]
            total += value
            place += len(part)
        ctx.save_for_backward(gradient, *(of_head or []))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        return None, None, None, None, *(saved.mul_(upstream[0].to(saved.dtype)) for saved in ctx.saved_tensors)


def _part_and_gradient(head: Head, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor,
                       learned: Sequence[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:  # fmt: skip
    """`_part` and its gradient by `hidden` and `learned`, with two arrays of [n, V] at once where autograd has four."""
    with torch.enable_grad():
        logits = head(hidden.requires_grad_())
    known, targets = logits.detach(), targets[:, None]
    largest, where = known.max(-1, keepdim=True)
    of_logits = torch.softmax(known, -1, dtype=torch.float32)
    # The largest probability is 1 / sum(exp(logit - largest)): well above 0, as that of a target may not be.
    losses = largest.float() - of_logits.gather(-1, where).log() - known.gather(-1, targets).float()
    of_logits.scatter_add_(-1, targets, of_logits.new_full(targets.shape, -1.0)).mul_(weights[:, None])
    return (losses[:, 0] * weights).sum(), torch.autograd.grad(logits, [hidden, *learned], of_logits.to(logits.dtype))


def _chunks(vocabulary: int, *arrays: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Rows whose logits are computed together."""
    rows = max(LOGITS[arrays[0].device.type] // vocabulary, FEWEST)
    return zip(*(array.split(rows) for array in arrays), strict=True)
