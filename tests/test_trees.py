"""Trees hold each token that rows begin with once, and say of every learned token what stands before it."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from mlx_finetune.data.batches import Batch, Example
from mlx_finetune.data.trees import LEAST_SHARED, Tree, plan, tokens_of

Learned = Counter[tuple[tuple[int, ...], int]]  # (tokens before it, the token), with the sum of the weights


def row(tokens: Sequence[int], weights: Sequence[float]) -> Example:
    return Example(np.array(tokens, np.int32), np.array(weights, np.float32), "gptme", "id", (1,))


def random_rows(random: np.random.Generator, count: int) -> list[Example]:
    """Rows that go on from a part of an earlier one, or are one over again, or are new."""
    rows: list[Example] = []
    for _ in range(count):
        start: list[int] = []
        if rows and random.random() < 0.8:
            earlier = rows[random.integers(len(rows))].tokens.tolist()
            start = earlier[: random.integers(len(earlier) + 1)]
        tokens = [*start, *random.integers(0, 5, random.integers(0 if len(start) > 2 else 3, 90)).tolist()]
        weights = (random.random(len(tokens)) < 0.3) * random.choice((1.0, 0.5), len(tokens))
        weights[0], weights[random.integers(1, len(tokens))] = 0.0, 1.0
        rows.append(row(tokens, weights.tolist()))
    return rows


def learned_of_rows(rows: Sequence[Example]) -> Learned:
    found: Learned = Counter()
    for each in rows:
        for place in np.flatnonzero(each.weights > 0).tolist():
            found[tuple(each.tokens[:place].tolist()), int(each.tokens[place])] += float(each.weights[place])  # type: ignore[assignment]
    return found


def learned_of_tree(tree: Tree) -> Learned:
    """By what the segments say alone."""
    found: Learned = Counter()
    for place, target, weight in zip(tree.places.tolist(), tree.targets.tolist(), tree.weights.tolist(), strict=True):
        segment = next(each for each in tree.segments if each.start <= place < each.end)
        seen = [i for low, high in (*segment.sees, (segment.start, place + 1)) for i in range(low, high)]
        assert [int(tree.positions[i]) for i in seen] == list(range(len(seen)))
        found[tuple(tree.inputs[seen].tolist()), target] += weight  # type: ignore[assignment]
    return found


@pytest.mark.parametrize("seed", range(30))
def test_what_is_learned_behind_which_tokens_is_that_of_the_rows(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = random_rows(random, int(random.integers(1, 14)))
    batches = [Batch.of(rows[i : i + 3]) for i in range(0, len(rows), 3)]
    expected = learned_of_rows(rows)
    for most in (10**6, 400, 64):
        trees = plan(batches, most)
        found = sum((learned_of_tree(tree) for tree in trees), Counter())
        assert found.keys() == expected.keys()
        assert all(abs(found[key] - expected[key]) < 1e-5 for key in expected)
        longest = max(len(each.tokens) for each in rows)
        for tree in trees:
            assert len(tree.inputs) <= max(most, longest) and tree.segments[-1].end == len(tree.inputs)
            assert [each.start for each in tree.segments] == [0, *(each.end for each in tree.segments[:-1])]


def test_a_common_beginning_stands_there_once_and_a_short_one_is_not_worth_it() -> None:
    random = np.random.default_rng(0)
    for shared, once in ((LEAST_SHARED, True), (LEAST_SHARED - 1, False)):
        prompt = random.integers(3, 1000, shared).tolist()
        rows = [row([*prompt, *([i] * 50)], [0.0] * shared + [1.0] * 50) for i in (1, 2, 3)]
        (tree,) = plan([Batch.of(rows)], 10**6)
        assert len(tree.inputs) == (shared + 3 * 49 if once else 3 * (shared + 49))
        assert len(tree.segments) == 3 and tokens_of([Batch.of(rows)]) >= 3 * (shared + 49)


def test_what_stands_behind_the_last_learned_token_is_left_out() -> None:
    (tree,) = plan([Batch.of([row(range(3, 103), [0.0] * 40 + [1.0] * 10 + [0.0] * 50)])], 10**6)
    assert tree.inputs.tolist() == list(range(3, 52))
    assert tree.targets.tolist() == list(range(43, 53))
