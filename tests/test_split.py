"""Who is held out: whole groups of gptme, the same ones as the collection grows."""

import numpy as np
import pytest

from mlx_finetune.data.conversation import Conversation, Message
from mlx_finetune.data.split import held_out_groups, place

TURNS = (Message("user", "a"), Message("assistant", "b"))


def of(groups: list[str], source: str = "gptme") -> list[Conversation]:
    return [Conversation(TURNS, source, group, "private") for group in groups]


GROUPS = [f"2026-01-{i}" for i in range(2000)]


def test_a_place_belongs_to_the_group_for_ever() -> None:
    assert place("2026-06-03-jumping-green-pelican") == 0.22006468347172273
    places = np.array([place(group) for group in GROUPS])
    assert places.min() >= 0 and places.max() < 1
    assert np.all(np.abs(np.histogram(places, 10, (0, 1))[0] - 200) < 60)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.4])
def test_a_group_keeps_its_split_as_the_collection_grows(fraction: float) -> None:
    random = np.random.default_rng(1)
    everything = held_out_groups(of(GROUPS), fraction)
    assert abs(len(everything) / len(GROUPS) - fraction) < 0.03
    for size in (100, 300, 1000):
        some = random.permutation(GROUPS)[:size].tolist()
        assert held_out_groups(of(some), fraction) == everything & set(some)


def test_order_repeats_and_other_sources_do_not_matter() -> None:
    plain = held_out_groups(of(GROUPS), 0.1)
    assert held_out_groups(of(GROUPS[::-1] + GROUPS[:50]), 0.1) == plain
    assert held_out_groups(of(GROUPS) + of(["t1", "t2"], "openassistant"), 0.1) == plain


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_one_group_stays_and_one_is_held_out_where_there_are_two(fraction: float) -> None:
    assert held_out_groups([], fraction) == held_out_groups(of(["a"]), fraction) == frozenset()
    assert held_out_groups(of([f"t{i}" for i in range(9)], "openassistant"), fraction) == frozenset()
    for groups in (["a", "b"], GROUPS[:3], GROUPS[:30]):
        held_out = held_out_groups(of(groups), fraction)
        assert held_out <= set(groups)
        assert len(held_out) == 0 if fraction == 0 else 1 <= len(held_out) < len(groups)
