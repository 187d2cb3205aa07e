"""Each turn is learned once, near-duplicates stay once, who belongs together is told, whatever the order of reading."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_finetune.data.clusters import place_in_test
from mlx_finetune.data.conversation import Conversation, Message, ToolCall
from mlx_finetune.data.dedupe import Decision, decide
from mlx_finetune.data.fingerprint import Fingerprint, fingerprint, shingles_of
from mlx_finetune.data.minhash import jaccard, shingles, signature
from mlx_finetune.data.sources import gather, openassistant
from mlx_finetune.data.sources.openassistant import EVERYTHING


def talk(name: str, *texts: str, weights: Sequence[float] | None = None, **more: Any) -> Conversation:
    """User and assistant in turn; `weights` of the assistant's turns; `more`: time, source, group."""
    given = iter(weights or [1.0] * len(texts))
    messages = [Message("assistant", text, next(given)) if k % 2 else Message("user", text) for k, text in enumerate(texts)]
    meta = {"name": name, "time": more.get("time", "")}
    return Conversation(tuple(messages), more.get("source", "gptme"), more.get("group", name), "private", meta)


def words(count: int, seed: int) -> str:
    return " ".join(f"w{k}" for k in np.random.default_rng(seed).integers(0, 10**6, count))


def edited(text: str, share: float, seed: int) -> str:
    """The text with that share of its words replaced."""
    random, parts = np.random.default_rng(seed), text.split(" ")
    for place in random.choice(len(parts), round(share * len(parts)), replace=False):
        parts[place] = f"x{random.integers(10**6)}"
    return " ".join(parts)


def decided(conversations: Sequence[Conversation], threshold: float | None = 0.7) -> Decision:
    prints = [fingerprint(one, near=threshold is not None) for one in conversations]
    return decide(prints, lambda i: shingles_of(conversations[i]), threshold)


def named(conversations: Sequence[Conversation], threshold: float | None = 0.7) -> dict[str, tuple[str | None, Any, str]]:
    """For each name: why it is dropped, its context, its group."""
    done = decided(conversations, threshold)
    rows = enumerate(zip(conversations, done.groups, strict=True))
    return {one.name: (done.dropped.get(i), done.context.get(i, ()), group) for i, (one, group) in rows}


BEGINNING = [words(40, seed) for seed in range(4)]
LONG = talk("long", *BEGINNING, *(words(40, seed) for seed in (10, 11, 12, 13)), time="2026-01-02")
FORK = talk("fork", *BEGINNING, *(words(40, seed) for seed in (20, 21)), time="2026-01-03")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("threshold", [0.7, None])
def test_of_a_fork_the_shared_turns_are_context(order: tuple[int, int], threshold: float | None) -> None:
    assert named([(LONG, FORK)[k] for k in order], threshold) == {"long": (None, (), "long"), "fork": (None, (1, 3), "long")}


def test_of_three_forks_each_turn_is_learned_once() -> None:
    third = talk("third", *BEGINNING[:2], words(40, 30), words(40, 31), time="2026-01-01")
    found = named([third, FORK, LONG])
    assert {name: row[:2] for name, row in found.items()} == {"long": (None, ()), "fork": (None, (1, 3)), "third": (None, (1,))}
    assert {row[2] for row in found.values()} == {"third"}  # the earliest of them


def test_beginnings_of_others_are_dropped() -> None:
    chain = [talk(f"first {2 * k}", *BEGINNING[:2], *(words(40, s) for s in range(50, 50 + 2 * k))) for k in range(4)]
    found = named(chain)
    assert [found[one.name][0] for one in chain] == ["beginning of first 6"] * 3 + [None]
    assert len({row[2] for row in found.values()}) == 1


def test_branches_of_a_log_stay_in_its_group_whatever_they_say() -> None:
    branches = [talk(f"b{k}", words(40, k), words(40, k + 9), group="log") for k in range(3)]
    assert named(branches) == {one.name: (None, (), "log") for one in branches}


@pytest.mark.parametrize("threshold", [0.7, None])
def test_a_greeting_that_two_share_does_not_make_them_one_group(threshold: float | None) -> None:
    pair = [talk(f"g{k}", "hi", "Hello! How can I help?", words(60, k), words(60, k + 9)) for k in range(2)]
    found = named(pair, threshold)
    assert found["g0"][2] != found["g1"][2]
    assert sorted(row[1] for row in found.values()) == [(), (1,)]  # it is learned once all the same


@pytest.mark.parametrize("threshold", [0.7, None])
def test_equal_conversations_are_kept_once_from_the_best_source(threshold: float | None) -> None:
    texts = ("What is   HERE?", words(30, 1))
    copies = [talk(source, *texts, source=source) for source in ("openassistant", "chat", "gptme")]
    copies.append(talk("folded", texts[0].lower(), texts[1].upper() + "\n", source="openassistant"))
    found = named(copies, threshold)
    assert {name: row[0] for name, row in found.items()} == {
        "gptme": None,
        "chat": "duplicate of gptme",
        "openassistant": "duplicate of gptme",
        "folded": "duplicate of gptme",
    }
    assert len({row[2] for row in found.values()}) == 1


def test_equal_words_of_the_system_make_no_duplicates_and_other_ones_do_not_hide_them() -> None:
    def with_prompt(one: Conversation, prompt: str) -> Conversation:
        return dataclasses.replace(one, messages=(Message("system", prompt), *one.messages))

    prompt = words(2000, 99)
    assert not decided([with_prompt(talk(f"{k}", words(30, k), words(30, k + 9)), prompt) for k in range(2)]).dropped
    assert decided([with_prompt(talk(f"{k}", "q", words(30, 1)), words(30, k)) for k in range(2)]).dropped


def test_other_calls_are_other_turns() -> None:
    def calling(command: str) -> Conversation:
        call = ToolCall("1", "shell", json.dumps({"command": command}))
        return Conversation((Message("user", "go"), Message("assistant", "", tool_calls=(call,))), "chat", command, "x")

    assert not decided([calling("ls"), calling("rm")]).dropped
    assert decided([calling("ls"), dataclasses.replace(calling("ls"), group="z")]).dropped


def test_a_turn_that_only_one_copy_may_teach_is_learned_from_that_copy() -> None:
    one, other = (talk(name, *BEGINNING, weights=weights) for name, weights in (("one", (0, 1)), ("other", (1, 0))))
    assert {row[:2] for row in named([one, other]).values()} == {(None, ())}
    both = talk("both", *BEGINNING)
    assert {name: row[0] for name, row in named([one, other, both]).items()} == {
        "one": "duplicate of both",
        "other": "duplicate of both",
        "both": None,
    }


@pytest.mark.parametrize("threshold", [0.6, 0.7, 0.8])
def test_near_duplicates_are_those_whose_words_reach_the_threshold(threshold: float) -> None:
    alike = found = 0
    for number in range(120):
        question, answer = words(60, number), words(340, number + 1000)
        pair = [talk("a", question, answer), talk("b", question + " please", edited(answer, 0.001 * number, number))]
        similarity = jaccard(*map(shingles_of, pair))
        alike += similarity >= threshold
        for i, reason in decided(pair, threshold).dropped.items():
            assert similarity >= threshold
            assert reason == f"near-duplicate of {pair[1 - i].name} ({similarity:.2f})"
            found += 1
    assert 20 < alike < 100
    assert found >= alike - 1  # signatures miss one in thousands


def test_without_a_threshold_near_duplicates_stay() -> None:
    pair = [talk("a", "q", words(100, 1)), talk("b", "r", words(100, 1))]
    assert decided(pair).dropped and not decided(pair, None).dropped


def test_of_near_duplicates_the_longest_stays_then_the_newest() -> None:
    old, new = talk("old", "q", words(100, 1), time="2025-01-01"), talk("new", "r", words(100, 1), time="2026-01-01")
    longer = talk("longer", "s", words(100, 1), "t", words(10, 2), time="2024-01-01")
    assert {name: row[0] is None for name, row in named([old, new]).items()} == {"old": False, "new": True}
    assert [name for name, row in named([old, new, longer]).items() if row[0] is None] == ["longer"]


def test_what_is_like_something_dropped_stays_and_belongs_to_it() -> None:
    """A is like B and B like C, but A is not like C."""
    text = words(400, 1).split(" ")
    b = talk("b", "q", " ".join(text), "r", "s", time="2025-01-01")
    a = talk("a", "q1", " ".join([*words(50, 2).split(" "), *text[50:]]), "r", "s", time="2027-01-01")
    c = talk("c", "q2", " ".join([*text[:350], *words(50, 3).split(" ")]), "r", "s", time="2024-01-01")
    sets = [shingles_of(one) for one in (a, b, c)]
    assert jaccard(sets[0], sets[1]) > 0.7 and jaccard(sets[1], sets[2]) > 0.7 and jaccard(sets[0], sets[2]) < 0.7
    found = named([c, a, b])
    assert {name: row[0] and row[0][:19] for name, row in found.items()} == {"a": None, "b": "near-duplicate of a", "c": None}
    assert {row[2] for row in found.values()} == {"c"}


@pytest.mark.parametrize("text", ["", "ok", " \n", "\ud83d", "x" * 10_000])
def test_texts_without_words_to_compare_are_duplicates_only_of_equal_ones(text: str) -> None:
    assert not decided([talk("a", text, "yes"), talk("b", text, "no")]).dropped
    assert len(decided([talk("a", text, "yes"), talk("b", text, "yes")]).dropped) == 1
    assert not decided([Conversation((), "chat", "none", "x"), talk("a", text)]).dropped


def test_scripts_without_blanks_are_compared_by_their_signs() -> None:
    signs = [chr(0x4E00 + int(k)) for k in np.random.default_rng(0).integers(0, 5000, 300)]
    like = [*signs]
    like[100:110] = "一二三四五六七八九十"
    assert decided([talk("a", "你好", "".join(signs)), talk("b", "你好吗", "".join(like))]).dropped
    assert not decided([talk("a", "你好", "".join(signs)), talk("b", "你好吗", "".join(reversed(signs)))]).dropped


def test_a_fingerprint_is_the_same_everywhere_and_comes_back_from_json() -> None:
    values, seen = shingles(["The quick brown fox jumps over the lazy dog", "the QUICK brown fox  jumps", "你好世界再见"])
    assert (len(values), seen.tolist()) == (7, [5, 5, 7])
    assert values[:2].tolist() == [4296120555469996032, 9966835309363462144]
    assert signature(values)[[0, 1, 64, 127]].tolist() == [3480318226, 936023427, 326681528, 1982336672]
    whole = fingerprint(LONG)
    assert (whole.exact, int(whole.chain[0])) == (5360423116035232420, 9501877158813242879)
    assert whole.seen.tolist() == [72, 144, 216, 288]
    for near in (True, False):
        row = json.loads(json.dumps(fingerprint(LONG, near).to_json()))
        assert Fingerprint.from_json(row).to_json() == row
    for broken in (row[:-1], [*row[:-1], "AAAA"], [1, *row[1:]], [*row[:6], "?", *row[7:]]):
        with pytest.raises((ValueError, TypeError)):
            Fingerprint.from_json(broken)


def made_up(random: np.random.Generator, count: int) -> list[Conversation]:
    """Conversations that begin like earlier ones, or say almost the same, in any case, weight and source."""
    made: list[Conversation] = []
    for number in range(count):
        texts = [words(int(random.choice([1, 5, 40])), int(random.integers(6))) for _ in range(2 * random.integers(1, 4))]
        kind = random.random()
        if made and kind < 0.7:
            old = [message.content for message in made[random.integers(len(made))].messages]
            texts = old[: 2 * random.integers(1, 4)] + (texts[:2] if kind < 0.4 else [])
        if random.random() < 0.3:
            texts = [edited(text, 0.02, number) if len(text) > 99 else text.upper() for text in texts]
        time = f"20{10 + number}-01-01T00:00:00Z" if random.random() < 0.9 else ""
        source = str(random.choice(["gptme", "chat", "openassistant"]))
        made.append(talk(f"n{number}", *texts, weights=(random.random(len(texts)) < 0.8).tolist(), time=time, source=source))
    return made


def folded_turns(one: Conversation) -> list[tuple[Any, ...]]:
    """Of each turn to learn everything up to it, folded."""
    said = tuple((message.role, " ".join(message.content.split()).casefold()) for message in one.messages)
    return [said[: i + 1] for i, message in enumerate(one.messages) if message.role == "assistant" and message.weight > 0]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("threshold", [0.7, None])
def test_each_turn_is_learned_once_and_nothing_is_lost(seed: int, threshold: float | None) -> None:
    many = made_up(np.random.default_rng(seed), 40)
    prints, sets, done = [fingerprint(one) for one in many], [shingles_of(one) for one in many], decided(many, threshold)
    kept = [i for i in range(len(many)) if i not in done.dropped]
    assert set(done.context) <= set(kept)
    may, learned = [], []
    for i in kept:
        turns = list(zip(prints[i].chain.tolist(), prints[i].turns.tolist(), prints[i].learnable.tolist(), strict=True))
        may += [key for key, _, learnable in turns if learnable]
        learned += [key for key, turn, learnable in turns if learnable and turn not in done.context.get(i, ())]
    assert sorted(learned) == sorted(set(may))
    known = {turn for i in kept for turn in folded_turns(many[i])}
    for i, reason in done.dropped.items():
        near = threshold is not None and any(jaccard(sets[i], sets[k]) >= threshold for k in kept)
        assert set(folded_turns(many[i])) <= known or near, reason
    order = np.random.default_rng(seed).permutation(len(many))
    assert named([many[i] for i in order], threshold) == named(many, threshold)


def labels_after(before: Sequence[Conversation], after: Sequence[Conversation]) -> dict[str, set[str]]:
    """For each label that the conversations `before` have among those `after`: their labels until then."""
    old, new = named(before), named(after)
    joined: dict[str, set[str]] = {}
    for name, row in old.items():
        joined.setdefault(new[name][2], set()).add(row[2])
    assert sum(map(len, joined.values())) == len({row[2] for row in old.values()})  # none is torn apart
    return joined


@pytest.mark.parametrize("seed", range(10))
def test_as_newer_conversations_come_a_group_keeps_its_label_or_has_that_which_the_test_split_takes_first(seed: int) -> None:
    many = [dataclasses.replace(one, source="gptme") for one in made_up(np.random.default_rng(seed), 30) if one.meta["time"]]
    for count in range(1, len(many)):
        for label, labels in labels_after(many[:count], many[: count + 1]).items():
            assert label == min(labels, key=place_in_test)


@pytest.mark.parametrize("seed", range(10))
def test_other_sources_change_no_label_of_gptme_and_let_none_of_its_groups_vanish(seed: int) -> None:
    many = made_up(np.random.default_rng(seed), 40)
    own = [one for one in many if one.source == "gptme"]
    for label, labels in labels_after(own, many).items():
        assert label == min(labels, key=place_in_test)
    before, after = named(own), named(many)
    for name, (dropped, _, _) in before.items():
        assert dropped is not None or after[name][0] is None


def test_a_log_that_is_gone_on_with_after_a_fork_keeps_its_label() -> None:
    def times(one: Conversation, begun: str, time: str) -> Conversation:
        return dataclasses.replace(one, meta={**one.meta, "begun": begun, "time": time})

    resumed, fork = times(LONG, "2026-01-01", "2026-02-01"), times(FORK, "2026-01-03", "2026-01-04")
    assert {row[2] for row in named([resumed, fork]).values()} == {"long"}
    copied = times(dataclasses.replace(FORK, group="long-fork-1"), "2026-01-01", "2026-01-04")  # /fork copies the times too
    copied.meta["name"] = "long-fork-1"
    assert {row[2] for row in named([copied, resumed]).values()} == {"long"}


@pytest.mark.parametrize("threshold", [0, 0.7, 0.9])
def test_near_duplicates_that_are_kept_share_a_group(threshold: float) -> None:
    text = words(200, 1)
    pair = [talk("a", "q", text, time="2026-01-01"), talk("b", "r", edited(text, 0.03, 1), time="2026-01-02")]
    assert 0.7 < jaccard(*map(shingles_of, pair)) < 0.9
    assert len(decided(pair, threshold).dropped) == (threshold == 0.7)
    assert decided(pair, threshold).groups == ["a", "a"] and decided(pair, None).groups == ["a", "b"]


def test_edited_copies_of_real_conversations_are_found(shared: Path) -> None:
    path = shared / "data" / "openassistant" / "oasst1_ready.trees.jsonl.gz"
    real = [one for one in gather(openassistant.read(path, EVERYTHING)).conversations if len(shingles_of(one)) > 60]
    edits = []
    for number, one in enumerate(real):
        share = (0.01, 0.03, 0.05)[number % 3]
        messages = [dataclasses.replace(m, content=edited(m.content, share, number)) for m in one.messages]
        edits.append(dataclasses.replace(one, messages=tuple(messages), group="copy", meta={"name": f"copy {number}"}))
    both = [*real, *edits]
    sets, done = [shingles_of(one) for one in both], decided(both)
    found = [i in done.dropped or i + len(real) in done.dropped for i in range(len(real))]
    alike = [jaccard(sets[i], sets[i + len(real)]) >= 0.7 for i in range(len(real))]
    assert sum(alike) > 20
    assert sum(f and a for f, a in zip(found, alike, strict=True)) >= 0.95 * sum(alike)
