"""Trees hold each token that rows begin with once, and say of every learned token what stands before it."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from mlx_finetune.data.batches import Batch, Example
from mlx_finetune.data.trees import LEAST_SHARED, Tree, placed_rows, plan, tokens_of

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


def begun(prompt: int, own: int, count: int) -> list[Example]:
    """Rows of `count` + 40 tokens, the last of which is only a target, whose first 40 are the same."""
    return [row([*range(prompt, prompt + 40), *([own + i] * count)], [0.0] * 40 + [1.0] * count) for i in range(2)]


def test_rows_that_begin_alike_find_each_other_in_any_order() -> None:
    one, two = begun(100, 3, 20), begun(200, 7, 20)
    (tree,) = plan([Batch.of([one[0], two[0]]), Batch.of([two[1], one[1]])], 10**6)
    assert len(tree.inputs) == 2 * (40 + 2 * 19)
    assert [each.sees for each in tree.segments] == [(), ((0, 40),), (), ((78, 118),)]


def test_a_tree_is_as_large_as_is_allowed_and_no_larger() -> None:
    rows, size = [*begun(100, 3, 20), *begun(200, 7, 20)], 40 + 2 * 19
    assert [len(tree.inputs) for tree in plan([Batch.of(rows)], 2 * size)] == [2 * size]
    assert [len(tree.inputs) for tree in plan([Batch.of(rows)], 2 * size - 1)] == [size + 59, 59]
    assert [len(tree.inputs) for tree in plan([Batch.of(rows)], size)] == [size, size]
    assert [len(tree.inputs) for tree in plan([Batch.of(rows)], size - 1)] == [59, 59, 59, 59]
    assert [len(tree.inputs) for tree in plan([Batch.of(rows)], 1)] == [59, 59, 59, 59]


def test_a_row_is_found_again_where_it_was_folded() -> None:
    rows = [*begun(100, 3, 20), row(range(100, 141), [0.0] * 40 + [1.0])]
    for tree in plan([Batch.of(rows)], 10**6):
        assert all((tree.inputs[each.where] == each.inputs).all() for each in tree.rows)
        assert sorted(each.inputs.tolist() for each in tree.rows) == sorted(each.tokens[:-1].tolist() for each in rows)


def test_rows_that_are_not_folded_stand_behind_one_another() -> None:
    batch = Batch.of([row(range(3, 13), [0.0] * 5 + [1.0] * 3 + [0.0] * 2), row(range(20, 24), [0.0, 1.0, 1.0, 1.0])])
    one, two = placed_rows(batch, 7)
    assert one.inputs.tolist() == list(range(3, 10)) and one.where.tolist() == list(range(7))
    assert two.inputs.tolist() == [20, 21, 22] and two.where.tolist() == [7, 8, 9]
    assert tokens_of([batch]) == 2 * 7 and tokens_of([batch, batch]) == 28
