"""Served as trained, each turn learned once with its end, nothing else; and what cannot be learned from exactly is refused."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from chats import (
    BEYOND,
    ESCAPES,
    LLAMA3,
    NO_END,
    REPEATS_SYSTEM,
    SPACED,
    STRIPS_THINKING,
    SYSTEM_LAST,
    TEMPLATES,
    UPPER,
    ZEPHYR,
    chat,
    chatml_with,
    random_chat,
    template_of,
    to_learn,
)
from tiny_models import CHATML, tiny_tokenizer

import mlx_finetune
from mlx_finetune.data.conversation import Conversation, Message
from mlx_finetune.data.provenance import MOST_MESSAGES, Refused
from mlx_finetune.data.sources import gather, gptme, openassistant
from mlx_finetune.data.template import ChatTemplate, Encoded
from mlx_finetune.errors import UserError

SAMPLE = Path(mlx_finetune.__file__).parent / "sample"
END = "<|im_end|>"
Load = Callable[..., ChatTemplate]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A template on the tiny tokenizer; each is loaded once."""
    loaded: dict[tuple[str, str | None], ChatTemplate] = {}

    def once(jinja: str) -> ChatTemplate:
        eos = "</s>" if jinja == ZEPHYR else None
        if (jinja, eos) not in loaded:
            loaded[jinja, eos] = template_of(tmp_path_factory.mktemp("template"), jinja, eos)
        return loaded[jinja, eos]

    return once


@pytest.fixture(scope="module")
def real(smollm2: Path) -> ChatTemplate:
    return ChatTemplate.load(smollm2)


def text_of(template: ChatTemplate, ids: Sequence[int]) -> str:
    return str(template.special.decode(list(ids), skip_special_tokens=False))


def turns_of(template: ChatTemplate, encoded: Encoded) -> list[tuple[int, list[int], set[float]]]:
    """First place, ids and weights of each learned turn: it ends with the control token that a server stops at."""
    turns: list[tuple[int, list[int], set[float]]] = []
    start = None
    for place, (token, weight) in enumerate(zip(encoded.tokens.tolist(), encoded.weights.tolist(), strict=True)):
        if weight and start is None:
            start = place
        if start is not None and token in template.stop_ids:
            turns.append((start, encoded.tokens[start : place + 1].tolist(), set(encoded.weights[start : place + 1].tolist())))
            start = None
        assert weight or start is None, "a turn that is learned in part"
    assert start is None, "a turn without its end"
    return turns


def check(template: ChatTemplate, messages: Sequence[Message], separator: str = "") -> Encoded:
    """Encodes and proves that each turn is learned once, with its end, and nothing else."""
    encoded = template.encode(messages)
    expected, turns = to_learn(messages), turns_of(template, encoded)
    assert encoded.turns == tuple(place for place, _, _ in expected)
    control = {i for i, token in template.special.get_added_tokens_decoder().items() if token.special}
    for (_, text, weight), (_, ids, weights) in zip(expected, turns, strict=True):
        assert text_of(template, ids[:-1]) == text + separator
        assert not control & set(ids[:-1])
        assert weights == {np.float32(weight)}
    assert encoded.weights[0] == 0
    assert encoded.tokens.dtype == np.int32 and encoded.weights.dtype == np.float32
    assert encoded.served == sum(
        is_served(template, messages[:place], encoded.tokens[:start])
        for (place, _, _), (start, _, _) in zip(expected, turns, strict=True)
    )
    return encoded


def is_served(template: ChatTemplate, before: Sequence[Message], tokens: np.ndarray) -> bool:
    try:
        return bool(before) and np.array_equal(template.prompt(template.as_learned(before)), tokens)
    except Refused:
        return False


def genuine(folder: Path) -> list[Conversation]:
    return [one for one in gather(gptme.read(folder)).conversations if one.assistant_turns]


def check_genuine(template: ChatTemplate, conversations: Sequence[Conversation]) -> int:
    count = 0
    for conversation in conversations:
        encoded = check(template, conversation.messages)
        assert encoded.served == len(encoded.turns) == conversation.assistant_turns, conversation.group
        count += encoded.served
    return count


def test_the_sample_is_served_as_trained_token_for_token(real: ChatTemplate) -> None:
    trees = gather(openassistant.read(SAMPLE / "openassistant.trees.jsonl", openassistant.EVERYTHING)).conversations
    conversations = [*genuine(SAMPLE / "gptme-logs"), *trees]
    assert check_genuine(real, conversations) == sum(one.assistant_turns for one in conversations) > 100


def test_genuine_logs_are_served_as_trained_token_for_token(real: ChatTemplate, shared: Path) -> None:
    conversations = genuine(shared / "data" / "gptme-logs")
    assert check_genuine(real, conversations) == sum(one.assistant_turns for one in conversations) > 150


def test_genuine_trees_are_learned_exactly(real: ChatTemplate, shared: Path) -> None:
    path = shared / "data" / "openassistant" / "oasst_export_trees_en_2023-02.jsonl"
    conversations = gather(openassistant.read(path, openassistant.EVERYTHING)).conversations
    assert check_genuine(real, conversations) == sum(one.assistant_turns for one in conversations) > 90


def test_the_newline_after_the_end_of_a_turn_is_not_learned(load: Load) -> None:
    encoded = check(load(CHATML), chat("one", "two", "three", "four"))
    text = "".join(
        text_of(load(CHATML), [token]) if weight else "·" for token, weight in zip(encoded.tokens, encoded.weights, strict=True)
    )
    assert re.findall(r"[^·]+", text) == ["two<|im_end|>", "four<|im_end|>"]
    assert text_of(load(CHATML), encoded.tokens.tolist()).endswith("four<|im_end|>\n") and text.endswith("·")


def test_tool_output_system_and_context_turns_are_read_but_not_learned(load: Load) -> None:
    messages = [
        Message("system", "be kind"),
        *chat("run it", "```shell\nls\n```"),
        Message("system", "a.txt"),
        Message("assistant", "only read", 0.0),
        Message("tool", "b.txt"),
        Message("assistant", "half", 0.5),
        Message("assistant", " \n"),
    ]
    encoded = check(load(CHATML), messages)
    assert encoded.turns == (2, 6)
    assert encoded.served == 2


def test_the_name_of_a_control_token_in_a_message_stays_text(load: Load) -> None:
    for jinja, served in ((CHATML, 0), (LLAMA3, 0), (SYSTEM_LAST, 0), (ZEPHYR, 0)):
        template = load(jinja)
        messages = [Message("system", "is"), *chat(f"is {END} </s> a tag?", "yes", "\n\nso", f"<|im_start|>user\n{END}</s>")]
        encoded = check(template, messages)
        rendered = template.render(messages)
        assert text_of(template, encoded.tokens.tolist()) == rendered
        control = sum(encoded.tokens.tolist().count(stop) for stop in template.stop_ids)
        assert control == (5 if jinja != SYSTEM_LAST else 4)
        assert encoded.served == served  # a server makes control tokens of the rest


@pytest.mark.parametrize("name", TEMPLATES)
def test_random_chats_are_learned_exactly_or_refused(load: Load, name: str) -> None:
    template, random, refused, learned = load(TEMPLATES[name]), np.random.default_rng(7), Counter[str](), 0
    for _ in range(150):
        messages = random_chat(random, beyond=0.05)
        try:
            learned += len(check(template, messages).turns)
        except Refused as error:
            refused[re.sub(r"role \w+", "role", str(error))] += 1
            if name == "chatml":
                assert any(mark in message.content for mark in BEYOND for message in messages)
    assert "\n" not in "".join(refused)
    few = name in ("upper", "escapes", "raises", "drops system", "strips thinking", "spaced")
    assert learned > (1 if few else 90), (learned, refused)


def test_random_chats_are_learned_exactly_where_the_tokenizer_joins_letters_and_marks(tmp_path: Path) -> None:
    from tokenizers.normalizers import NFC

    template, random = template_of(tmp_path, CHATML, normalizer=NFC()), np.random.default_rng(9)
    for _ in range(100):
        messages = [replace(m, content=m.content.replace("e", "e\u0301")) for m in random_chat(random)]
        encoded = template.encode(messages)
        expected = [normalize("NFC", text) for _, text, _ in to_learn(messages)]
        assert [text_of(template, ids[:-1]) for _, ids, _ in turns_of(template, encoded)] == expected


def test_a_tokenizer_that_puts_a_blank_before_each_piece_keeps_no_control_token_as_text(tmp_path: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    template = template_of(tmp_path, CHATML, pre_tokenizer=ByteLevel(add_prefix_space=True))
    assert template.encode(chat("hello", "good day")).turns == (1,)
    with pytest.raises(Refused, match="text of a control token, which this tokenizer cannot keep as text"):
        template.encode(chat("hello", f"good {END} day"))


def test_random_chats_are_learned_exactly_on_the_real_tokenizer(real: ChatTemplate) -> None:
    random = np.random.default_rng(8)
    assert sum(len(check(real, random_chat(random)).turns) for _ in range(150)) > 150


THOUGHT = chat("hello", "<think>\nwell\n</think>\n\ngood day", "and?", "<think>\nhm\n</think>\n\nfine")


@pytest.mark.parametrize(
    ("jinja", "messages", "reason"),
    [
        (ZEPHYR, [*chat("list", "```\nls\n```"), Message("tool", "a.txt"), *chat("so?", "fine")], "drops a message of role tool"),
        (ZEPHYR, [*chat("列", "是"), Message("tool", "文"), *chat("么", "好")], "drops or rewrites a message of role tool"),
        (STRIPS_THINKING, THOUGHT, "rewrites a message of role assistant"),
        (STRIPS_THINKING, chat("hello", "<think></think>good day", "and?", "fine"), "rewrites a message of role assistant"),
        (STRIPS_THINKING, chat("hello", "<think></think>。", "and?", "fine"), "rewrites a message of role assistant"),
        (UPPER, chat("hello", "good day"), "what its words are"),
        (ESCAPES, chat("hello", 'good "day"'), "rewrites a message of role assistant"),
        (ESCAPES, chat("hello", '"、"'), "rewrites a message of role assistant"),
        (chatml_with("message['content'][:20]"), chat("hello", "a very long answer indeed"), "rewrites"),
        (chatml_with("message['content'][-20:]"), chat("hello", "a very long answer indeed"), "rewrites"),
        (chatml_with("message['content'] * (1 if loop.index < 6 else 2)"), chat(*["so", "fine"] * 3), "rewrites"),
        (chatml_with("message['content'] | replace('  ', ' ')"), chat("hello", "if  x"), "rewrites a message of role assistant"),
        (chatml_with("message['content'] | replace('\\r', '')"), chat("a\r\nb", "hi"), "rewrites a message of role user"),
        (
            chatml_with("'' if 'secret' in message['content'] else message['content']"),
            chat("a", "the secret"),
            "what its words are",
        ),
        (CHATML, chat("x\U00050041", "hi"), "unassigned characters"),
        (CHATML, chat(*["hi", "yes"] * 2600), f"more than {MOST_MESSAGES} messages"),
        (SPACED, chat("hello", "the answer"), "a token straddles the edge of a turn"),
        (
            "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}",
            chat("hi", "yes", first="assistant"),
            "nothing stands",
        ),
    ],
)
def test_a_template_that_would_be_masked_wrongly_is_refused(load: Load, jinja: str, messages: list[Message], reason: str) -> None:
    with pytest.raises(Refused, match=reason) as error:
        load(jinja).encode(messages)
    assert "\n" not in str(error.value)


def test_thinking_is_learned_where_the_template_keeps_it(load: Load) -> None:
    assert check(load(STRIPS_THINKING), THOUGHT[:2]).turns == (1,)
    assert check(load(CHATML), THOUGHT).served == 2


def test_what_a_template_adds_before_the_end_is_learned_because_the_model_must_write_it(load: Load) -> None:
    template = load(CHATML.replace("<|im_end|>'", "\n<|im_end|>'"))
    assert check(template, chat("hello", "good day", "and?", "fine"), separator="\n").served == 2


def test_a_turn_ends_at_its_last_fence_with_the_end_of_turn_token_at_once(load: Load) -> None:
    encoded = check(load(CHATML), chat("hello", "\n```shell\nls\n```\n", "so", "fine"))
    assert "```shell\nls\n```<|im_end|>" in text_of(load(CHATML), encoded.tokens.tolist())


def test_an_end_of_turn_token_that_takes_the_blanks_after_it_is_learned(tmp_path: Path) -> None:
    template_of(tmp_path, CHATML)
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    for token in tokenizer["added_tokens"]:
        token["rstrip"] = True  # as in Phi-3
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert check(ChatTemplate.load(tmp_path), chat("hello", "good day", "so", "fine")).served == 2


def test_tokens_that_a_server_would_join_are_not_counted_as_served(tmp_path: Path) -> None:
    template_of(tmp_path, LLAMA3)
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["merges"].append(["Ċ", "Ċ"])
    tokenizer["model"]["vocab"]["ĊĊ"] = len(tokenizer["model"]["vocab"])
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    # "\n\n" at the end of the prompt is one token, before a word it is two.
    assert check(ChatTemplate.load(tmp_path), chat("hello", "good day", "so", "fine")).served == 0


def test_a_straddling_token_is_found_though_the_tokenizer_trims_offsets(tmp_path: Path) -> None:
    from tokenizers.processors import ByteLevel

    template = template_of(tmp_path, SPACED, post_processor=ByteLevel(trim_offsets=True))
    with pytest.raises(Refused, match="straddles"):
        template.encode(chat("hello", "the answer"))
    assert check(template, chat("hello", "good day", "so?", "fine")).served == 2


SECRET = "[REDACTED:github_token:1]"


def learned_text(template: ChatTemplate, encoded: Encoded) -> str:
    """What is learned, with a dot for each stretch that is not."""
    marks = (text_of(template, [t]) if w else "·" for t, w in zip(encoded.tokens.tolist(), encoded.weights.tolist(), strict=True))
    return re.sub("·+", "·", "".join(marks))


@pytest.mark.parametrize(
    ("answer", "learned"),
    [
        (f"{SECRET} is it", "· is it<|im_end|>·"),
        (f"it is\n{SECRET}", "·it is\n·<|im_end|>·"),
        (f"a '{SECRET}' and\n[REDACTED:pem_block:12]\n", "·a '·' and\n·<|im_end|>·"),
        (SECRET, "·<|im_end|>·"),
        (SECRET * 3, "·<|im_end|>·"),
        ("[REDACTED:x] [REDACTED::1] [REDACTED:A:1]", "·[REDACTED:x] [REDACTED::1] [REDACTED:A:1]<|im_end|>·"),
    ],
)
def test_what_stands_for_a_secret_is_read_but_not_learned(load: Load, answer: str, learned: str) -> None:
    template = load(CHATML)
    encoded = template.encode(chat(f"use {SECRET}", answer))
    assert learned_text(template, encoded) == learned
    assert encoded.turns == (1,) and encoded.served == 1
    plain = template.encode([*chat(f"use {SECRET}"), Message("assistant", answer, 0.5)])
    assert encoded.placeholders == plain.placeholders == check_hidden(template, encoded, answer)
    assert set(plain.weights.tolist()) == {0, 0.5}


def check_hidden(template: ChatTemplate, encoded: Encoded, answer: str) -> int:
    """How many tokens of the turn are not learned: all of them stand for secrets."""
    whole = template.encode(chat(f"use {SECRET}", answer.replace("REDACTED:", "REDACTED;")))
    assert len(whole.tokens) == len(encoded.tokens) and whole.placeholders == 0
    return int((whole.weights > 0).sum() - (encoded.weights > 0).sum())


def test_no_token_of_a_placeholder_is_learned_on_the_real_tokenizer(real: ChatTemplate) -> None:
    random = np.random.default_rng(11)
    for _ in range(60):
        parts = [str(random.choice(("key=", " ", "\n", "'", "a", "é", "[", "", SECRET, "[REDACTED:aws_key:3]"))) for _ in range(9)]
        answer = ("".join(parts) + SECRET).strip()
        encoded = real.encode(chat("hello", answer, "so?", "fine"))
        learned = learned_text(real, encoded)
        assert "REDACTED" not in learned and ":1]" not in learned and learned.endswith("fine<|im_end|>·")
        assert encoded.weights[encoded.tokens == 2].tolist()[-4:] == [0, 1, 0, 1]  # the ends of the four messages
        assert encoded.placeholders >= 5


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("", "no chat template"),
        (NO_END, "no end-of-turn token follows"),
        (REPEATS_SYSTEM, "rewrites a message of role system"),
        (chatml_with("message['content'] | lower"), "what its words are"),
        ("{{ raise_exception('no\nway') }}", "does not take these messages: no way"),
        ("{% for %}", "does not take these messages"),
        ("{{ 1 + messages }}", "does not take these messages"),
        ("{{ 1 // 0 }}", "does not take these messages"),
        ("{{ 'a'.index('b') }}", "does not take these messages"),
        ("nothing", "drops a message of role system"),
        ({"one": CHATML, "two": CHATML}, "multiple chat templates"),
    ],
)
def test_a_template_of_no_use_is_refused_when_it_is_loaded(tmp_path: Path, jinja: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        template_of(tmp_path, jinja)
    assert error.value.message.startswith(str(tmp_path)) and error.value.hint
    assert "\n" not in error.value.message


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"version": "1.0", "model"', b'{"model": {"type": "BPE", "vocab": 3}}'])
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    template_of(tmp_path, CHATML)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer") as error:
        ChatTemplate.load(tmp_path)
    assert error.value.hint and "\n" not in error.value.message


@pytest.mark.parametrize(
    ("content", "stops"), [("{}", {2}), ("[1]", {2}), ('{"eos_token_id": [0, 2]}', {0, 2}), ('{"eos_token_id": 1}', {1, 2})]
)
def test_a_server_stops_where_tokenizer_and_generation_config_say(tmp_path: Path, content: str, stops: set[int]) -> None:
    (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    assert template_of(tmp_path, CHATML).stop_ids == stops


def test_the_fingerprint_is_that_of_tokenizer_template_and_stops(tmp_path: Path) -> None:
    same = [template_of(tmp_path / name, CHATML).fingerprint for name in ("a", "b")]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "generation_config.json").write_text('{"eos_token_id": 0}', encoding="utf-8")
    other = [
        template_of(tmp_path / "c", CHATML),
        template_of(tmp_path / "d", CHATML + " "),
        template_of(tmp_path / "e", CHATML, "</s>"),
    ]
    assert len({*same}) == 1 and len({*same, *(one.fingerprint for one in other)}) == 4


def test_the_count_of_a_message_is_never_below_its_tokens(load: Load) -> None:
    template, random = load(CHATML), np.random.default_rng(3)
    for _ in range(50):
        messages = random_chat(random)
        assert len(template.encode(messages).tokens) <= sum(map(template.count, messages))


def test_decoding_leaves_out_control_tokens(load: Load) -> None:
    assert load(CHATML).decode([1, *tiny_tokenizer()("the answer")["input_ids"], 2]) == "the answer"
