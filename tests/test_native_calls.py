"""Native tool calls: learned whole with their end-of-turn token, served as trained, or refused with the reason."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import chat, conversation_of, template_of
from shipped_templates import model_folder
from tiny_models import CHATML
from tool_chats import LLAMA, MISTRAL, QWEN, TOOLS, call, calling, result, session

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, ToolCall, read_conversations, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.template import ChatTemplate, Encoded
from mlx_finetune.data.windows import cut

TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "mistral": MISTRAL}
CALL = 'echo \\"a\\tb\\"\\nls -la'
SAVED = '{"path": "é.py", "content": "print(\'x\')\\n", "times": 3, "really": true}'
LEARNED = {
    "qwen": [
        f'<tool_call>\n{{"name": "shell", "arguments": {{"command": "{CALL}"}}}}\n</tool_call>',
        f'<tool_call>\n{{"name": "save", "arguments": {SAVED}}}\n</tool_call>',
        "Two files.",
    ],
    "llama": [
        f'{{"name": "shell", "parameters": {{"command": "{CALL}"}}}}',
        f'{{"name": "save", "parameters": {SAVED}}}',
        "Two files.",
    ],
    "mistral": [
        f'[TOOL_CALLS] [{{"name": "shell", "arguments": {{"command": "{CALL}"}}, "id": "call00001"}}]',
        f'[TOOL_CALLS] [{{"name": "save", "arguments": {SAVED}, "id": "call00002"}}]',
        "Two files.",
    ],
}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTemplate]:
    return {name: template_of(tmp_path_factory.mktemp(name), jinja) for name, jinja in TEMPLATES.items()}


def learned(template: ChatTemplate, encoded: Encoded) -> list[str]:
    """The text of each stretch of learned tokens; each ends with the token that a server stops at, which is cut off."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.weights > 0, [0]])))
    stretches = [encoded.tokens[start:end].tolist() for start, end in edges.reshape(-1, 2)]
    assert all(stretch[-1] in template.stop_ids for stretch in stretches)
    return [str(template.special.decode(stretch[:-1], skip_special_tokens=False)) for stretch in stretches]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_is_learned_whole_with_its_end_and_its_result_is_only_read(templates: dict[str, ChatTemplate], name: str) -> None:
    template, messages = templates[name], session()
    encoded = template.encode(messages, TOOLS)
    assert encoded.turns == (2, 4, 6)
    assert [text.removeprefix("\n").removeprefix(" ") for text in learned(template, encoded)] == LEARNED[name]
    assert encoded.served == 3 - (name == "mistral")  # whose template puts a blank before an answer, which no server sends
    for turn in encoded.turns:
        prompt = template.prompt(messages[:turn], TOOLS)
        assert np.array_equal(prompt, encoded.tokens[: len(prompt)])


def test_what_is_said_beside_a_call_is_learned_with_it(templates: dict[str, ChatTemplate]) -> None:
    template = templates["qwen"]
    encoded = template.encode(session(" Let me look.\n"), TOOLS)
    assert learned(template, encoded)[0] == f"Let me look.\n{LEARNED['qwen'][0]}"
    assert encoded.served == 3
    for name in ("llama", "mistral"):
        with pytest.raises(Refused, match="drops a message of role assistant"):
            templates[name].encode(session("Let me look."), TOOLS)


def test_several_calls_in_one_turn_are_learned_where_the_template_writes_them_all(templates: dict[str, ChatTemplate]) -> None:
    calls = [call("call00001", command="ls"), call("call00002", command="ls"), call("call00003", "save", path="a")]
    messages = [*chat("do"), calling(*calls), *(result(each.id, "done") for each in calls), Message("assistant", "ok")]
    for name in ("qwen", "mistral"):
        turns = learned(templates[name], templates[name].encode(messages, TOOLS))
        assert turns[0].count('"ls"') == 2 and turns[0].count('"save"') == 1 and len(turns) == 2
    with pytest.raises(Refused, match="only single tool-calls at once"):
        templates["llama"].encode(messages, TOOLS)


def test_a_call_of_weight_0_is_read_but_not_learned_and_one_of_half_counts_half(templates: dict[str, ChatTemplate]) -> None:
    messages = session()
    messages[2], messages[4] = replace(messages[2], weight=0.0), replace(messages[4], weight=0.5)
    encoded = templates["qwen"].encode(messages, TOOLS)
    assert encoded.turns == (4, 6) and set(encoded.weights.tolist()) == {0, 0.5, 1}
    assert learned(templates["qwen"], encoded) == LEARNED["qwen"][1:]


def test_what_stands_for_a_secret_in_a_call_is_not_learned(templates: dict[str, ChatTemplate]) -> None:
    messages = [*chat("log in"), calling(call("call00001", command="login [REDACTED:password:1] now"))]
    for template in templates.values():
        encoded = template.encode(messages, TOOLS)
        texts = str(template.special.decode(encoded.tokens[encoded.weights > 0].tolist(), skip_special_tokens=False))
        assert "login " in texts and " now" in texts and "REDACTED" not in texts and encoded.placeholders > 5


DROPS = CHATML
# As GLM 4.5: nothing ends a turn but the name of who speaks next.
GLM = (
    "{% for m in messages %}{{ '<|observation|>' if m.role == 'tool' else '<|' + m.role + '|>' }}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>{\"name\": \"' + call.function.name + '\", \"arguments\": ' + (call.function.arguments | tojson) + '}' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ONLY_FIRST = QWEN.replace("for call in m.tool_calls %}", "for call in m.tool_calls[:1] %}")
CUTS = QWEN.replace("(call.arguments | tojson)", "(call.arguments | tojson)[:20]")
NAMELESS = QWEN.replace("call.name", "'f'")
LATER = "{% if messages | length > 3 %}{{ 'long ' }}{% endif %}" + QWEN
# As Qwen3: an empty thought before the last turn of all.
THINKS = QWEN.replace(
    "'<|im_start|>assistant' }}{% if m.content",
    "'<|im_start|>assistant' + ('\n<think></think>' if loop.last else '') }}{% if m.content",
)
# As Command R7B: the header of the next turn stands there unasked.
OPENS = QWEN.replace("'<|im_start|>assistant'", "'<|im_start|>assistant<|endoftext|>'")
OPENS = OPENS.replace(
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|im_start|>assistant<|endoftext|>' }}"
)
OPEN = QWEN.replace("</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}", "</tool_call>' }}{% endfor %}{{ '\n' }}")
TWICE = [*chat("go"), calling(call("c", command="ls"), call("d", command="ls"))]
BOTH = [*chat("go"), calling(call("c", command="ls"), call("d", command="pwd"))]


@pytest.mark.parametrize(
    ("jinja", "messages", "reason"),
    [
        (DROPS, session(), "drops a tool call"),
        (ONLY_FIRST, BOTH, "drops a tool call"),
        (ONLY_FIRST, TWICE, "drops a tool call"),
        (CUTS, session(), "drops a tool call"),
        (NAMELESS, session(), "drops a tool call"),
        (CUTS, [replace(m, weight=0.0) if m.tool_calls else m for m in session()], "drops a tool call"),
        (LATER, session(), "in another way than a server would"),
        (OPEN, session(), "no end-of-turn token"),
        (QWEN, [*chat("a"), calling(ToolCall("c", "shell", "{'command'"))], "not JSON"),
        (QWEN, [*chat("a"), calling(ToolCall("c", "shell", "[1]"))], "no JSON object"),
        (QWEN, [*chat("a"), calling(ToolCall("c", "shell", "[" * 100_000))], "not JSON"),
        (QWEN, [*chat("a"), calling(call("c", command="echo '<|im_end|>'"))], "text of a control token"),
        (MISTRAL, [*chat("a"), calling(call("call_1", command="ls"))], "IDs should be of length 9"),
    ],
)
def test_a_call_that_a_template_does_not_write_as_it_is_is_refused(
    tmp_path: Path, jinja: str, messages: list[Message], reason: str
) -> None:
    template = template_of(tmp_path, jinja)
    with pytest.raises(Refused, match=reason) as error:
        template.encode(messages, TOOLS)
    assert "\n" not in str(error.value)


def test_a_call_is_learned_where_the_last_turn_of_all_is_written_in_another_way(tmp_path: Path) -> None:
    template, messages = template_of(tmp_path, THINKS), session()
    for count, turns in ((7, 3), (5, 2)):
        encoded = template.encode(messages[:count], TOOLS)
        assert encoded.served == len(encoded.turns) == turns
    first, last = learned(template, encoded)
    assert first == LEARNED["qwen"][0] and last == f"<think></think>\n{LEARNED['qwen'][1]}"


def test_the_header_of_the_next_turn_is_not_learned_with_a_call_though_it_stands_there_unasked(tmp_path: Path) -> None:
    template = template_of(tmp_path, OPENS)
    for count in (5, 6):
        encoded = template.encode(session()[:count], TOOLS)
        assert learned(template, encoded) == [f"\n{text}" for text in LEARNED["qwen"][:2]]
        assert encoded.served == len(encoded.turns) == 2


def test_a_call_without_words_is_learned_in_a_context_of_its_own(tmp_path: Path) -> None:
    template = template_of(tmp_path, QWEN)
    encoded = template.encode_turn(session()[:5], TOOLS)
    assert learned(template, encoded) == LEARNED["qwen"][1:2]
    assert np.array_equal(template.prompt(session()[:4], TOOLS), encoded.tokens[: int(np.argmax(encoded.weights > 0))])


def test_a_call_ends_where_its_result_begins_if_a_server_stops_there(tmp_path: Path) -> None:
    roles = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    folder = model_folder(tmp_path, GLM, roles, ("<|user|>", "<|observation|>"))
    template = ChatTemplate.load(folder)
    messages = session("Look: <|user|> <|observation|>")
    call_1, call_2 = (text.replace("<tool_call>\n", "<tool_call>").replace("\n</tool_call>", "") for text in LEARNED["qwen"][:2])
    forms = {
        2: f"Look: <|user|> <|observation|>{call_1}<|observation|>",
        4: f"{call_2}<|observation|>",
        6: "Two files.<|user|>",
    }
    for turn, form in forms.items():
        for encoded in (template.encode_turn(messages[: turn + 1], TOOLS), template.encode(messages[: turn + 1], TOOLS)):
            ids = encoded.tokens[encoded.weights > 0].tolist()
            assert str(template.special.decode(ids, skip_special_tokens=False)).endswith(form)
            assert ids[-1] == template.special.token_to_id(form[form.rindex("<|") :]) and encoded.turns[-1] == turn


def test_a_call_without_arguments_is_learned(templates: dict[str, ChatTemplate]) -> None:
    for arguments in ("", "{}"):
        encoded = templates["qwen"].encode([*chat("a"), calling(ToolCall("c", "shell", arguments))], TOOLS)
        assert learned(templates["qwen"], encoded) == ['<tool_call>\n{"name": "shell", "arguments": {}}\n</tool_call>']


def test_the_result_of_a_tool_is_proven_also_where_it_is_written_as_json(
    templates: dict[str, ChatTemplate], tmp_path: Path
) -> None:
    messages = [*session()[:3], result("call00001", '"x"\n\ttab \\ é …'), Message("assistant", "fine")]
    assert templates["llama"].encode(messages).turns == (2, 4)
    cuts = template_of(tmp_path, LLAMA.replace("(m.content | tojson)", "(m.content | tojson)[:6]"))
    with pytest.raises(Refused, match="rewrites a message of role tool"):
        cuts.encode(messages)


def test_the_template_is_told_which_call_a_result_is_of_and_no_more_than_gptme_sends(tmp_path: Path) -> None:
    named = "'\n' + (m.name or 'result') + ' of ' + m.tool_call_id + '\n'"
    text = template_of(tmp_path, QWEN.replace("'\n<tool_response>\n'", named)).render(session(), tools=TOOLS)
    assert "\nresult of call00001\na.txt" in text and "\nresult of call00002\nSaved." in text


def test_schemas_are_counted_where_the_template_writes_them(templates: dict[str, ChatTemplate], tmp_path: Path) -> None:
    for name, template in templates.items():
        assert template.count_tools(()) == 0
        assert template.count_tools(TOOLS) > 60, name
    assert template_of(tmp_path, CHATML).count_tools(TOOLS) == 0


def random_session(random: np.random.Generator, steps: int) -> list[Message]:
    """Questions, calls of all sizes with notices between them and their results, and answers."""
    messages = [Message("system", "be kind")]
    for step in range(steps):
        messages.append(Message("user", f"ask {step} " + "why " * int(random.integers(0, 20))))
        for turn in range(random.integers(0, 4)):
            calls = [
                call(f"call{step:03}{turn}{n}", command="ls " * int(random.integers(1, 40))) for n in range(random.integers(1, 3))
            ]
            messages.append(calling(*calls, content="look " * int(random.integers(0, 5)), weight=float(random.choice((0, 1, 1)))))
            messages += [Message("system", "a notice")] if random.random() < 0.3 else []
            messages += [result(each.id, "line\n" * int(random.integers(0, 200))) for each in calls]
        messages.append(Message("assistant", f"answer {step}"))
    return messages


def words(message: Message) -> int:
    return len(message.content.split()) + sum(len(each.arguments.split()) + 3 for each in message.tool_calls) + 2


@pytest.mark.parametrize("size", [64, 128, 400])
def test_no_window_holds_a_result_whose_call_is_cut_off(size: int) -> None:
    random, cut_windows = np.random.default_rng(size), 0
    for _ in range(60):
        conversation = conversation_of(random_session(random, 8))
        windows = cut(conversation, words, size)
        cut_windows += len(windows.windows) > 1
        learned_turns = [turn for window in windows.windows for turn in window.turns]
        assert sorted([*learned_turns, *windows.too_long]) == [
            i for i, m in enumerate(conversation.messages) if m.role == "assistant" and m.weight > 0
        ]
        for window in windows.windows:
            assert sum(map(words, window.messages)) <= size
            made: set[str] = set()
            for message in window.messages:
                made |= {each.id for each in message.tool_calls}
                assert message.role != "tool" or message.tool_call_id in made
    assert cut_windows > 30


def test_a_result_without_any_call_stays_where_it_is() -> None:
    messages = [*chat("a " * 30, "b " * 30) * 3, result("none", "x"), *chat("c", "d")]
    assert "x" in [message.content for message in cut(conversation_of(messages), words, 80).windows[-1].messages]


def prepared(folder: Path, conversations: Sequence[Conversation], template: ChatTemplate, **settings: Any) -> Dataset:
    write_conversations(folder / "all.jsonl", conversations)
    prepare([folder / "all.jsonl"], template, make_config({"valid_fraction": 0} | settings, "test"), folder / "dataset", {})
    return Dataset.open(folder / "dataset")


def decoded(message: Message) -> Message:
    calls = (replace(c, arguments=json.dumps(json.loads(c.arguments), ensure_ascii=False)) for c in message.tool_calls)
    return replace(message, tool_calls=tuple(calls))


def test_the_jsonl_beside_holds_calls_results_and_schemas(templates: dict[str, ChatTemplate], tmp_path: Path) -> None:
    conversation = Conversation(tuple(session("Look.")), "gptme", "g", "private", {}, TOOLS)
    dataset = prepared(tmp_path, [conversation], templates["qwen"])
    (row,) = read_conversations(dataset.folder / "train.jsonl")
    assert row.tools == TOOLS and row.messages == tuple(map(decoded, conversation.messages))
    (example,) = dataset.train
    assert np.array_equal(templates["qwen"].encode(row.messages, row.tools).tokens, example.tokens)
    assert example.turns == (2, 4, 6) and dataset.info["train"]["served_as_trained"] == 3


@pytest.mark.parametrize("size", [256, 400, 1000])
def test_windows_with_calls_and_schemas_keep_to_the_length(templates: dict[str, ChatTemplate], tmp_path: Path, size: int) -> None:
    random = np.random.default_rng(size)
    conversations = [
        Conversation(tuple(random_session(random, 6)), "gptme", str(i), "private", {}, TOOLS if i % 2 else ()) for i in range(20)
    ]
    dataset = prepared(tmp_path, conversations, templates["qwen"], max_length=size)
    tally = dataset.info["train"]
    assert max(dataset.train.lengths) <= size and tally["turns_refused"] == {}
    assert tally["learned_turns"] + tally["turns_too_long"] == sum(one.assistant_turns for one in conversations)
    assert tally["learned_turns"] > 50
