"""Nothing of a person's conversations in what verbs say when something fails, nor in what they hand back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finished_runs import WORDS, make_base, make_run

from mlx_finetune.data.conversation import read_conversations
from mlx_finetune.errors import UserError

Cli = Callable[..., tuple[int, str, str]]
MARK = "zebra-crossing-1848"


def line(**values: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]} | values)


# A line of a file of conversations with which something is wrong.
BROKEN = {
    "cut": line()[:-20],
    "no JSON": f"{MARK} {MARK}",
    "two values": line() + line(),
    "a lone brace": "{" + MARK,
    "a number": f'{{"messages": [{{"role": "user", "content": {MARK}}}]}}',
    "an unknown role": line(messages=[{"role": "user", "content": MARK}, {"role": "assistant", "content": 3, "x": MARK}]),
    "content as a list": line(messages=[{"role": "user", "content": [MARK]}]),
    "content as an object": line(messages=[{"role": "user", "content": {"text": MARK}}]),
    "messages as text": line(messages=MARK),
    "a message as text": line(messages=[MARK, MARK]),
    "calls as text": line(messages=[{"role": "assistant", "content": "", "tool_calls": MARK}]),
    "arguments": line(
        messages=[{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "a", "arguments": MARK}}]}]
    ),
    "half a character": line(messages=[{"role": "user", "content": f"{MARK}\ud800"}]),
    "not UTF-8": f"{MARK}\udcff",
    "tools": line(tools=MARK),
    "source": line(source={MARK: MARK}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, a model, dataset/ for it."""
    root = tmp_path_factory.mktemp("private")
    make_base(root)
    return root


def raw(*names: str) -> bytes:
    """A file with a good line and those."""
    return "".join(f"{each}\n" for each in (line(), *(BROKEN[name] for name in names))).encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("name", BROKEN)
def test_an_error_names_the_place_and_not_what_stands_there(name: str, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_bytes(raw(name))
    try:
        assert len(list(read_conversations(tmp_path / "chats.jsonl"))) == 2
    except UserError as refused:
        assert refused.message.startswith(f"{tmp_path / 'chats.jsonl'}:2") and MARK not in refused.message + refused.hint


@pytest.mark.long
@pytest.mark.parametrize("name", BROKEN)
def test_prepare_says_nothing_of_a_broken_line_either(name: str, root: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_bytes(raw(name))
    status, out, err = cli("prepare", tmp_path / "chats.jsonl", "--model", root / "base", "--out", tmp_path / "out")
    assert MARK not in out + err and "Traceback" not in err and status in (0, 2), err


def test_what_collect_says_and_writes_of_broken_lines_is_where_they_are(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_bytes(raw(*BROKEN))
    (tmp_path / "logs" / "2026-06-03-one").mkdir(parents=True)
    (tmp_path / "logs" / "2026-06-03-one" / "conversation.jsonl").write_bytes(raw(*BROKEN))
    status, out, err = cli("collect", tmp_path / "logs", "--chat", tmp_path / "chats.jsonl", "--out", tmp_path / "collected")
    assert status == 0 and MARK not in out + err and "Traceback" not in err, err
    for path in [*(tmp_path / "collected").glob("*.json"), tmp_path / "collected" / "rejected.jsonl"]:
        assert MARK not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.long
def test_a_damaged_dataset_is_refused_without_a_word_of_it(root: Path, cli: Cli, tmp_path: Path) -> None:
    from shutil import copytree

    for name in ("cut", "no JSON", "messages as text"):
        data = Path(copytree(root / "dataset", tmp_path / name))
        for split in ("train", "valid"):
            (data / f"{split}.jsonl").write_text(BROKEN[name] + "\n" + (data / f"{split}.jsonl").read_text())
        for verb in (
            ("inspect", data),
            ("train", "--model", root / "base", "--data", data, "--out", tmp_path / "run", "--set=steps=1", "--dry-run"),
        ):
            _, out, err = cli(*verb)
            assert MARK not in out + err and "Traceback" not in err, (name, verb[0], err)


@pytest.mark.parametrize("text", [f"api_key: {MARK}", f"model: [{MARK}", f"{MARK}", f"data: '{MARK}\n"])
def test_a_config_is_refused_without_the_values_of_what_it_does_not_know(text: str, cli: Cli, tmp_path: Path) -> None:
    """A key of another program in it is not to stand in a log."""
    (tmp_path / "config.yaml").write_text(text)
    status, out, err = cli("train", tmp_path / "config.yaml")
    assert status == 2 and "config.yaml" in err and MARK not in out + err, err


@pytest.mark.long
def test_no_word_of_a_conversation_is_in_what_is_handed_back(root: Path, engine_name: str, cli: Cli, tmp_path: Path) -> None:
    run = make_run(root, engine_name, f"run-{engine_name}")
    handed = [("fuse", run, "--out", tmp_path / "fused"), ("export", run, "--to", "peft", "--out", tmp_path / "peft")]
    handed.append(("export", run, "--to", "gguf", "--out", tmp_path / "gguf"))
    for verb in handed:
        status, out, err = cli(*verb)
        assert status == 0 and not any(word in out + err for word in WORDS.split()), err
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name not in ("tokenizer.json", "vocab.json"):
            assert not any(word.encode() in path.read_bytes() for word in WORDS.split()), path
            assert str(root).encode() not in path.read_bytes() or path.name == "adapter_config.json", path


def test_the_file_of_a_secret_is_named_and_the_secret_is_not(tmp_path: Path) -> None:
    """What json's own error holds: the whole document."""
    from mlx_finetune.files import read_json

    (tmp_path / "a.json").write_text(f'{{"a": {MARK}}}')
    with pytest.raises(UserError) as refused:
        read_json(tmp_path / "a.json")
    assert MARK not in refused.value.message
