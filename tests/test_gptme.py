"""The reader of gptme's logs, against real logs and the requests that gptme really sent from them."""

import json
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gptme_logs import messages_of, read_all, said, write_log

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.sources import Read, gptme
from mlx_finetune.errors import UserError

DATA = Path(__file__).parents[2] / "shared" / "data"
TEXT_REQUESTS = [
    "markdown_interactive__2026-06-03-jumping-green-pelican",
    "markdown_noninteractive__2026-06-05-retry-backoff-client",
    "old_0.27.0_markdown__2025-04-22-walking-happy-mouse",
    "xml__2026-07-13-dancing-red-penguin",
]
TOOL_REQUESTS = ["tool__2026-06-18-climbing-orange-robot", "tool_parallel_calls__2026-07-16-swimming-happy-seal"]


@pytest.fixture(scope="module")
def real_logs() -> Read:
    if not (DATA / "gptme-logs").is_dir():
        pytest.skip("the gptme logs of ../shared are not here")
    return read_all(DATA / "gptme-logs")


def by_name(read: Read, name: str) -> Conversation:
    (conversation,) = [one for one in read.conversations if one.group == name]
    return conversation


def requests_of(name: str) -> list[list[tuple[str, str]]]:
    """The (role, text) of each request's messages; the parts of a content are joined as mlx_lm.server does."""
    requests = json.loads((DATA / "gptme-requests" / f"{name}.json").read_text(encoding="utf-8"))
    return [[(m["role"], text_of(m.get("content"))) for m in request["body"]["messages"]] for request in requests]


def text_of(content: str | list[dict[str, str]] | None) -> str:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


@pytest.mark.parametrize("name", TEXT_REQUESTS)
def test_the_messages_before_each_turn_are_those_that_gptme_sent(real_logs: Read, name: str) -> None:
    messages = by_name(real_logs, name.split("__")[1]).messages
    requests = requests_of(name)
    for sent in requests:  # no difference is allowed for: attached files and outer blanks agree too
        assert [(message.role, message.content) for message in messages[: len(sent)]] == sent
        assert messages[len(sent)].role == "assistant"
    turns = [place for place, message in enumerate(messages) if message.role == "assistant"]
    assert [len(sent) for sent in requests] == turns


@pytest.mark.parametrize("name", TOOL_REQUESTS)
def test_native_tool_calls_stay_text_and_their_results_system_and_this_is_said(real_logs: Read, name: str) -> None:
    """Known difference: gptme sends a call as `tool_calls` (a Message has none) and its result as role "tool"."""
    conversation = by_name(real_logs, name.split("__")[1])
    for sent in requests_of(name):
        for (role, content), message in zip(sent, conversation.messages, strict=False):
            assert message.role == ("system" if role == "tool" else role)
            if role == "assistant":
                assert message.content.startswith(content.removesuffix("\n"))
            else:
                assert message.content == content
    assert conversation.meta["not_reproduced"] == ["call_id"]


def test_the_real_logs_are_read_with_their_titles_and_the_cut_line_is_named(real_logs: Read) -> None:
    manifest = json.loads((DATA / "gptme-logs.manifest.json").read_text(encoding="utf-8"))
    assert {conversation.group for conversation in real_logs.conversations} == set(manifest)
    for conversation in real_logs.conversations:
        expected = manifest[conversation.group]
        has_config = (DATA / "gptme-logs" / conversation.group / "config.toml").exists()
        assert conversation.meta.get("title") == (expected.get("title") if has_config else None)
        labelled = expected.get("tool_format") if conversation.messages else None
        assert conversation.meta.get("tool_format") == labelled  # by config.toml, or by the turns themselves
        assert (conversation.source, conversation.license) == ("gptme", "private")
    (cut,) = real_logs.bad_lines
    assert (cut.path.parent.name, cut.line) == ("2026-06-22-node-cache-race", 21)
    assert "cut off" in cut.reason
    assert by_name(real_logs, "2026-06-26-swimming-angry-cat").messages == ()
    assert [(one.id, one.reason) for one in real_logs.rejected] == [
        ("2026-07-08-hopping-orange-fish#main-undo-0", "undone: the person took these turns back")
    ]


def test_lines_that_are_no_messages_are_named_and_blank_ones_are_no_fault(tmp_path: Path) -> None:
    bad = {
        '{"role": "user", "conte': "cut off",
        "[]": "JSON object",
        '{"role": "bot", "content": "x"}': "'bot'",
        '{"role": ["user"], "content": "x"}': "'user'",
        '{"role": "user", "content": null}': "content",
        '{"role": "user", "content": "x", "files": 1}': "files",
        "[" * 100_000: "JSON|nested",
    }
    write_log(tmp_path, "log", said("user", "hello"), "", *bad, "   ", said("assistant", "hi"))
    read = read_all(tmp_path)
    assert messages_of(read) == [("user", "hello"), ("assistant", "hi")]
    assert [line.line for line in read.bad_lines] == list(range(3, 3 + len(bad)))
    for line, part in zip(read.bad_lines, bad.values(), strict=True):
        assert any(word in line.reason for word in part.split("|")), line.reason


def test_a_byte_order_mark_costs_no_line(tmp_path: Path) -> None:
    write_log(tmp_path, "one", "\ufeff" + json.dumps(said("user", "hi")), said("assistant", "ho"))
    read = read_all(tmp_path)
    assert messages_of(read) == [("user", "hi"), ("assistant", "ho")] and not read.bad_lines


def test_bytes_and_surrogates_that_are_not_text_become_marks(tmp_path: Path) -> None:
    log = write_log(tmp_path, "log", said("user", "a\ud83db"))
    log.write_bytes(log.read_bytes() + b'{"role": "assistant", "content": "caf\xe9"}\n')
    assert messages_of(read_all(tmp_path)) == [("user", "a?b"), ("assistant", "caf\ufffd")]


def test_neighbours_merge_but_for_tool_results_and_the_cache_boundary(tmp_path: Path) -> None:
    boundary = "# System Prompt Cache Boundary\n\nbelow\n\n---"
    write_log(
        tmp_path,
        "log",
        said("system", "one"),
        said("system", "for the screen only", ui_only=True),
        said("system", "two "),
        said("system", boundary),
        said("system", "three"),
        said("user", "a"),
        said("user", "b"),
        said("assistant", "\nc\n"),
        said("system", "first result", call_id="1"),
        said("system", "second result", call_id="2"),
        said("system", "notice"),
    )
    assert messages_of(read_all(tmp_path)) == [
        ("system", "one\n\ntwo "),
        ("system", boundary),
        ("system", "three"),
        ("user", "a\n\nb"),
        ("assistant", "\nc\n"),
        ("system", "first result"),
        ("system", "second result"),
        ("system", "notice"),
    ]


def test_attachments_come_from_the_stored_copy_and_the_others_are_named(tmp_path: Path) -> None:
    files = [
        "/home/me/src/app/sub/a.py",
        "/home/me/other/b.txt",
        "/home/me/src/app/logo.png",
        "/home/me/src/app/gone.md",
    ]
    hashes = {files[0]: "aa11", files[1]: "bb22", files[2]: "cc33", files[3]: "dd44"}
    write_log(tmp_path, "log", said("user", "see", files=files, file_hashes=hashes))
    stored = tmp_path / "log" / "files"
    stored.mkdir()
    (stored / "aa11.py").write_text("x = 1\n")
    (stored / "bb22.txt").write_text("y" * 100_001)
    (stored / "cc33.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "log" / "config.toml").write_text('[chat]\nworkspace = "~/src/app"\n')
    ((_, content),) = messages_of(read := read_all(tmp_path))
    assert content.startswith("see\n\n````sub/a.py\nx = 1\n\n````\n\n````/home/me/other/b.txt\nyyy")
    assert content.endswith("y\n\n[Content truncated to 100,000 characters (file is 100,001 bytes)]\n````")
    assert len(content.split("b.txt\n")[1]) == 100_000 + len("\n````")
    assert read.conversations[0].meta["not_reproduced"] == [f"attachment {files[3]}", f"attachment {files[2]}"]


def test_a_hash_in_a_log_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("private")
    write_log(tmp_path / "logs", "log", said("user", "see", files=["a.txt"], file_hashes={"a.txt": "../../../secret"}))
    (tmp_path / "logs" / "log" / "files").mkdir()
    assert messages_of(read_all(tmp_path / "logs")) == [("user", "see")]


def test_only_conversation_files_are_read_in_order_of_name(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_log(tmp_path, name, said("user", name))
        (tmp_path / name / "events.jsonl").write_text('{"role": "user", "content": "event"}\n')
        (tmp_path / name / "branches").mkdir()
        (tmp_path / name / "branches" / "main-undo-0.jsonl").write_text('{"role": "user", "content": "undone"}\n')
    assert [one.messages[0].content for one in read_all(tmp_path).conversations] == ["a", "b"]


def test_a_broken_config_costs_only_the_title(tmp_path: Path) -> None:
    write_log(tmp_path, "log", said("user", "a"), said("assistant", "b", metadata={"model": "local/m"}))
    (tmp_path / "log" / "config.toml").write_text("[chat\n")
    read = read_all(tmp_path)
    assert read.conversations[0].meta["model"] == "local/m" and "title" not in read.conversations[0].meta
    assert [(line.path.name, line.line) for line in read.bad_lines] == [("config.toml", 0)]


@pytest.mark.parametrize(
    ("config", "title"),
    [
        ('[chat]\nname = "A title"\n\n[env]\nname = "B"\n', "A title"),
        ('top = 1\n[mcp]\nname = "B"\n[chat]\nname = "A title" # said so\ntools = ["a", "b"]\n', "A title"),
        ('[chat]\nmodel = """\nname = "B"\n"""\nname = "A title"\n', "A title"),
        ('[chat]\ntools = [\n  "a",\n]\nname = "A title"\n', "A title"),
        ('chat = {name = "A title"}\n', "A title"),
        ('["chat"]\nname = "A title"\n', "A title"),
        ('[chat.more]\nname = "B"\n', None),
        ('[[chat]]\nname = "B"\n', None),
    ],
)
def test_a_config_is_read_as_toml_whatever_its_layout(tmp_path: Path, config: str, title: str | None) -> None:
    write_log(tmp_path, "log", said("user", "a"))
    (tmp_path / "log" / "config.toml").write_text(config)
    read = read_all(tmp_path)
    assert read.conversations[0].meta.get("title") == title and not read.bad_lines


def test_a_log_that_cannot_be_opened_is_rejected_and_the_rest_read(tmp_path: Path) -> None:
    write_log(tmp_path, "good", said("user", "a"))
    (tmp_path / "odd" / "conversation.jsonl").mkdir(parents=True)
    read = read_all(tmp_path)
    assert [one.group for one in read.conversations] == ["good"]
    assert [(one.id, one.reason) for one in read.rejected] == [("odd", "cannot be read: not an ordinary file")]


def test_a_wrong_folder_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder") as error:
        read_all(tmp_path / "nowhere")
    assert "GPTME_LOGS_HOME" in error.value.hint
    with pytest.raises(UserError, match=r"no \*/conversation.jsonl in it"):
        read_all(tmp_path)
    write_log(tmp_path / "logs", "log", said("user", "a"))
    with pytest.raises(UserError, match="is one conversation") as error:
        read_all(tmp_path / "logs" / "log")
    assert error.value.hint == f"pass {tmp_path / 'logs'}"


def test_the_logs_folder_follows_gptmes_own_rules(tmp_path: Path) -> None:
    def folder(platform: str = "darwin", **environment: str) -> Path:
        return gptme.default_logs_folder(environment, tmp_path, platform)

    assert folder(GPTME_LOGS_HOME="/logs", XDG_DATA_HOME="/data") == Path("/logs")
    assert folder(GPTME_LOGS_HOME=" ", XDG_DATA_HOME="/data") == Path("/data/gptme/logs")
    assert folder("darwin") == tmp_path / "Library" / "Application Support" / "gptme" / "logs"
    assert folder("linux") == tmp_path / ".local" / "share" / "gptme" / "logs"
    (tmp_path / ".local" / "share" / "gptme").mkdir(parents=True)
    assert folder("darwin") == tmp_path / ".local" / "share" / "gptme" / "logs"


def test_a_day_of_2023_in_one_file_is_a_conversation_too(tmp_path: Path) -> None:
    lines = [json.dumps({"role": role, "content": text}) for role, text in (("user", "list"), ("assistant", "```bash\nls\n```"))]
    (tmp_path / "2023-06-18.log").write_text("\n".join(lines))
    os.utime(tmp_path / "2023-06-18.log", (1_687_100_000, 1_687_100_000))
    (conversation,) = read_all(tmp_path).conversations
    assert (conversation.name, len(conversation.messages)) == ("2023-06-18", 2)
    assert conversation.meta["time"] == "2023-06-18T00:00:00Z"  # such logs hold no times: the day in the name


def test_a_log_without_times_is_of_the_day_in_its_name_else_of_its_file(tmp_path: Path) -> None:
    for name in ("2023-09-20-old-name", "2023-99-99-no-day", "no-day"):
        log = write_log(tmp_path, name, {"role": "user", "content": "a"})
        os.utime(log, (1_687_100_000, 1_687_100_000))
    times = {one.name: one.meta["time"] for one in read_all(tmp_path).conversations}
    assert times.pop("2023-09-20-old-name") == "2023-09-20T00:00:00Z"
    assert set(times.values()) == {"2023-06-18T14:53:20Z"}


def test_a_log_compacted_by_hand_is_read_whole_from_its_lossless_copy(tmp_path: Path) -> None:
    write_log(tmp_path, "log", said("user", "summary of what was said"))
    (tmp_path / "log" / "lossless.jsonl").write_text(json.dumps(said("user", "all of it")) + "\n")
    (tmp_path / "log" / "views").mkdir()
    (tmp_path / "log" / "views" / "compacted-001.jsonl").write_text(json.dumps(said("user", "a view")) + "\n")
    assert messages_of(read_all(tmp_path)) == [("user", "all of it")]


@pytest.mark.parametrize(
    ("config", "turns", "label"),
    [
        ("tool", ["```shell\nls\n```"] * 2, "markdown"),
        ("markdown", ['@shell(call-1): {"command": "ls"}'], "tool"),
        ("markdown", ['@shell(call-1): {"command": "ls"}', "```shell\nls\n```"], "markdown"),
        ("xml", ["```shell\nls\n```", '@shell(call-1): {"command": "ls"}'], "xml"),  # the others do not agree
        ("foo", ["```shell\nls\n```"], "markdown"),
        ("foo", ["no call"], None),
        ("xml", ["no call"], "xml"),
    ],
)
def test_the_tool_format_of_the_config_holds_unless_all_calls_that_ran_are_in_another(
    tmp_path: Path, config: str, turns: list[str], label: str | None
) -> None:
    rows = [row for text in turns for row in (said("assistant", text), said("system", "Ran command: `ls`\n\n`a`"))]
    log = write_log(tmp_path, "log", said("user", "list"), *rows, said("assistant", "Run this:\n\n```shell\nls\n```"))
    (log.parent / "config.toml").write_text(f'[chat]\ntool_format = "{config}"\n')
    if label is None:
        log.write_text("".join(json.dumps(row) + "\n" for row in (said("user", "list"), said("assistant", "no call"))))
    assert read_all(tmp_path).conversations[0].meta.get("tool_format") == label


def test_the_models_of_the_turns_are_known_where_they_differ(tmp_path: Path) -> None:
    one, other = ({"metadata": {"model": f"openai/{name}"}} for name in "AB")
    log = write_log(
        tmp_path, "log", said("user", "a"), said("assistant", "b", **one), said("user", "c"), said("assistant", "d", **other)
    )
    (log.parent / "config.toml").write_text('[chat]\nmodel = "openai/B"\n')
    write_log(tmp_path, "same", said("user", "a"), said("assistant", "b", **one))
    switched, same = read_all(tmp_path).conversations
    assert (switched.meta["model"], switched.meta["turn_models"]) == ("openai/B", ["openai/A", "openai/B"])
    assert same.meta["model"] == "openai/A" and "turn_models" not in same.meta


def test_naive_and_aware_times_are_compared_in_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    naive, aware = said("user", "a"), said("assistant", "b", timestamp="2026-06-03T10:00:00+00:00")
    write_log(tmp_path, "log", naive, aware, said("system", "c", timestamp="no date"), said("system", "d", timestamp="0001-01-01"))
    (conversation,) = read_all(tmp_path).conversations
    monkeypatch.undo()
    time.tzset()
    assert conversation.meta["time"] == "2026-06-03T12:44:37Z"  # the naive one, four hours behind, is the later


def test_what_was_taken_back_is_named_and_another_branch_is_a_conversation_of_the_same_group(tmp_path: Path) -> None:
    start = [said("user", "hello"), said("assistant", "hi")]
    write_log(tmp_path, "log", *start, said("user", "go on"), said("assistant", "done"))
    branches = tmp_path / "log" / "branches"
    branches.mkdir()
    tails = {
        "main-undo-0": [said("user", "no"), said("assistant", "wrong")],
        "main-undo-1": [said("user", "no")],  # what the second undo of the same command leaves
        "main-edit-0": [said("user", "no"), said("assistant", "wrong")],  # the same turn a second time
        "other": [said("user", "another way"), said("assistant", "so")],
        "same": [said("user", "go on"), said("assistant", "done")],
    }
    for name, tail in tails.items():
        (branches / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in start + tail))
    read = read_all(tmp_path)
    assert [(one.name, one.group) for one in read.conversations] == [("log", "log"), ("log#other", "log")]
    assert {one.id for one in read.rejected} == {"log#main-edit-0"}
    assert {one.reason for one in read.rejected} == {"undone: the person took these turns back"}


def test_after_a_change_of_tools_the_newest_prompt_stands_in_front(tmp_path: Path) -> None:
    newest = {"prompt_generation": "g2"}
    write_log(
        tmp_path,
        "log",
        said("system", "first prompt", pinned=True),
        said("user", "hello"),
        said("assistant", "hi"),
        said("system", "second prompt", pinned=True, metadata={"prompt_generation": "g1"}),
        said("system", "third prompt", pinned=True, metadata=newest),
        said("user", "again"),
        said("assistant", "yes"),
    )
    read = read_all(tmp_path)
    assert [content for _, content in messages_of(read)] == ["third prompt", "hello", "hi", "again", "yes"]
    assert read.conversations[0].meta["not_reproduced"] == ["prompt_generation"]  # the first answer had another prompt


def test_links_pipes_and_what_may_not_be_read_are_named_and_never_followed(tmp_path: Path) -> None:
    secret = write_log(tmp_path / "elsewhere", "log", said("user", "private"))
    logs = tmp_path / "logs"
    write_log(logs, "good", said("user", "a"))
    (logs / "linked-folder").symlink_to(secret.parent, target_is_directory=True)
    (logs / "loop").symlink_to(logs, target_is_directory=True)
    for name in ("linked-file", "pipe", "dangling"):
        (logs / name).mkdir()
    (logs / "linked-file" / "conversation.jsonl").symlink_to(secret)
    (logs / "dangling" / "conversation.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(logs / "pipe" / "conversation.jsonl")
    for part in ("files", "branches"):
        (logs / "good" / part).symlink_to(secret.parent, target_is_directory=True)
    read = read_all(logs)
    assert [one.group for one in read.conversations] == ["good"]
    assert {one.id: one.reason for one in read.rejected} == {
        "linked-folder": "cannot be read: a link, not followed",
        "linked-file": "cannot be read: a link, not followed",
        "dangling": "cannot be read: a link, not followed",
        "pipe": "cannot be read: not an ordinary file",
    }


def test_a_line_of_a_hundred_megabytes_is_passed_over_in_little_memory(tmp_path: Path) -> None:
    log = write_log(tmp_path, "log", said("user", "before"))
    with log.open("ab") as file:
        file.write(b'{"role": "user", "content": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + json.dumps(said("assistant", "after")).encode() + b"\n")
    tracemalloc.start()
    read = read_all(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert messages_of(read) == [("user", "before"), ("assistant", "after")]
    assert [(bad.line, bad.reason) for bad in read.bad_lines] == [(2, "longer than 16 MB")]
    assert peak < 5 * 16 * 2**20  # bytes, text and a copy of what was read of it


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_in_any_file_of_a_log_only_cost_what_they_hold(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    pieces = [
        b"\n",
        b"{",
        b"}",
        b'"role": "user"',
        b'"content": "x"',
        b'{"role": "user", "content": "ok"}\n',
        b"[",
        b"\xff\x00",
        b'"',
    ]
    log = write_log(tmp_path, "log")
    for part in ("files", "branches"):
        (log.parent / part).mkdir()
    for name in ("conversation.jsonl", "config.toml", "branches/main-undo-0.jsonl", "branches/x.jsonl", "lossless.jsonl"):
        chosen = random.integers(0, len(pieces), 300)
        (log.parent / name).write_bytes(b"".join(pieces[i] for i in chosen) + random.bytes(200))
    read = read_all(tmp_path)
    assert all(message.content == "ok" or message.role == "user" for one in read.conversations for message in one.messages)
    assert read.bad_lines


def test_deep_nesting_huge_numbers_and_odd_types_are_lines_that_cannot_be_read(tmp_path: Path) -> None:
    deep = '{"role": "user", "content": "x", "metadata": ' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}"
    huge = '{"role": "user", "content": "x", "n": ' + "9" * 10_000 + "}"
    odd = '{"role": "user", "content": "x", "timestamp": [1], "call_id": 3, "files": [1, null], "file_hashes": {"1": 2}}'
    write_log(tmp_path, "log", said("user", "fine"), deep, huge, odd)
    read = read_all(tmp_path)
    assert messages_of(read) == [("user", "fine\n\nx")]
    assert [bad.line for bad in read.bad_lines] == [2, 3]
