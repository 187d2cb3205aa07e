"""Which turns are learned: what a person or gptme marked as bad is only read, and everything else is learned."""

import pytest

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.turns import TurnRules, judge, reason_to_reject_turns

LS = "```shell\nls\n```"
TEST = "Again:\n\n```shell\npytest -q\n```"
FAILS = "Ran command: `pytest -q`\n\n```stdout\nE  assert 1 == 2\n1 failed in 0.03s\n```\n\nReturn code: 1"
PASSES = "Ran command: `pytest -q`\n\n```stdout\n1 passed in 0.05s\n```\n\n"
OLD_LS = "```bash\nls\n```"
OLD_RAN = "Ran command: `ls`\n\nstdout:\n```\na.txt\n```"
TRACEBACK = "```stdout\nTraceback (most recent call last):\nValueError: x\n```"
PATCH = "```patch a.py\n<<<<<<< ORIGINAL\n1\n=======\n2\n>>>>>>> UPDATED\n```"
PATCHED = "Patch successfully applied to `/home/dev/a.py`"


def chat(*texts: str) -> list[Message]:
    """ "u: ...", "a: ..." and "s: ..." as messages."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [Message(roles[text[0]], text[3:]) for text in texts]  # type: ignore[arg-type]


def reasons(*texts: str, rules: TurnRules | None = None) -> list[str]:
    judged = judge(chat(*texts), "markdown", rules or TurnRules())
    assert [m.content for m in judged] == [text[3:] for text in texts] or rules
    turns = [message for message in judged if message.role == "assistant"]
    assert all((turn.weight == 0) == (turn.reason not in ("", "recovers")) for turn in turns)
    return [turn.reason for turn in turns]


@pytest.mark.parametrize(
    ("turn", "after", "reason"),
    [
        ("Flask keeps a registry... ^C Interrupted", (), "interrupted"),
        (LS, ("s: Interrupted by user",), "interrupted"),
        (LS, ("s: Ran command: `ls`\n\nCommand interrupted",), "interrupted"),
        (LS, ("s: Declined by user",), "declined by the person"),
        (LS, ("s: Execution declined by user",), "declined by the person"),
        (LS, ("s: Operation aborted: user chose not to run.",), "declined by the person"),
        (LS, ("s: Aborted, user chose not to run command.",), "declined by the person"),
        (LS, ("s: Execution aborted: user chose not to run this code.",), "declined by the person"),
        (LS, ("s: Save aborted: user refused to overwrite the file.",), "declined by the person"),
        (LS, ("s: Ran command: `ls -a`\n\n`a`\n\n(content was edited by user)",), "edited by the person before it ran"),
        (
            "I will look.",
            ("u: <system>No tool call detected in last message. Did you mean to finish?</system>",),
            "no tool call detected",
        ),
        ("```save a.py\nx = 1\n", (), "cut off"),
        ("text", ("s: Potential markdown codeblock cut-off detected",), "cut off"),
        ("```bash\nls\n```", ("s: Ran command: `ls`\n\nstdout:\n```\na\n```",), "out-of-date convention"),
        (LS, ("s: Ran allowlisted command: `ls`\n\n```stdout\nDeclined by user\n```",), ""),  # only printed by a program
        ("The message says `Interrupted by user`.", (), ""),
        ("Use it so:\n\n```python\nprint(1)\n```", ("u: thanks",), ""),  # shown, not run
        (LS, ("s: Command denied: `git add .`\n\nNothing was executed",), ""),  # an error to recover from
    ],
)
def test_a_turn_that_was_marked_as_bad_is_only_read(turn: str, after: tuple[str, ...], reason: str) -> None:
    assert reasons("u: please", f"a: {turn}", *after) == [reason]


DECLINED = [
    *("Save cancelled.", "Append cancelled.", "Command execution cancelled.", "Operation cancelled.", "Cancelled"),
    *("User chose not to run command.", "User chose not to execute this shell tool. Do not re-suggest it."),
    *("Skipped by user", "Skipped tool 1a2b-3c", "Operation skipped", "Copied to clipboard, execution skipped"),
    *("Editing returned no content; execution aborted.", "Editing is not supported for this command; execution aborted."),
    *("Edited content was not confirmed; execution aborted.", "Unknown response: nope"),
    *("Elicitation cancelled by user", "Selection cancelled", "Form cancelled"),
]


@pytest.mark.parametrize("result", DECLINED)
def test_every_way_to_decline_since_2024_is_known_where_it_is_all_that_gptme_says(result: str) -> None:
    assert reasons("u: please", f"a: {LS}", f"s: {result}", "a: Fine.") == ["declined by the person", ""]
    assert reasons("u: please", f"a: {LS}", f"s: {result}\n\nSome notice.", "a: Fine.") == ["declined by the person", ""]
    printed = f"s: Ran command: `ls`\n\n```stdout\n\n{result}\n\n```"
    assert reasons("u: please", f"a: {LS}", printed, "a: Fine.") == ["", ""]
    assert reasons("u: please", f"a: {LS}", f"s: Build 7: {result}", "a: Fine.") == ["", ""]


@pytest.mark.parametrize("text", ["It is", ""])
@pytest.mark.parametrize("end", ["... ^C Interrupted", " [INTERRUPTED]", "\n\n[interrupted]", "[INTERRUPTED]\n"])
def test_every_mark_of_an_interrupted_text_is_known(text: str, end: str) -> None:
    expected = "" if text + end == "It is[INTERRUPTED]\n" else "interrupted"
    assert reasons("u: why?", f"a: {text}{end}", "u: go on", "a: Because.") == [expected, ""]
    assert reasons("u: why?", f"a: {text}{end} is what it prints.") == [""]


def test_the_interruption_of_old_is_a_message_of_its_own() -> None:
    assert reasons("u: please", f"a: {LS}", "s: Interrupted", "a: Fine.") == ["interrupted", ""]
    assert reasons("u: please", f"a: {LS}", "s: Ran command: `ls`\n\nInterrupted system call", "a: Fine.") == ["", ""]


def test_a_call_without_a_result_before_a_word_of_the_person_was_declined_or_undone() -> None:
    assert reasons("u: please", f"a: {LS}", "u: no, not so", "a: Fine.") == ["undone or declined: no result", ""]
    assert reasons("u: please", "a: ```complete\n```", "u: more", "a: Fine.") == ["", ""]  # a tool that few sessions have
    assert reasons("u: please", "a: So:\n\n```json\n{}\n```", "u: thanks", "a: Fine.") == ["", ""]
    (turn,) = [m for m in judge(chat("u: how?", f"a: {LS}", "u: ok"), "xml", TurnRules()) if m.role == "assistant"]
    assert turn.weight == 1  # only shown: in xml, blocks are no calls
    (turn,) = [
        m
        for m in judge(chat("u: how?", f"a: {LS}", "u: ok"), "markdown", TurnRules(), frozenset({"save"}))
        if m.role == "assistant"
    ]
    assert turn.weight == 1  # only shown: this session had no shell


def test_a_log_that_ends_in_a_whole_call_is_learned_and_one_that_ends_in_half_of_one_is_not() -> None:
    assert reasons("u: please", f"a: {LS}") == [""]  # the session ended as it ran: nobody said that it was wrong
    assert reasons("u: please", "a: ```shell\nls") == ["cut off"]


def test_a_block_of_old_without_a_result_is_a_call_only_where_such_blocks_ran() -> None:
    old = "out-of-date convention"
    ran = ("u: list", f"a: {OLD_LS}", f"s: {OLD_RAN}", "a: One file.")
    assert reasons(*ran, "u: and again", f"a: {OLD_LS}", "u: no", "a: Fine.")[2:] == ["undone or declined: no result", ""]
    assert reasons(*ran, "u: and again", f"a: {OLD_LS}") == [old, "", ""]
    assert reasons("u: how?", f"a: {OLD_LS}", "u: thanks", "a: Fine.") == ["", ""]


@pytest.mark.parametrize("command", ["cat log.txt", "tail -n 20 log.txt", "grep -n Error log.txt", "sed -n 1,9p log.txt"])
def test_a_failure_that_a_file_tells_of_is_none(command: str) -> None:
    look = f"a: ```shell\n{command}\n```"
    shown = f"s: Ran command: `{command}`\n\n{TRACEBACK}"
    assert reasons("u: look", look, shown, f"a: {LS}", "s: Ran command: `ls`\n\n`a`") == ["", ""]
    failed = f"{shown}\n\nReturn code: 1"
    assert reasons("u: look", look, failed, f"a: {LS}", "s: Ran command: `ls`\n\n`a`") == ["", "recovers"]
    piped = look.replace(command, f"python a.py 2>&1 | {command}")
    assert reasons("u: look", piped, shown, f"a: {LS}", "s: Ran command: `ls`\n\n`a`") == ["", "recovers"]


def test_a_call_again_after_a_change_is_learned_and_without_one_it_is_not() -> None:
    tried = ("u: fix", f"a: {TEST}", f"s: {FAILS}", f"a: {PATCH}", f"s: {PATCHED}", f"a: {TEST}", f"s: {PASSES}")
    assert reasons(*tried) == ["", "recovers", ""]
    again = "repeats an earlier turn"
    assert reasons("u: fix", f"a: {TEST}", f"s: {FAILS}", f"a: {TEST}", f"s: {FAILS}") == ["", again]
    looked = "s: Ran allowlisted command: `ls`\n\n`a.py`"
    assert reasons("u: fix", f"a: {TEST}", f"s: {FAILS}", f"a: {LS}", looked, f"a: {TEST}", f"s: {FAILS}")[-1] == again
    failed = "s: Error during execution: Patch failed: original chunk not found in file"
    assert reasons("u: fix", f"a: {TEST}", f"s: {FAILS}", f"a: {PATCH}", failed, f"a: {TEST}", f"s: {FAILS}")[-1] == again


def test_a_call_again_has_its_reason_where_the_person_spoke_or_the_answer_differs() -> None:
    assert reasons("u: test", f"a: {TEST}", f"s: {FAILS}", "u: once more", f"a: {TEST}", f"s: {FAILS}") == ["", ""]
    assert reasons("u: is it flaky?", f"a: {TEST}", f"s: {FAILS}", f"a: {TEST}", f"s: {PASSES}")[0] == ""
    assert "repeats an earlier turn" not in reasons("u: is it flaky?", f"a: {TEST}", f"s: {FAILS}", f"a: {TEST}", f"s: {PASSES}")
    wait = "```shell\noutput 1\n```"
    running = "s: Command: `make`\n\n```stdout\nbuilding\n```"
    assert reasons("u: build", f"a: {wait}", running, f"a: {wait}", running) == ["", ""]


def test_a_third_time_with_nothing_but_the_same_complaint_between_is_going_in_circles() -> None:
    round_ = (f"a: {TEST}", f"s: {FAILS}", "u: still fails")
    assert reasons("u: fix", *round_, *round_, *round_) == ["", "", "repeats an earlier turn"]


@pytest.mark.parametrize(("first", "second"), [("run it again", "run it again"), ("I edited it, run again", "now?"), ("hm", "no")])
def test_a_call_that_the_person_asks_for_is_no_repetition_however_often(first: str, second: str) -> None:
    ran = (f"a: {TEST}", f"s: {FAILS}")
    assert reasons("u: run the tests", *ran, f"u: {first}", *ran, f"u: {second}", *ran) == ["", "", ""]


def test_the_same_long_answer_twice_is_a_repetition_and_a_short_one_is_not() -> None:
    long = "a: The module is still missing. Please try again."
    assert reasons("u: fix", long, "u: still fails", long) == ["", "repeats an earlier turn"]
    assert reasons("u: fix", "a: Done.", "u: and this", "a: Done.") == ["", ""]


def test_the_first_success_after_a_failure_can_weigh_more() -> None:
    texts = (
        "u: fix",
        f"a: {TEST}",
        f"s: {FAILS}",
        f"a: {PATCH}",
        f"s: {PATCHED}",
        f"a: {TEST}",
        f"s: {PASSES}",
        "a: All pass now.",
    )
    judged = judge(chat(*texts), "markdown", TurnRules(recovery_weight=2.5))
    assert [m.weight for m in judged if m.role == "assistant"] == [1, 2.5, 1, 1]


def test_old_conventions_are_only_read_or_modernised_and_learned() -> None:
    texts = ("u: list", "a: Sure:\n\n```bash\nls\n```", "s: Ran command: `ls`\n\nstdout:\n```\na.txt\n```", "a: One file.")
    assert reasons(*texts) == ["out-of-date convention", ""]
    judged = judge(chat(*texts), "markdown", TurnRules(modernise=True))
    assert [(m.content, m.weight) for m in judged if m.role == "assistant"] == [(f"Sure:\n\n{LS}", 1), ("One file.", 1)]


def test_a_conversation_in_circles_or_of_apologies_is_rejected_and_one_apology_is_not() -> None:
    round_ = (f"a: {TEST}", f"s: {FAILS}", "a: It still fails, please try it again.", "u: still fails")
    circles = judge(chat("u: fix", *round_ * 4), "markdown", TurnRules())
    assert reason_to_reject_turns(circles) == "goes in circles: repeats its own turns"
    sorry = [Message("assistant", f"I apologize for the confusion. Attempt {i}.") for i in range(3)]
    assert reason_to_reject_turns([*sorry, Message("assistant", "It works.")]) == "apologises in most of its turns"
    assert (
        reason_to_reject_turns([sorry[0], Message("user", "I apologize"), *chat("a: ok", "a: ok then", "s: I apologize")]) is None
    )
