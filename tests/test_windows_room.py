"""Windows to the last token: what parts of a window are for what, by messages of so many words; and what shortening leaves."""

from dataclasses import replace

import pytest
from chats import conversation_of

from mlx_finetune.data.conversation import Conversation, Message, ToolCall
from mlx_finetune.data.windows import Windows, cut, shorten


def words(message: Message) -> int:
    """A count that is checked by eye: a token for each word, and two around them."""
    return len(message.content.split()) + 2


def one_message(size: int, role: str = "user", name: str = "x") -> Message:
    """`size` tokens by `words`."""
    return Message(role, " ".join([name] * (size - 2)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "is_whole"), [(96, True), (97, False)])
def test_a_system_prompt_of_three_quarters_of_a_window_stands_whole_in_the_first(size: int, is_whole: bool) -> None:
    later = [one_message(12, role) for _ in range(4) for role in ("user", "assistant")]
    conversation = conversation_of([one_message(size, "system"), *later])
    first = cut(conversation, words, 128).windows[0]
    assert first.whole == is_whole and (words(first.messages[0]) == size) == is_whole


@pytest.mark.parametrize(("size", "kept"), [(16, 16), (17, 15)])
def test_a_system_prompt_of_an_eighth_of_a_window_stands_whole_in_the_later_ones(size: int, kept: int) -> None:
    later = [one_message(20, role) for _ in range(8) for role in ("user", "assistant")]
    found = cut(conversation_of([one_message(size, "system"), *later]), words, 128)
    sizes = [words(window.messages[0]) for window in found.windows]
    assert len(sizes) > 2 and sizes == [size] + [kept] * (len(sizes) - 1)


@pytest.mark.parametrize(("role", "longest"), [("tool", 16), ("system", 16), ("user", 28)])
def test_an_output_of_an_eighth_and_a_message_of_a_quarter_of_the_room_stand_whole(role: str, longest: int) -> None:
    """128 tokens with a system prompt of 16 leave room for 112."""
    for size in (longest, longest + 1):
        rest = [one_message(20, each) for _ in range(6) for each in ("user", "assistant")]
        middle = [one_message(20), one_message(size, role, "middle"), one_message(20, "assistant")]
        found = cut(conversation_of([one_message(16, "system"), *rest, *middle]), words, 128)
        (shown,) = {m.content for window in found.windows for m in window.messages if "middle" in m.content}
        assert (shown == one_message(size, role, "middle").content) == (size == longest)
        assert found.shortened == (size > longest)


@pytest.mark.parametrize(("size", "is_learned"), [(84, True), (85, False)])
def test_a_turn_of_three_quarters_of_the_room_is_learned(size: int, is_learned: bool) -> None:
    rest = [one_message(20, each) for _ in range(4) for each in ("user", "assistant")]
    found = cut(conversation_of([one_message(16, "system"), *rest, one_message(10), one_message(size, "assistant")]), words, 128)
    assert found.too_long == (() if is_learned else (10,))


def test_a_quarter_of_the_room_is_what_was_read_before() -> None:
    """Room for 112: 28 of it for old messages, of 14 each."""
    for size, old in ((14, 2), (15, 0), (9, 2), (7, 4)):  # an answer does not come first
        rest = [one_message(size, "user" if i % 2 else "assistant", f"m{i}") for i in range(1, 40)]
        _, second, *_ = cut(conversation_of([one_message(16, "system"), *rest]), words, 128).windows
        places = [int(m.content.split()[0][1:]) for m in second.messages[1:]]
        assert second.turns[0] - places[0] - 1 == old, (size, places)


def test_a_window_is_filled_to_its_last_token_and_schemas_take_their_part() -> None:
    messages = [one_message(10, role) for _ in range(3) for role in ("user", "assistant")]
    conversation = conversation_of(messages)
    assert [one.whole for one in cut(conversation, words, 60).windows] == [True]
    assert [one.turns for one in cut(conversation, words, 59).windows] == [(1, 3), (5,)]
    assert [one.whole for one in cut(conversation, words, 66, tools=6).windows] == [True]
    assert [one.turns for one in cut(conversation, words, 65, tools=6).windows] == [(1, 3), (5,)]


def test_windows_are_filled_to_the_last_token() -> None:
    """Eight messages of 14 fill the room for 112: all of them new in the first window, two of them old in the others."""
    rest = [one_message(14, "assistant" if i % 2 else "user") for i in range(40)]
    for size, turns in ((128, [(2, 4, 6, 8), (10, 12, 14), (16, 18, 20)]), (127, [(2, 4, 6), (8, 10, 12), (14, 16, 18)])):
        windows = cut(conversation_of([one_message(16, "system"), *rest]), words, size).windows
        assert [window.turns for window in windows[:3]] == turns


def test_what_fits_to_the_last_token_is_whole_though_its_prompt_is_long_and_more_follows() -> None:
    begun = [one_message(100, "system"), one_message(14), one_message(14, "assistant")]
    conversation = conversation_of([*begun, one_message(500)])
    found = cut(conversation, words, 128)
    assert [(window.messages, window.turns, window.whole) for window in found.windows] == [(tuple(begun), (2,), True)]
    assert found.short_prompts == 0 and not cut(conversation, words, 127).windows[0].whole


def test_a_message_that_would_not_get_shorter_stays() -> None:
    small = one_message(7, "tool", "w")  # as many words as `… 9 characters cut …`
    rest = [one_message(5, each) for _ in range(4) for each in ("user", "assistant")]
    found = cut(conversation_of([*rest, one_message(4), small, one_message(5, "assistant")]), words, 32)
    assert small.content in {m.content for window in found.windows for m in window.messages} and found.shortened == 0


def test_nothing_to_learn_is_no_window() -> None:
    assert cut(conversation_of([one_message(9), one_message(9)]), words, 128) == Windows((), (), 0, 0, 0, 0, 0)


def task(count: int, asked: int = 14) -> Conversation:
    """A person asks, and asks again; `count` calls with their outputs follow. Room for 112 of 128 beside the system prompt."""
    begun = [one_message(16, "system", "rule"), one_message(14), one_message(14, "assistant"), one_message(asked, "user", "asked")]
    steps = [one_message(14, role, f"{role[0]}{i}") for i in range(count) for role in ("assistant", "tool")]
    return conversation_of([*begun, *steps, one_message(14, "assistant", "end")])


def test_a_window_in_the_middle_of_a_task_begins_with_what_was_asked_last() -> None:
    for asked, size in ((14, 114), (28, 128)):
        _, *later = cut(task(12, asked), words, 128).windows
        assert len(later) > 2 and {window.messages[1] for window in later} == {one_message(asked, "user", "asked")}
        assert sum(map(words, later[0].messages)) == size
    second = cut(task(12), words, 128).windows[1].messages
    assert [message.content.split()[0] for message in second] == "rule asked t1 a2 t2 a3 t3 a4".split()
    assert [message.weight for message in second] == [1, 1, 0, 0, 0, 1, 0, 1]


def test_what_was_asked_stands_before_a_turn_that_leaves_room_for_just_that() -> None:
    conversation = task(4, 28)
    last = cut(conversation_of([*conversation.messages, one_message(9, "tool"), one_message(84, "assistant", "long")]), words, 128)
    assert [message.content.split()[0] for message in last.windows[-1].messages] == ["rule", "asked", "long"]


def test_a_turn_stands_behind_as_much_as_there_is_room_for() -> None:
    begun = [one_message(16, "system"), one_message(14), one_message(14, "assistant")]
    said = [one_message(14, "user", f"m{i}") for i in range(10)]
    found = cut(conversation_of([*begun, *said, one_message(14, "assistant")]), words, 128)
    assert [m.content.split()[0] for m in found.windows[1].messages[1:-1]] == [f"m{i}" for i in range(3, 10)]
    assert found.left_out == 3


def test_old_messages_are_measured_one_by_one() -> None:
    begun = [one_message(16, "system"), *(one_message(14, role) for _ in range(3) for role in ("user", "assistant"))]
    old = [one_message(23, "user", "old"), one_message(5, "assistant", "answer")]
    new = [one_message(26, "user", "new"), one_message(14, "assistant", "end")]
    first, second = cut(conversation_of([*begun, *old, *new]), words, 128).windows
    assert first.turns == (2, 4, 6, 8)
    assert [message.content.split()[0] for message in second.messages[1:]] == ["old", "answer", "new", "end"]


def test_an_old_answer_that_is_left_away_leaves_its_room_to_others() -> None:
    rest = [one_message(15, "assistant" if i % 2 else "user") for i in range(40)]
    windows = cut(conversation_of([one_message(16, "system"), *rest]), words, 128).windows
    assert [window.turns for window in windows[:3]] == [(2, 4, 6), (8, 10, 12), (14, 16, 18)]


@pytest.mark.parametrize(("limit", "head", "tail"), [(36, 2, 1), (35, 1, 0), (54, 3, 1), (72, 4, 2)])
def test_two_thirds_of_what_is_left_are_lines_of_the_head_and_one_is_of_the_tail(limit: int, head: int, tail: int) -> None:
    lines = [f"line {i} of 9\n" for i in range(10)]  # of 12 characters
    message = Message("tool", "".join(lines))
    short = shorten(message, lambda one: 120 if one is message else 1, limit)
    assert short.content == "".join([*lines[:head], f"… {10 - head - tail} lines cut …\n", *lines[10 - tail :]])


@pytest.mark.parametrize("limit", [52, 60])
def test_shortening_goes_on_until_the_line_that_tells_of_it_has_room_too(limit: int) -> None:
    lines = [f"line {i} of 9\n" for i in range(10)]
    short = shorten(Message("tool", "".join(lines)), lambda one: len(one.content), limit)
    assert short.content == "".join([*lines[:2], "… 7 lines cut …\n", lines[9]]) and len(short.content) == 52


def test_a_long_line_is_cut_within_and_short_ones_beside_it_are_not() -> None:
    for text, left in (("ab" * 60, "ab" * 10 + "… 80 characters cut …" + "ab" * 10), ("ab\n" + "x" * 117, "ab\n… 1 lines cut …\n")):
        message = Message("tool", text)
        assert shorten(message, lambda one, whole=message: 120 if one is whole else 1, 40).content == left  # type: ignore[misc]


def test_a_shortened_prompt_of_several_messages_keeps_them_apart() -> None:
    prompt = [Message("system", "one"), Message("system", "rule\n" * 200)]
    rest = [one_message(20, role) for _ in range(8) for role in ("user", "assistant")]
    found = cut(conversation_of([*prompt, *rest]), words, 128)
    assert {window.messages[0].content[:9] for window in found.windows} == {"one\n\nrule"}


def test_a_prompt_that_would_not_get_shorter_stays() -> None:
    rest = [one_message(5, role) for _ in range(6) for role in ("user", "assistant")]
    found = cut(conversation_of([one_message(7, "system", "w"), *rest]), words, 32)
    assert found.short_prompts == 0 and {words(window.messages[0]) for window in found.windows} == {7} and len(found.windows) > 2


def test_a_window_ends_before_a_late_result_of_a_call_that_it_does_not_hold() -> None:
    def late(place: int) -> list[tuple[int, ...]]:
        begun = [one_message(16, "system"), *(one_message(14, "assistant" if i % 2 else "user") for i in range(16))]
        begun[place] = replace(begun[place], tool_calls=(ToolCall("c", "f", "{}"),))
        begun[11] = replace(one_message(14, "tool", "late"), tool_call_id="c")
        return [window.turns for window in cut(conversation_of(begun), words, 128).windows]

    assert late(2) == [(2, 4, 6, 8), (10,), (12, 14, 16)]
    assert late(8) == [(2, 4, 6, 8), (10, 12, 14), (16,)]  # it is read again, with the question before it


def test_a_window_ends_before_a_late_result_though_others_beside_it_have_their_calls() -> None:
    begun = [one_message(16, "system"), *(one_message(14, "assistant" if i % 2 else "user") for i in range(8))]
    made = (ToolCall("far", "f", "{}"), ToolCall("near", "f", "{}"))
    begun[2] = replace(begun[2], tool_calls=made[:1])
    steps = [one_message(14), replace(one_message(14, "assistant"), tool_calls=made[1:])]
    late = [replace(one_message(14, "tool"), tool_call_id=each) for each in ("near", "far")]
    found = cut(conversation_of([*begun, *steps, *late, one_message(14, "assistant")]), words, 128).windows
    assert [window.turns for window in found] == [(2, 4, 6, 8), (10,), (13,)]
    assert [message.tool_call_id for message in found[-1].messages if message.role == "tool"] == []


def test_a_call_with_which_a_window_begins_has_its_result_in_it() -> None:
    """An answer of 40 tokens before it is more than what may be read again."""
    begun = [one_message(16, "system"), *(one_message(14, role) for _ in range(2) for role in ("user", "assistant"))]
    asked = [one_message(14, "user", "asked"), one_message(40, "assistant")]
    step = [replace(one_message(14, "assistant", "call"), tool_calls=(ToolCall("c", "f", "{}"),))]
    step += [replace(one_message(14, "tool", "result"), tool_call_id="c"), one_message(14, "assistant", "end")]
    first, second = cut(conversation_of([*begun, *asked, *step]), words, 128).windows
    assert first.turns == (2, 4, 6) and second.turns == (7, 9)
    assert [message.content.split()[0] for message in second.messages[1:]] == ["asked", "call", "result", "end"]


def test_an_answer_that_is_only_read_may_begin_a_window_where_no_window_had_it_yet() -> None:
    begun = [one_message(16, "system"), *(one_message(14, role) for role in ("user", "assistant"))]
    begun += [one_message(14, "user", "asked"), one_message(40, "assistant")]
    new = [replace(one_message(20, "assistant", "read"), weight=0.0), one_message(14, "user", "next")]
    found = cut(conversation_of([*begun, *new, one_message(14, "assistant", "end")]), words, 128)
    assert [message.content.split()[0] for message in found.windows[1].messages[1:]] == ["asked", "read", "next", "end"]
    assert [window.turns for window in found.windows] == [(2, 4), (7,)] and found.left_out == 0


def test_a_question_takes_just_its_own_room_from_what_stands_before_a_turn() -> None:
    """Beside a question of 15 there are 97 for six outputs of 14 and the turn of 13."""
    begun = [one_message(16, "system"), *(one_message(14, role) for _ in range(2) for role in ("user", "assistant"))]
    asked = one_message(15, "user", "asked")
    outputs = [one_message(14, "tool", f"t{i}") for i in range(12)]
    *_, last = cut(conversation_of([*begun, asked, *outputs, one_message(13, "assistant", "end")]), words, 128).windows
    assert sum(map(words, last.messages)) == 128


def test_where_nobody_asked_nothing_stands_for_a_question() -> None:
    turns = [one_message(14, "assistant", f"a{i}") for i in range(20)]
    found = cut(conversation_of([one_message(16, "system", "rule"), *turns]), words, 128).windows
    assert [[m.role for m in window.messages].count("system") for window in found] == [1] * len(found) and len(found) > 2
    assert [turn for window in found for turn in window.turns] == list(range(1, 21))
    assert not any(message.content.startswith("a0 ") for window in found[1:] for message in window.messages)
    assert all(sum(map(words, window.messages)) <= 128 and len(set(window.messages)) == len(window.messages) for window in found)


def test_the_very_first_message_may_be_what_was_asked_last() -> None:
    steps = [one_message(14, role) for _ in range(12) for role in ("assistant", "tool")]
    found = cut(conversation_of([one_message(14, "user", "asked"), *steps, one_message(14, "assistant")]), words, 112).windows
    assert len(found) > 2 and {window.messages[0].content.split()[0] for window in found} == {"asked"}


def test_lines_of_any_length_are_counted_one_by_one() -> None:
    message = Message("tool", "a\n" + "b" * 9 + "\n" + "c" * 87 + "\n" + "d" * 9 + "\n" + "e" * 8 + "\n" + "f\n")
    short = shorten(message, lambda one: 121 if one is message else 1, 37)  # 24 characters of the head, 12 of the tail
    assert short.content == "a\nbbbbbbbbb\n… 2 lines cut …\n" + "e" * 8 + "\nf\n"
