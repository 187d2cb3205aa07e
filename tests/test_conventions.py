"""What older versions of gptme ran is told by their results, and becomes what today's runs, with nothing else changed."""

import difflib
import time
from dataclasses import dataclass

import numpy as np
import pytest

from mlx_finetune.data.conventions import SAVE_LINE, legacy_calls, modernise, ran_legacy
from mlx_finetune.data.tool_calls import calls_in

XML_PYTHON = "<tool-use>\n<python>\nprint(1)\n</python>\n</tool-use>"
TEXT = "I look.\n\n{}\n\nThat is all."
LS, LS_RAN = "```{}\nls -la\n```", "Ran command: `ls -la`\n\nstdout:\n```\na.txt\n```\n\n"
CODE, CODE_RAN = "```{}\nprint(1)\n```", "Executed code block.\n\nstdout:\n```\n1\n```"
FILE, SAVED = "```{}\nprint('hello')\n```", "Saved to {}"
SHELL, IPYTHON = ("shell", "", "ls -la"), ("ipython", "", "print(1)")
DECLINED = "Aborted, user chose not to run command."


@dataclass(frozen=True)
class Turn:
    """A turn of an old version, the message that followed once it had run, and what was meant."""

    text: str
    result: str
    meant: tuple[str, str, str]
    modern: bool = True  # whether today's convention can say it


OLD = {
    "v0.1 bash": Turn(LS.format("bash"), "Ran command:\n```bash\nls -la\n```\n\nstdout:\n```\na.txt\n```", SHELL),
    "v0.1 sh": Turn(LS.format("sh"), LS_RAN, SHELL),
    "v0.19 bash": Turn(LS.format("bash"), LS_RAN, SHELL),
    "v0.9 terminal": Turn(LS.format("terminal"), LS_RAN, SHELL),
    "v0.1 python": Turn(CODE.format("python"), ">>> print(1)\n1", IPYTHON),
    "v0.13 python": Turn(CODE.format("python"), CODE_RAN, IPYTHON),
    "v0.16 python": Turn(CODE.format("python"), CODE_RAN, IPYTHON),
    "v0.5 a file name": Turn(FILE.format("hello.py"), SAVED.format("hello.py"), ("save", "hello.py", "print('hello')")),
    "v0.19 a path": Turn(FILE.format("src/a.py"), SAVED.format("/home/u/src/a.py"), ("save", "src/a.py", "print('hello')")),
    "v0.19 a home path": Turn(FILE.format("~/a.py"), SAVED.format("/home/u/a.py"), ("save", "~/a.py", "print('hello')")),
    "v0.19 a path with a blank": Turn(
        FILE.format("src/My App/a.py"), SAVED.format("src/My App/a.py"), ("save", "src/My App/a.py", "print('hello')")
    ),
    "v0.2 a save line": Turn(
        FILE.format("python") + "\n// save: hello.py", SAVED.format("hello.py"), ("save", "hello.py", "print('hello')")
    ),
    "v0.3 a terminal line": Turn("terminal: ls -la", LS_RAN, SHELL),
    "v0.3 a python line": Turn("python: print(1)", CODE_RAN, IPYTHON),
    "v0.17 python in xml": Turn(XML_PYTHON, CODE_RAN, IPYTHON),
    "v0.25 without an id": Turn('@shell: {"command": "ls -la"}', LS_RAN, SHELL, modern=False),
    "v0.12 terminal with tmux": Turn("```terminal\nnew_session top\n```", "Running `top` in session", ("tmux", "", ""), False),
    "v0.14 tmux": Turn("```tmux\nsend_keys 0 C-c\n```", "Sent 'C-c' to tmux session", ("tmux", "", "send_keys 0 C-c"), False),
    "v0.16 youtube": Turn("```youtube\nabc\n```", "Here is a summary of the response: x", ("youtube", "", "abc"), False),
}
MODERN = {name: turn for name, turn in OLD.items() if turn.modern}


def runnable(text: str) -> list[tuple[str, str, str]]:
    calls = calls_in(text, "xml" if "<tool-use>" in text else "markdown")
    return [(call.tool, call.argument, call.content) for call in calls]


@pytest.mark.parametrize("name", OLD)
def test_what_ran_is_told_by_its_result(name: str) -> None:
    turn = OLD[name]
    text = TEXT.format(turn.text)
    assert runnable(text) == [] or turn.meant[0] == "tmux"
    assert [call.tool for call in legacy_calls(text)] == [turn.meant[0]]
    assert ran_legacy(text, turn.result)
    assert ran_legacy(text, turn.result + "\n\nSome notice.")


@pytest.mark.parametrize("result", ["", " \n", DECLINED, "You have 3 unread mails.", "Ran command: `pwd`", "Saved to other.txt"])
@pytest.mark.parametrize("name", [name for name in OLD if name != "v0.16 youtube"])
def test_what_was_declined_or_has_another_result_did_not_run(name: str, result: str) -> None:
    text = TEXT.format(OLD[name].text)
    assert not ran_legacy(text, result)
    assert modernise(text, result) == text


@pytest.mark.parametrize("name", MODERN)
def test_a_turn_that_ran_runs_the_same_today(name: str) -> None:
    turn = MODERN[name]
    text = TEXT.format(turn.text)
    modern = modernise(text, turn.result)
    assert runnable(modern) == [turn.meant]
    assert legacy_calls(modern) == [] and not ran_legacy(modern, turn.result)
    assert modernise(modern, turn.result) == modern


@pytest.mark.parametrize("name", MODERN)
def test_only_the_lines_that_name_the_tool_change(name: str) -> None:
    turn = MODERN[name]
    text = TEXT.format(turn.text)
    before, after = text.split("\n"), modernise(text, turn.result).split("\n")
    lines = list(difflib.ndiff(before, after))
    gone = [line[2:] for line in lines if line.startswith("- ")]
    assert gone and all(line.startswith(("```", "terminal: ", "python: ", "<", "// save:")) for line in gone)
    come = [line[2:] for line in lines if line.startswith("+ ") and line[2:]]
    assert all(line.startswith(("```", "<ipython>", "</ipython>")) or f" {line}" in turn.text for line in come)


@pytest.mark.parametrize("name", [name for name, turn in OLD.items() if not turn.modern])
def test_a_turn_that_today_cannot_say_stays(name: str) -> None:
    text = TEXT.format(OLD[name].text)
    assert modernise(text, OLD[name].result) == text


@pytest.mark.parametrize(
    "text", ["```text\nls\n```", "```json\n{}\n```", "```\nls -la\n```", "    ```bash\n    ls -la\n    ```", "bash"]
)
@pytest.mark.parametrize("result", [LS_RAN, CODE_RAN, SAVED.format("a.py")])
def test_what_no_version_ran_stays(text: str, result: str) -> None:
    assert legacy_calls(text) == [] and not ran_legacy(text, result)
    assert modernise(text, result) == text == modernise(text)


@pytest.mark.parametrize("name", MODERN)
def test_blocks_that_were_only_shown_stay(name: str) -> None:
    shown = "Such a block would remove it:\n\n```bash\nrm -r x\n```\n\nand this one a file:\n\n```notes.md\n# A\n```\n\n"
    turn = MODERN[name]
    if turn.meant[0] == "ipython" and turn.text.startswith("<"):
        shown = shown.replace("\n```", "\n````")
    modern = modernise(shown + turn.text, turn.result)
    assert modern == shown + modernise(turn.text, turn.result)
    assert runnable(modern) == [turn.meant]


def test_of_several_blocks_those_change_that_ran() -> None:
    text = "\n\n".join([LS.format("bash"), FILE.format("a.py"), "```sh\nrm x\n```", FILE.format("b.py")])
    modern = modernise(text, LS_RAN + SAVED.format("b.py"))
    assert runnable(modern) == [SHELL, ("save", "b.py", "print('hello')")]
    assert "```sh\nrm x\n```" in modern and "```a.py\n" in modern


def test_where_results_of_python_are_fewer_than_blocks_the_last_blocks_ran() -> None:
    text = "For example:\n\n```python\nimport os\n```\n\nBut now:\n\n" + CODE.format("python")
    assert runnable(modernise(text, CODE_RAN)) == [IPYTHON]
    assert len(runnable(modernise(text, f"{CODE_RAN}\n\n{CODE_RAN}"))) == 2


@pytest.mark.parametrize("failure", ["An error occurred: x", "Error during execution: x", "SyntaxError: invalid syntax"])
def test_a_failure_that_names_no_tool_belongs_to_the_last_block(failure: str) -> None:
    text = LS.format("bash") + "\n\n" + CODE.format("python")
    assert ran_legacy(text, failure)
    assert runnable(modernise(text, failure)) == [IPYTHON]


def test_a_turn_that_calls_in_todays_convention_did_not_run_the_rest() -> None:
    text = "To list: run\n\n" + LS.format("bash") + "\n\nI do:\n\n" + LS.format("shell")
    assert not ran_legacy(text, LS_RAN)
    assert modernise(text, LS_RAN) == text == modernise(text)


def test_without_results_a_turn_that_ends_in_a_block_calls_that_one_else_all() -> None:
    two = LS.format("bash") + "\n\n" + FILE.format("a.py")
    assert runnable(modernise(two)) == [("save", "a.py", "print('hello')")]
    assert runnable(modernise(two + "\n\nDone.")) == [SHELL, ("save", "a.py", "print('hello')")]
    assert modernise("terminal: ls -la") == "terminal: ls -la"  # prose, for all that is known
    assert modernise(FILE.format("js src/a.js")) == FILE.format("js src/a.js")  # a language and a title


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_stay(end: str) -> None:
    text = TEXT.format(LS.format("bash")).replace("\n", end)
    assert modernise(text, LS_RAN) == text.replace("bash", "shell")


def test_todo_blocks_of_two_words_today() -> None:
    assert runnable(modernise("```todoread\n```", "📝 Todo List:\n")) == [("todo", "read", "")]
    assert runnable(modernise("```todowrite\nadd x\n```", "Added todo 1")) == [("todo", "write", "add x")]


PIECES = ["```bash", "```python", "```a.py", "```shell", "```", "````", "ls -la", "print(1)", "// save: b.py", "text", "", "<b>"]
PIECES += [
    "terminal: ls -la",
    "python: 1",
    '@shell: {"command": "ls -la"}',
    "<tool-use>",
    "<python>x</python>",
    "</tool-use>",
    "\r",
]


@pytest.mark.parametrize("seed", range(5))
def test_made_up_turns_keep_their_content_and_settle(seed: int) -> None:
    random = np.random.default_rng(seed)
    changed = 0
    for _ in range(300):
        text = "\n".join(random.choice(PIECES, size=random.integers(1, 12)))
        result = str(random.choice([LS_RAN, CODE_RAN, SAVED.format("a.py"), SAVED.format("b.py"), LS_RAN + CODE_RAN, DECLINED]))
        modern = modernise(text, result)
        assert modernise(modern, result) == modern
        changed += modern != text
        assert ran_legacy(text, result) or modern == text
        before, after = ([line for line in one.splitlines() if plain(line)] for one in (text, modern))
        assert [line for line in after if line not in ("ls -la", "1")] == [line for line in before if line not in ("ls -la", "1")]
    assert changed > 5


def plain(line: str) -> bool:
    """Whether the line names no tool and is no fence."""
    return bool(line) and not line.startswith(("```", "<", "terminal: ", "python: ")) and not SAVE_LINE.match(line)


@pytest.mark.parametrize(
    "unit", ["`", "```\n", "```bash\n", "```bash\nls\n```\n", "````\n```\n", "terminal: ls\n", "@shell: {\n", "\n"]
)
def test_a_quarter_of_a_megabyte_is_read_in_seconds(unit: str) -> None:
    text = unit * (2**18 // len(unit))
    begin = time.process_time()
    for result in ("An error occurred: x", text):
        ran_legacy(text, result)
        modernise(text, result)
    modernise(text)
    assert time.process_time() - begin < 5  # at most 1 s measured; many minutes where it is quadratic
