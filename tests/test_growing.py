"""From logs to splits: a collection grows, is collected twice, or overlaps another, and nothing held out is trained on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import template_of
from tiny_models import CHATML

from mlx_finetune.cli import main
from mlx_finetune.config import make_config
from mlx_finetune.data.clusters import place_in_test
from mlx_finetune.data.collect import collect
from mlx_finetune.data.conversation import read_conversations, write_conversations
from mlx_finetune.data.dataset import SPLITS, Dataset
from mlx_finetune.data.found import Sources
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.refine import Settings
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError

FRACTION = 0.2
NAMES = [f"2026-01-{day:02}-log-{word}" for day in range(1, 29) for word in ("alpha", "beta", "gamma")]
TESTED = [name for name in NAMES if place_in_test(name) < FRACTION]
OTHERS = [name for name in NAMES if place_in_test(name) >= FRACTION]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return template_of(tmp_path_factory.mktemp("template"), CHATML)


def words(seed: int, count: int = 60) -> str:
    return " ".join(f"w{k}" for k in np.random.default_rng(seed).integers(0, 10**6, count))


def edited(text: str) -> str:
    """With one word replaced."""
    return " ".join("other" if k == 30 else word for k, word in enumerate(text.split(" ")))


def write_log(logs: Path, name: str, texts: Sequence[str], day: str = "") -> None:
    (logs / name).mkdir(parents=True, exist_ok=True)
    rows = (
        {"role": ("user", "assistant")[i % 2], "content": text, "timestamp": f"{day or name[:10]}T10:00:{i:02}+00:00"}
        for i, text in enumerate(texts)
    )
    (logs / name / "conversation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def splits(template: ChatTemplate, out: Path, *collected: Path, **settings: Any) -> tuple[Dataset, dict[str, str]]:
    """The data set, and the text of each split."""
    prepare(collected, template, make_config({"max_length": 2048, **settings}, "test"), out, {})
    beside = {name: out / f"{name}.jsonl" for name in SPLITS}
    return Dataset.open(out), {name: path.read_text(encoding="utf-8") if path.exists() else "" for name, path in beside.items()}


@pytest.mark.parametrize("newer", ["fork", "copy", "near-duplicate", "both"])
def test_what_was_set_aside_for_a_test_stays_there_whatever_comes_later(tiny: ChatTemplate, tmp_path: Path, newer: str) -> None:
    logs, old = tmp_path / "logs", [words(1), words(2)]
    for k, name in enumerate(OTHERS[:8]):
        write_log(logs, name, [words(10 + k), words(30 + k)])
    write_log(logs, TESTED[0], old)
    collect(Sources(logs), Settings(), tmp_path / "before")
    _, before = splits(tiny, tmp_path / "d1", tmp_path / "before", test_fraction=FRACTION)
    assert words(2) in before["test"] and words(2) not in before["train"] + before["valid"]
    later = [name for name in OTHERS[8:] if name > TESTED[0][:11]]
    if newer in ("fork", "both"):
        write_log(logs, later[0], [*old, words(3), words(4)])
    if newer == "copy":
        write_log(logs, later[1], old)
    if newer in ("near-duplicate", "both"):
        write_log(logs, later[2], [edited(old[0]), edited(old[1])])
    collect(Sources(logs), Settings(), tmp_path / "after")
    dataset, after = splits(tiny, tmp_path / "d2", tmp_path / "after", test_fraction=FRACTION)
    assert words(2) in after["test"] or edited(words(2)) in after["test"]
    for text in (words(2), edited(words(2)), words(4)):
        assert text not in after["train"] + after["valid"]
    assert dataset.info["left_out"] == {}
    for name in OTHERS[:8]:
        assert name not in dataset.info["test_conversations"]


def test_a_test_log_that_is_gone_on_with_after_a_fork_stays(tiny: ChatTemplate, tmp_path: Path) -> None:
    logs, start = tmp_path / "logs", [words(1), words(2)]
    for k, name in enumerate(OTHERS[10:18]):
        write_log(logs, name, [words(10 + k), words(30 + k)])
    write_log(logs, TESTED[0], [*start, words(3), words(4)])
    fork = next(name for name in OTHERS if name > TESTED[0])
    write_log(logs, fork, [*start, words(5), words(6)])
    more = [("user", words(7), "2026-03-01T10:00:00+00:00"), ("assistant", words(8), "2026-03-01T10:00:01+00:00")]
    with (logs / TESTED[0] / "conversation.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"role": role, "content": text, "timestamp": time}) + "\n" for role, text, time in more)
    collect(Sources(logs), Settings(), tmp_path / "all")
    dataset, texts = splits(tiny, tmp_path / "d", tmp_path / "all", test_fraction=FRACTION)
    assert dataset.info["test_conversations"] == sorted([TESTED[0], fork])
    assert words(8) in texts["test"] and words(6) in texts["test"]


def test_a_log_that_joins_two_others_does_not_take_them_out_of_the_test_split(tiny: ChatTemplate, tmp_path: Path) -> None:
    logs, older = tmp_path / "logs", OTHERS[0]
    test = next(name for name in TESTED if name > older)
    one, other = words(1, 200).split(" "), words(2, 200).split(" ")
    write_log(logs, older, ["q1", " ".join(one)])
    write_log(logs, test, ["q2", " ".join([*one[:100], *other[100:]])])
    for k, name in enumerate(OTHERS[10:14]):
        write_log(logs, name, [words(10 + k), words(30 + k)])
    collect(Sources(logs), Settings(near_duplicates=0.4), tmp_path / "before")
    dataset, _ = splits(tiny, tmp_path / "d1", tmp_path / "before", test_fraction=FRACTION)
    assert dataset.info["test_conversations"] == [test]
    write_log(logs, "2026-02-01-bridge", ["q3", " ".join([*one[:150], *other[150:]])])
    collect(Sources(logs), Settings(near_duplicates=0.4), tmp_path / "after")
    _, after = splits(tiny, tmp_path / "d2", tmp_path / "after", test_fraction=FRACTION)
    assert " ".join(other[120:150]) not in after["train"] + after["valid"]


def of_two_kinds(logs: Path) -> None:
    """Twelve logs, and of each a near-duplicate on another day."""
    for k in range(12):
        texts = [words(10 + k), words(30 + k)]
        write_log(logs, f"2026-01-{k + 1:02}-one", texts)
        write_log(logs, f"2026-02-{k + 1:02}-two", [edited(text) for text in texts])


@pytest.mark.parametrize("by", ["time", "hash"])
def test_near_duplicates_that_are_kept_never_straddle(tiny: ChatTemplate, tmp_path: Path, by: str) -> None:
    of_two_kinds(tmp_path / "logs")
    collect(Sources(tmp_path / "logs"), Settings(near_duplicates=0), tmp_path / "all")
    kept = list(read_conversations(tmp_path / "all" / "gptme.jsonl"))
    assert len(kept) == 24 and len({one.group for one in kept}) == 12
    settings = {"valid_fraction": 0.3, "test_fraction": 0.2, "validation_by": by}
    _, texts = splits(tiny, tmp_path / "d", tmp_path / "all", **settings)
    assert texts["valid"] and texts["test"]
    for k in range(12):
        assert len([name for name in SPLITS if words(30 + k) in texts[name] or edited(words(30 + k)) in texts[name]]) == 1


def test_where_near_duplicates_are_not_looked_for_they_are_kept_in_groups_of_their_own(tmp_path: Path) -> None:
    of_two_kinds(tmp_path / "logs")
    collect(Sources(tmp_path / "logs"), Settings(near_duplicates=None), tmp_path / "all")
    assert len({one.group for one in read_conversations(tmp_path / "all" / "gptme.jsonl")}) == 24


def test_a_path_named_twice_is_refused(tiny: ChatTemplate, tmp_path: Path) -> None:
    of_two_kinds(tmp_path / "logs")
    collect(Sources(tmp_path / "logs"), Settings(), tmp_path / "all")
    (tmp_path / "link").symlink_to(tmp_path / "all")
    file = tmp_path / "all" / "gptme.jsonl"
    for paths in ([tmp_path / "all"] * 2, [tmp_path / "all", file], [tmp_path / "all", tmp_path / "link"]):
        with pytest.raises(UserError, match=r"gptme\.jsonl: named twice") as error:
            splits(tiny, tmp_path / "d", *paths)
        assert error.value.hint


def test_what_stands_in_two_collections_is_taken_once(tiny: ChatTemplate, tmp_path: Path) -> None:
    of_two_kinds(tmp_path / "logs")
    collect(Sources(tmp_path / "logs"), Settings(near_duplicates=0), tmp_path / "all")
    kept = list(read_conversations(tmp_path / "all" / "gptme.jsonl"))
    (tmp_path / "june").mkdir()
    write_conversations(tmp_path / "june" / "gptme.jsonl", kept[:10])
    once, _ = splits(tiny, tmp_path / "d1", tmp_path / "all")
    for number, paths in enumerate(([tmp_path / "all", tmp_path / "june"], [tmp_path / "june", tmp_path / "all"]), 2):
        twice, _ = splits(tiny, tmp_path / f"d{number}", *paths)
        assert twice.info["left_out"] == {"the same conversation again": 10}
        assert twice.info["examples"] == once.info["examples"]
        for name in SPLITS:
            assert twice.info[name]["learned_turns"] == once.info[name]["learned_turns"]


def test_of_two_copies_the_one_whose_turns_are_learned_elsewhere_is_taken(tiny: ChatTemplate, tmp_path: Path) -> None:
    """A fork is collected with the log that it forks from, where its shared turns are only read, and without it."""
    start = [words(1), words(2)]
    write_log(tmp_path / "both", "2026-01-01-one", [*start, words(3), words(4), words(5), words(6)])
    for logs in ("both", "alone"):
        write_log(tmp_path / logs, "2026-01-02-fork", [*start, words(7), words(8)])
        collect(Sources(tmp_path / logs), Settings(), tmp_path / f"c {logs}")
    for number, order in enumerate((("both", "alone"), ("alone", "both"))):
        paths = [tmp_path / f"c {logs}" for logs in order]
        dataset, _ = splits(tiny, tmp_path / f"d{number}", *paths, valid_fraction=0)
        assert dataset.info["train"]["learned_turns"] == 4
        assert dataset.info["left_out"] == {"the same conversation again": 1}


def test_groups_that_two_collections_name_otherwise_are_one(tiny: ChatTemplate, tmp_path: Path) -> None:
    """A log stands in both collections, resumed in between; only the second has the older one that it belongs to."""
    of_two_kinds(tmp_path / "other")
    start = [words(1), words(2)]
    write_log(tmp_path / "second", "2026-01-01-old", [*start, words(3), words(4)])
    for name, more in (("first", []), ("second", [words(7), words(8)])):
        write_log(tmp_path / name, "2026-03-02-fork", [*start, words(5), words(6), *more])
    for name in ("other", "first", "second"):
        collect(Sources(tmp_path / name), Settings(), tmp_path / f"c {name}")
    for fraction in (0.05, 0.3, 0.6):
        out = tmp_path / f"d {fraction}"
        _, texts = splits(tiny, out, *(tmp_path / f"c {name}" for name in ("first", "other", "second")), valid_fraction=fraction)
        assert len([name for name in SPLITS if words(2) in texts[name] or words(6) in texts[name]]) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--near-duplicates", "0.5", "--no-near-duplicate-search"],
            "error: --near-duplicates 0.5 with --no-near-duplicate-search",
        ),
        (["--near-duplicates", "0", "--no-near-duplicate-search"], "error: --near-duplicates 0 with --no-near-duplicate-search"),
        (["--no-near-duplicate-search"], "near-duplicates were not looked for"),
    ],
)
def test_what_is_not_looked_for_is_said_and_options_that_contradict_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    write_log(tmp_path / "logs", "2026-01-01-a", [words(1), words(2)])
    with pytest.raises(SystemExit) as ended:
        main(["collect", str(tmp_path / "logs"), "--out", str(tmp_path / "out"), *options])
    assert said in capsys.readouterr().err
    assert ended.value.code == (2 if said.startswith("error") else 0) and (tmp_path / "out").exists() != said.startswith("error")
