"""Windows: between messages, never too long, each turn learned once or counted as too long, and nothing lost without a count."""

import json
from collections import Counter
from collections.abc import Iterable
from copy import copy
from pathlib import Path

import numpy as np
import pytest
from chats import chat, conversation_of, random_chat, template_of, to_learn
from tiny_models import CHATML

import mlx_finetune
from mlx_finetune.data.conversation import Conversation, Message
from mlx_finetune.data.examples import make_examples
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.sources import gather, gptme
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.windows import Count, Windows, cut, shorten

SAMPLE = Path(mlx_finetune.__file__).parent / "sample"
SIZES = (64, 128, 256, 1024, 8192)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return template_of(tmp_path_factory.mktemp("template"), CHATML)


def words(message: Message) -> int:
    """A count that is checked by eye: a token for each word, and two around them."""
    return len(message.content.split()) + 2


def check(conversation: Conversation, windows: Windows, max_length: int, count: Count = words) -> None:
    messages = conversation.messages
    turns = [i for i, message in enumerate(messages) if message.role == "assistant" and message.weight > 0]
    learned = [turn for window in windows.windows for turn in window.turns]
    assert learned == sorted(learned)
    assert Counter(learned) + Counter(windows.too_long) == Counter(turns)
    for window in windows.windows:
        assert sum(map(count, window.messages)) <= max_length
        here = [m for m in window.messages if m.role == "assistant" and m.weight > 0]
        assert here == [messages[turn] for turn in window.turns]
        assert window.messages[-1] == messages[window.turns[-1]]
        said = [(message.role, message.content) for message in window.messages]
        assert window.whole == (said == [(message.role, message.content) for message in messages[: len(said)]])
        check_order(window.messages, messages)


def check_order(inside: Iterable[Message], messages: tuple[Message, ...]) -> None:
    """Whole messages or their head and tail, in the order of the conversation; only the system prompt may be joined."""
    places = iter(messages)
    for message in inside:
        if message.role == "system" and "\n\n" in message.content and message not in messages:
            continue
        start, mark, _ = message.content.partition("… ")
        assert any(
            m.role == message.role and (m.content == message.content or (mark and m.content.startswith(start))) for m in places
        )


def log(turns: int, words_each: int, system: int = 10, output: int = 0) -> Conversation:
    messages = [Message("system", "rule " * system)]
    for i in range(turns):
        messages += chat(f"ask{i} " + "why " * words_each, f"answer{i} " + "so " * words_each)
        messages += [Message("system", f"output{i}\n" + "line of output\n" * output)] if output else []
    return conversation_of(messages)


def test_a_conversation_that_fits_is_one_window_untouched() -> None:
    conversation = log(3, 5)
    windows = cut(conversation, words, sum(map(words, conversation.messages)))
    (window,) = windows.windows
    assert window.messages == conversation.messages
    assert (window.turns, window.whole, windows.too_long, windows.shortened, windows.left_out) == ((2, 4, 6), True, (), 0, 0)


def test_what_follows_the_last_turn_is_not_read() -> None:
    messages = [*chat("a", "b"), Message("system", "output " * 500), Message("user", "thanks")]
    (window,) = cut(conversation_of(messages), words, 64).windows
    assert window.messages == tuple(messages[:2]) and window.whole


def test_windows_follow_each_other_with_a_quarter_of_what_was_read_before() -> None:
    conversation = log(20, 8)
    windows = cut(conversation, words, 112)
    check(conversation, windows, 112)
    assert windows.too_long == () and windows.shortened == 0 and windows.left_out == 0
    assert [window.turns for window in windows.windows[:3]] == [(2, 4, 6, 8), (10, 12, 14), (16, 18, 20)]
    second = windows.windows[1].messages
    assert second[0] == conversation.messages[0]
    assert [(m.content.split()[0], m.weight) for m in second[1:4]] == [("ask3", 0), ("answer3", 0), ("ask4", 0)]


def test_no_window_begins_with_an_answer_whose_question_is_not_there() -> None:
    asked = [text for i in range(20) for text in (f"why{i} " * 3, f"so{i} " * 14)]
    messages = [Message("system", "rule"), *chat(*asked)]
    for size in range(64, 200, 8):
        windows = cut(conversation_of(messages), words, size)
        check(conversation_of(messages), windows, size)
        assert {window.messages[1].role for window in windows.windows} == {"user"}


def test_long_output_keeps_its_head_and_its_tail() -> None:
    conversation = log(4, 8, output=200)
    windows = cut(conversation, words, 256)
    check(conversation, windows, 256)
    assert windows.too_long == () and windows.shortened == 3
    (shown,) = {m.content for w in windows.windows for m in w.messages if m.content.startswith("output1")}
    assert "\n… " in shown and shown.endswith(" lines cut …\n" + "line of output\n" * shown.rpartition("…")[2].count("line"))
    assert words(Message("system", shown)) <= 256 / 8


def test_later_windows_have_the_system_prompt_in_an_eighth_and_the_first_one_whole() -> None:
    conversation = log(30, 8, system=100)
    windows = cut(conversation, words, 256)
    check(conversation, windows, 256)
    first, *later = windows.windows
    assert first.whole and first.messages[0] == conversation.messages[0] and len(later) > 1
    assert {words(window.messages[0]) for window in later} == {min(words(window.messages[0]) for window in later)}
    assert all(words(window.messages[0]) <= 256 / 8 and not window.whole for window in later)
    assert windows.shortened == 1 and windows.too_long == () and windows.short_prompts == len(later)


def test_a_short_system_prompt_is_the_same_in_all_windows() -> None:
    cut_up = cut(log(40, 8, system=20), words, 256)
    assert len(cut_up.windows) > 2 and cut_up.short_prompts == 0
    assert {window.messages[0].content for window in cut_up.windows} == {"rule " * 20}


def test_it_is_known_what_plain_truncation_would_learn() -> None:
    conversation = log(4, 8)  # 12 tokens of system prompt, then 11 of each message
    windows = cut(conversation, words, 12 + 5 * 11 + 3)
    assert (windows.turn_tokens, windows.truncated_tokens) == (4 * 11, 2 * 11 + 3)
    whole = cut(conversation, words, 1000)
    assert whole.turn_tokens == whole.truncated_tokens == 4 * 11
    assert cut(log(4, 8, system=500), words, 128).truncated_tokens == 0


def test_a_long_system_prompt_is_shortened_in_every_window() -> None:
    conversation = log(4, 8, system=1000)
    windows = cut(conversation, words, 256)
    check(conversation, windows, 256)
    assert windows.shortened == 1
    prompts = {window.messages[0].content for window in windows.windows}
    assert len(prompts) == 1 and words(Message("system", prompts.pop())) <= 32


def test_a_turn_that_no_window_has_room_for_is_counted_and_read_in_part() -> None:
    messages = [*chat("one", "1 " * 300, "two", "second answer"), Message("user", "x " * 90), Message("assistant", "third")]
    conversation = conversation_of(messages)
    windows = cut(conversation, words, 128)
    check(conversation, windows, 128)
    assert windows.too_long == (1,)
    assert [window.turns for window in windows.windows] == [(3, 5)]
    assert [m.weight for m in windows.windows[0].messages if m.role == "assistant"] == [0, 1, 1]
    assert cut(conversation_of(chat("a", "b " * 500)), words, 128) == Windows((), (1,), 0, 0, turn_tokens=502, truncated_tokens=125)


def test_messages_that_no_window_has_room_for_are_counted() -> None:
    messages = [Message("user", f"m{i} " + "x " * 30) for i in range(10)]
    conversation = conversation_of([*chat("a", "b"), *messages, *chat("c", "d")])
    windows = cut(conversation, words, 128)
    check(conversation, windows, 128)
    seen = {m.content.split()[0] for window in windows.windows for m in window.messages}
    assert windows.left_out == 10 - len([name for name in seen if name.startswith("m")]) > 0


def test_context_only_turns_are_never_learned() -> None:
    turns = [Message("assistant", f"a{i} " * 20, float(i % 2)) for i in range(10)]
    conversation = conversation_of([m for i, turn in enumerate(turns) for m in (Message("user", f"u{i}"), turn)])
    for size in (64, 100, 1000):
        check(conversation, cut(conversation, words, size), size)
    assert cut(conversation_of([*chat("a"), Message("assistant", "b", 0.0)]), words, 64) == Windows((), (), 0, 0)


@pytest.mark.parametrize("size", SIZES)
def test_random_conversations_of_any_shape_are_cut_within_the_window(size: int) -> None:
    random = np.random.default_rng(size)
    for _ in range(150):
        messages = [
            Message(m.role, f"{i} " + m.content * int(random.choice((1, 3, 40, 300))), m.weight)
            for i, m in enumerate(random_chat(random) + random_chat(random))
        ]
        conversation = conversation_of(messages)
        windows = cut(conversation, words, size)
        learned = [turn for window in windows.windows for turn in window.turns]
        assert Counter(learned) + Counter(windows.too_long) == Counter(place for place, _, _ in to_learn(messages))
        assert all(sum(map(words, window.messages)) <= size for window in windows.windows)


@pytest.mark.parametrize("size", SIZES)
def test_the_windows_of_the_sample_hold_each_turn_once_in_real_tokens(tiny: ChatTemplate, size: int) -> None:
    for conversation in gather(gptme.read(SAMPLE / "gptme-logs")).conversations:
        windows = cut(conversation, tiny.count, size)
        check(conversation, windows, size, tiny.count)
        for window in windows.windows:
            encoded = tiny.encode(window.messages)
            assert len(encoded.tokens) <= size
            learned = tiny.decode(encoded.tokens[encoded.weights > 0].tolist())
            assert learned == "".join(conversation.messages[turn].content.strip() for turn in window.turns)


def test_each_message_is_counted_about_once() -> None:
    calls = Counter[str]()

    def count(message: Message) -> int:
        calls[message.content] += 1
        return words(message)

    conversation = log(100, 20)
    assert len(cut(conversation, count, 512).windows) > 5
    assert max(calls.values()) == 1


@pytest.mark.parametrize("limit", [0, 1, 8, 20, 100])
@pytest.mark.parametrize(
    "text", ["word " * 5000, "a b c\n" * 900, "\n" * 3000, "x\r\n" * 500, "好" * 3000, "one long line " * 300 + "\nend"]
)
def test_shortening_ends_and_keeps_to_the_limit_where_it_can(tiny: ChatTemplate, text: str, limit: int) -> None:
    message = Message("user", text)
    short = shorten(message, tiny.count, limit)
    least = tiny.count(Message("user", f"… {len(text)} characters cut …"))
    assert tiny.count(short) <= max(limit, least)
    assert " cut …" in short.content


def test_a_short_message_is_never_replaced_by_a_longer_one(tiny: ChatTemplate) -> None:
    for size in (64, 80, 100):
        conversation = conversation_of(
            [Message("system", "be kind and brief"), *chat(*["why is that so, please?", "because it is"] * 9)]
        )
        for window in cut(conversation, tiny.count, size).windows:
            assert all(m.content in {one.content for one in conversation.messages} for m in window.messages)


def test_a_log_that_cannot_be_tokenized_fast_is_still_cut_in_time(tiny: ChatTemplate) -> None:
    conversation = conversation_of([*chat("a", "b"), Message("tool", "A" * 300_000), *chat("c", "d")])
    windows = cut(conversation, tiny.count, 256)
    assert windows.shortened == 1
    assert json.dumps(windows.windows[-1].messages[-1].content) == '"d"'


def test_windows_of_the_sample_are_served_or_refused_never_wrong(tmp_path: Path) -> None:
    starts_with_user = CHATML.replace(
        "{% for", "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% for", 1
    )
    template = template_of(tmp_path, starts_with_user)
    conversation = conversation_of(chat(*["a " * 30, "b " * 30] * 6))
    for window in cut(conversation, template.count, 128).windows:
        if window.messages[0].role == "assistant":
            with pytest.raises(Refused):
                template.encode(window.messages)
        else:
            assert template.encode(window.messages).turns


def test_the_first_window_of_a_long_conversation_is_whole_and_later_ones_are_not() -> None:
    messages = [Message("system", "s" * 10), *chat(*[f"{i:02}" * 10 for i in range(20)])]
    conversation = Conversation(tuple(messages), "gptme", "g", "MIT")
    windows = cut(conversation, lambda message: len(message.content), 120).windows
    assert len(windows) > 2
    assert [window.whole for window in windows] == [True] + [False] * (len(windows) - 1)
    assert [m.content for m in windows[0].messages] == [m.content for m in messages[: len(windows[0].messages)]]


def test_an_output_that_only_the_first_window_holds_whole_does_not_count_as_shortened() -> None:
    begun = [Message("system", "rule"), *chat("a", "b"), Message("system", "output " * 60), Message("assistant", "c")]
    later = [text for i in range(30) for text in (f"ask{i} " * 10, f"answer{i} " * 10)]
    conversation = conversation_of([*begun, *chat(*later)])
    windows = cut(conversation, words, 256)
    check(conversation, windows, 256)
    assert windows.windows[0].messages[3].content == "output " * 60 and len(windows.windows) > 2
    assert windows.shortened == 0


def test_what_a_conversation_becomes_does_not_depend_on_the_one_before_it(tiny: ChatTemplate) -> None:
    random = np.random.default_rng(3)
    some = [conversation_of([*random_chat(random), *random_chat(random), Message("assistant", "End.")]) for _ in range(40)]
    alone = [make_examples(one, copy(tiny), 96) for one in some]
    for order in (some, some[::-1]):
        template = copy(tiny)
        together = {id(one): make_examples(one, template, 96) for one in order}
        for one, made in zip(some, alone, strict=True):
            assert together[id(one)].lines == made.lines
            for before, after in zip(made.examples, together[id(one)].examples, strict=True):
                assert np.array_equal(before.tokens, after.tokens) and np.array_equal(before.weights, after.weights)


def test_a_message_counts_as_many_tokens_as_it_takes_in_its_chat(tiny: ChatTemplate) -> None:
    messages = chat("One  two,\n\nthree. ", "  Four 1234\n", "é 日本語 👩\u200d👧", "End.")
    tiny.look_ahead(messages)
    encoded = tiny.encode(messages)
    counted = sum(tiny.count(message) for message in messages)
    assert len(encoded.tokens) <= counted <= len(encoded.tokens) + 4 * len(messages)
