"""Calls are found where gptme finds them, in its three formats, and are sent as gptme sends them.

Each table below was compared with gptme 0.35.1 itself; where gptme is installed, it still is, with made-up texts besides.
"""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from log_rows import flat, said

from mlx_finetune.data.fences import blocks
from mlx_finetune.data.native import arguments_of, native_calls
from mlx_finetune.data.tool_calls import DEFAULT_TOOLS, calls_in, fingerprint, format_of, to_native

PATCH = "<<<<<<< ORIGINAL\na\n=======\nb\n>>>>>>> UPDATED"
MARKDOWN: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "a shell block": ("Let me look.\n\n```shell\nls -la\n```", [("shell", "", "ls -la")]),
    "py means ipython": ("```py\n1 + 1\n```\n", [("ipython", "", "1 + 1")]),
    "the path is the rest of the fence line": ("```save my file.py\nx\n```", [("save", "my file.py", "x")]),
    "a patch keeps its markers": (f"```patch a.py\n{PATCH}\n```", [("patch", "a.py", PATCH)]),
    "blank lines of the content stay": ("```shell\n\nls\n\n```", [("shell", "", "\nls\n")]),
    "an empty block": ("```complete\n```", [("complete", "", "")]),
    "two blocks": ("```shell\nls\n```\n\n```save a\nx\n```", [("shell", "", "ls"), ("save", "a", "x")]),
    "a block with text right below it": ("```shell\nls\n```\nThis lists files.", [("shell", "", "ls")]),
    "a save with text right below it": ("```save a\nx\n```\nDone.", []),
    "a save with a blank line below it": ("```save a\nx\n```\n\nDone.", [("save", "a", "x")]),
    "an open block": ("```shell\nls\n", []),
    "an indented fence": ("  ```shell\n  ls\n  ```", []),
    "blanks around the tool": ("``` shell \nls\n``` ", [("shell", "", "ls")]),
    "four backticks": ("````shell\necho '\n```\n'\n````", [("shell", "", "echo '\n```\n'")]),
    "a fence of another length does not close": ("````shell\nls\n```", []),
    "bash": ("```bash\nls\n```", []),
    "python": ("```python\n1\n```", []),
    "a file name": ("```hello.py\n1\n```", []),
    "a tool without a block": ("```recall\n1\n```", []),
    "CRLF": ("```shell\r\nls\r\npwd\r\n```\r\n", [("shell", "", "ls\npwd")]),
    "a nested fence with a language": (
        "```save README.md\n# A\n\n```sh\nls\n```\n\nend\n```",
        [("save", "README.md", "# A\n\n```sh\nls\n```\n\nend")],
    ),
    "a nested bare fence": ("```save R\n# A\n```\nls\n```\nend\n```", [("save", "R", "# A\n```\nls\n```\nend")]),
    "no nesting in shell": ("```shell\nls\n```\nx\n```\ny\n```", [("shell", "", "ls")]),
    "a here-document with fences": (
        "```shell\ncat > R <<'EOF'\n```\nls\n```\nmore\nEOF\n```",
        [("shell", "", "cat > R <<'EOF'\n```\nls\n```\nmore\nEOF")],
    ),
    "a shift is no here-document": ("```shell\necho $((1 << 3))\n```\nx\n```\ny", [("shell", "", "echo $((1 << 3))")]),
    "a here-document that never ends": ("```shell\ncat <<EOF\n```\nx", [("shell", "", "cat <<EOF")]),
    "a fence in a shell string": ("```shell\necho '\n```\n'\n```", [("shell", "", "echo '\n```\n'")]),
    "a quote in a comment": ("```shell\nls # it's\n```", [("shell", "", "ls # it's")]),
    "a fence in a docstring": ('```ipython\nx = """\n```\n"""\n```', [("ipython", "", 'x = """\n```\n"""')]),
    "an apostrophe in Python ends with its line": ("```ipython\n# it's\ns = 'x\n```", [("ipython", "", "# it's\ns = 'x")]),
    "fences that touch": ("```shell\nls\n``````shell\npwd\n```", [("shell", "", "ls"), ("shell", "", "pwd")]),
    "thinking right behind a fence": ("```shell\nls\n```<think>\nhm\n</think>", [("shell", "", "ls")]),
    "a block in thinking": ("<thinking>\n```shell\nrm x\n```\n</thinking>\n```shell\nls\n```", [("shell", "", "ls")]),
    "thinking that ends where it never began": ("```shell\nrm x\n```\n</think>\n```shell\nls\n```", [("shell", "", "ls")]),
    "thinking that does not end": ("<think>\n```shell\nls\n```", []),
    "a tag in the middle of a line": ("About <think>:\n```shell\nls\n```", [("shell", "", "ls")]),
    "xml is text": ("<tool-use>\n<shell>\nls\n</shell>\n</tool-use>", []),
    "a native call is text": ('@shell(call_1): {"command": "ls"}', []),
}
XML: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "a call": ("Hi.\n<tool-use>\n<shell>\nls &amp;&amp; pwd\n</shell>\n</tool-use>", [("shell", "", "ls && pwd")]),
    "an argument": ("<tool-use><save args='a.py'>\nx = 1\n</save></tool-use>", [("save", "a.py", "x = 1")]),
    "the form of Haiku": (
        '<function_calls>\n<invoke name="save" path="a.py">\nx\n</invoke>\n</function_calls>',
        [("save", "a.py", "x")],
    ),
    "two calls in one list": (
        "<tool-use><shell>a</shell><ipython>b</ipython></tool-use>",
        [("shell", "", "a"), ("ipython", "", "b")],
    ),
    "order is that in which tools are first named": (
        "<tool-use><shell>a</shell></tool-use><tool-use><save>b</save></tool-use><tool-use><shell>c</shell></tool-use>",
        [("shell", "", "a"), ("shell", "", "c"), ("save", "", "b")],
    ),
    "elements within are their text": ("<tool-use><shell>cat <b>x</b> y</shell></tool-use>", [("shell", "", "cat x y")]),
    "CDATA": ("<tool-use><shell><![CDATA[a < b]]></shell></tool-use>", [("shell", "", "a < b")]),
    "an unescaped &&": ("<tool-use>\n<shell>\nls && pwd\n</shell>\n</tool-use>", []),
    "an unescaped < in the prose": ("a < b\n<tool-use><shell>ls</shell></tool-use>", []),
    "an open call": ("<tool-use><shell>ls</shell>", []),
    "an unknown tool": ("<tool-use><bash>ls</bash></tool-use>", []),
    "an invoke without a name": ("<function_calls><invoke>ls</invoke></function_calls>", []),
    "a call outside of a list": ("<shell>ls</shell>", []),
    "markdown is text": ("```shell\nls\n```", []),
    "half a character": ("<tool-use><shell>\ud83d</shell></tool-use>", []),
}
NATIVE: dict[str, tuple[str, list[tuple[str, str, dict[str, Any]]]]] = {
    "a call": ('I look.\n@shell(call_1): {"command": "ls"}', [("shell", "call_1", {"command": "ls"})]),
    "two calls": ('@shell(a): {}\n@save(b): {"path": "x"}', [("shell", "a", {}), ("save", "b", {"path": "x"})]),
    "ids with dots, colons and dashes": ('@shell(t.1:2-x): {"a": 1}', [("shell", "t.1:2-x", {"a": 1})]),
    "braces in strings": ('@shell(a): {"command": "echo }{ \\" }"}', [("shell", "a", {"command": 'echo }{ " }'})]),
    "JSON over several lines": ('@shell(a):\n{\n "command": "ls"\n}', [("shell", "a", {"command": "ls"})]),
    "no id": ('@shell: {"command": "ls"}', []),
    "not at the start of a line": ('Try @shell(a): {"command": "ls"}', []),
    "cut off": ('@shell(a): {"command": "l', []),
    "cut off before another": ('@shell(a): {"command": "l\n@shell(b): {}', []),
    "in a code block": ('```\n@shell(a): {"command": "ls"}\n```', []),
    "behind a code block": ('```\nx\n```\n@shell(a): {"command": "ls"}', [("shell", "a", {"command": "ls"})]),
    "in a code block that stays open": ('```\n@shell(a): {"command": "ls"}', [("shell", "a", {"command": "ls"})]),
    "an unknown tool": ("@browse(a): {}", []),
    "no object": ("@shell(a): [1]", []),
    "the repr of a dict": (
        "@shell(a): {'command': \"it's\", 'background': True}",
        [("shell", "a", {"command": "it's", "background": True})],
    ),
    "a line end in a string": ('@shell(a): {"command": "a\nb"}', [("shell", "a", {"command": "a\nb"})]),
    "an escape that JSON does not have": (r'@shell(a): {"command": "grep \d \$x"}', [("shell", "a", {"command": r"grep \d \$x"})]),
    "a comma too many": ('@shell(a): {"command": "ls",}', [("shell", "a", {"command": "ls"})]),
}
BROKEN_JSON = ["{a: b}", '{"a" "b"}', "{'a", '{"a": [}', "{" * 5000 + "}" * 5000, '{"a": ' + "[" * 100_000 + "}"]


def markdown_and_xml(text: str, tool_format: str, tools: frozenset[str] = DEFAULT_TOOLS) -> list[tuple[str, str, str]]:
    return [(call.tool, call.argument, call.content) for call in calls_in(text, tool_format, tools) if call.format != "tool"]


def native(text: str, tools: frozenset[str] = DEFAULT_TOOLS) -> list[tuple[str, str, dict[str, Any]]]:
    return [(call.tool, call.id, call.arguments) for call in calls_in(text, "tool", tools) if call.format == "tool"]


@pytest.mark.parametrize("name", MARKDOWN)
def test_markdown_blocks_run_where_gptme_runs_them(name: str) -> None:
    text, calls = MARKDOWN[name]
    assert markdown_and_xml(text, "markdown") == calls
    assert markdown_and_xml(text, "tool") == calls  # the format tool runs them too


@pytest.mark.parametrize("name", XML)
def test_xml_calls_run_where_gptme_runs_them(name: str) -> None:
    text, calls = XML[name]
    assert markdown_and_xml(text, "xml") == calls


@pytest.mark.parametrize("name", NATIVE)
def test_native_calls_run_where_gptme_runs_them(name: str) -> None:
    text, calls = NATIVE[name]
    assert native(text) == calls


@pytest.mark.parametrize("text", BROKEN_JSON)
def test_arguments_beyond_mending_are_no_call_and_no_crash(text: str) -> None:
    assert arguments_of(text) is None
    assert native(f"@shell(a): {text}") == []


def test_a_call_stands_where_it_says() -> None:
    text = "é\n```shell\r\nls\n```\nand\n```save a\nx\n```\n"
    assert [text[c.start : c.end] for c in calls_in(text)] == ["```shell\r\nls\n```", "```save a\nx\n```"]
    text = "é <tool-use><shell>é</shell> <save args='>'/></tool-use>"
    assert next(text[c.start : c.end] for c in calls_in(text, "xml")) == "<shell>é</shell>"
    text = 'é\n@shell(a): {"command": "ls"} more'
    assert [text[c.start : c.end] for c in calls_in(text, "tool")] == ['@shell(a): {"command": "ls"}']
    (call,) = native_calls(text)
    assert text[call.json_start : call.end] == '{"command": "ls"}'


def test_only_loaded_tools_run() -> None:
    text = "```shell\nls\n```\n\n```lookup x\n1\n```"
    assert [call.tool for call in calls_in(text, tools=frozenset({"lookup"}))] == ["lookup"]


def test_the_same_call_has_one_fingerprint_in_every_format() -> None:
    same = [
        calls_in("```save a.py\nx = 1\n```")[0],
        calls_in("Again:\n\n```save a.py\nx = 1\n\n```\n")[0],
        calls_in("<tool-use>\n<save args='a.py'>\nx = 1\n</save>\n</tool-use>", "xml")[0],
        calls_in('@save(call_9): {"content": "x = 1\\n", "path": "a.py"}', "tool")[0],
    ]
    assert len({fingerprint(call) for call in same}) == 1
    texts = ["```shell\nls\n```", "```shell\nls -a\n```", "```ipython\nls\n```", "```save b.py\nx = 1\n```", "```read ls\n```"]
    others = [calls_in(text)[0] for text in texts]
    slow = calls_in('@shell(a): {"command": "ls", "background": true}', "tool")
    assert len({fingerprint(call) for call in [same[0], *others, *slow]}) == 7


@pytest.mark.parametrize(
    ("texts", "tool_format"),
    [
        (["Hi.", "```shell\nls\n```", "Done."], "markdown"),
        (["<tool-use>\n<shell>\nls\n</shell>\n</tool-use>"], "xml"),
        (["\n@shell(call_1): {}", "So: ```shell\nls\n```"], "tool"),
        (["Done.", ""], None),
        ([], None),
        (["```bash\nls\n```"], "markdown"),  # as of 2023
        (["```hello.py\n1\n```"], "markdown"),
        (["Here is JSON:\n```json\n{}\n```"], None),
        (["Use `<tool-use>` or `@shell(id): {}` for that."], None),
        (["Its xml format:\n```xml\n<tool-use><shell>ls</shell></tool-use>\n```", "```shell\nls\n```"], "markdown"),
        (["<tool-use>\n<save args='R.md'>\n```shell\nls\n```\n</save>\n</tool-use>"], "xml"),
        (["```save R.md\n<tool-use>\n<shell>ls</shell>\n</tool-use>\n```"], "markdown"),
        (["<tool-use>\n<shell>\nls && pwd\n</shell>\n</tool-use>"], "xml"),  # not well-formed, but what else
        (["<tool-use>\n<shell>\na && b\n</shell>\n</tool-use>", "```shell\nls\n```"], "markdown"),
        (['```\n@shell(a): {"command": "ls"}\n```', "```shell\nls\n```"], "markdown"),
        (["```shell\nls\n```", "```shell\nls\n```", "@shell(a): {}"], "markdown"),
    ],
)
def test_a_conversation_has_the_format_of_most_of_its_calls(texts: list[str], tool_format: str | None) -> None:
    assert format_of(texts) == tool_format


@pytest.mark.parametrize(
    "unit",
    [
        *("```\n", "`", "<", "```shell\n", "```x\n", "@a(b): {\n", "@a(", "````\n```\n", "```shell\n<<A\n", "```shell\n<<1 "),
        *("</think>x\n```shell\n", "<tool-use><shell>x</shell></tool-use>", "@shell(a): {}\n", "```shell\nls\n```\n"),
        *('@a(b): {"\\"', "```\n@a(b): {\n```\n}\n"),
    ],
)
def test_reading_takes_time_in_proportion_to_the_text(unit: str) -> None:
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        begin = time.process_time()
        for tool_format in ("markdown", "xml", "tool"):
            calls_in(text, tool_format)
        to_native([said("assistant", text)])
        format_of([text])
        return time.process_time() - begin

    assert seconds(2**18) < 4  # 256 KB: 0.1 to 0.6 s measured; minutes where it is quadratic


PIECES = [
    *("```", "````", "```shell", "```ipython", "```save a.py", "```python", "```text", "``````shell", "```<think>", "   ```"),
    *("``` ", "text", "", "it's", 'x = """', "'''", "cat <<EOF", "EOF", "x << 2", "# it's", "abc \\"),
    *("'", '"', "$'a", "$((", "```py"),
    *("<think>", "</think>", "<thinking>", "</thinking>", "```shell\nls\n```", "&amp;", "<save args='a'>", "</save>"),
    *('@shell(a): {"command": "ls"}', "@foo(b): {}", "@shell(c): {'a': 1,}", "<tool-use>", "</tool-use>", "<shell>", "</shell>"),
    *("<tool-use><shell>ls</shell></tool-use>", "<function_calls>", "</function_calls>", '<invoke name="shell">', "</invoke>"),
]


def made_up(random: np.random.Generator) -> str:
    pool = random.choice(PIECES, size=random.integers(2, 12))
    lines = random.choice([*pool, "```", "```shell"], size=random.integers(1, 20))
    return "".join(line + ("\r\n" if random.random() < 0.05 else "\n") for line in lines)


def test_blocks_lie_one_behind_the_other_and_hold_what_the_text_holds() -> None:
    random = np.random.default_rng(0)
    found = 0
    for _ in range(1000):
        text, end = made_up(random), 0
        for block in blocks(text):
            assert end <= block.start < block.body <= block.end <= len(text)
            assert text[block.start :].startswith(block.fence + block.info) or block.info
            assert text[block.body : block.end].replace("\r\n", "\n").startswith(block.content)
            end, found = block.end, found + 1
    assert found > 300


def test_gptme_itself_finds_and_sends_the_same(gptme_python: str, gptme_home: dict[str, str]) -> None:
    random = np.random.default_rng(0)
    texts = [text for table in (MARKDOWN, XML, NATIVE) for text, _ in table.values() if "\ud83d" not in text]
    texts += [made_up(random) for _ in range(2000)]
    after = (said("system", "1", "a"), said("system", "notice"), said("system", "2", "b"))
    logs = [(said("assistant", text), *after) for text in texts]
    rows = [
        [{"role": m.role, "content": m.content} | ({"call_id": m.tool_call_id} if m.tool_call_id else {}) for m in log]
        for log in logs
    ]
    command = [gptme_python, str(Path(__file__).with_name("gptme_oracle.py"))]
    asked = json.dumps(list(zip(texts, rows, strict=True)))
    answer = subprocess.run(command, input=asked, capture_output=True, text=True, check=True, env=gptme_home)
    tools, answers = json.loads(answer.stdout.splitlines()[-1])
    loaded = frozenset(tools)
    for text, log, theirs in zip(texts, logs, answers, strict=True):
        ours = [*(markdown_and_xml(text, kind, loaded) for kind in ("markdown", "xml", "tool")), flat(to_native(log))]
        ours[2] += native(text, loaded)
        assert json.loads(json.dumps(ours)) == theirs, text
