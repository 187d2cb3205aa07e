"""An answer is judged as gptme would take it: calls, fences, patches, commands."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from log_rows import said

from mlx_finetune.data.tool_calls import calls_in, fingerprint
from mlx_finetune.evaluation.judging import RATES, Asked, blank_line_after_files, judge, repeats_itself, shell_parses
from mlx_finetune.evaluation.known_files import known_files
from mlx_finetune.evaluation.patches import DoesNotApply, Malformed, apply, is_well_formed

LS = "```shell\nls\n```"


def hunk(original: str, updated: str) -> str:
    return f"<<<<<<< ORIGINAL\n{original}\n=======\n{updated}\n>>>>>>> UPDATED"


def verdict(name: str, answer: str, asked: Asked = Asked(LS, "markdown"), stopped: bool = True) -> bool | None:  # noqa: B008
    return judge(answer, stopped, asked).get(name)


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("valid call", "I look.\n\n```shell\nls -a\n```", True),
        ("valid call", "```save a.py\nx\n```", True),
        ("valid call", "```save a.py\nx\n```\nDone.", False),  # no blank line: gptme does not run it
        ("valid call", "```bash\nls\n```", False),
        ("valid call", "```shell\nls", False),
        ("valid call", "I would run ls.", False),
        ("same tool", "```shell\npwd\n```", True),
        ("same tool", "```ipython\n1\n```\n\n```shell\nls\n```", False),  # the first is what runs
        ("same tool", "No.", False),
        ("fence closed", "```shell\nls\n```", True),
        ("fence closed", "```shell\nls\n```\n\n```python\n1\n", False),
        ("fence closed", "```save R.md\n```sh\nls\n```\n", False),
        ("fence closed", "```save R.md\n```sh\nls\n```\n```", True),
        ("fence closed", "Only `words`.", None),
        ("fence closed", "<think>\n```\n</think>\nNo fence.", None),
        ("shell parses", "```shell\nfor i in 1 2; do echo $i; done\n```", True),
        ("shell parses", "```shell\nfor i in 1 2; do echo $i\n```", False),
        ("shell parses", "```shell\necho 'a\n```", None),  # the fence is in a string: no call
        ("shell parses", "```ipython\nfor\n```", None),
        ("today's conventions", "```bash\nls\n```", False),
        ("today's conventions", "```shell\nls\n```\n\n```hello.py\n1\n```", False),
        ("today's conventions", "```shell\nls\n```", True),
        ("today's conventions", "Words.", None),
        ("patch well formed", f"```patch a\n{hunk('x', 'y')}\n```", True),
        ("patch well formed", "```patch a\n<<<<<<< ORIGINAL\nx\n=======\ny\n```", False),
        ("patch applies", f"```patch ./a\n{hunk('x', 'y')}\n```", True),
        ("patch applies", f"```patch a\n{hunk('z', 'y')}\n```", False),
        ("patch applies", f"```patch b\n{hunk('x', 'y')}\n```", None),
        ("patch applies", LS, None),
    ],
)
def test_an_answer_of_markdown_is_judged_as_gptme_takes_it(name: str, answer: str, expected: bool | None) -> None:
    assert verdict(name, answer, Asked(LS, "markdown", files={"a": "w\nx\n"})) is expected


@pytest.mark.parametrize(
    ("tool_format", "answer", "valid", "closed"),
    [
        ("xml", "<tool-use>\n<shell>\nls\n</shell>\n</tool-use>", True, True),
        ("xml", "<tool-use>\n<shell>\nls && pwd\n</shell>\n</tool-use>", False, True),
        ("xml", "<tool-use>\n<shell>\nls", False, False),
        ("xml", LS, False, None),
        ("tool", '@shell(call_1): {"command": "ls"}', True, True),
        ("tool", '@shell(call_1): {"command": "l', False, False),
        ("tool", '@shell: {"command": "ls"}', False, None),
        ("tool", LS, True, True),  # markdown runs in the format tool too
    ],
)
def test_an_answer_is_judged_in_the_format_of_its_conversation(tool_format, answer, valid, closed) -> None:
    logged = {"xml": "<tool-use><shell>ls</shell></tool-use>", "tool": '@shell(a): {"command": "ls"}'}[tool_format]
    asked = Asked(logged, tool_format)
    assert verdict("valid call", answer, asked) is valid and verdict("fence closed", answer, asked) is closed


def test_a_turn_without_a_call_in_the_log_says_nothing_of_calls() -> None:
    judged = judge(LS, True, Asked("All done.", "markdown", after_error=True))
    assert not {"valid call", "same tool", "another call after an error"} & judged.keys()


def test_after_an_error_another_call_is_asked_for_and_the_same_in_other_words_does_not_count() -> None:
    asked = Asked(LS, "markdown", True, frozenset(map(fingerprint, calls_in("```shell\ncat x\n```"))))
    name = "another call after an error"
    assert verdict(name, "Let me try.\n\n```shell\ncat y\n```", asked) is True
    assert verdict(name, "Let me try again.\n\n```shell\ncat x\n\n```", asked) is False
    assert verdict(name, "Sorry.", asked) is False
    assert verdict(name, LS) is None


def test_an_answer_that_reaches_the_limit_did_not_stop_by_itself() -> None:
    assert verdict("stops by itself", LS, stopped=True) is True and verdict("stops by itself", LS, stopped=False) is False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```save a\nx\n```", None),
        ("```save a\nx\n```\n\n", None),
        ("```save a\nx\n```\n\nThen.", True),
        ("```save a\nx\n```\n \nThen.", True),
        ("```save a\nx\n```\nThen.", False),
        ("```append a\nx\n```\n\nThen.\n\n```patch b\ny\n```\nNow.", False),
        ("```save R\n```sh\nls\n```\nmore\n```\n\nThen.", True),
        ("```shell\nls\n```\nThen.", None),
        ("```save a\nx", None),
    ],
)
def test_text_behind_a_file_needs_a_blank_line_before_it(text: str, expected: bool | None) -> None:
    assert blank_line_after_files(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ls -la\n" * 20, True),
        ("I will run the command. " * 7, True),
        ("word " * 31, False),
        ("word " * 32, True),
        ("a b c d e f g h i j k " * 3, False),
        ("Fine. " + "the same again and again, " * 12 + "but it ends.", True),
        ("-" * 400 + "\n" + "=" * 400, False),
        (" ".join(map(str, range(500))), False),
        ("", False),
    ],
)
def test_a_loop_is_a_stretch_that_comes_four_times_on_end_over_32_words(text: str, expected: bool) -> None:
    assert repeats_itself(text) is expected


def test_a_command_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told.sh"
    told.write_text(f"touch {tmp_path}/told")
    monkeypatch.setenv("BASH_ENV", str(told))
    for script in (f"touch {tmp_path}/ran", f"$(touch {tmp_path}/ran)", f"set +n\ntouch {tmp_path}/ran", "exit 3", "\udcff"):
        assert shell_parses(script) is True
    assert list(tmp_path.iterdir()) == [told]


def test_the_rates_are_those_that_are_explained() -> None:
    files = {"a": "x\n"}
    asked = Asked(LS, "markdown", True, frozenset(map(fingerprint, calls_in(LS))), files)
    texts = [LS, f"```patch a\n{hunk('x', 'y')}\n```\n\nThen."]
    assert {name for text in texts for name in judge(text, True, asked)} == RATES.keys()


def test_a_patch_changes_the_one_place_that_it_names() -> None:
    assert apply(hunk("b", "B"), "a\nb\nc\n") == "a\nB\nc\n"
    assert apply(hunk("b", "B") + "\n" + hunk("c", "C"), "a\nb\nc\n") == "a\nB\nC\n"
    assert apply("<<<<<<< ORIGINAL\nb\n\n=======\n>>>>>>> UPDATED", "a\nb\nc\n") == "a\nc\n"
    assert apply(hunk("a\n\nb\n", "c"), "a\n   \nb\n") == "c"  # lines of blanks are alike
    for patch, content in ((hunk("a", "b"), "aa"), (hunk("a", "a"), "a"), (hunk("x", "y"), "a")):
        with pytest.raises(DoesNotApply):
            apply(patch, content)
    for patch in ("a", "<<<<<<< ORIGINAL\na\n>>>>>>> UPDATED", hunk("a", "b\n=======\nc"), hunk("# ...\na", "b")):
        with pytest.raises(Malformed):
            apply(patch, "a")
        assert not is_well_formed(patch)
    assert not is_well_formed("")


PIECES = (
    "a",
    "b",
    "  x = 1",
    "",
    "   ",
    "# ...",
    "// ... rest",
    "=======",
    "==========",
    "def f():",
    "aa",
    ">>>>>>> UPDATED",
    "\ta",
)


def made_up(random: np.random.Generator) -> tuple[str, str]:
    """A patch and a file, which mostly have lines in common."""

    def lines(most: int) -> list[str]:
        return [str(line) for line in random.choice(PIECES[: random.integers(3, len(PIECES))], random.integers(0, most))]

    content = lines(9) if random.random() < 0.3 else list(random.permutation(PIECES[: random.integers(4, 11)]))
    hunks = []
    for _ in range(1 if random.random() < 0.7 else 3):
        begin = random.integers(0, len(content) + 1)
        original = content[begin : begin + random.integers(0, 4)] if random.random() < 0.9 else lines(3)
        original = [line if random.random() < 0.96 else "  " for line in original]
        hunks.append(hunk("\n".join(original), "\n".join(lines(3))))
    patch = "\n".join(hunks)
    if random.random() < 0.2:
        cut = random.integers(0, len(patch))
        patch = patch[:cut] + patch[cut + random.integers(1, 9) :]
    return patch, "\n".join(content) + "\n" * random.integers(0, 2)


def ours(patch: str, content: str) -> str | None:
    try:
        return apply(patch, content)
    except (Malformed, DoesNotApply):
        return None


def test_gptme_itself_patches_the_same(tmp_path: Path) -> None:
    """In the interpreter that GPTME_PYTHON names, or in this one."""
    python = os.environ.get("GPTME_PYTHON") or (sys.executable if importlib.util.find_spec("gptme") else "")
    if not python:
        pytest.skip("gptme is not installed, and GPTME_PYTHON names no interpreter that has it: it cannot be compared")
    random = np.random.default_rng(0)
    cases = [made_up(random) for _ in range(3000)]
    names = ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")
    environment = {**os.environ, **dict.fromkeys(names, str(tmp_path))}
    command = [python, str(Path(__file__).with_name("patch_oracle.py"))]
    answer = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, check=True, env=environment)
    theirs = json.loads(answer.stdout.splitlines()[-1])
    assert 300 < sum(each is not None for each in theirs) < 2700
    for case, expected in zip(cases, theirs, strict=True):
        assert ours(*case) == expected, case


def test_files_are_known_as_the_conversation_shows_them() -> None:
    log = [
        said("user", "See:\n\n````notes/a.md\n# A\n````"),
        said("assistant", "```save ./b.py\nx = 1\n```"),
        said("system", "Saved to b.py"),
        said("assistant", "```append b.py\ny = 2\n```"),
        said("system", "Appended to b.py"),
        said("assistant", f"```patch b.py\n{hunk('x = 1', 'x = 3')}\n```"),
        said("system", "Patch successfully applied to `/home/dev/b.py`"),
        said("assistant", "```shell\ncat c.txt\n```"),
        said("system", "Ran allowlisted command: `cat c.txt`\n\n```stdout\none\ntwo\n```"),
        said("assistant", "```save d.py\nx\n```"),
        said("system", "Declined by user"),
        said("assistant", "```shell\npytest -q 2>&1 | tail -3\n```"),
        said("system", "Ran command: `pytest -q`\n\n```stdout\n1 failed\n```"),
    ]
    known = {"notes/a.md": "# A\n", "b.py": "x = 3\ny = 2\n", "c.txt": "one\ntwo\n"}
    assert known_files(log, "markdown") == known
    failed = [said("assistant", f"```patch b.py\n{hunk('z', 'y')}\n```"), said("system", "Error during execution: Patch failed: x")]
    assert known_files(log + failed, "markdown") == known
    for command in ("git checkout .", "sed -i s/a/b/ b.py", "echo > b.py", "ruff format ."):
        assert known_files([*log, said("assistant", f"```shell\n{command}\n```"), said("system", "Ran")], "markdown") == {}


@pytest.mark.parametrize(
    "result",
    [
        "```stdout\none\n… 9 lines cut …\ntwo\n```",
        "```stdout\na\n```\n\n```stderr\nb\n```",
        "```stdout\na\n```\nReturn code: 1",
        "`a`",
    ],
)
def test_what_is_not_all_of_a_file_is_not_taken_for_it(result: str) -> None:
    log = [said("assistant", "```shell\ncat a\n```"), said("system", f"Ran allowlisted command: `cat a`\n\n{result}")]
    assert known_files(log, "markdown") == {}
