"""The short system prompt told from the full one: against recorded requests, real logs and, where it is installed, gptme itself."""

import hashlib
import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.sources import gather, gptme
from mlx_finetune.data.system_prompt import Replaced, describe, replace_system

DATA = Path(__file__).parents[2] / "shared" / "data"
PELICAN, SEAL, RED_PENGUIN = "2026-06-03-jumping-green-pelican", "2026-06-09-skipping-red-seal", "2026-07-13-dancing-red-penguin"
BUDGET = "<budget:token_budget>128000</budget:token_budget>"


def system(*texts: str) -> tuple[Message, ...]:
    return tuple(Message("system", text) for text in texts)


def short(messages: tuple[Message, ...]) -> Replaced:
    return replace_system(messages, "short", "markdown", (), True, "")


@pytest.fixture(scope="module")
def prompts() -> dict[str, tuple[Message, ...]]:
    """The leading system messages of each real log, as the reader gives them."""
    if not (DATA / "gptme-logs").is_dir():
        pytest.skip("the gptme logs of ../shared are not here")
    logs = {log.name: log.messages for log in gather(gptme.read(DATA / "gptme-logs")).conversations}
    return {name: messages[: [m.role for m in (*messages, Message("user", ""))].index("user")] for name, messages in logs.items()}


def recorded_short() -> str:
    path = DATA / "gptme-requests" / "markdown_short_prompt_4_tools.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    first = json.loads(path.read_text(encoding="utf-8"))[0]["body"]["messages"][0]["content"]
    return "".join(part["text"] for part in first)


def test_a_recorded_short_prompt_is_known_and_stays_as_it_is() -> None:
    messages = system(recorded_short())
    prompt = describe(messages)
    assert (prompt.kind, prompt.version, prompt.tool_format, prompt.interactive) == ("short", "0.35.1", "markdown", True)
    assert prompt.tools == ("patch", "save", "shell", "ipython")
    model = "local/mlx-community/Qwen3-Coder-30B-A3B-Instruct-4bit"
    options = ("--system", "short", "--tools", "patch,save,shell,ipython", "--tool-format", "markdown", "--model", model)
    assert short(messages) == Replaced(messages, options, exact=True)


def test_the_short_prompt_of_a_log_has_the_sentences_of_the_recorded_one(prompts: dict[str, tuple[Message, ...]]) -> None:
    """The same conversation was recorded with four tools: what says who gptme is, and three of the tools, are the same text."""
    ours, recorded = short(prompts[SEAL]).messages[0].content, recorded_short()
    start, end = "\n\n# Tools Overview\n\n", "\n\n## "
    assert ours.partition(start)[0] == recorded.partition(start)[0]
    of_tools = recorded.partition(start)[2].partition("*End of Tools List.*")[0].split("\n\n## ipython")[0]
    edit_tools, shell = of_tools.split(end + "shell", 1)
    patch, save = edit_tools.split(end + "save", 1)
    assert all(section in ours for section in (f"{patch}{end}", f"## save{save}{end}", f"## shell{shell}{end}"))
    assert (
        ours.partition("*End of Tools List.*")[2].replace("shopapi", "shopapi-x-short-4tools", 1)
        == (recorded.partition("*End of Tools List.*")[2])
    )


@pytest.mark.parametrize(
    ("name", "digest"),
    [(PELICAN, "a6b4f9f4e144a158"), (RED_PENGUIN, "f5cfe48d32551170"), ("2026-06-18-climbing-orange-robot", "24e2b604fa202059")],
)
def test_the_short_prompts_of_three_logs_are_those_that_were_checked(
    prompts: dict[str, tuple[Message, ...]], name: str, digest: str
) -> None:
    shortened = short(prompts[name])
    assert shortened.exact
    text = "\0".join(message.content for message in shortened.messages)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_every_full_prompt_of_the_logs_has_a_short_form_with_the_same_tools(prompts: dict[str, tuple[Message, ...]]) -> None:
    full = {name: messages for name, messages in prompts.items() if describe(messages).kind == "full"}
    assert len(full) == len(prompts) - 2, "one log is empty, one of 0.27.0"
    for name, messages in full.items():
        shortened = short(messages)
        assert shortened.exact, name
        assert replace(describe(messages), kind="short") == describe(shortened.messages), name
        assert short(shortened.messages) == shortened, "a short prompt stays, and is served by the same options"
        assert "### Examples" not in shortened.messages[0].content and "<examples>" not in shortened.messages[0].content
        assert sum(len(m.content) for m in shortened.messages) < 0.65 * sum(len(m.content) for m in messages)


def test_what_was_merged_behind_the_date_stands_before_the_files_when_the_boundary_goes(
    prompts: dict[str, tuple[Message, ...]],
) -> None:
    (only,) = short(prompts[SEAL]).messages
    listed, budget, file = (only.content.index(text) for text in ("## Selected files", f"\n\n{BUDGET}\n\n", "````README.md\n"))
    assert listed < budget < file
    assert only.content.endswith("\n````")


def test_the_boundary_and_the_state_of_the_repository_stay(prompts: dict[str, tuple[Message, ...]]) -> None:
    shortened = short(prompts[PELICAN]).messages
    assert shortened[1] == prompts[PELICAN][1]
    assert shortened[2].content == f"# Project Workspace\n\n## Git Status\n\n**Branch:** `main` (clean)\n\n{BUDGET}"


def test_keep_changes_nothing_and_names_the_options(prompts: dict[str, tuple[Message, ...]]) -> None:
    kept = replace_system(prompts[RED_PENGUIN], "keep", "xml", (), False, "")
    assert kept.messages == prompts[RED_PENGUIN]
    assert kept.exact
    assert kept.served_by[:3] == ("--system", "full", "--tools")
    model = "local/mlx-community/Devstral-Small-2507-4bit"
    assert kept.served_by[4:] == ("--tool-format", "xml", "--non-interactive", "--model", model)


def test_none_leaves_nothing_and_says_that_gptme_cannot_serve_it(prompts: dict[str, tuple[Message, ...]]) -> None:
    left = replace_system(prompts[PELICAN], "none", "markdown", (), True, "")
    assert left == Replaced((), (), False, "gptme has no option to send no system prompt")


def changed(messages: tuple[Message, ...], index: int, old: str, new: str) -> tuple[Message, ...]:
    assert old in messages[index].content
    there = replace(messages[index], content=messages[index].content.replace(old, new, 1))
    return (*messages[:index], there, *messages[index + 1 :])


@pytest.mark.parametrize(
    ("index", "old", "new", "reason"),
    [
        (0, "gptme v0.35.1,", "gptme v0.34.0,", "of another gptme than 0.35.1"),
        (0, "You are gptme", "I am gptme", "not gptme's own prompt"),
        (0, "Break down complex tasks", "Split complex tasks", "a changed prompt of gptme 0.35.1"),
        (0, "Keep patches small.", "\n\n## my_tool\n\n**Description:** Mine", "tools that are not gptme's own: my_tool"),
        (0, "\n\n## patch\n\n**Description:** ", "\n\n## read\n\n**Description:** ", "a prompt that does not fit its tools"),
        (0, "*End of Tools List.*", "*End*", "a prompt without tools"),
        (1, "ends above", "ends here", "no system information and date where gptme puts them"),
        (2, "**OS:**", "**Machine:**", "no system information and date where gptme puts them"),
        (2, "# Project Workspace", "# Something New", "an unknown part behind the date"),
    ],
)
def test_a_prompt_that_is_not_known_stays_and_the_reason_is_said(
    prompts: dict[str, tuple[Message, ...]], index: int, old: str, new: str, reason: str
) -> None:
    messages = changed(prompts[PELICAN], index, old, new)
    result = short(messages)
    assert (result.messages, result.exact, result.reason) == (messages, False, reason)


def test_a_prompt_that_was_replaced_on_the_way_is_not_shortened(prompts: dict[str, tuple[Message, ...]]) -> None:
    messages = (*changed(prompts[PELICAN], 2, f"\n\n{BUDGET}", ""), *system(BUDGET))
    assert short(messages).reason == "the prompt was replaced during the conversation (/model or /tools)"


def test_options_of_an_unknown_prompt_are_those_that_the_log_names(prompts: dict[str, tuple[Message, ...]]) -> None:
    custom = system("You write haiku.")
    result = replace_system(custom, "short", "xml", ("shell", "save"), False, "local/x")
    options = ("--tools", "shell,save", "--tool-format", "xml", "--non-interactive", "--model", "local/x")
    assert result == Replaced(custom, options, False, "not gptme's own prompt")
    old = prompts["2025-04-22-walking-happy-mouse"]
    assert describe(old).version == "0.27.0+unknown"
    assert short(old).messages == old
    assert replace_system((), "short", "", (), True, "") == Replaced((), (), False, "no system prompt")


def test_skills_are_left_out_but_a_file_that_quotes_them_is_not_touched(prompts: dict[str, tuple[Message, ...]]) -> None:
    entry = "\n\n## Available Skills\n\nLoad on-demand with `cat <path>`:\n\n- **foo**: Does foo.\n  `/skills/foo/SKILL.md`\n\n"
    skills = f"{entry}*1 skills available*"
    with_skills = changed(prompts[SEAL], 0, "\n\n## Selected files\n", f"{skills}\n\n## Selected files\n")
    assert short(with_skills).messages == short(prompts[SEAL]).messages
    quoted = changed(prompts[SEAL], 0, "Internal shop API.", f"Internal shop API.{skills}")
    assert skills in short(quoted).messages[0].content
    endless = changed(prompts[SEAL], 0, "\n\n## Selected files\n", f"{entry}\n\n## Selected files\n")
    assert short(endless).reason == "a list of skills whose end cannot be told"


def test_files_that_cannot_be_told_from_the_text_leave_the_prompt_as_it_is(prompts: dict[str, tuple[Message, ...]]) -> None:
    strange = changed(prompts[SEAL], 0, "````README.md\n", "````OTHER.md\n")
    assert short(strange).reason == "files in line that cannot be told from the text"
    memory = "\n\n## Persistent Memory\n\nThe following memories are shared across sessions (from `/m`):\n\n# One\n\n````x\ny\n````"
    remembered = changed(prompts[SEAL], 0, "\n\n````README.md\n", f"{memory}\n\n````README.md\n")
    (only,) = short(remembered).messages
    assert f"{memory}\n\n{BUDGET}\n\n````README.md\n" in only.content


def test_damage_anywhere_never_raises_and_damage_in_the_known_part_is_noticed(prompts: dict[str, tuple[Message, ...]]) -> None:
    random = np.random.default_rng(3)
    for name in (PELICAN, SEAL, RED_PENGUIN):
        messages = prompts[name]
        known = messages[0].content.index("ools>" if name == RED_PENGUIN else "# Tools Overview")
        after_first_line = messages[0].content.index("\n", 10)
        for _ in range(60):
            index = int(random.integers(len(messages)))
            at, until = sorted(int(x) for x in random.integers(0, len(messages[index].content), 2))
            text = messages[index].content
            short((*messages[:index], *system(text[:at] + text[until:]), *messages[index + 1 :]))
            at = int(random.integers(after_first_line, known))
            text = messages[0].content
            damaged = (*system(text[:at] + "~" + text[at + 1 :]), *messages[1:])
            assert short(damaged).messages == damaged


@pytest.mark.parametrize(
    "part",
    [
        ", an agent running in gptme v0.35.1, ",
        "\n\n# Tools Overview\n\n## shell\n\n**Description:** x",
        "\n\n## Available Skills\n\nLoad on-demand with `cat <path>`:\n\n- **",
        "\n\n## Selected files\n\nRead more with `cat`.\n\n- /a\n- /b",
        "\n\n## Persistent Memory\n\nThe following memories are shared across sessions (from `\n\n````",
        "\n\n````/a\n\n\n````",
        "\n\n### Examples\n\n",
    ],
)
def test_the_time_grows_with_the_text_and_not_faster(prompts: dict[str, tuple[Message, ...]], part: str) -> None:
    many = part * (2_000_000 // len(part))
    before = time.process_time()
    short(changed(prompts[SEAL], 0, "\n\n## Selected files\n", f"{many}\n\n## Selected files\n"))
    short(changed(prompts[SEAL], 0, "\n\n## append\n", f"{many}\n\n## append\n"))
    short(system("You are x" + many))
    assert time.process_time() - before < 5, "about 0.1 s; a quadratic search takes minutes"


# Writes the pairs to standard output: what 0.35.1's own `get_prompt` and merging give for full and for short.
PAIRS = """
import json, sys
from pathlib import Path
from gptme.logmanager.manager import _merge_consecutive_messages
from gptme.message import Message
from gptme.prompts import get_prompt
from gptme.tools import get_tools, init_tools
from gptme.util.context import embed_attached_file_content

init_tools(None)
workspace = Path.cwd()

def sent(prompt, **settings):
    budget = Message("system", "<budget:token_budget>128000</budget:token_budget>")
    merged = _merge_consecutive_messages([*get_prompt(prompt=prompt, workspace=workspace, **settings), budget])
    return [embed_attached_file_content(message, workspace).content for message in merged]

for names in (None, ("patch", "save", "shell", "ipython"), ("save",), ("patch", "todo"), ("shell",)):
    tools = [tool for tool in get_tools() if names is None or tool.name in names]
    for tool_format in ("markdown", "xml", "tool"):
        for interactive in (True, False):
            for model in ("local/tiny", "local/gemma<&", "anthropic/claude-sonnet-4-5"):
                said = dict(tools=tools, tool_format=tool_format, interactive=interactive, model=model)
                pair = {kind: sent(kind, **said) for kind in ("full", "full-noexamples", "short")}
                print(json.dumps({**pair, **said, "tools": [tool.name for tool in tools]}))
"""


def write_workspace(folder: Path, kind: str) -> Path:
    """An empty folder, one with files of many kinds, or the same in git, with the prompt of a project."""
    folder.mkdir(parents=True)
    if kind == "empty":
        return folder
    (folder / "README.md").write_text("# Read me\n\n````x\nfence\n````\n")
    (folder / "AGENTS.md").write_text("Rules\n\n## Selected files\n\nRead more with `cat`.\n\n- x\n\n````README.md\nquoted\n````\n")
    (folder / "logo.png").write_bytes(b"\x89PNG\xff")
    if kind == "git":
        (folder / "gptme.toml").write_text('[prompt]\nprompt = "A <project>\\n\\n\\n& more"\nfiles = ["README.md", "logo.png"]\n')
        subprocess.run(["git", "init", "-q", "."], cwd=folder, check=True)
    return folder


OTHERS = (("empty", True), ("files", False), ("files", True), ("git", False))


@pytest.mark.parametrize(
    ("workspace", "person"),
    [("empty", False), ("git", True), *(pytest.param(*both, marks=pytest.mark.long) for both in OTHERS)],
)
def test_gptme_itself_sends_the_same_short_prompt(
    tmp_path: Path, gptme_python: str, gptme_home: dict[str, str], workspace: str, person: bool
) -> None:
    config = tmp_path / ".config" / "gptme"
    config.mkdir(parents=True)
    if person:
        (config / "config.toml").write_text(
            '[user]\nname = "A <b>"\nabout = "A\\n\\n# B"\nresponse_preference = "Short"\n[prompt.fragments]\nx = "More"\n[env]\n'
        )
        skill = config / "skills" / "foo" / "SKILL.md"
        skill.parent.mkdir(parents=True)
        skill.write_text("---\nname: foo\ndescription: Does foo & <bar>.\n---\n\n# Foo\n")
    homes = {"HOME": tmp_path, "XDG_CONFIG_HOME": tmp_path / ".config", "XDG_DATA_HOME": tmp_path / ".local" / "share"}
    environment = gptme_home | {name: str(path) for name, path in homes.items()}
    folder = write_workspace(tmp_path / "src" / "work", workspace)
    run = subprocess.run([gptme_python, "-c", PAIRS], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    pairs = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"full"')]
    assert len(pairs) == 90
    for pair in pairs:
        said = pair["tool_format"], pair["tools"], pair["interactive"], pair["model"]
        for kind in ("full", "full-noexamples"):
            result = replace_system(system(*pair[kind]), "short", *said)
            assert (result.exact, result.reason) == (True, "")
            assert [message.content for message in result.messages] == pair["short"]
            prompt = describe(system(*pair[kind]))
            assert (prompt.tool_format or said[0], list(prompt.tools), prompt.interactive, prompt.model) == said
