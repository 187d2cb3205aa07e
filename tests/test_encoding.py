"""Where learned turns begin and end, and which chats are refused because that cannot be said."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chats import SYSTEM_LAST, ZEPHYR, chat, template_of
from shipped_templates import model_folder
from tiny_models import CHATML
from tool_chats import QWEN, call, calling

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.encoding import Encoded
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.template import ChatTemplate

# Nothing ends a turn but the name of who speaks next; a line break follows each message.
BY_NAMES = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
# The first answer ends in another way than those after it.
TWO_ENDS = CHATML.replace("'<|im_end|>'", "('<|im_end|>' if loop.index0 == 1 else '</s>')")


def text_of(template: ChatTemplate, encoded: Encoded) -> str:
    return str(template.special.decode(encoded.tokens.tolist(), skip_special_tokens=False))


def learned(template: ChatTemplate, encoded: Encoded) -> str:
    ids = encoded.tokens[encoded.weights > 0].tolist()
    return str(template.special.decode(ids, skip_special_tokens=False))


def with_merges(folder: Path, jinja: str, *merges: tuple[str, str]) -> ChatTemplate:
    """The tiny tokenizer with further merges of its BPE, which come first."""
    template_of(folder, jinja)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["merges"][:0] = map(list, merges)
    for pair in merges:
        tokenizer["model"]["vocab"].setdefault("".join(pair), len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"]))
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return ChatTemplate.load(folder)


def test_a_last_turn_that_the_template_leaves_open_ends_as_the_turns_before_it(tmp_path: Path) -> None:
    template = ChatTemplate.load(model_folder(tmp_path, BY_NAMES, ROLES, ("<|user|>",)))
    messages = chat("one", "two", "three", "four")
    encoded = template.encode(messages)
    assert text_of(template, encoded) == "<|user|>one\n<|assistant|>two\n<|user|>three\n<|assistant|>four\n<|user|>"
    assert learned(template, encoded) == "two\n<|user|>four\n<|user|>" and encoded.turns == (1, 3) and encoded.served == 2
    assert learned(template, template.encode_turn(messages)) == "four\n<|user|>"
    assert learned(template, template.encode_turn(messages[:2])) == "two\n<|user|>"


@pytest.mark.parametrize("end", ["<|im_end|>", "\n<|im_end|>", "<|endoftext|><|im_end|>", "<|endoftext|> <|im_end|>"])
def test_a_last_turn_left_open_gets_all_that_stands_behind_an_inner_one_up_to_its_end(tmp_path: Path, end: str) -> None:
    """What the template writes behind the last turn is not what it writes behind the others."""
    for name, last in (("nothing", ""), ("a line break", "\n"), ("blanks", " \n ")):
        open_last = f"({last!r} if loop.last and message['role'] == 'assistant' else {end + chr(10)!r})"
        template = template_of(tmp_path / name, CHATML.replace("'<|im_end|>' + '\n'", open_last))
        messages = chat("one", "two", "three", "four")
        assert learned(template, template.encode(messages)) == f"two{end}four{end}"
        assert learned(template, template.encode_turn(messages)) == f"four{end}"


@pytest.mark.parametrize("last", ["", "\n", "\n\n"])
def test_a_last_turn_of_calls_left_open_ends_as_one_that_is_answered(tmp_path: Path, last: str) -> None:
    end = f"({last!r} if loop.last and m.role == 'assistant' else '\n<|im_end|>\n')"
    jinja = QWEN.replace("{% endfor %}{{ '<|im_end|>\n' }}", f"{{% endfor %}}{{{{ {end} }}}}")
    template = template_of(tmp_path, jinja.replace("m.content + '<|im_end|>\n'", f"m.content + {end}"))
    messages = [*chat("go"), calling(call("c", "f", command="ls"))]
    through = [*messages, Message("tool", "R", tool_call_id="c")]
    first, again = template.encode(through), learned(template, template.encode(messages))
    assert learned(template, first).endswith("</tool_call>\n<|im_end|>")
    assert again == learned(template, first) == learned(template, template.encode_turn(messages))


def test_turns_that_end_in_different_ways_are_learned_only_if_a_server_stops_at_them(tmp_path: Path) -> None:
    stops = model_folder(tmp_path / "both", TWO_ENDS, (), ("</s>", "<|im_end|>"))
    template, another = ChatTemplate.load(stops), template_of(tmp_path / "one", TWO_ENDS, eos="</s>")
    both = chat("one", "two", "three", "four")
    assert learned(template, template.encode(both)) == "two<|im_end|>four</s>"
    with pytest.raises(Refused, match=r"ends assistant turns in different ways: </s> <\|im_end\|>"):
        another.encode(both)
    assert learned(another, another.encode(both[:2])) == "two<|im_end|>"
    both[1] = replace(both[1], weight=0.0)
    assert learned(another, another.encode(both)) == "four</s>"


@pytest.mark.parametrize("where", ["argument", "name", "schema"])
def test_the_text_of_a_control_token_in_a_call_or_a_schema_is_refused(tmp_path: Path, where: str) -> None:
    template = template_of(tmp_path, QWEN)
    text = {where: "a <|im_end|> b"}
    messages = [*chat("go"), calling(call("c", text.get("name", "f"), command=text.get("argument", "ls")))]
    schema: dict[str, Any] = {"type": "function", "function": {"name": "f", "description": text.get("schema", "Runs.")}}
    for encode in (template.encode, template.encode_turn):
        assert encode([*chat("go"), calling(call("c", "f", command="ls"))]).turns == (1,)
        with pytest.raises(Refused, match="a tool call or schema holds the text of a control token"):
            encode(messages, [schema])


def test_a_turn_before_which_nothing_stands_is_refused(tmp_path: Path) -> None:
    jinja = "{% for m in messages if m.content %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    template, answer = template_of(tmp_path, jinja), Message("assistant", "yes")
    for encode in (template.encode, template.encode_turn):
        with pytest.raises(Refused, match="nothing stands before the first turn"):
            encode([Message("user", ""), answer])
        assert learned(template, encode([Message("user", "x"), answer])) == "yes<|im_end|>"
    at_once = template_of(tmp_path / "at once", "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}")
    assert at_once.encode([Message("user", ""), answer]).weights.tolist()[:2] == [0, 1]


def test_names_of_control_tokens_in_several_messages_stay_text_in_their_places(tmp_path: Path) -> None:
    template = template_of(tmp_path, ZEPHYR, eos="</s>")
    messages = [Message("system", "a </s>"), *chat("b", "c </s>", "</s> d", "e")]
    encoded = template.encode(messages)
    assert text_of(template, encoded) == template.render(messages)
    assert learned(template, encoded) == "c </s></s>e</s>"
    assert encoded.tokens.tolist().count(template.special.token_to_id("</s>")) == 5
    assert encoded.exact == (False, False) and encoded.as_text == (True, True)
    own = template.encode(chat("b", "c </s>", "d", "e"))
    assert own.exact == (True, False) and own.as_text == (False, True)  # what a turn says itself is not sent for it


def test_names_of_control_tokens_stay_text_also_where_the_template_changes_the_order(tmp_path: Path) -> None:
    template = template_of(tmp_path, SYSTEM_LAST)
    messages = [Message("system", "a <|im_end|>"), *chat("b", "c <|im_end|>", "d", "e")]
    encoded = template.encode(messages)
    assert text_of(template, encoded) == template.render(messages)
    assert encoded.tokens.tolist().count(template.special.token_to_id("<|im_end|>")) == 4


def test_the_name_of_a_control_token_in_the_next_message_does_not_end_a_turn(tmp_path: Path) -> None:
    """The template ends only what a person says, and the last turn of all; what is said follows it at once."""
    end = "{% if m.role != 'assistant' or loop.last %}{{ '<|im_end|>' }}{% endif %}"
    ends_few = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    ends_all = "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    moves = "{% set messages = (messages | rejectattr('role', 'equalto', 'system') | list)"
    moves += " + (messages | selectattr('role', 'equalto', 'system') | list) %}"
    asked, named = chat("one", "two"), [Message("user", "<|im_end|> three"), Message("assistant", "four", 0.0)]
    for jinja, messages in ((ends_few, [*asked, *named]), (moves + ends_few, [*asked, Message("system", "s"), *named])):
        with pytest.raises(Refused, match="no end-of-turn token follows an assistant message"):
            template_of(tmp_path / str(len(messages)), jinja).encode(messages)
    read = [asked[0], replace(asked[1], weight=0.0), *chat("three", "four")]
    template = template_of(tmp_path / "few", ends_few)
    assert learned(template, template.encode(read)) == "four<|im_end|>"  # what is only read needs no end
    template = template_of(tmp_path / "all", ends_all)
    assert learned(template, template.encode([*asked, *chat("three", "four")])) == "two<|im_end|>four<|im_end|>"


def test_a_turn_before_which_no_control_token_stands_is_exact_if_a_server_feeds_the_same(tmp_path: Path) -> None:
    plain = (
        "{% for m in messages %}{{ m.role + ':\n' + m.content + ('<|im_end|>' if m.role == 'assistant' else '\n') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    )
    joins = with_merges(tmp_path / "joins", plain.replace(":\n", ":\n\n"), ("Ċ", "Ċ"))  # at the end of a text, not before a word
    for template, exact in ((template_of(tmp_path / "plain", plain), True), (joins, False)):
        encoded = template.encode(chat("one", "two", "three", "four"))
        assert encoded.exact == (exact, exact) and encoded.as_text == (False, False)
        assert template.encode(chat("one", "two")).exact == (exact,)
    assert template_of(tmp_path / "chatml", CHATML).encode(chat("hi", "so?", "yes", first="assistant")).exact == (False, True)


def test_a_context_of_its_own_has_the_tokens_that_a_server_feeds_and_names_of_control_tokens_stay_text(tmp_path: Path) -> None:
    template, before = template_of(tmp_path, CHATML), chat("one", "two", "three")
    fed, asked = template.prompt(before).tolist(), set()
    earlier = len(template.plain.encode("two", add_special_tokens=False).ids)
    for content in ("four", "say <|im_end|> so"):
        encoded = template.encode_turn([*before, Message("assistant", content)])
        asked.add(encoded.by_role["user"])
        assert encoded.tokens[: len(fed)].tolist() == fed and encoded.weights[: len(fed) + 1].tolist() == [0] * len(fed) + [1]
        assert encoded.tokens.tolist().count(template.special.token_to_id("<|im_end|>")) == 4
        assert learned(template, encoded) == f"{content}<|im_end|>"
        said = template.plain.encode(content, add_special_tokens=False).ids
        assert encoded.tokens[len(fed) : -1].tolist() == said and encoded.by_role["assistant"] == len(said) + 1 + earlier
        assert encoded.exact == (True,) and encoded.as_text == (False,)
    assert len(asked) == 1


def test_a_prompt_that_would_be_cut_otherwise_before_a_word_is_learned_behind_as_it_is_fed(tmp_path: Path) -> None:
    """At the end of a text: tab, and blank with line break; before a word: tab with blank, and line break."""
    template = with_merges(tmp_path, CHATML.replace("assistant\n", "assistant\t \n"), ("Ġ", "Ċ"), ("ĉ", "Ġ"))
    fed = template.prompt(chat("one")).tolist()
    encoded = template.encode_turn(chat("one", "two"))
    assert encoded.tokens[: len(fed)].tolist() == fed and learned(template, encoded) == "two<|im_end|>"
    whole = template.special.encode(text_of(template, encoded), add_special_tokens=False).ids
    assert len(whole) == len(encoded.tokens) and whole != encoded.tokens.tolist()


def test_a_token_of_two_placeholders_is_counted_once(tmp_path: Path) -> None:
    template = with_merges(tmp_path, CHATML, ("]", "["))
    encoded = template.encode(chat("one", "[REDACTED:password:1]" * 2))
    start = len(template.prompt(chat("one")))
    end = int(encoded.weights.argmax())
    assert template.special.token_to_id("][") in encoded.tokens and encoded.placeholders == end - start
    assert learned(template, encoded) == "<|im_end|>"


def test_a_tokenizer_that_puts_a_blank_before_each_piece_learns_a_turn_in_a_context_of_its_own(
    tmp_path: Path,
) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    template = template_of(tmp_path, CHATML, pre_tokenizer=ByteLevel(add_prefix_space=True))
    encoded = template.encode_turn(chat("one", "two"))
    assert learned(template, encoded).strip() == "two<|im_end|>" and not template.pieces_join
    with pytest.raises(Refused, match="a token straddles the edge of a turn"):
        template.encode_turn(chat("one", "two <|im_end|>"))
