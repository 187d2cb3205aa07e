"""Collecting: every conversation is kept once, or named with the reason why not; no secret, nothing twice, nothing lost."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from chats import NO_POLICY, template_of

from mlx_finetune.data import refining
from mlx_finetune.data.clean import reason_in_name, reason_in_shape
from mlx_finetune.data.collect import collect
from mlx_finetune.data.conversation import Conversation, Message, Role, ToolCall, read_conversations
from mlx_finetune.data.found import Sources
from mlx_finetune.data.redact import Rules
from mlx_finetune.data.refine import Settings
from mlx_finetune.data.rendered import write_rendered
from mlx_finetune.data.select import Selection
from mlx_finetune.data.sources.openassistant import EVERYTHING
from mlx_finetune.data.tags import read_tags
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError

PLAIN = Settings(redaction=Rules())
GITHUB = "ghp_" + "0aZ9" * 9


def conversation(*roles: Role, source: str = "gptme", name: str = "2026-01-01-a-log", text: str = "text") -> Conversation:
    return Conversation(tuple(Message(role, text) for role in roles), source, name, "private")


def write_log(folder: Path, name: str, *messages: tuple[str, str], extra: str = "") -> None:
    (folder / name).mkdir(parents=True)
    lines = [json.dumps({"role": role, "content": content}) + "\n" for role, content in messages]
    (folder / name / "conversation.jsonl").write_text("".join(lines) + extra, encoding="utf-8")


def write_tree(path: Path, question: str, answer: str) -> Path:
    base = {"review_result": True, "deleted": False, "synthetic": False, "lang": "en"}
    reply = base | {"message_id": "a", "text": answer, "role": "assistant", "replies": []}
    root = base | {"message_id": "p", "text": question, "role": "prompter", "replies": [reply]}
    path.write_text(json.dumps({"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": root}) + "\n")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gather(out: Path, logs: Path | None = None, *trees: Path, settings: Settings = PLAIN, update: bool = False) -> dict[str, Any]:
    return collect(Sources(logs, tuple(map(str, trees)), (), EVERYTHING), settings, out, update=update)


def texts(out: Path, source: str = "gptme") -> dict[str, list[str]]:
    return {one.name: [m.content for m in one.messages] for one in read_conversations(out / f"{source}.jsonl")}


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        (conversation(), "no messages"),
        (conversation("system", "assistant"), "no user turn"),
        (conversation("system", "user", "system"), "no assistant turn"),
        (conversation("user", "assistant", text=" "), "no assistant turn"),
        (conversation("user", "assistant", name="test-1-x"), "a temporary or test log of gptme"),
        (conversation("user", "assistant", name="tmpabc"), "a temporary or test log of gptme"),
        (
            conversation("user", "assistant", name="2026-07-23-gptme-evals-local--m-markdown-5f2a9c1e"),
            "a gptme evaluation: would leak into evaluation",
        ),
        (conversation("user", "assistant", name="2026-06-03-fix-flaky-test-run"), None),
        (conversation("user", "assistant", name="test-1", source="openassistant"), None),
        (
            Conversation((Message("user", "a"), Message("assistant", "b", 0.0, "cut off")), "gptme", "g", "private"),
            "no turn left to learn: cut off",
        ),
    ],
)
def test_a_conversation_is_rejected_for_a_reason_or_kept(rejected: Conversation, reason: str | None) -> None:
    assert (reason_in_name(rejected) or reason_in_shape(rejected)) == reason


def test_every_genuine_log_is_kept_or_rejected_for_the_reason_in_the_manifest(tmp_path: Path, shared: Path) -> None:
    manifest = json.loads((shared / "data" / "gptme-logs.manifest.json").read_text(encoding="utf-8"))
    summary = gather(tmp_path / "out", shared / "data" / "gptme-logs")
    rejected = {row["id"]: row["reason"] for row in lines_of(tmp_path / "out" / "rejected.jsonl")}
    assert set(texts(tmp_path / "out")) | {name for name in rejected if "#" not in name} == set(manifest)
    for name, expected in manifest.items():
        if expected.get("kind") == "named like a gptme-eval run":
            assert rejected[name] == "a gptme evaluation: would leak into evaluation"
        elif expected.get("kind") == "empty log (made by hand)":
            assert rejected[name] == "no messages"
        elif expected["quality"] == "low":
            assert re.match("goes in circles|apologises", rejected[name])
        else:
            assert name not in rejected
    assert rejected["2026-07-08-hopping-orange-fish#main-undo-0"].startswith("undone")
    assert summary["context_only"]["declined by the person"] == 1
    assert summary["formats"] == {"markdown": 16, "tool": 4, "xml": 2}
    assert [(bad["file"].split("/")[-2], bad["line"]) for bad in summary["bad_lines"]] == [("2026-06-22-node-cache-race", 21)]


@pytest.mark.parametrize("seed", range(5))
def test_no_planted_secret_is_left_in_any_file_and_no_other_text_is_changed(tmp_path: Path, shared: Path, seed: int) -> None:
    data = shared / "data"
    plant = [sys.executable, data / "plant_secrets.py", data / "gptme-logs", tmp_path / "planted", "--seed", str(seed)]
    answer = subprocess.run([str(part) for part in plant], capture_output=True, text=True, check=True)
    values = dict(line.split("\t") for line in answer.stdout.splitlines())
    gather(tmp_path / "redacted", tmp_path / "planted")
    gather(tmp_path / "plain", data / "gptme-logs", settings=Settings(redaction=None))
    assert len(values) == 4
    for path in (tmp_path / "redacted").rglob("*"):
        raw = path.read_text(encoding="utf-8")
        assert not [name for name, value in values.items() if value in raw], path
    marks: dict[str, set[str]] = {}
    redacted, plain = texts(tmp_path / "redacted"), texts(tmp_path / "plain")
    assert redacted.keys() == plain.keys()
    for name, contents in plain.items():
        for before, after in zip(contents, redacted[name], strict=True):
            pattern = re.sub(r"@@([A-Z_]+_\d+)@@", r"(\\[REDACTED:[a-z_]+:\\d+\\])", re.escape(before))
            match = re.fullmatch(pattern, after)
            assert match, (name, before[:200], after[:200])
            for mark, value in zip(re.findall(r"@@[A-Z_]+_\d+@@", before), match.groups(), strict=True):
                marks.setdefault(mark, set()).add(value)
    assert len(marks) == 4 and all(len(placeholders) == 1 for placeholders in marks.values())
    assert len({placeholder for placeholders in marks.values() for placeholder in placeholders}) == 4


def test_the_same_secret_has_the_same_placeholder_in_every_conversation(tmp_path: Path) -> None:
    other = "ghp_" + "Qw3r" * 9
    for name, secret in (("a", other), ("b", GITHUB), ("c", GITHUB), ("d", other)):
        write_log(
            tmp_path / "logs", name, ("user", f"use {secret} in {name}"), ("assistant", f"I use {secret} as you said in {name}.")
        )
    summary = gather(tmp_path / "out", tmp_path / "logs", settings=Settings(near_duplicates=None))
    found = {name: re.findall(r"\[REDACTED:\w+:\d+\]", " ".join(contents)) for name, contents in texts(tmp_path / "out").items()}
    assert found["a"] == found["d"] == ["[REDACTED:github_token:1]"] * 2
    assert found["b"] == found["c"] == ["[REDACTED:github_token:2]"] * 2
    assert summary["secrets"] == {"github_token": 8} and summary["distinct_secrets"] == {"github_token": 2}


@pytest.mark.parametrize("tool_calls", ["text", "native"])
def test_a_secret_within_a_native_call_has_its_placeholder_too(tmp_path: Path, tool_calls: Literal["text", "native"]) -> None:
    call = f'@shell(call-1): {{"command": "export GITHUB_TOKEN={GITHUB} && echo \\u00e9"}}'
    write_log(
        tmp_path / "logs", "one", ("user", "log in"), ("assistant", call), ("system", f"Ran with {GITHUB}"), ("assistant", "Done.")
    )
    (tmp_path / "logs" / "one" / "config.toml").write_text('[chat]\ntool_format = "tool"\n')
    gather(tmp_path / "out", tmp_path / "logs", settings=Settings(tool_calls=tool_calls))
    raw = (tmp_path / "out" / "gptme.jsonl").read_text()
    assert raw.count("[REDACTED:github_token:1]") == 2 and raw.count("REDACTED") == 2 and GITHUB not in raw
    (kept,) = read_conversations(tmp_path / "out" / "gptme.jsonl")
    turn = kept.messages[1]
    arguments = turn.tool_calls[0].arguments if tool_calls == "native" else turn.content.partition(": ")[2]
    assert json.loads(arguments) == {"command": "export GITHUB_TOKEN=[REDACTED:github_token:1] && echo \u00e9"}


def test_a_secret_has_one_placeholder_under_whichever_kind_it_stands(tmp_path: Path) -> None:
    token = "9fQ2kLx7Rt0ZpW4s"
    write_log(tmp_path / "logs", "a", ("user", f"API_TOKEN={token}"), ("assistant", "It is set, and the service answers now."))
    write_log(tmp_path / "logs", "b", ("user", f"curl -u joe:{token} x"), ("assistant", "The page is there; nothing else came."))
    summary = gather(tmp_path / "out", tmp_path / "logs")
    found = {name: re.findall(r"\[REDACTED:\w+:\d+\]", " ".join(contents)) for name, contents in texts(tmp_path / "out").items()}
    assert found["a"] == found["b"] and len(found["a"]) == 1
    assert sum(summary["distinct_secrets"].values()) == 1


def test_no_output_file_says_who_the_person_is_or_holds_a_secret_in_a_name(tmp_path: Path) -> None:
    home = tmp_path / "home" / "kim"
    rules = Rules.for_person(home, "kim")
    write_log(home / "logs", f"2026-01-01-kim-{GITHUB}", ("user", "list"), ("assistant", "There is nothing in this folder."))
    write_log(home / "logs", f"test-{GITHUB}", ("user", "list"), ("assistant", "There is nothing."))
    write_log(home / "logs", "2026-01-02", extra=json.dumps({"role": GITHUB, "content": "x"}) + "\n")
    row = {
        "id": f"of kim {GITHUB}",
        "license": GITHUB,
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    }
    bad = {"messages": [{"role": GITHUB * 3, "content": "q"}]}
    (home / "chat.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(bad) + "\n")
    sources = Sources(home / "logs", (), (str(home / "chat.jsonl"),))
    settings = Settings(redaction=rules)
    collect(sources, settings, tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert GITHUB[:20] not in path.read_text() and "kim" not in path.read_text(), path
    assert collect(sources, settings, tmp_path / "out")["unchanged"]
    tags = read_tags(tmp_path / "out" / "tags.yaml")
    assert set(tags) == {"2026-01-01-user-[REDACTED:github_token:1]", "of user [REDACTED:github_token:1]"}


def test_an_equal_conversation_is_kept_once_whatever_its_source(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_log(tmp_path / "logs", name, ("user", "hello?"), ("assistant", "hi"))
    tree = write_tree(tmp_path / "trees.jsonl", "hello?", "hi")
    summary = gather(tmp_path / "out", tmp_path / "logs", tree)
    assert sum(summary["conversations"].values()) == 1
    reasons = [row["reason"] for row in lines_of(tmp_path / "out" / "rejected.jsonl")]
    assert len(reasons) == 2 and all(reason.startswith("duplicate of ") for reason in reasons)
    assert summary["rejected"] == {"duplicate": 2}


def test_a_fork_teaches_its_shared_beginning_once_and_stays_in_its_group(tmp_path: Path) -> None:
    start = [("user", "write a parser for the config"), ("assistant", "Here is a parser that reads it line by line.")]
    write_log(tmp_path / "logs", "first", *start, ("user", "in C"), ("assistant", "Now it is in C, with fgets and strtok."))
    write_log(tmp_path / "logs", "second", *start, ("user", "in Rust"), ("assistant", "It is in Rust now and borrows its lines."))
    write_log(tmp_path / "logs", "third", *start)
    summary = gather(tmp_path / "out", tmp_path / "logs")
    kept = list(read_conversations(tmp_path / "out" / "gptme.jsonl"))
    assert {one.name for one in kept} == {"first", "second"} and len({one.group for one in kept}) == 1
    assert sum(one.assistant_turns for one in kept) == 3 == summary["assistant_turns"]["gptme"]
    assert summary["context_only"] == {"learned in another conversation": 1}
    assert summary["rejected"] == {"beginning": 1}


def test_only_what_was_read_is_written(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "trees.jsonl", "hello?", "hi \ud83d")
    gather(tmp_path / "out", None, tree)
    made = {"openassistant.jsonl", "rejected.jsonl", "collect.json", "tags.yaml", "index.ndjson"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == made
    assert texts(tmp_path / "out", "openassistant") == {"t": ["hello?", "hi ?"]}


def test_nothing_left_is_refused_with_the_counts_and_leaves_no_folder(tmp_path: Path) -> None:
    write_log(tmp_path / "logs", "a", extra='{"cut')
    write_log(tmp_path / "logs", "b", ("user", "anyone?"))
    write_log(tmp_path / "logs", "c", ("user", "hello?"))
    with pytest.raises(UserError, match="no conversation left after cleaning") as error:
        gather(tmp_path / "out", tmp_path / "logs")
    assert "no assistant turn (2); no messages (1); 1 unreadable lines, the first" in error.value.message
    assert error.value.hint
    with pytest.raises(UserError, match="no source"):
        gather(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"logs"}


def test_an_existing_folder_is_never_touched(tmp_path: Path) -> None:
    write_log(tmp_path / "logs", "a", ("user", "hello?"), ("assistant", "hi"))
    (tmp_path / "out").mkdir()
    for update in (False, True):
        with pytest.raises(UserError, match="out exists already"):
            gather(tmp_path / "out", tmp_path / "logs", update=update)
    assert not list((tmp_path / "out").iterdir())


def test_a_second_run_reads_only_what_is_new_and_gives_what_one_run_would(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    for i in range(4):
        secret = f" with {GITHUB}" if i == 2 else ""
        write_log(
            logs, f"log-{i}", ("user", f"task {i * 77}{secret}"), ("assistant", f"The answer to {i * 77} is {i**3}, as you see.")
        )
    first = gather(tmp_path / "out", logs)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = gather(tmp_path / "out", logs)
    assert again["unchanged"] and not first["unchanged"]
    assert {key: value for key, value in again.items() if key != "unchanged"} == {
        k: v for k, v in first.items() if k != "unchanged"
    }
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write_log(logs, "log-9", ("user", f"a new one with {GITHUB}"), ("assistant", "Something quite different from the others."))
    write_log(logs, "log-5", ("user", "task 0"), ("assistant", "The answer to 0 is 0, as you see."))  # as log-0
    with pytest.raises(UserError, match="something new to collect") as error:
        gather(tmp_path / "out", logs)
    assert "--update" in error.value.hint
    updated = gather(tmp_path / "out", logs, update=True)
    whole = gather(tmp_path / "whole", logs)
    assert updated["conversations"] == whole["conversations"] == {"gptme": 5}
    for name in ("gptme.jsonl", "rejected.jsonl", "tags.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(UserError, match="collected with another system"):
        gather(tmp_path / "out", logs, settings=Settings(system="none"))


def test_a_collection_that_was_edited_is_not_built_upon(tmp_path: Path) -> None:
    write_log(tmp_path / "logs", "a", ("user", "hello?"), ("assistant", "hi"))
    gather(tmp_path / "out", tmp_path / "logs")
    with (tmp_path / "out" / "gptme.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="out exists already"):
        gather(tmp_path / "out", tmp_path / "logs", update=True)


@pytest.mark.parametrize("version", [2, 99])
def test_a_collection_of_another_version_says_which(tmp_path: Path, version: int) -> None:
    write_log(tmp_path / "logs", "a", ("user", "hello?"), ("assistant", "hi"))
    gather(tmp_path / "out", tmp_path / "logs")
    summary = json.loads((tmp_path / "out" / "collect.json").read_text())
    (tmp_path / "out" / "collect.json").write_text(json.dumps(summary | {"version": version}))
    for update in (False, True):
        with pytest.raises(UserError, match=f"out exists already, collected as version {version} does; this one makes version 3"):
            gather(tmp_path / "out", tmp_path / "logs", update=update)


def test_several_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        write_log(tmp_path / "logs", f"log-{i}", ("user", f"task {i * 77} {GITHUB}"), ("assistant", f"The answer is {i**5 * 31}."))
    gather(tmp_path / "one", tmp_path / "logs")
    monkeypatch.setattr(refining, "MUCH", 0)
    monkeypatch.setattr(refining, "CHUNK", 200)
    gather(tmp_path / "many", tmp_path / "logs")
    for name in ("gptme.jsonl", "rejected.jsonl", "tags.yaml"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def write_tagged_logs(logs: Path) -> None:
    for i in range(3):
        write_log(logs, f"2026-01-0{i}", ("user", f"task {i * 77}"), ("assistant", f"The answer is {i**5 * 31}."))
    write_log(logs, "test-x", ("user", "a test of gptme"), ("assistant", "It prints what it should print."))


def weights(out: Path) -> dict[str, float]:
    return {one.name: one.messages[-1].weight for one in read_conversations(out / "gptme.jsonl")}


def test_the_tags_that_it_writes_can_be_edited_and_given_back(tmp_path: Path) -> None:
    write_tagged_logs(tmp_path / "logs")
    gather(tmp_path / "out", tmp_path / "logs")
    tags = (tmp_path / "out" / "tags.yaml").read_text()
    assert '"2026-01-00": 1  # (1 turn)\n' in tags
    assert read_tags(tmp_path / "out" / "tags.yaml") == {f"2026-01-0{i}": 1 for i in range(3)}
    edited = tags.replace('"2026-01-00": 1', '"2026-01-00": drop').replace('"2026-01-01": 1', '"2026-01-01": 2.5')
    (tmp_path / "tags.yaml").write_text(edited.replace('# "test-x"', '"test-x"'))
    settings = Settings(selection=Selection(tags=read_tags(tmp_path / "tags.yaml")))
    gather(tmp_path / "tagged", tmp_path / "logs", settings=settings)
    assert weights(tmp_path / "tagged") == {"2026-01-01": 2.5, "2026-01-02": 1.0, "test-x": 1.0}


def test_tags_that_were_given_stand_in_the_next_file_and_mean_the_same(tmp_path: Path) -> None:
    write_tagged_logs(tmp_path / "logs")
    tags = {"*-02": "drop", "2026-01-01": 2.5, "2026-*": 0.5, "test-x": "keep", "*-00": 3.0}
    for round_ in range(3):
        settings = Settings(selection=Selection(tags=tags))
        gather(tmp_path / str(round_), tmp_path / "logs", settings=settings)
        assert weights(tmp_path / str(round_)) == {"2026-01-00": 3.0, "2026-01-01": 2.5, "2026-01-02": 0.5, "test-x": 1.0}
        tags = read_tags(tmp_path / str(round_) / "tags.yaml")


def test_edited_tags_are_applied_by_update_and_never_lost(tmp_path: Path) -> None:
    write_tagged_logs(tmp_path / "logs")
    gather(tmp_path / "out", tmp_path / "logs")
    path = tmp_path / "out" / "tags.yaml"
    path.write_text(path.read_text().replace('"2026-01-00": 1', '"2026-01-00": drop'))
    for update in (False, True):
        with pytest.raises(UserError, match=r"tags\.yaml was edited") as error:
            gather(tmp_path / "out", tmp_path / "logs", update=update)
        assert f"--tags {path} --update" in error.value.hint
    edited = Settings(selection=Selection(tags=read_tags(path)))
    result = gather(tmp_path / "out", tmp_path / "logs", settings=edited, update=True)
    assert weights(tmp_path / "out").keys() == {"2026-01-01", "2026-01-02"} and result["changed_options"] == ["selection"]
    assert '"2026-01-00": drop' in path.read_text()
    assert gather(tmp_path / "out", tmp_path / "logs", settings=Settings(selection=Selection(tags=read_tags(path))))["unchanged"]


def test_update_with_other_options_gives_what_a_new_collection_would(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    write_log(logs, "a", ("user", "list"), ("assistant", "```bash\nls\n```"), ("system", "Executed"), ("assistant", "Done so."))
    tree = write_tree(tmp_path / "trees.jsonl", "hello?", "hi")
    gather(tmp_path / "out", logs)
    other = Settings(near_duplicates=None)
    gather(tmp_path / "out", logs, tree, settings=other, update=True)
    gather(tmp_path / "new", logs, tree, settings=other)
    for name in ("gptme.jsonl", "openassistant.jsonl", "rejected.jsonl", "tags.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    with pytest.raises(UserError, match=r"holds .*trees.jsonl, which is not read now"):
        gather(tmp_path / "out", logs, settings=other, update=True)


def rendered(folder: Path) -> list[str]:
    """The texts of train.csv, which are those of train.jsonl."""
    with (folder / "train.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    with (folder / "train.jsonl").open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert header == ["text"] and all(len(row) == 1 for row in rows)
    assert lines == [{"text": row[0]} for row in rows]
    return [row[0] for row in rows]


def test_the_rendered_files_give_back_every_text(tmp_path: Path, tiny_llama: Path) -> None:
    contents = ['say "hi", then\nleave', "", "a\r\nb\rc", "snowman ☃\u2028end", "```shell\nls\n```\n"]
    conversations = [conversation("user", "assistant", text=text) for text in contents]
    write_rendered(conversations, ChatTemplate.load(tiny_llama), tmp_path)
    assert rendered(tmp_path) == [
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text.strip()}<|im_end|>\n" for text in contents
    ]


def test_with_a_template_the_collected_conversations_are_rendered_too(tmp_path: Path, tiny_llama: Path) -> None:
    write_log(tmp_path / "logs", "one", ("system", "be kind"), ("user", "list"), ("assistant", "```shell\nls\n```\n"))
    tree = write_tree(tmp_path / "trees.jsonl", "hello?", "hi")
    template = ChatTemplate.load(tiny_llama)
    collect(Sources(tmp_path / "logs", (str(tree),), (), EVERYTHING), PLAIN, tmp_path / "out", template=template)
    kept = [one for name in ("gptme", "openassistant") for one in read_conversations(tmp_path / "out" / f"{name}.jsonl")]
    assert rendered(tmp_path / "out") == [template.render(template.as_learned(one.messages)) for one in kept]
    assert rendered(tmp_path / "out")[0].endswith("<|im_start|>assistant\n```shell\nls\n```<|im_end|>\n")


def test_what_a_template_would_lose_is_left_out_of_the_rendered_files_and_counted(tmp_path: Path, tiny_llama: Path) -> None:
    called = Message("assistant", "", tool_calls=(ToolCall("1", "shell", '{"command": "ls"}'),))
    lost = Conversation((Message("user", "list"), called), "chat", "a", "private")
    refusals = write_rendered([lost, conversation("user", "assistant")], ChatTemplate.load(tiny_llama), tmp_path)
    assert len(rendered(tmp_path)) == 1 and sum(refusals.values()) == 1


def test_a_conversation_that_the_template_does_not_take_is_named_and_leaves_no_folder(tmp_path: Path) -> None:
    write_log(tmp_path / "logs", "one", ("user", "list"), ("assistant", "ls"), ("system", "a.txt"), ("assistant", "one file"))
    template = template_of(tmp_path / "model", NO_POLICY)
    with pytest.raises(UserError, match=r"^one: the template does not take these messages") as error:
        collect(Sources(tmp_path / "logs"), PLAIN, tmp_path / "out", template=template)
    assert "collect without --model" in error.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"logs", "model"}
