"""What an engine computes at once: rows as they are, or folded into trees; and which process computes what. Numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_finetune.data.batches import Batch
from mlx_finetune.data.trees import Placed, Segment, Tree, placed_rows, plan, tokens_of

WORTH = 0.95  # of the tokens of rows: what trees must come down to, for their attention is cut into more parts


@dataclass(frozen=True)
class Work:
    """One forward pass: which tokens, what each sees, and where something is learned."""

    inputs: np.ndarray  # int32 [B, T]
    rows: tuple[Placed, ...]
    tree: Tree | None  # None: each token sees all before it in its row
    places: np.ndarray  # int32 [n], in the flattened inputs
    targets: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n]

    @classmethod
    def of_rows(cls, batch: Batch) -> "Work":
        """What stands behind the last learned token of all is not computed."""
        width = int(batch.columns[-1]) + 1
        weights = batch.weights[:, :width].reshape(-1)
        places = np.flatnonzero(weights > 0).astype(np.int32)
        targets = batch.targets[:, :width].reshape(-1)[places]
        return cls(batch.inputs[:, :width], placed_rows(batch, width), None, places, targets, weights[places])

    @classmethod
    def of_tree(cls, tree: Tree) -> "Work":
        """The whole tree is one row."""
        return cls(tree.inputs[None], tree.rows, tree, tree.places, tree.targets, tree.weights)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Of a row or of padded rows of one width: all of it."""
        return self.tree.segments if self.tree else (Segment(0, self.inputs.shape[1]),)


def works_of(batches: Sequence[Batch], in_trees: bool, most: int | None) -> list[Work]:
    """The micro-batches of a step: as trees of at most `most` tokens where that is less to compute, else as the rows they are.

    `most`: None is as many as the largest of `batches` has.
    """
    if in_trees:
        trees = plan(batches, most or max(batch.inputs.size for batch in batches))
        if sum(len(tree.inputs) for tree in trees) < WORTH * tokens_of(batches):
            return [Work.of_tree(tree) for tree in trees]
    return [Work.of_rows(batch) for batch in batches]


def share_of(sizes: Sequence[int], rank: int, ranks: int) -> list[int]:
    """Which of the pieces process `rank` of `ranks` computes, as indices: the largest first, each to whom has least so far.

    A pure function of its arguments, so that processes need not speak of it; with one process all, in their order.
    """
    if ranks == 1:
        return list(range(len(sizes)))
    loads, mine = [0] * ranks, list[int]()
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        loads[least] += sizes[index]
        if least == rank:
            mine.append(index)
    return sorted(mine)


def in_step(mine: Sequence[int], sizes: Sequence[int], ranks: int) -> list[tuple[int, float]]:
    """`mine` of `share_of`, each with what it counts; where other processes have more, with the smallest piece again for nothing.

    Weights that are cut over processes are gathered by all of them at once, so each has to go through the layers as often.
    """
    most = max(len(share_of(sizes, rank, ranks)) for rank in range(ranks))
    smallest = min(range(len(sizes)), key=lambda i: sizes[i])
    return [(index, 1.0) for index in mine] + [(smallest, 0.0)] * (most - len(mine))
