"""Whatever a path leads to, each verb answers at once, in one line, with status 2."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Answer

SECONDS = 60
Make = Callable[[Path], Path]


def folder(place: Path) -> Path:
    (place / "folder").mkdir()
    return place / "folder"


def empty(place: Path) -> Path:
    (place / "empty.yaml").touch()
    return place / "empty.yaml"


def pipe(place: Path) -> Path:
    os.mkfifo(place / "pipe.jsonl")
    return place / "pipe.jsonl"


def unreadable(place: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("the superuser may read everything")
    (place / "secret.yaml").write_text("rank: 8\n")
    (place / "secret.yaml").chmod(0)
    return place / "secret.yaml"


def in_closed_folder(place: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("the superuser may read everything")
    (place / "closed").mkdir(mode=0)
    return place / "closed" / "x"


def loop(place: Path) -> Path:
    (place / "loop").symlink_to("loop")
    return place / "loop"


def sparse(place: Path) -> Path:
    with (place / "sparse.jsonl").open("wb") as file:
        file.truncate(2**30)
    return place / "sparse.jsonl"


def below_a_file(place: Path) -> Path:
    return empty(place) / "x"


def odd(place: Path) -> Path:
    (place / "a\nb\x1b[2J\u202e").write_bytes(b"\xff\x00")
    return place / "a\nb\x1b[2J\u202e"


def not_utf8(place: Path) -> Path:
    name = os.fsdecode(bytes(place) + b"/\xff\xfe")
    Path(name).write_bytes(b"\xff\x00")
    return Path(name)


PLACES: dict[str, Make] = {
    "a folder": folder,
    "an empty file": empty,
    "a pipe": pipe,
    "a device without end": lambda place: Path("/dev/zero"),
    "a file without permission": unreadable,
    "a folder without permission": in_closed_folder,
    "a link to itself": loop,
    "nothing": lambda place: place / "nothing",
    "a path below a file": below_a_file,
    "a name too long": lambda place: place / ("x" * 300),
    "a path too long": lambda place: place / "/".join(["y" * 200] * 30),
    "a name with control characters": odd,
    "a name that is not UTF-8": not_utf8,
    "a gigabyte of nothing": sparse,
}
VERBS: dict[str, list[str]] = {
    "collect logs": ["collect", "{}", "--out", "out"],
    "collect chat": ["collect", "--no-gptme", "--chat", "{}", "--out", "out"],
    "collect openassistant": ["collect", "--no-gptme", "--openassistant", "{}", "--out", "out"],
    "collect tags": ["collect", "logs", "--tags", "{}", "--out", "out"],
    "prepare": ["prepare", "{}", "--model", "model", "--out", "out"],
    "prepare model": ["prepare", "collected.jsonl", "--model", "{}", "--out", "out"],
    "inspect": ["inspect", "{}"],
    "plan model": ["plan", "--model", "{}"],
    "plan data": ["plan", "--model", "model", "--data", "{}"],
    "convert": ["convert", "{}", "--out", "out"],
    "train config": ["train", "{}"],
    "train model": ["train", "--model", "{}", "--data", "data", "--out", "out"],
    "train data": ["train", "--model", "model", "--data", "{}", "--out", "out"],
    "train resume": ["train", "--resume", "--out", "{}"],
    "evaluate": ["evaluate", "{}"],
    "report": ["report", "{}"],
    "plot": ["plot", "{}"],
    "chat": ["chat", "{}"],
    "serve": ["serve", "{}"],
    "fuse": ["fuse", "{}", "--out", "out"],
    "export": ["export", "{}", "--to", "peft", "--out", "out"],
    "push": ["push", "{}", "me/model", "--yes"],
}


@contextmanager
def answers_at_once() -> Iterator[None]:
    """Ends a verb that waits."""

    def too_late(number: int, frame: object) -> None:
        raise AssertionError(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.long
@pytest.mark.parametrize("what", PLACES)
def test_every_verb_refuses_it_in_one_line(what: str, cli: Callable[..., Answer], tmp_path: Path, small_model: Path) -> None:
    place = PLACES[what](tmp_path)
    (tmp_path / "model").symlink_to(small_model)
    wrong = {}
    for verb, words in VERBS.items():
        with answers_at_once():
            status, out, err = cli(*(word.replace("{}", str(place)) for word in words))
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        if status != 2 or len(lines) != 1 or "Traceback" in err or len(lines[0]) > 700 or out or (tmp_path / "out").exists():
            wrong[verb] = (status, out[-300:], err[-300:])
    assert wrong == {}
