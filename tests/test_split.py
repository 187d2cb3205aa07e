"""Who is held out and who is set aside: whole groups, the newest or the same ones for ever, and never one that is trained on."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_finetune.config import make_config
from mlx_finetune.data.clusters import place
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.entries import Entry, entries, read_entry, seconds
from mlx_finetune.data.split import MOST_TREES_HELD_OUT, Split, lowest, newest, split
from mlx_finetune.errors import UserError

GROUPS = [f"2026-01-{i}" for i in range(2000)]


def entry(group: str, time: float = -math.inf, source: str = "gptme", name: str = "") -> Entry:
    return Entry(source, group, name or group, time, Path("all.jsonl"), 1, 0, 0, "", 0)


def parted(everything: Sequence[Entry], **settings: Any) -> Split:
    """Split, and proof that each conversation stands in one place, and each group in one split."""
    result = split(everything, make_config(settings, "test"))
    parts = {"train": result.train, "valid": result.valid, "test": result.test}
    assert sum(map(len, parts.values())) + result.left_out.total() == len(everything)
    groups = {name: {e.group for e in part} for name, part in parts.items()}
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not groups[one] & groups[other]
    return result


def random_entries(random: np.random.Generator, count: int) -> list[Entry]:
    """Of all sources, with groups of several, some of them over sources, some without a time."""
    made = []
    for i in range(count):
        source = str(random.choice(("gptme", "openassistant", "chat")))
        group = f"{source if random.random() < 0.9 else 'any'}-{random.integers(0, count // 2)}"
        time = float(random.choice((-math.inf, random.integers(0, 1000))))
        made.append(entry(group, time, source, f"{source} {i}"))
    return made


def test_a_place_belongs_to_the_group_for_ever() -> None:
    assert place("2026-06-03-jumping-green-pelican") == 0.22006468347172273
    places = np.array([place(group) for group in GROUPS])
    assert places.min() >= 0 and places.max() < 1
    assert np.all(np.abs(np.histogram(places, 10, (0, 1))[0] - 200) < 60)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.4])
def test_by_hash_a_group_keeps_its_split_as_the_collection_grows(fraction: float) -> None:
    random = np.random.default_rng(1)
    everything = lowest(GROUPS, fraction)
    assert abs(len(everything) / len(GROUPS) - fraction) < 0.03
    for size in (100, 300, 1000):
        some = random.permutation(GROUPS)[:size].tolist()
        assert lowest(some, fraction) == everything & set(some)


def test_order_repeats_and_other_sources_do_not_matter() -> None:
    for by in ("time", "hash"):
        made = [entry(group, float(i % 97)) for i, group in enumerate(GROUPS)]
        trees = [entry(f"t{i}", 1e9, "openassistant") for i in range(30)]
        chats = [entry(f"c{i}", 1e9, "chat") for i in range(30)]
        plain = parted(made, validation_by=by).held_out_groups
        assert len(plain) > 150
        for others in (made[::-1] + made[:50], trees + made + chats):
            assert parted(others, validation_by=by).held_out_groups == plain


@pytest.mark.parametrize("by", ["time", "hash"])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_one_group_stays_and_one_is_held_out_where_there_are_two(fraction: float, by: str) -> None:
    settings = {"valid_fraction": fraction, "validation_by": by}
    assert parted([], **settings).valid == parted([entry("a")], **settings).valid == ()
    for groups in (["a", "b"], GROUPS[:3], GROUPS[:30]):
        result = parted([entry(group) for group in groups], **settings)
        assert {e.group for e in result.valid} == result.held_out_groups
        assert len(result.valid) == 0 if fraction == 0 else 1 <= len(result.valid) < len(groups)


def test_by_time_so_large_a_part_is_held_out_and_nothing_trained_on_is_newer() -> None:
    random = np.random.default_rng(2)
    for _ in range(50):
        made = random_entries(random, int(random.integers(4, 80)))
        fraction = float(random.choice((0.05, 0.2, 0.5)))
        result = parted(made, valid_fraction=fraction)
        latest: dict[str, float] = {}
        for e in made:
            if e.source == "gptme":
                latest[e.group] = max(latest.get(e.group, -math.inf), e.time)
        if len(latest) < 2:
            continue
        assert len(result.held_out_groups) == min(max(round(fraction * len(latest)), 1), len(latest) - 1)
        oldest = min(latest[group] for group in result.held_out_groups)
        assert all(e.time <= oldest for e in result.train if e.source == "gptme")


def test_a_group_counts_as_its_newest_member_and_one_without_a_time_as_oldest() -> None:
    made = [entry("long", 1.0), entry("long", 9.0), entry("short", 5.0), entry("unknown")]
    assert parted(made, valid_fraction=0.3).held_out_groups == {"long"}
    assert parted(made, valid_fraction=0.6).held_out_groups == {"long", "short"}
    assert newest({"a": 1.0, "b": 1.0, "c": 1.0}, 0.3) == lowest("abc", 0.001)


def test_where_there_is_no_gptme_other_chats_are_held_out() -> None:
    made = [entry(f"c{i}", float(i), "chat") for i in range(10)] + [entry(f"t{i}", 99.0, "openassistant") for i in range(10)]
    assert parted(made).held_out_groups == {"c9"}
    assert not parted([*made, entry("g", 1.0)]).held_out_groups


def test_a_few_trees_are_held_out_by_hash_and_never_more_than_fifty() -> None:
    trees = [entry(f"t{i}", source="openassistant") for i in range(3000)]
    own = [entry(f"g{i}", float(i)) for i in range(10)]
    for others in ([], own):
        assert parted([*others, *trees]).held_out_trees == set(sorted((e.group for e in trees), key=place)[:MOST_TREES_HELD_OUT])
        few = parted([*others, *trees[:400]]).held_out_trees
        assert few == {e.group for e in trees[:400] if place(e.group) < 0.05} and 10 < len(few) < 30
        assert len(parted([*others, *trees[:5]]).held_out_trees) == 1
        assert not parted([*others, *trees], openassistant_valid_fraction=0).held_out_trees
    assert not parted([*own, *trees], openassistant_share=0).held_out_trees
    assert parted(trees, openassistant_share=0).held_out_trees


def test_a_group_never_straddles_whatever_its_members_are() -> None:
    random = np.random.default_rng(3)
    for _ in range(100):
        made = random_entries(random, 60)
        by = str(random.choice(("time", "hash")))
        result = parted(made, validation_by=by, test_fraction=0.1, valid_fraction=0.2, openassistant_valid_fraction=0.2)
        assert {e.source for e in result.test} <= {"gptme"} and {e.source for e in result.valid} <= {"gptme", "openassistant"}


def test_the_test_split_never_changes_as_the_collection_grows() -> None:
    random = np.random.default_rng(4)
    made = [entry(f"group {i // 3}", float(random.integers(0, 99)), name=f"log-{i}") for i in range(600)]
    everything = {e.name for e in parted(made, test_fraction=0.1).test}
    assert 30 < len(everything) < 100
    for size in (1, 5, 50, 300):  # of a group any may be left: the others were dropped, or are not collected yet
        some = [made[i] for i in random.permutation(600)[:size]]
        result = parted(some, test_fraction=0.1)
        assert {e.name for e in result.test} == everything & {e.name for e in some}
        assert result.left_out == {}
    assert parted(made).test == ()


def test_what_other_sources_have_of_a_test_group_is_left_out() -> None:
    made = [
        entry(f"g{i}", source=source, name=f"{source} {i}") for i in range(100) for source in ("gptme", "chat", "openassistant")
    ]
    result = parted(made, test_fraction=0.2, valid_fraction=0)
    assert {e.source for e in result.test} == {"gptme"} and 10 < len(result.test) < 30
    assert result.left_out == {"same group as a test conversation": 2 * len(result.test)}


def test_the_test_split_is_not_the_one_that_validation_by_hash_takes() -> None:
    made = [entry(group) for group in GROUPS]
    result = parted(made, test_fraction=0.1, valid_fraction=0.1, validation_by="hash")
    assert 150 < len(result.valid) < 220 and 150 < len(result.test) < 250


@pytest.mark.parametrize(
    ("text", "later"),
    [
        ("2026-01-01T00:00:00+00:00", 0), ("2026-01-01T00:00:00Z", 0), ("2026-01-01T02:00:00+02:00", 0), ("2026-01-01", 0),
        ("2026-01-01T00:00:00", 0), ("2026-01-01T00:00:00.5+00:00", 0.5), ("2025-12-31T23:59:59Z", -1),
    ],
)  # fmt: skip
def test_a_time_is_read_as_iso_8601_has_it(text: str, later: float) -> None:
    assert seconds(text) == (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=later)).timestamp()


@pytest.mark.parametrize("value", ["", "yesterday", None, 17, [], "2026-13-01", "0" * 1000])
def test_what_is_no_time_counts_as_oldest(value: object) -> None:
    assert seconds(value) == -math.inf


def conversation(i: int) -> Conversation:
    messages = (Message("user", f"é {i}\u2028\n"), Message("assistant", "x" * i))
    return Conversation(messages, "gptme", f"g{i}", "private", {"time": f"2026-01-0{i + 1}", "name": f"n{i}"})


def test_each_entry_leads_to_its_conversation_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    write_conversations(path, map(conversation, range(1, 9)))
    text = path.read_bytes()
    path.write_bytes(b"\n  \r\n" + text.replace(b"\n", b"\r\n\n"))
    found = list(entries(path))
    assert [(e.source, e.group, e.name) for e in found] == [("gptme", f"g{i}", f"n{i}") for i in range(1, 9)]
    assert [read_entry(e) for e in reversed(found)] == [conversation(i) for i in range(8, 0, -1)]
    assert found[3].time == datetime(2026, 1, 5, tzinfo=UTC).timestamp() and found[0].place == f"{path}:3"


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    write_conversations(path, map(conversation, range(1, 4)))
    last = list(entries(path))[-1]
    write_conversations(path, map(conversation, range(2, 4)))
    with pytest.raises(UserError):
        read_entry(last)
    path.unlink()
    with pytest.raises(UserError, match=r"all\.jsonl: No such file"):
        read_entry(last)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff", "not UTF-8"),
        (b"{", "not JSON"),
        (b'{"messages": 1}', "no list"),
        (b'{"messages": [], "x": "\\ud800"}', "half a character"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "all.jsonl"
    path.write_bytes(b'{"messages": []}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"all\.jsonl:2: .*{reason}") as error:
        list(entries(path))
    assert error.value.hint
