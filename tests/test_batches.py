"""Batches: every example once an epoch, a pure function of the step; shifted and padded once."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import pytest

from mlx_finetune.data.batches import WIDTHS, Batch, Example, _epoch, efficiency, examples_at, steps_per_epoch


def lengths_of(count: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(count).integers(2, 5000, count).tolist())


def example(tokens: Sequence[int], weights: Sequence[float]) -> Example:
    return Example(np.array(tokens, np.int32), np.array(weights, np.float32), "gptme", "c", (1,))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 17, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 7, 200])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 50])
def test_each_epoch_has_every_example_exactly_once(count: int, batch_size: int, accumulation: int) -> None:
    lengths, steps = lengths_of(count), steps_per_epoch(count, batch_size, accumulation)
    for epoch in range(3):
        micro_batches = [examples_at(lengths, batch_size, accumulation, 3, epoch * steps + step) for step in range(steps)]
        assert all(1 <= len(step) <= accumulation and all(step) for step in micro_batches)
        sizes = [len(batch) for step in micro_batches for batch in step]
        assert sorted(index for step in micro_batches for batch in step for index in batch) == list(range(count))
        assert sorted(sizes)[1:] == [batch_size] * (len(sizes) - 1)


def test_what_a_step_sees_depends_on_nothing_but_lengths_seed_and_step() -> None:
    lengths = lengths_of(40)
    forwards = [examples_at(lengths, 4, 2, 7, step) for step in range(20)]
    _epoch.cache_clear()
    backwards = [examples_at(lengths, 4, 2, 7, step) for step in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert examples_at(lengths, 4, 2, 7, 4) == [[21, 38, 39, 36], [8, 28, 0, 17]]


def test_the_order_differs_between_epochs_and_seeds() -> None:
    lengths = lengths_of(400)
    epochs = [
        [examples_at(lengths, 4, 1, seed, epoch * 100 + step) for step in range(100)] for seed in range(3) for epoch in range(3)
    ]
    assert len({str(epoch) for epoch in epochs}) == 9
    together = [{frozenset(batch) for step in epoch for batch in step} for epoch in epochs]
    assert all(len(one & other) < 50 for i, one in enumerate(together) for other in together[:i])


def test_examples_of_one_length_are_shuffled_too() -> None:
    orders = {str(examples_at((64,) * 12, 12, 1, 0, epoch)) for epoch in range(5)}
    assert len(orders) == 5


def test_padding_is_little_because_neighbours_share_a_batch() -> None:
    lengths = np.array(lengths_of(400))
    steps = [examples_at(tuple(lengths.tolist()), 4, 1, 0, step) for step in range(100)]
    slots = sum(Batch.of([example([1] * n, [0.0] + [1.0] * (n - 1)) for n in lengths[batch]]).inputs.size for (batch,) in steps)
    assert efficiency(tuple(lengths.tolist()), 4, 0) == (lengths - 1).sum() / slots > 0.975


def test_a_batch_is_shifted_and_padded_on_the_right() -> None:
    batch = Batch.of([example([5, 6, 7, 8], [0, 0, 1, 0.5]), example([9, 3], [0, 2])])
    assert batch.inputs.shape == batch.targets.shape == batch.weights.shape == (2, WIDTHS)
    assert batch.inputs[:, :4].tolist() == [[5, 6, 7, 0], [9, 0, 0, 0]]
    assert batch.targets[:, :4].tolist() == [[6, 7, 8, 0], [3, 0, 0, 0]]
    assert batch.weights[:, :4].tolist() == [[0, 1, 0.5, 0], [2, 0, 0, 0]]
    assert not batch.weights[:, 4:].any() and not batch.inputs[:, 4:].any() and not batch.targets[:, 4:].any()
    assert batch.learned == 3.5


def test_the_head_is_needed_where_any_row_learns_something() -> None:
    batch = Batch.of([example([5, 6, 7, 8, 9], [0, 0, 0.5, 0, 1]), example([5, 6, 7, 8], [0, 0, 3, 0])])
    assert batch.columns.tolist() == [1, 3] and batch.columns.dtype == np.int32


def test_an_example_stands_alone_unless_it_is_said_otherwise() -> None:
    one = example([5, 6], [0, 1])
    assert (one.exact_turns, one.own_context, one.family) == (0, False, "")


@pytest.mark.parametrize(("length", "width"), [(2, 32), (33, 32), (34, 64), (65, 64), (66, 96)])
def test_the_width_is_the_next_multiple(length: int, width: int) -> None:
    batch = Batch.of([example([1] * length, [0.0] + [1.0] * (length - 1))])
    assert batch.inputs.shape == (1, width)
    assert batch.learned == length - 1


def test_an_example_or_batch_that_cannot_be_learned_from_is_our_mistake() -> None:
    for tokens, weights in (
        ([1, 2], [1, 1]),
        ([1, 2], [0, 0]),
        ([1, 2, 3], [0, 1]),
        ([1, 2, 3], [0, -1, 2]),
        ([1, 2], [0, np.inf]),
    ):
        with pytest.raises(AssertionError):
            example(tokens, weights)
    with pytest.raises(AssertionError):
        Example(np.array([1, 2]), np.array([0, 1], np.float32), "gptme", "c", ())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_few_relatives_stand_behind_one_another_and_each_example_is_there_once(batch_size: int) -> None:
    lengths, families = lengths_of(60), tuple([0] * 10 + [1] * 3 + list(range(2, 49)))
    steps = steps_per_epoch(60, batch_size, 8)
    epoch = [batch for step in range(steps) for batch in examples_at(lengths, batch_size, 8, 3, step, families)]
    assert sorted(i for batch in epoch for i in batch) == list(range(60))
    assert Counter(map(len, epoch)) == Counter(map(len, examples_at(lengths, batch_size, 1000, 3, 0)))
    if batch_size == 1:
        of = [families[batch[0]] for batch in epoch]
        runs = [(family, len(list(same))) for family, same in groupby(of)]
        assert {length for family, length in runs if family == 0} <= {2, 4, 6, 8, 10}  # 4 + 4 + 2, where they meet by chance
        assert [length for family, length in runs if family == 1] == [3]
        assert [batch[0] for batch in epoch if families[batch[0]] == 1] == [10, 11, 12]
