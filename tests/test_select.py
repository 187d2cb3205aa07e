"""What a person chooses to learn from, by option and by the file of tags."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_finetune.data.conversation import Conversation, Message, ToolCall
from mlx_finetune.data.redact import Rules
from mlx_finetune.data.refine import Refined, Settings, refine
from mlx_finetune.data.select import Selection, tools_used
from mlx_finetune.data.sources import Rejected
from mlx_finetune.data.tags import read_tags
from mlx_finetune.errors import UserError


def log(name: str = "2026-06-03-jumping-green-pelican", text: str = "```shell\nls\n```", **meta: Any) -> Conversation:
    said = {
        "name": name,
        "title": "Billing period fix",
        "tool_format": "markdown",
        "model": "local/Qwen3-Coder",
        "time": "2026-06-03T08:00:00Z",
    }
    return Conversation((Message("user", "list"), Message("assistant", text)), "gptme", name, "private", said | meta)


def reason_to_leave(selection: Selection, conversation: Conversation) -> str | None:
    left = selection.leaves(conversation)
    return left and left.reason


@pytest.mark.parametrize(
    ("selection", "reason"),
    [
        (Selection(), None),
        (Selection(since="2026-06-03T08:00:00Z"), None),
        (Selection(since="2026-06-03T08:00:01Z"), "outside --since and --until"),
        (Selection(until="2026-06-03T08:00:00Z"), "outside --since and --until"),
        (Selection(tools=("shell", "browser")), None),
        (Selection(tools=("patch",)), "no call of --tool"),
        (Selection(formats=("xml", "tool")), "another --format"),
        (Selection(models=("qwen3",)), None),
        (Selection(models=("llama", "local/qwen*")), None),
        (Selection(models=("qwen",), titles=("docker",)), "another --title"),
        (Selection(titles=("period",)), None),
        (Selection(titles=("*pelican",)), None),
        (Selection(exclude=("2026-06-*",)), "--exclude"),
        (Selection(exclude=("pelican",)), None),  # a name whole, or a pattern of it
        (Selection(tags={"2026-06-03-jumping-green-pelican": "drop"}), "dropped by the tags file"),
        (Selection(tags={"*pelican": 0.0}), "dropped by the tags file"),
        (Selection(tags={"*pelican": "keep"}, models=("llama",)), None),  # named by hand: chosen
        (Selection(tags={"*pelican": 2.0}, models=("llama",)), "another --from-model"),  # a weight chooses nothing
        (Selection(tags={"*": "drop", "2026-06-03-jumping-green-pelican": 2.0}), None),  # its own name wins
    ],
)
def test_a_conversation_is_left_for_the_option_that_did_not_ask_for_it(selection: Selection, reason: str | None) -> None:
    assert reason_to_leave(selection, log()) == (reason and f"not selected: {reason}")


@pytest.mark.parametrize("text", ["in /home/kim", "with ghp_" + "0aZ9" * 9, "plain"])
def test_the_id_that_was_written_excludes_and_tags(text: str) -> None:
    rules = Rules.for_person(Path("/home/kim"), "kim")
    for settings in (Settings(redaction=rules), Settings(redaction=rules, system="none")):
        written = refine(log(text=text), settings, b"key")
        assert isinstance(written, Refined)
        name = json.loads(written.head)["id"]
        for exclude in (name, name[:8] + "*"):
            chosen = replace(settings, selection=Selection(exclude=(exclude,)))
            assert refine(log(text=text), chosen, b"another") == Rejected(log().name, "gptme", "not selected: --exclude")
        dropped = refine(log(text=text), replace(settings, selection=Selection(tags={name: "drop"})), b"key")
        assert isinstance(dropped, Rejected)


def test_what_has_no_time_is_outside_every_time_that_was_asked_for() -> None:
    for selection in (Selection(since="2020-01-01T00:00:00Z"), Selection(until="2030-01-01T00:00:00Z")):
        assert reason_to_leave(selection, log(time="")) == "not selected: outside --since and --until"


def test_a_persons_own_choices_do_not_touch_openassistant_but_names_do() -> None:
    tree = Conversation((Message("user", "a"), Message("assistant", "b")), "openassistant", "tree-1", "Apache-2.0", {})
    assert reason_to_leave(Selection(since="2026-01-01T00:00:00Z", tools=("shell",), formats=("xml",)), tree) is None
    assert reason_to_leave(Selection(exclude=("tree-*",)), tree) == "not selected: --exclude"


def test_of_a_log_of_several_models_the_turns_of_the_wanted_ones_are_learned() -> None:
    turns = [Message("assistant", "one"), Message("assistant", "two", 0.0, "interrupted"), Message("assistant", "three", 2.0)]
    switched = replace(log(model="openai/C", turn_models=["openai/A", None, "openai/C"]), messages=(Message("user", "a"), *turns))

    def weights(*models: str, tag: str | None = None) -> list[tuple[float, str]]:
        chosen = Selection(models=models).of_wanted_models(switched, tag)
        assert "turn_models" not in chosen.meta
        return [(message.weight, message.reason) for message in chosen.messages[1:]]

    assert reason_to_leave(Selection(models=("openai/a",)), switched) is None
    assert reason_to_leave(Selection(models=("openai/b",)), switched) == "not selected: another --from-model"
    assert weights("openai/A") == [(1, ""), (0, "interrupted"), (0, "of another model")]
    assert weights("*/A", "*/C") == weights() == weights("openai/A", tag="keep") == [(1, ""), (0, "interrupted"), (2, "")]


def test_what_is_written_has_the_wanted_turns_and_no_empty_one(tmp_path: Path) -> None:
    texts = ["A first answer.", "", "A second answer.", " \n"]
    turns = [Message(role, text) for text in texts for role, text in (("user", "go on"), ("assistant", text))]  # type: ignore[arg-type]
    switched = replace(log(turn_models=["A", "A", "B", "B"]), messages=tuple(turns))
    written = refine(switched, Settings(selection=Selection(models=("B",)), redaction=None), b"key")
    assert isinstance(written, Refined) and "turn_models" not in written.head
    rows = [row for row in json.loads(b"{" + written.body)["messages"] if row["role"] == "assistant"]
    assert [(row.get("weight", 1), row.get("reason", "")) for row in rows] == [
        (0, "of another model"),
        (0, "empty"),
        (1, ""),
        (0, "empty"),
    ]
    for source in ("chat", "openassistant"):
        assert isinstance(refine(replace(switched, source=source), Settings(redaction=None), b"key"), Refined)


def test_the_tools_of_every_format_are_known() -> None:
    native = Message("assistant", "", tool_calls=(ToolCall("1", "patch", "{}"),))
    assert tools_used(Conversation((native,), "chat", "g", "private")) == {"patch"}
    assert tools_used(log()) == {"shell"}
    assert tools_used(log(text='@save(call-1): {"path": "a", "content": "b"}', tool_format="tool")) == {"save"}
    assert tools_used(log(text="<tool-use>\n<ipython>\n1 + 1\n</ipython>\n</tool-use>", tool_format="xml")) == {"ipython"}


def test_tags_are_read_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "tags.yaml"
    path.write_text('# mine\n2026-01-01: keep\n"*-fox": drop\nyes: 2.5\n0123: 1e-1\n')
    assert read_tags(path) == {"2026-01-01": "keep", "*-fox": "drop", "yes": 2.5, "0123": 0.1}
    path.write_text("# nothing yet\n")
    assert read_tags(path) == {}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: kep\n", "a: 'kep' is not keep, drop or a weight"),
        ("a: -1\n", "a: '-1'"),
        ("a: nan\n", "a: 'nan'"),
        ("a: 1e9\n", "a: '1e9'"),
        ("a: [1]\n", r"a: \['1'\]"),
        ("- a\n", "not a list of names"),
        ("[a]: keep\n", "not YAML|not a list of names"),
        ("a: 'b\n", "not YAML"),
        ("[" * 20_000, "not YAML"),
    ],
)
def test_a_mistake_in_the_tags_is_named_with_its_place(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "tags.yaml").write_text(text)
    with pytest.raises(UserError, match=named) as error:
        read_tags(tmp_path / "tags.yaml")
    assert "NAME: keep" in error.value.hint and "tags.yaml" in error.value.message
    with pytest.raises(UserError, match="No such file"):
        read_tags(tmp_path / "nowhere.yaml")
