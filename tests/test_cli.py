"""The command line as a person meets it: one line for a mistake, exit status 2, and nothing overwritten."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from chats import RAISES
from conftest import Answer

from mlx_finetune.cli import app, main
from mlx_finetune.config import FIELDS

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "mlx_finetune" / "sample" / "gptme-logs"
TREES = ROOT / "mlx_finetune" / "sample" / "openassistant.trees.jsonl"


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with collected/, dataset/ and a run/ of two steps, made through the command line."""
    folder = tmp_path_factory.mktemp("made")
    verbs = (
        ("collect", LOGS, "--openassistant", TREES, "--out", folder / "collected"),
        ("prepare", folder / "collected", "--model", tiny_llama, "--max-length", "512", "--out", folder / "dataset"),
        (
            "train",
            "--model",
            tiny_llama,
            "--data",
            folder / "dataset",
            "--out",
            folder / "run",
            "--set",
            "steps=2",
            "--set",
            "rank=2",
        ),
    )
    for arguments in verbs:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        assert not exit.value.code
    return folder


def test_the_whole_road_by_its_verbs(made: Path, cli: Callable[..., Answer], tmp_path: Path) -> None:
    assert {path.name for path in (made / "collected").iterdir()} == {
        "gptme.jsonl",
        "openassistant.jsonl",
        "rejected.jsonl",
        "collect.json",
        "tags.yaml",
        "index.ndjson",
    }
    assert (made / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    status, out, err = cli("evaluate", made / "run", "--json")
    found = json.loads(out)
    assert (
        status == 0 and found["base"]["by_source"].keys() == {"gptme"} == found["tuned"]["by_source"].keys()
    )  # the tree is too long here
    assert "next: mlx-finetune report" in err
    status, out, err = cli("fuse", made / "run", "--out", tmp_path / "tuned", "--json")
    assert status == 0 and json.loads(out)["verified"]["largest_difference"] < 1e-3
    assert (tmp_path / "tuned" / "tokenizer.json").is_file()


def test_a_model_whose_template_needs_a_policy_is_handed_back_with_the_template_that_was_trained(
    tiny_llama: Path, cli: Callable[..., Answer], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = RAISES
    tokenizer.save_pretrained(model)
    own = (model / "chat_template.jinja").read_bytes()
    assert cli("collect", LOGS, "--out", "c")[0] == 0
    status, out, err = cli("prepare", "c", "--model", model, "--max-length", "512", "--out", "d", "--json")
    info = json.loads(out)
    assert status == 0 and "roles folded: " in err and info["role_policy"]["name"] == "folded"
    assert info["train"]["exact_turns"] == info["train"]["learned_turns"] > 50
    train = ("train", "--model", model, "--data", "d", "--out", "r", "--set", "steps=1", "--set", "rank=2")
    assert cli(*train, "--set", "learning_rate=0.01")[0] == 0
    assert cli("fuse", "r", "--out", "tuned")[0] == 0
    served = AutoTokenizer.from_pretrained(tmp_path / "tuned").chat_template
    assert served == info["chat_template"] == (tmp_path / "r" / "chat_template.jinja").read_bytes().decode() != own.decode()
    assert (model / "chat_template.jinja").read_bytes() == own


def test_every_verb_ends_with_its_path_and_the_next_command(made: Path, cli: Callable[..., Answer]) -> None:
    status, out, err = cli("collect", LOGS, "--out", "c")
    assert (status, out.splitlines()[-1]) == (0, "c") and "next: mlx-finetune prepare c" in err
    status, out, err = cli("plot", made / "run")
    assert (status, out.splitlines()[-1]) == (0, str(made / "run" / "loss.png"))


def test_collect_with_a_model_also_writes_what_gptmes_first_collector_wrote(
    tiny_llama: Path, cli: Callable[..., Answer], tmp_path: Path
) -> None:
    status, out, _ = cli("collect", LOGS, "--model", tiny_llama, "--out", "c", "--json")
    assert status == 0
    rows = list(csv.DictReader((tmp_path / "c" / "train.csv").open(newline="", encoding="utf-8")))
    lines = [json.loads(line) for line in (tmp_path / "c" / "train.jsonl").open(encoding="utf-8")]
    assert [row["text"] for row in rows] == [line["text"] for line in lines]
    assert len(lines) == json.loads(out)["conversations"]["gptme"]
    assert all(line["text"].startswith("<|im_start|>system\n") and "<|im_start|>assistant\n" in line["text"] for line in lines)


def write_secret_log(folder: Path) -> tuple[Path, str]:
    """A logs folder with a token in the third line of its only log, and the token."""
    token = "ghp_" + "aB3x" * 9
    rows = [
        ("user", "push it"),
        ("assistant", "```shell\ngit remote -v\n```"),
        ("system", f"origin https://me:{token}@github.example/a.git"),
    ]
    (folder / "2026-06-03-a-log").mkdir(parents=True)
    lines = "".join(json.dumps({"role": role, "content": content}) + "\n" for role, content in rows)
    write(folder / "2026-06-03-a-log" / "conversation.jsonl", lines)
    return folder, token


def test_scan_only_names_kind_file_and_line_never_the_value_and_writes_nothing(cli: Callable[..., Answer], tmp_path: Path) -> None:
    logs, token = write_secret_log(tmp_path / "logs")
    before = snapshot(tmp_path)
    status, out, err = cli("collect", logs, "--scan-only", "--json")
    place = str(logs / "2026-06-03-a-log" / "conversation.jsonl")
    hit = {"kind": "github_token", "file": place, "line": 3, "count": 1}
    assert (status, json.loads(out)) == (0, {"secrets": [hit], "not_read": []})
    status, out, more = cli("collect", logs, "--scan-only")
    assert status == 0 and "conversation.jsonl:3" in out.replace("\n", "") and "github_token" in out
    assert token not in out + err + more and snapshot(tmp_path) == before


def test_scan_only_names_line_and_file_of_rows_with_a_name_of_their_own_and_what_it_could_not_read(
    cli: Callable[..., Answer], tmp_path: Path
) -> None:
    logs, token = write_secret_log(tmp_path / "logs")
    (tmp_path / "logs" / "2026-06-04-linked").mkdir()
    (tmp_path / "logs" / "2026-06-04-linked" / "conversation.jsonl").symlink_to(tmp_path / "elsewhere")
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    rows = [
        {"id": "x1", "conversations": turns},
        {"id": f"chat {token}", "conversations": [*turns, {"from": "alien", "value": token}]},
    ]
    write(tmp_path / "chats.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    node = {"message_id": "m", "role": "prompter", "text": f"use {token}", "lang": "en", "replies": []}
    write(tmp_path / "trees.jsonl", json.dumps({"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": node}) + "\n")
    status, out, err = cli("collect", logs, "--chat", "chats.jsonl", "--openassistant", "trees.jsonl", "--scan-only", "--json")
    found = json.loads(out)
    places = {(Path(hit["file"]).name, hit["line"], hit["count"]) for hit in found["secrets"]}
    assert status == 0 and token not in out + err
    assert places == {("conversation.jsonl", 3, 1), ("chats.jsonl", 2, 2), ("trees.jsonl", 1, 1)}
    assert [(Path(one["file"]).parent.name, one["reason"]) for one in found["not_read"]] == [
        ("2026-06-04-linked", "a link, not followed")
    ]


def test_show_prints_what_was_kept_and_rejected_in_one_line_each(cli: Callable[..., Answer], tmp_path: Path) -> None:
    logs, token = write_secret_log(tmp_path / "logs")
    log = tmp_path / "logs" / "test-\x1b[31m" / "conversation.jsonl"
    log.parent.mkdir()
    write(log, json.dumps({"role": "user", "content": "\x1b[2J"}) + "\n")
    status, out, err = cli("collect", logs, "--show", "--out", "c")
    assert status == 0 and "2026-06-03-a-log" in out and "asked: push it" in out
    assert "a temporary or test log of gptme" in out and "\x1b" not in out and token not in out + err


def test_a_name_that_nothing_has_is_said(cli: Callable[..., Answer], tmp_path: Path) -> None:
    logs, _ = write_secret_log(tmp_path / "logs")
    status, _, err = cli("collect", logs, "--exclude", "2026-06-04*", "--exclude", "*-b-log", "--out", "c")
    assert status == 0 and "nothing is called '2026-06-04*'" in err and "nothing is called '*-b-log'" in err
    write(tmp_path / "tags.yaml", '"*-a-log": 2\nother: drop\n')
    status, _, err = cli("collect", logs, "--tags", tmp_path / "tags.yaml", "--out", "d")
    assert status == 0 and "nothing is called 'other'" in err and "a-log'" not in err


def test_a_second_collect_with_nothing_new_changes_nothing_and_update_adds_what_is_new(
    cli: Callable[..., Answer], tmp_path: Path
) -> None:
    logs, _ = write_secret_log(tmp_path / "logs")
    assert cli("collect", logs, "--out", "c")[0] == 0
    before = snapshot(tmp_path)
    status, out, err = cli("collect", logs, "--out", "c")
    assert status == 0 and "nothing is new" in err and snapshot(tmp_path) == before
    write_secret_log(tmp_path / "more")
    (tmp_path / "more" / "2026-06-03-a-log").rename(tmp_path / "logs" / "2026-06-04-b")
    write(tmp_path / "logs" / "2026-06-04-b" / "config.toml", '[chat]\nname = "Another"\n')
    status, out, err = cli("collect", logs, "--out", "c")
    assert status == 2 and "hint: --update" in err
    status, out, err = cli("collect", logs, "--out", "c", "--update", "--json")
    assert status == 0 and json.loads(out)["found"] == {"gptme": 2}


def test_a_dry_run_writes_nothing_and_shows_the_settings(
    made: Path, tiny_llama: Path, cli: Callable[..., Answer], tmp_path: Path
) -> None:
    arguments = ("train", "--model", tiny_llama, "--data", made / "dataset", "--out", "r", "--set", "rank=3", "--dry-run")
    status, out, _ = cli(*arguments)
    assert status == 0 and "rank: 3   (set)" in out
    assert not (tmp_path / "r").exists()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


GOOD = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'

# What is given, and what the one line names.
MISTAKES: dict[str, tuple[Callable[[Path, Path, Path], list[object]], str]] = {
    "no such logs folder": (lambda t, m, d: ["collect", t / "nowhere", "--out", t / "o"], "nowhere"),
    "OpenAssistant file that is not JSON": (
        lambda t, m, d: ["collect", "--no-gptme", "--openassistant", write(t / "x.jsonl", "{}\nnot json\n"), "--out", t / "o"],
        "x.jsonl:",
    ),
    "no such time": (lambda t, m, d: ["collect", LOGS, "--since", "June", "--out", t / "o"], "--since 'June': no such time"),
    "no such format": (lambda t, m, d: ["collect", LOGS, "--format", "yaml", "--out", t / "o"], "--format 'yaml' is not one of"),
    "no such system prompt": (
        lambda t, m, d: ["collect", LOGS, "--system", "full", "--out", t / "o"],
        "--system 'full' is not one of",
    ),
    "recovery weight out of range": (
        lambda t, m, d: ["collect", LOGS, "--recovery-weight", "-1", "--out", t / "o"],
        "--recovery-weight -1.0 is not from",
    ),
    "similarity out of range": (
        lambda t, m, d: ["collect", LOGS, "--near-duplicates", "7", "--out", t / "o"],
        "--near-duplicates 7.0",
    ),
    "quality out of range": (lambda t, m, d: ["collect", LOGS, "--min-quality", "7", "--out", t / "o"], "--min-quality 7.0"),
    "tags file missing": (
        lambda t, m, d: ["collect", LOGS, "--tags", t / "tags.yaml", "--out", t / "o"],
        "tags.yaml: No such file",
    ),
    "pattern that is none": (lambda t, m, d: ["collect", LOGS, "--allow", "re:(", "--out", t / "o"], "re:("),
    "chat file of no known shape": (
        lambda t, m, d: ["collect", "--no-gptme", "--chat", write(t / "x.jsonl", '{"a": 1}\n'), "--out", t / "o"],
        "x.jsonl",
    ),
    "a logs folder with --no-gptme": (lambda t, m, d: ["collect", LOGS, "--no-gptme", "--out", t / "o"], "--no-gptme"),
    "collected before with other options": (
        lambda t, m, d: ["collect", LOGS, "--openassistant", TREES, "--system", "none", "--out", d / "collected"],
        "exists already, collected with another system",
    ),
    "collected before with another source": (
        lambda t, m, d: ["collect", LOGS, "--update", "--out", d / "collected"],
        "openassistant.trees.jsonl, which is not read now",
    ),
    "home that is no path": (lambda t, m, d: ["collect", LOGS, "--home", "kim", "--out", t / "o"], "--home 'kim'"),
    "home with --no-personal": (
        lambda t, m, d: ["collect", LOGS, "--no-personal", "--home", "/home/kim", "--out", t / "o"],
        "--home with --no-personal",
    ),
    "e-mails with --no-redact": (
        lambda t, m, d: ["collect", LOGS, "--no-redact", "--emails", "--out", t / "o"],
        "--emails with --no-redact",
    ),
    "nothing to read": (lambda t, m, d: ["collect", "--no-gptme", "--out", t / "o"], "nothing to read"),
    "collected folder missing": (
        lambda t, m, d: ["prepare", t / "nowhere", "--model", m, "--out", t / "o"],
        "nowhere: no such file",
    ),
    "collected file not JSON": (
        lambda t, m, d: ["prepare", write(t / "c.jsonl", GOOD + "{cut"), "--model", m, "--out", t / "o"],
        "c.jsonl:2: not JSON",
    ),
    "unknown role": (
        lambda t, m, d: ["prepare", write(t / "c.jsonl", GOOD.replace('"user"', '"bot"')), "--model", m, "--out", t / "o"],
        "c.jsonl:1: message 1: role 'bot' is not one of system, user, assistant, tool",
    ),
    "nothing to learn": (
        lambda t, m, d: ["prepare", write(t / "c.jsonl", GOOD.replace('"assistant"', '"user"')), "--model", m, "--out", t / "o"],
        "no conversation left to learn from",
    ),
    "model folder missing": (lambda t, m, d: ["prepare", d / "collected", "--model", t / "nomodel", "--out", t / "o"], "nomodel"),
    "model without tokenizer": (
        lambda t, m, d: ["prepare", d / "collected", "--model", without(m, t / "m", "tokenizer.json"), "--out", t / "o"],
        "tokenizer",
    ),
    "model without chat template": (
        lambda t, m, d: ["prepare", d / "collected", "--model", without(m, t / "m", "chat_template.jinja"), "--out", t / "o"],
        "chat template",
    ),
    "max_length out of range": (
        lambda t, m, d: ["prepare", d / "collected", "--model", m, "--max-length", "abc", "--out", t / "o"],
        "max_length = 'abc'",
    ),
    "unknown setting in the file": (
        lambda t, m, d: ["train", write(t / "c.yaml", "learnin_rate: 1\n"), "--out", t / "o"],
        "c.yaml: unknown setting 'learnin_rate'",
    ),
    "unknown setting on the command line": (lambda t, m, d: ["train", "--set", "rnk=4", "--out", t / "o"], "unknown setting 'rnk'"),
    "setting out of range": (lambda t, m, d: ["train", "--set", "rank=0", "--out", t / "o"], "rank = 0"),
    "config file missing": (lambda t, m, d: ["train", t / "no.yaml", "--out", t / "o"], "no.yaml"),
    "no model": (lambda t, m, d: ["train", "--data", d / "dataset", "--out", t / "o"], "no model given"),
    "data not prepared": (lambda t, m, d: ["train", "--model", m, "--data", t, "--out", t / "o"], "not a prepared data set"),
    "another window than the data was prepared with": (
        lambda t, m, d: ["train", "--model", m, "--data", d / "dataset", "--set", "max_length=128", "--out", t / "o"],
        "max_length = 128, but",
    ),
    "unknown engine": (
        lambda t, m, d: ["train", "--model", m, "--data", d / "dataset", "--engine", "jax", "--out", t / "o"],
        "engine = 'jax'",
    ),
    "wrong target module": (
        lambda t, m, d: ["train", "--model", m, "--data", d / "dataset", "--set", "target_modules=qproj", "--out", t / "o"],
        "'qproj'",
    ),
    "run folder exists": (lambda t, m, d: ["train", "--model", m, "--data", d / "dataset", "--out", d / "run"], "exists already"),
    "resume of nothing": (lambda t, m, d: ["train", "--resume", "--out", t / "o"], "not a run"),
    "evaluate of nothing": (lambda t, m, d: ["evaluate", t / "norun"], "norun: not a run"),
    "no such checkpoint": (lambda t, m, d: ["evaluate", d / "run", "--checkpoint", "step-000009"], "no checkpoint 'step-000009'"),
    "fuse into an existing folder": (lambda t, m, d: ["fuse", d / "run", "--out", d / "dataset"], "exists already"),
    "demo into an existing folder": (lambda t, m, d: ["demo", "--out", d / "dataset"], "exists already"),
    "no such verb": (lambda t, m, d: ["trian"], "trian"),
    "no such option": (lambda t, m, d: ["train", "--modle", "x"], "--modle"),
    "missing argument": (lambda t, m, d: ["prepare", "--model", m], "Missing argument"),
}


def without(model: Path, copy: Path, name: str) -> Path:
    """The model folder with one thing missing."""
    copy.mkdir()
    for path in model.iterdir():
        if path.name != name:
            (copy / path.name).write_bytes(path.read_bytes())
    config = copy / "tokenizer_config.json"
    if name == "chat_template.jinja":
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}))
    return copy


def snapshot(folder: Path) -> dict[str, float]:
    return {str(path): path.lstat().st_mtime for path in folder.rglob("*")}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_a_hint_and_nothing_is_written(
    mistake: str, made: Path, tiny_llama: Path, cli: Callable[..., Answer], tmp_path: Path
) -> None:
    arguments, named = MISTAKES[mistake]
    given = arguments(tmp_path, tiny_llama, made)
    before = snapshot(made) | snapshot(tmp_path)
    status, out, err = cli(*given)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    hints = [line for line in err.splitlines() if line.startswith("hint: ")]
    assert status == 2 and out == ""
    assert len(errors) == 1 and named in errors[0], err
    assert len(hints) == 1 and "Traceback" not in err
    assert snapshot(made) | snapshot(tmp_path) == before


def test_the_nearest_setting_is_named(cli: Callable[..., Answer]) -> None:
    assert "hint: did you mean learning_rate?" in cli("train", "--set", "learnig_rate=1")[2]


def test_help_names_every_setting_with_its_default(cli: Callable[..., Answer]) -> None:
    text = re.sub(r"\s+", " ", cli("train", "--help")[1])
    for name in FIELDS:
        assert name in text
    assert "gradient_accumulation = 8:" in text and "target_modules = all-linear:" in text and "steps = none:" in text


def test_every_verb_has_help_that_ends_well(cli: Callable[..., Answer]) -> None:
    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        status, out, _ = cli(name, "--help")
        assert status == 0 and name in out
    assert cli("--version")[1].startswith("mlx-finetune 0.")


def test_help_loads_neither_numpy_nor_a_framework() -> None:
    program = "import sys\nfrom mlx_finetune.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    program += "print([m for m in ('numpy', 'mlx', 'mlx_lm', 'torch', 'transformers', 'datasets') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "[]"


def test_what_is_said_stands_behind_what_was_printed_also_in_one_file(tmp_path: Path) -> None:
    program = "from mlx_finetune.terminal import say; print('result'); say('next')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with (tmp_path / "log").open("wb") as log:
        subprocess.run([sys.executable, "-c", program], stdout=log, stderr=log, env=environment, check=True)
    assert (tmp_path / "log").read_text() == "result\nnext\n"
