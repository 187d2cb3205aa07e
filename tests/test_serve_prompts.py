"""Served as trained: for what gptme really sent, the server feeds the tokens that a prepared log has in that place."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chats import RAISES, template_of
from test_requests import (
    ATTACHED,
    DATA,
    FOLDED,
    PARALLEL,
    SHORT,
    TEXT,
    TOOL,
    Recorded,
    _place,
    folder_of,
    learned,
    logs,
    prepared,
    recorded,
)
from tiny_models import CHATML, make_tiny
from tool_chats import LLAMA, MISTRAL, QWEN, SHELL, TOOLS, session

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.emission import emission
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.written_calls import WAYS, hidden_of, read_calls, written_by
from mlx_finetune.errors import UserError
from mlx_finetune.export.fuse import write_template
from mlx_finetune.serving.opened import Source, find_source
from mlx_finetune.serving.pieces import Held, Pieces
from mlx_finetune.serving.requests import Refusal, read_request
from mlx_finetune.serving.served import Served
from mlx_finetune.serving.trained import Trained, gptme_command, named_as_folded, read_trained, served_name

needs_recorded = pytest.mark.skipif(not (DATA / "gptme-requests").is_dir(), reason="what gptme sent lies in ../shared")


def serving(template: ChatTemplate, trained: Trained = Trained()) -> Served:  # noqa: B008  frozen
    """The tuned model of a run of such conversations."""
    return Served(Source(make_config({}, "test"), Path("model"), template, None, trained, None, Path("step")), "m", 100)


def fed(served: Served, body: dict[str, Any]) -> list[int]:
    return served.question(read_request(body | {"model": "m"})).prompt


def check(served: Served, one: Recorded, conversation: Conversation, folder: Path) -> int:
    turns = learned(prepared(folder, served.source.template, [conversation]), conversation)
    for turn, (before, _) in turns.items():
        body = next(body for body in one.bodies if _place(body, conversation) == turn)
        assert fed(served, body) == before, (conversation.name, turn)
    return len(turns)


@needs_recorded
@pytest.mark.parametrize("name", ["chatml", "qwen", "gemma", "trl/qwen3", "trl/qwen3_5_nothink"])
def test_a_recorded_request_is_fed_as_the_prepared_log_was_trained(tmp_path: Path, name: str) -> None:
    template = ChatTemplate.load(folder_of(tmp_path / "model", name))
    for number, request in enumerate((*TEXT[1:], SHORT, ATTACHED)):
        one = recorded(request)
        (tmp_path / str(number)).mkdir()
        assert check(serving(template), one, one.conversation, tmp_path / str(number)) == one.conversation.assistant_turns


@needs_recorded
@pytest.mark.parametrize("request_name", [TOOL, PARALLEL])
def test_native_calls_are_fed_as_they_were_trained_native_with_schemas_or_as_text(tmp_path: Path, request_name: str) -> None:
    one = recorded(request_name)
    template = ChatTemplate.load(folder_of(tmp_path / "model", "trl/qwen3"))
    (tmp_path / "native").mkdir()
    with_schemas = serving(template, Trained("tool", native=True, schemas=True, known=True))
    assert check(with_schemas, one, one.conversation, tmp_path / "native") == 6
    (tmp_path / "without").mkdir()
    without = serving(template, Trained("tool", native=True, known=True))
    assert check(without, one, replace(one.conversation, tools=()), tmp_path / "without") == 6
    log = next(each for each in logs() if each.name == request_name.split("__")[1])
    for name in ("trl/qwen3", "chatml"):
        folder = tmp_path / name.replace("/", " ")
        as_text = serving(ChatTemplate.load(folder_of(folder / "model", name)), Trained("tool", known=True))
        (folder / "text").mkdir()
        assert as_text.calls_as_text and check(as_text, one, log, folder / "text") == 6


@needs_recorded
def test_a_request_that_gptme_folded_is_fed_as_the_folding_template_trained_it(tmp_path: Path) -> None:
    template, one = ChatTemplate.load(folder_of(tmp_path / "model", "raises")), recorded(FOLDED)
    assert template.policy.name == "folded"
    assert check(serving(template), one, one.conversation, tmp_path) == len(one.bodies)


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTemplate]:
    jinja = {"hermes": QWEN, "llama": LLAMA, "mistral": MISTRAL, "none": CHATML}
    return {name: template_of(tmp_path_factory.mktemp(name), text) for name, text in jinja.items()}


@pytest.mark.parametrize("name", ["hermes", "llama", "mistral"])
def test_calls_are_read_as_the_template_writes_them(templates: dict[str, ChatTemplate], name: str) -> None:
    template = templates[name]
    way = written_by(template)
    assert way and way.name == name
    messages = template.as_learned(session())
    for place, message in enumerate(messages):
        if message.tool_calls:
            prompt = template.render(messages[:place], True, TOOLS)
            written = emission(template, messages[: place + 1], prompt, TOOLS).written
            said, found = read_calls(way, written, TOOLS)
            assert said == "" and [(c.name, json.loads(c.arguments)) for c in found] == [
                (c.name, json.loads(c.arguments)) for c in message.tool_calls
            ]
    assert written_by(templates["none"]) is None


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "qwen3_5_nothink", "qwen3_8"])
def test_the_ways_of_published_templates_are_known(tmp_path: Path, name: str) -> None:
    way = written_by(ChatTemplate.load(folder_of(tmp_path, f"trl/{name}")))
    assert way and way.name == ("xml" if name in ("qwen3_5_nothink", "qwen3_8") else "hermes")


NO_CALLS = {
    "hermes": ("<tool_call>", "<tool_call>\n{}\n</tool_call>", "<tool_call>\n{\"name\": \"a\", \"arguments\": 3}</tool_call>",
               '<tool_call>{"name": "a", "arguments": {}}</tool_call> and more', '<tool_call>{"name": "a", "argum'),
    "xml": ("<tool_call>\n<function=a>\n<parameter=b>\nc", "<tool_call>a</tool_call>"),
    "mistral": ("[TOOL_CALLS]", "[TOOL_CALLS] [1]", "[TOOL_CALLS]a[ARGS]{", "[TOOL_CALLS]a[ARGS]{} more",
                "[TOOL_CALLS] " + "[" * 9999),
    "llama": ('{"name": "a"}x', "<|python_tag|>", '{"name": 3, "parameters": {}}', 'Say {"name": "a", "parameters": {}}'),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_what_is_no_whole_call_stays_text(way: Any) -> None:
    for text in NO_CALLS[way.name]:
        assert read_calls(way, text, TOOLS) == (text, []), text


def test_unquoted_values_are_read_by_their_schema() -> None:
    way = next(way for way in WAYS if way.name == "xml")
    schema = {"n": {"type": "integer"}, "on": {"type": "boolean"}, "text": {"type": "string"}, "list": {"type": "array"}}
    tools = ({"type": "function", "function": {"name": "f", "parameters": {"properties": schema}}},)
    given = {"n": "5", "on": "True", "text": "5", "list": "[1]"}
    values = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in given.items())
    _, (call,) = read_calls(way, f"<tool_call>\n<function=f>\n{values}</function>\n</tool_call>", tools)
    assert json.loads(call.arguments) == {"n": 5, "on": True, "text": "5", "list": [1]}


def test_tools_that_the_template_does_not_take_are_refused_unless_training_had_them_as_text(
    templates: dict[str, ChatTemplate],
) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "tools": [SHELL]}
    request = read_request(body)
    with pytest.raises(Refusal, match="--tool-format xml"):
        serving(templates["none"], Trained("xml", known=True)).question(request)
    as_text = serving(templates["none"], Trained("tool", known=True))
    assert as_text.question(request).prompt == fed(as_text, body | {"tools": []})
    plain = serving(templates["hermes"])
    assert plain.question(request).prompt == templates["hermes"].prompt(request.messages, [SHELL]).tolist()
    asked = plain.question(read_request(body | {"tool_choice": "none"}))
    assert asked.prompt == templates["hermes"].prompt(request.messages).tolist() and asked.way is None
    warned = serving(templates["hermes"], Trained("markdown", known=True))
    assert "--tool-format markdown" in warned.unlike_training(request) and not plain.unlike_training(request)
    assert warned.question(request).prompt == plain.question(request).prompt
    native = serving(templates["hermes"], Trained("tool", native=True, known=True))
    assert native.question(request).prompt == asked.prompt and "trained without them" in native.unlike_training(request)
    assert native.question(request).way is not None


def test_a_name_says_qwen3_5_if_and_only_if_training_folded(templates: dict[str, ChatTemplate], tmp_path: Path) -> None:
    folding, plain = template_of(tmp_path, RAISES).source, templates["none"].source
    assert served_name("Qwen/Qwen3.5-0.8B", Path("run"), folding) == "qwen3.5-0.8b-run"
    assert served_name("org/Other", Path("run"), folding) == "other-run-folded-as-qwen3.5"
    assert served_name("Qwen/Qwen3.5-0.8B", Path("run"), plain) == "qwen3-5-0.8b-run"
    assert served_name("a/My Model!", None, plain) == "my-model"
    assert served_name("a", Path("b"), plain, "mine") == "mine"
    for told, template in (("mine", folding), ("my_qwen3_5", plain), ("a b", plain), ("a/b", plain)):
        with pytest.raises(UserError):
            served_name("a", Path("b"), template, told)


def test_the_command_is_for_the_format_that_the_conversations_have(tmp_path: Path, templates: dict[str, ChatTemplate]) -> None:
    def trained_on(name: str, *answers: Message) -> Trained:
        folder = tmp_path / name
        folder.mkdir()
        end = Message("user", "b"), Message("assistant", "c")
        made = [
            Conversation((Message("user", f"do {i}"), answer, *end), "gptme", f"{i}", "MIT") for i, answer in enumerate(answers)
        ]
        write_conversations(folder / "c.jsonl", made)
        prepare([folder / "c.jsonl"], templates["hermes"], make_config({"valid_fraction": 0}, "t"), folder / "d", {})
        return read_trained(make_config({"data": str(folder / "d")}, "t"))

    def answer(text: str) -> Message:
        return Message("assistant", text)

    markdown, xml = "```shell\nls\n```", "<tool-use>\n<shell>\nls\n</shell>\n</tool-use>"
    native = session()[2]
    assert trained_on("markdown", answer(markdown), answer(xml), answer(markdown)).tool_format == "markdown"
    assert trained_on("xml", answer(xml)).tool_format == "xml"
    as_text = trained_on("tool", answer('@shell(call_1): {"command": "ls"}'))
    assert as_text.tool_format == "tool" and as_text.calls_as_text
    called = trained_on("native", native)
    assert called.tool_format == "tool" and called.native and not called.calls_as_text and not called.schemas
    assert trained_on("none", answer("no")) == Trained(known=True)
    assert read_trained(make_config({"data": str(tmp_path / "gone")}, "t")) == Trained()
    (tmp_path / "markdown" / "d" / "train.jsonl").write_text("[")
    with pytest.raises(UserError, match=r"train\.jsonl:1: not a line"):
        read_trained(make_config({"data": str(tmp_path / "markdown" / "d")}, "t"))
    command = gptme_command("m", Trained("xml", known=True), "http://127.0.0.1:1")
    assert command == ("OPENAI_BASE_URL=http://127.0.0.1:1/v1 OPENAI_API_KEY=none gptme -m local/m --tool-format xml")
    with_key = gptme_command("m", Trained(options=("--system", "short")), "http://127.0.0.1:1", "$KEY")
    assert " OPENAI_API_KEY=$KEY " in with_key and with_key.endswith("--tool-format markdown --system short")


@needs_recorded
def test_the_command_names_the_short_prompt_and_the_tools_where_training_had_them(tmp_path: Path) -> None:
    one, template = recorded(SHORT), ChatTemplate.load(folder_of(tmp_path / "model", "chatml"))
    dataset = prepared(tmp_path, template, [one.conversation])
    options = read_trained(make_config({"data": str(dataset.folder)}, "t")).options
    assert options[:3] == ("--system", "short", "--tools") and set(options[3].split(",")) >= {"shell", "save", "patch"}


TEXTS = ("Grüße, 東京! 👩‍👩‍👧 \ufffd\ufffd ok", "a" * 50, "\n\n  x ", "🦘🦘", "e\u0301\u0301")


def test_pieces_are_whole_characters_and_join_to_the_text(templates: dict[str, ChatTemplate]) -> None:
    import numpy as np

    template = templates["none"]
    hidden = hidden_of(template, None)
    noise = np.random.default_rng(0).integers(0, 320, (50, 40)).tolist()  # bytes that are no characters too
    for ids in [template.special.encode(text, add_special_tokens=False).ids for text in TEXTS] + noise:
        pieces = Pieces(lambda some: str(template.special.decode(some, skip_special_tokens=False)), hidden)
        found = [pieces.add(token) for token in ids]
        text = "".join(found) + pieces.rest()
        assert text == template.decode(ids)
        if ids not in noise:
            assert "\ufffd" not in "".join(found).replace("\ufffd\ufffd ok", "")


def test_what_may_be_a_stop_string_waits_until_it_is_none() -> None:
    held = Held(("STOP", "</end>"))
    assert [held.add(piece) for piece in ("a S", "T", "O", "x </e", "nd", "!")] == ["a ", "", "", "STOx ", "", "</end!"]
    assert [held.add(piece) for piece in ("b</", "end> c")] == ["b", ""] and held.found == "</end>"
    assert held.add("more") == "" and held.rest() == "</end> cmore"
    assert Held(()).add("abc") == "abc"


def test_a_model_that_was_handed_back_is_served_with_the_policy_of_its_run(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model", tokenizer=True)
    template_of(folder, RAISES)
    template = ChatTemplate.load(folder)
    write_template(folder, template.source)
    served = find_source(str(folder), "", "torch").template
    assert served.policy.name == "folded" and served.source == template.source
    assert named_as_folded(served_name(str(folder), None, served.source))
