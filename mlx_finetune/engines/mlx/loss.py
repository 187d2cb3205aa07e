"""Cross entropy of learned tokens alone, a few rows of logits at a time, with the gradient computed on the way forward."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_finetune.engines.mlx.exponential import exp

LOGITS = 3 * 2**20  # numbers that exist at once
FEWEST, MOST = 64, 256  # rows: fewer would read the head's weights too often
SUM_CHUNK = 128
Head = Callable[..., mx.array]  # hidden states [n, D], and what is trained of the head itself -> logits [n, V]


def loss_sum(
    head: Head, hidden: mx.array, targets: mx.array, weights: mx.array, learned: Mapping[str, mx.array] | None = None
) -> mx.array:
    """Sum of weight times cross entropy (nats). hidden: [n, D]; targets, weights: [n]; `learned`: what is trained of the head.

    No array of [n, V] exists where n is large: neither forward nor backward.
    """
    names = list(learned or ())

    @mx.custom_function
    def chunked(hidden: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        sums: list[mx.array] = []
        gradients: list[mx.array] = []
        of_head: list[mx.array] = []
        for start, end in _chunks(head, hidden):
            part, target, weight = (each[start:end] for each in (hidden, targets, weights))
            if gradients:
                (part,) = mx.depends([part], [gradients[-1], *of_head])

            def with_gradient(part: mx.array, *arrays: mx.array, t: mx.array = target, w: mx.array = weight) -> Any:
                parameters = (dict(zip(names, arrays, strict=True)),) if names else ()
                return _with_gradient(lambda x: head(x, *parameters), part, t, w)

            (_, value), found = mx.value_and_grad(with_gradient, tuple(range(1 + len(arrays))))(part, *arrays)
            gradient, *others = found if arrays else (found,)
            value, gradient, *others = mx.depends([value, gradient, *others], [gradient, value])
            sums.append(value)
            gradients.append(gradient)
            of_head = [one + other for one, other in zip(of_head, others, strict=True)] if of_head else others
        return mx.stack(sums).sum(), mx.concatenate(gradients), *of_head

    @chunked.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        scaled = [(cotangents[0] * output).astype(output.dtype) for output in outputs[1:]]
        return scaled if names else scaled[0]

    outputs: Any = chunked(hidden, *(learned or {}).values())
    value: mx.array = outputs[0]
    return value


def losses_of(head: Head, hidden: mx.array, targets: mx.array) -> np.ndarray:
    """float32 [n]: the cross entropy (nats) of each, without a gradient."""
    parts = []
    for start, end in _chunks(head, hidden):
        logits = head(hidden[start:end]).astype(mx.float32)
        largest, _, total = _raised(logits)
        parts.append(np.array(_of_targets(logits, targets[start:end], largest, total)))
    return np.concatenate(parts)


def _chunks(head: Head, hidden: mx.array) -> list[tuple[int, int]]:
    """Rows of hidden states whose logits are computed together."""
    rows = min(max(LOGITS // head(hidden[:1]).shape[-1], FEWEST), MOST)  # the shape alone: nothing is computed
    return [(start, min(start + rows, hidden.shape[0])) for start in range(0, hidden.shape[0], rows)]


def _with_gradient(head: Head, hidden: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
    """A number whose gradient is that of the loss, and the loss. Each logit is raised once, for both."""
    logits = head(hidden).astype(mx.float32)
    fixed = mx.stop_gradient(logits)
    largest, raised, total = _raised(fixed)
    loss = (_of_targets(fixed, targets, largest, total) * weights).sum()
    gradient = raised * (weights[:, None] / total)
    gradient = gradient.at[mx.arange(targets.size), targets].add(-weights)
    return (logits * gradient).sum(), loss


def _of_targets(logits: mx.array, targets: mx.array, largest: mx.array, total: mx.array) -> mx.array:
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)
    return (mx.log(total) + largest - chosen).squeeze(-1)


def _raised(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Of each row: its largest logit [n, 1], e^(logit - largest) [n, V], and their sum [n, 1].

    Summed in two levels: MLX's CPU sum over 49,152 entries in one pass is off by up to 3e-4.
    """
    largest = logits.max(-1, keepdims=True)
    raised = exp(logits - largest)
    rows, vocabulary = raised.shape
    whole = vocabulary - vocabulary % SUM_CHUNK
    total = raised[:, :whole].reshape(rows, -1, SUM_CHUNK).sum(-1).sum(-1, keepdims=True)
    return largest, raised, total + raised[:, whole:].sum(-1, keepdims=True)


class Caught:
    """Stands in for the layers of a model: lets them run, keeps what they give, and hands on one token of it.

    What the model makes of that token is never computed: it is not asked for.
    """

    def __init__(self, layers: nn.Module) -> None:
        self._layers = layers
        self.hidden: mx.array | None = None

    def __call__(self, *arguments: Any, **named: Any) -> mx.array:
        self.hidden = self._layers(*arguments, **named)
        return self.hidden[:, :1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layers, name)


class Given:
    """Stands in for the layers of a model and gives hidden states that are there already.

    Whatever the model does after its layers (head, tied or not, scale, soft cap) it does token by token.
    """

    def __init__(self, layers: nn.Module, hidden: mx.array) -> None:
        self._layers, self._hidden = layers, hidden

    def __call__(self, *arguments: Any, **named: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layers, name)
