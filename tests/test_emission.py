"""What a model is to write in a turn: all that its template says, to the token at which a server stops, and not one more."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from chats import END_ONLY_LAST, chat, template_of
from shipped_templates import model_folder
from tiny_models import CHATML

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.exact import pieces_of
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.template import ChatTemplate, Encoded
from mlx_finetune.data.windows import Window
from mlx_finetune.errors import UserError

CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
# As gpt-oss: the answer has a channel, and ends in another way where it is the last of all.
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '') + '<|message|>' }}"
    "{{ m.content + ('<|return|>' if loop.last and m.role == 'assistant' and not add_generation_prompt else '<|end|>') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# As GLM 4.5: a turn ends where that of the other begins, at whose name a server stops.
HEADERS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# As Apertus and Apriel: the end stands there only where another message follows.
OPEN_LAST = CHATML.replace("'<|im_end|>' + '\n'", "('' if loop.last and message['role'] == 'assistant' else '<|im_end|>\n')")
# As Command R7B: two control tokens end a turn, at the second of which a server stops.
TWO_ENDS = (
    "{% for m in messages %}{{ '<|turn|><|' + m.role + '|>' + ('<|response|>' if m.role == 'assistant' else '') + m.content }}"
    "{{ ('<|end_response|>' if m.role == 'assistant' else '') + '<|end_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|><|assistant|>' }}{% endif %}"
)
# As Phi-3: the end of a text behind the end of the last turn, and a server stops at either.
END_OF_ALL = CHATML + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
# As DeepSeek R1: the prompt begins to think, and a thought is in no message that is written.
R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' + m.content.split('</think>')[-1] + '<|stop|>' }}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# As DeepSeek V3: all system messages stand in front.
SYSTEM_IN_FRONT = (
    "{% for m in messages if m.role == 'system' %}{{ m.content + '\n' }}{% endfor %}"
    "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
MODELS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "harmony": (HARMONY, CHANNELS, ("<|return|>",)),
    "headers": (HEADERS, ROLES, ("<|user|>",)),
    "open last": (OPEN_LAST, (), ("<|im_end|>",)),
    "only last": (END_ONLY_LAST, (), ("<|im_end|>",)),
    "two ends": (TWO_ENDS, (*ROLES, "<|turn|>", "<|response|>", "<|end_response|>"), ("<|end_turn|>",)),
    "end of all": (END_OF_ALL, (), ("<|endoftext|>", "<|im_end|>")),
    "r1": (R1, ROLES, ("<|stop|>",)),
}
# What is learned of "yes" after each; all else of a turn is in the prompt.
LEARNED = {
    "harmony": "<|channel|>final<|message|>{}<|return|>",
    "headers": "{}<|user|>",
    "two ends": "<|response|>{}<|end_response|><|end_turn|>",
    "only last": "{}\n<|im_end|>",
    "r1": "\n</think>\n\n{}<|stop|>",
}
ANSWERS = ("yes", "a", "<", "f", "好", "<|im_end|>", "<|channel|>final", "is <|user|> or </s> 'it'\n\n<|return|> x", "two\n\nlines")


def load(folder: Path, name: str) -> ChatTemplate:
    return ChatTemplate.load(model_folder(folder, *MODELS[name]))


def learned_texts(template: ChatTemplate, messages: Sequence[Message]) -> list[tuple[str, int]]:
    """Of each turn, in all examples that `prepare` would make, what is learned, and how many control tokens are in it."""
    places = [i for i, m in enumerate(messages) if m.role == "assistant"]
    result: Encoded | Refused
    try:
        result = template.encode(messages)
    except Refused as refused:
        result = refused
    pieces = pieces_of(Window(tuple(messages), tuple(places), True), result, template, (), 10**6)
    assert not pieces.refused and not pieces.inexact
    found: dict[int, tuple[str, int]] = {}
    for piece in pieces.pieces:
        tokens, learned = piece.encoded.tokens.tolist(), piece.encoded.weights > 0
        edges = np.flatnonzero(np.diff([0, *learned, 0])).reshape(-1, 2).tolist()
        for (start, end), turn, exact in zip(edges, piece.window.turns, piece.encoded.exact, strict=True):
            assert turn not in found and tokens[end - 1] in template.stop_ids
            assert not exact or template.prompt(messages[:turn]).tolist() == tokens[:start]
            text = str(template.special.decode(tokens[start:end], skip_special_tokens=False))
            found[turn] = text, sum(token in template.special_ids for token in tokens[start:end])
    return [found[place] for place in places]


@pytest.mark.parametrize("name", MODELS)
def test_a_turn_is_learned_to_the_token_at_which_a_server_stops(tmp_path: Path, name: str) -> None:
    template, form = load(tmp_path, name), LEARNED.get(name, "{}<|im_end|>")
    for answer in ANSWERS:
        for messages in (chat("so?", answer), chat("so?", answer, "and?", "yes"), chat("so?", "no", "and?", answer)):
            expected = [(form.format(m.content), form.count("|>")) for m in messages if m.role == "assistant"]
            assert learned_texts(template, messages) == expected
    assert template.policy.name == "as it is"


def test_a_thought_goes_on_where_the_prompt_begins_it(tmp_path: Path) -> None:
    template = load(tmp_path, "r1")
    whole, begun = "<think>\nwell\n</think>\n\nyes", "well\n</think>\n\nyes"
    for content in (whole, begun):
        encoded = template.encode_turn(chat("so?", content))
        assert template.special.decode(encoded.tokens[encoded.weights > 0], skip_special_tokens=False) == begun + "<|stop|>"


def test_the_end_that_a_template_leaves_out_is_said(tmp_path: Path) -> None:
    assert "leaves the last turn open, which is learned with <|user|> as its end" in " ".join(load(tmp_path, "headers").remarks)
    (tmp_path / "other").mkdir()
    stops_elsewhere = template_of(tmp_path / "other", CHATML.replace("<|im_end|>", "<|endoftext|>"))
    assert "ends turns with <|endoftext|>, at which no server stops" in " ".join(stops_elsewhere.remarks)


def test_the_header_of_the_next_turn_is_no_end_where_no_server_stops_at_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no end-of-turn token follows"):
        ChatTemplate.load(model_folder(tmp_path, HEADERS, ROLES, ("<|stop|>",)))


def test_the_name_of_a_control_token_in_the_next_message_ends_no_turn(tmp_path: Path) -> None:
    bare = (
        "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}{% if not add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}"
    )
    template = template_of(tmp_path, bare)
    with pytest.raises(Refused, match="no end-of-turn token follows"):
        template.encode(chat("so?", "yes", "<|im_end|> is it?", "no"))


def test_a_template_that_puts_later_system_messages_in_front_is_given_another_policy(tmp_path: Path) -> None:
    template = template_of(tmp_path, SYSTEM_IN_FRONT)
    assert template.policy.name == "folded"
    assert template.why == "without it: the template puts a message of role system in front of an earlier one"


def test_an_answer_that_only_begins_to_think_is_refused_where_the_prompt_has_begun(tmp_path: Path) -> None:
    keeps = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    template = template_of(tmp_path, keeps)
    with pytest.raises(Refused, match="a thought without an end"):
        template.encode_turn(chat("so?", "<think>\nwell"))
    encoded: Encoded = template.encode_turn(chat("so?", "<think>\nwell\n</think>\n\nyes"))
    assert template.special.decode(encoded.tokens[encoded.weights > 0], skip_special_tokens=False) == (
        "well\n</think>\n\nyes<|im_end|>"
    )
