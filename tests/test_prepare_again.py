"""When `prepare` does nothing, refuses or cannot go on: no folder is half made, nothing stale is used."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chats import ZEPHYR, chat, conversation_of, template_of
from prepared_chats import of_times, prepared
from tiny_models import CHATML

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import collected_files, prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return template_of(tmp_path_factory.mktemp("template"), CHATML)


@pytest.mark.parametrize(
    ("conversations", "settings", "reason"),
    [
        ([], {}, "no assistant turn"),
        ([conversation_of([Message("user", "a")])], {}, "no assistant turn"),
        ([conversation_of(chat("a", "b " * 500))], {"max_length": 64}, r"turn longer than a window \(1\)"),
        ([conversation_of(chat("a", " "))], {}, r"a turn of blanks \(1\)"),
        ([conversation_of(chat("\U00050041", "b"))], {}, r"unassigned characters in a message \(1\)"),
    ],
)
def test_nothing_to_learn_is_refused_and_leaves_no_folder(
    tiny: ChatTemplate, tmp_path: Path, conversations: list[Conversation], settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        prepared(tmp_path, conversations, tiny, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["all.jsonl"]


def test_a_bad_line_or_a_folder_that_exists_changes_nothing(tiny: ChatTemplate, tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text('{"messages": []}\n{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"all\.jsonl:2: "):
        prepare([tmp_path / "all.jsonl"], tiny, make_config({}, "test"), tmp_path / "out", {})
    assert [path.name for path in tmp_path.iterdir()] == ["all.jsonl"]
    (tmp_path / "out").mkdir()
    write_conversations(tmp_path / "all.jsonl", [conversation_of(chat("a", "b"))])
    with pytest.raises(UserError, match="exists already"):
        prepare([tmp_path / "all.jsonl"], tiny, make_config({}, "test"), tmp_path / "out", {})
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.long
def test_helpers_that_cannot_start_are_said_and_not_waited_for(tmp_path: Path) -> None:
    """A program without the usual guard starts itself again in each helper, which ends at once."""
    write_conversations(tmp_path / "all.jsonl", [conversation_of(chat("a", "b"))])
    template_of(tmp_path / "model", CHATML)
    program = f"""
from pathlib import Path
import mlx_finetune.data.examples
mlx_finetune.data.examples.MUCH = 0
mlx_finetune.data.examples.workers = lambda: 2
from mlx_finetune.config import make_config
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
folder = Path({str(tmp_path)!r})
template = ChatTemplate.load(folder / "model")
template.filling = "x" * 10_000_000
prepare([folder / "all.jsonl"], template, make_config({{}}, "test"), folder / "out", {{}})
"""
    (tmp_path / "unguarded.py").write_text(program, encoding="utf-8")
    ended = subprocess.run([sys.executable, tmp_path / "unguarded.py"], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1 and "a helper process was ended from outside" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_is_done_where_nothing_has_changed_and_nothing_stale_is_used(tiny: ChatTemplate, tmp_path: Path) -> None:
    def again(template: ChatTemplate = tiny, update: bool = False, model: str = "tiny", **settings: Any) -> dict[str, Any]:
        paths = [tmp_path / "all.jsonl"]
        return prepare(paths, template, make_config(settings, "test"), tmp_path / "dataset", {"model": model}, update=update)

    chats = of_times(6)
    first = prepared(tmp_path, chats, tiny)
    stamp = (tmp_path / "dataset").stat().st_ino
    assert again()["unchanged"] and again(update=True)["id"] == first.id and (tmp_path / "dataset").stat().st_ino == stamp
    other = template_of(tmp_path / "other", ZEPHYR, eos="<|im_end|>")
    with pytest.raises(UserError, match="prepared with max_length 8192"):
        again(max_length=4096)
    with pytest.raises(UserError, match="prepared with another tokenizer or chat template"):
        again(other)
    with pytest.raises(UserError, match="prepared with model tiny"):
        again(model="large")
    assert Dataset.open(tmp_path / "dataset").id == first.id
    write_conversations(tmp_path / "all.jsonl", chats[:-1])
    with pytest.raises(UserError, match="prepared with other conversations") as error:
        again()
    assert "--update" in error.value.hint
    assert again(update=True)["id"] != first.id and again()["unchanged"]
    assert again(other, update=True)["tokenizer"] == other.fingerprint == Dataset.open(tmp_path / "dataset").info["tokenizer"]
    (tmp_path / "dataset" / "valid.jsonl").unlink()
    with pytest.raises(UserError, match="files that are no longer whole"):
        again(other)
    assert "unchanged" not in again(other, update=True) and again(other)["unchanged"]


def test_an_interrupted_writing_leaves_no_folder(tiny: ChatTemplate, tmp_path: Path) -> None:
    write_conversations(tmp_path / "all.jsonl", [conversation_of(chat("a", str(i)), str(i)) for i in range(9)])

    def stop(done: int, total: int) -> None:
        assert total == 9
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([tmp_path / "all.jsonl"], tiny, make_config({}, "test"), tmp_path / "out", {}, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["all.jsonl"]


def test_a_folder_stands_for_the_conversations_that_collect_put_into_it(tmp_path: Path) -> None:
    for name in ("gptme.jsonl", "openassistant.jsonl", "rejected.jsonl", "train.jsonl", "test.jsonl", "collect.json", "train.csv"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    assert [path.name for path in collected_files([tmp_path])] == ["gptme.jsonl", "openassistant.jsonl"]
    assert collected_files([tmp_path / "train.jsonl"]) == [tmp_path / "train.jsonl"]
    for path, reason in ((tmp_path / "empty", "no conversations in this folder"), (tmp_path / "none", "no such file or folder")):
        with pytest.raises(UserError, match=reason):
            collected_files([path])
