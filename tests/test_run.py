"""`run`: the whole road, again only where something changed, and on from where it stopped."""

import fcntl
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Answer
from gptme_logs import said, write_log

from mlx_finetune.cli import main
from mlx_finetune.config import FIELDS, load_config
from mlx_finetune.errors import UserError
from mlx_finetune.road import KEYS, Collect, commented, load_road
from mlx_finetune.running.state import State

AFTER = ("evaluate", "report", "fuse", "export peft")
STAGES = ("collect", "prepare", "train", *AFTER)
SETTINGS: dict[str, Any] = {
    "max_length": 256, "valid_fraction": 0.3, "validation_by": "hash", "rank": 4, "alpha": 8, "learning_rate": 1e-2, "steps": 6,
    "gradient_accumulation": 1, "eval_every": 3, "save_every": 2, "sample_prompts": 0, "evaluate": {"answers": 1, "tokens": 4},
    "hand_back": {"export": ["peft"]},
}  # fmt: skip
Cli = Callable[..., Answer]
# What stands in the folder when a process is killed.
MOMENTS = "road.json", ".dataset.*", "run/config.yaml", "run/checkpoints/step-000006", "run/evaluation.json", ".tuned.*", "tuned"


def add_log(logs: Path, number: int) -> None:
    """A conversation with a call that goes well."""
    call = f"I look.\n\n```shell\nls {'-l ' * (number % 4)}src{number}\n```"
    turns = (
        said("user", f"List src{number}."),
        said("assistant", call),
        said("system", "a.py\nb.py"),
        said("assistant", "Two."),
    )
    write_log(logs, f"2026-06-{number + 1:02d}-log-{number}", said("system", "You are gptme."), *turns)


def write_config(folder: Path, model: Path, **changes: Any) -> Path:
    """config.yaml of a road in the folder, and its logs in folder/logs."""
    for number in range(8):
        add_log(folder / "logs", number)
    values = SETTINGS | {"model": str(model), "collect": {"logs": "logs", "near_duplicates": 0}} | changes
    (folder / "config.yaml").write_text(commented(values), encoding="utf-8")
    return folder / "config.yaml"


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file but the lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture(scope="module")
def gone(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A road with MLX that was gone to its end."""
    folder = tmp_path_factory.mktemp("gone")
    config = write_config(folder, tiny_llama, engine="mlx")
    with pytest.raises(SystemExit) as exit:
        main(["run", str(config)])
    assert exit.value.code == 0
    return folder


@pytest.fixture
def road(gone: Path, tmp_path: Path) -> Iterator[Path]:
    """The same at the same place, to change; afterwards it is as it was."""
    shutil.copytree(gone, tmp_path / "kept", symlinks=True)
    yield gone
    shutil.rmtree(gone)
    shutil.copytree(tmp_path / "kept", gone, symlinks=True)


def looked(cli: Cli, folder: Path, *changes: str) -> dict[str, str]:
    """What each stage would do."""
    status, out, err = cli("run", folder / "config.yaml", "--dry-run", "--json", *(f"--set={change}" for change in changes))
    assert status == 0, err
    return {row["stage"]: row["does"] for row in json.loads(out)["stages"]}


def does(first: str, *others: str, waiting: tuple[str, ...] = ()) -> dict[str, str]:
    """`first` and `others` are to be done, `waiting` wait for them, and all else stays."""
    return dict.fromkeys(STAGES, "done") | dict.fromkeys((first, *others), "to do") | dict.fromkeys(waiting, "waits")


def test_gone_up_to_the_training_and_again_it_changes_no_file(tmp_path: Path, tiny_llama: Path, cli: Cli) -> None:
    config = write_config(tmp_path, tiny_llama, engine="mlx", steps=2)
    for did in (True, False):
        before = files_of(tmp_path)
        status, out, err = cli("run", config, "--until", "train", "--json")
        assert status == 0, err
        assert [(row["stage"], row["did"]) for row in json.loads(out)["stages"]] == [(name, did) for name in STAGES[:3]]
    assert files_of(tmp_path) == before
    assert looked(cli, tmp_path) == does("evaluate", "fuse", "export peft", waiting=("report",))


def test_a_road_that_was_gone_leaves_everything_and_says_from_what_it_was_made(gone: Path) -> None:
    for made in ("collected/gptme.jsonl", "dataset/dataset.json", "run/best/adapter_model.safetensors", "run/evaluation.json"):
        assert (gone / made).is_file(), made
    assert (gone / "tuned/verification.json").is_file() and (gone / "peft/adapter_config.json").is_file()
    stages = json.loads((gone / "road.json").read_text())["stages"]
    assert list(stages) == list(STAGES)
    data = json.loads((gone / "dataset/dataset.json").read_text())["id"]
    assert stages["prepare"]["inputs"]["id"] == data
    assert stages["train"]["inputs"]["data"] == stages["evaluate"]["inputs"]["data"] == data
    assert stages["fuse"]["inputs"]["checkpoint"] == stages["evaluate"]["inputs"]["checkpoint"]
    assert all(one["versions"]["mlx-finetune"] and one["at"] for one in stages.values())


def test_gone_again_it_changes_no_file(gone: Path, cli: Cli) -> None:
    before = files_of(gone)
    status, out, err = cli("run", gone / "config.yaml", "--json")
    assert status == 0 and files_of(gone) == before, err
    result = json.loads(out)
    assert [(row["stage"], row["did"]) for row in result["stages"]] == [(name, False) for name in STAGES]
    assert result["next"] == f"mlx-finetune serve {gone / 'run'}"


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("save_every=5", does("collect") | {"collect": "done"}),
        ("evaluate.answers=0", does("evaluate", waiting=("report",))),
        ("hand_back.base=org/name", does("fuse", "export peft")),
        ("rank=2", does("train", waiting=AFTER)),
        ("max_length=128", does("prepare", waiting=("train", *AFTER))),
        ("collect.system=none", does("collect", waiting=("prepare", "train", *AFTER))),
    ],
)
def test_a_changed_setting_does_again_just_what_depends_on_it(gone: Path, cli: Cli, change: str, expected: dict[str, str]) -> None:
    before = files_of(gone)
    assert looked(cli, gone, change) == expected
    assert files_of(gone) == before


@pytest.mark.long
@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda road: (road / "tuned/model.safetensors").write_bytes(b"other"), does("fuse")),
        (lambda road: shutil.rmtree(road / "tuned"), does("fuse")),
        (lambda road: (road / "peft/adapter_config.json").unlink(), does("export peft")),
        (lambda road: (road / "run/evaluation.json").write_text("{}"), does("evaluate", waiting=("report",))),
        (lambda road: (road / "run/checkpoints/step-000006/optimizer.safetensors").write_bytes(b""),
         does("train", waiting=AFTER) | {"train": "goes on"}),
        (lambda road: shutil.rmtree(road / "run"), does("train", waiting=AFTER)),
        (lambda road: shutil.rmtree(road / "dataset"), does("prepare", waiting=("train", *AFTER))),
    ],
)  # fmt: skip
def test_what_is_gone_or_altered_is_noticed(road: Path, cli: Cli, harm: Callable[[Path], Any], expected: dict[str, str]) -> None:
    harm(road)
    assert looked(cli, road) == expected


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "said_so"),
    [
        ("collected/gptme.jsonl", "collected/gptme.jsonl was altered since run made it"),
        ("dataset/train.jsonl", "dataset/train.jsonl was altered since run made it"),
        ("road.json", "was altered since run wrote it"),
    ],
)
def test_what_a_person_edited_is_never_made_over(road: Path, cli: Cli, file: str, said_so: str) -> None:
    text = (road / file).read_text(encoding="utf-8")
    (road / file).write_text(text.replace("src1", "srcX").replace("run/evaluation", "run/evaluatiom"), encoding="utf-8")
    before = files_of(road)
    status, _, err = cli("run", road / "config.yaml")
    assert status == 2 and said_so in err and len(err.strip().splitlines()) <= 2
    assert files_of(road) == before


@pytest.mark.long
def test_a_new_log_is_taken_up_and_the_old_run_stays(road: Path, cli: Cli) -> None:
    old = files_of(road / "run")
    (road / "tuned" / "mine.txt").write_text("a note")
    add_log(road / "logs", 9)
    status, out, err = cli("run", road / "config.yaml", "--until", "fuse", "--json")
    assert status == 0, err
    made = {row["stage"]: row["made"] for row in json.loads(out)["stages"] if row["did"]}
    assert made["train"] == str(road / "run-2") and set(made) >= {"collect", "prepare", "train", "evaluate", "fuse"}
    assert files_of(road / "run") == old
    assert made["fuse"] == str(road / "tuned-2") and (road / "tuned" / "mine.txt").read_text() == "a note"


@pytest.mark.long
def test_a_stage_that_fails_is_gone_on_with_before_new_logs_are_read(road: Path, cli: Cli) -> None:
    told = "--set=hand_back.export=[gguf]"
    status, _, err = cli("run", road / "config.yaml", told, "--set=hand_back.quantisation=q9_9")
    assert status == 2 and "q9_9" in err.splitlines()[-2]
    add_log(road / "logs", 9)
    status, out, err = cli("run", road / "config.yaml", told, "--json")
    assert status == 0 and "new conversations wait" in err
    assert [row["stage"] for row in json.loads(out)["stages"] if row["did"]] == ["export gguf"]
    assert looked(cli, road)["collect"] == "to do"


@pytest.mark.long
def test_what_a_person_puts_where_a_stage_failed_stays(road: Path, cli: Cli) -> None:
    told = "--set=hand_back.export=[gguf]"
    assert cli("run", road / "config.yaml", told, "--set=hand_back.quantisation=q9_9")[0] == 2
    (road / "gguf").mkdir()
    (road / "gguf" / "mine.txt").write_text("mine")
    status, out, err = cli("run", road / "config.yaml", told, "--json")
    assert status == 0 and (road / "gguf" / "mine.txt").read_text() == "mine", err
    assert json.loads(out)["stages"][-1]["made"] == str(road / "gguf-2")


@pytest.mark.long
@pytest.mark.parametrize("original_stays", [False, True])
def test_a_moved_or_copied_road_is_not_gone_again(road: Path, cli: Cli, tiny_llama: Path, original_stays: bool) -> None:
    shutil.copytree(tiny_llama, road / "model")
    assert cli("run", road / "config.yaml", "--set", f"model={road / 'model'}")[0] == 0
    moved = road.with_name("moved")
    shutil.copytree(road, moved, symlinks=True, copy_function=shutil.copyfile)  # files get new times
    if not original_stays:
        shutil.rmtree(road)
    config, told = moved / "config.yaml", ("--set", f"model={moved / 'model'}", "--set", "hand_back.base=org/name")
    assert "moved or copied" in cli("run", config, *told, "--dry-run")[2]
    status, out, err = cli("run", config, *told, "--json")
    made = {row["stage"]: row for row in json.loads(out)["stages"]}
    shutil.rmtree(moved)
    road.mkdir(exist_ok=True)
    assert status == 0, err
    assert [name for name in STAGES if made[name]["did"]] == ["collect", "report", "fuse", "export peft"]  # logs have new times
    assert made["train"]["made"] == str(moved / "run") and made["fuse"]["made"] == str(moved / "tuned")


@pytest.mark.long
def test_settings_that_go_to_and_fro_find_what_each_run_was_measured_as(road: Path, cli: Cli) -> None:
    assert cli("run", road / "config.yaml", "--set=rank=2", "--until=report")[0] == 0
    assert looked(cli, road) == dict.fromkeys(STAGES, "done")
    assert looked(cli, road, "rank=2") == does("fuse", "export peft")
    assert not list(road.glob("run*/evaluation-*"))


@pytest.mark.long
def test_the_same_model_at_another_place_trains_nothing_anew(road: Path, cli: Cli, tiny_llama: Path) -> None:
    (road / "link").symlink_to(tiny_llama)
    status, out, err = cli("run", road / "config.yaml", "--set", f"model={road / 'link'}", "--json")
    assert status == 0, err
    assert [row["stage"] for row in json.loads(out)["stages"] if row["did"]] == ["prepare"]


def test_a_record_with_fewer_fields_is_read(tmp_path: Path) -> None:
    earlier = {"format": 1, "stages": {}, "making": "", "ended": True}
    digest = hashlib.sha256(json.dumps(earlier, sort_keys=True).encode()).hexdigest()
    (tmp_path / "road.json").write_text(json.dumps(earlier | {"sha256": digest}))
    assert State.open(tmp_path).written.ended


def test_two_roads_in_one_folder_exclude_each_other(tmp_path: Path, tiny_llama: Path, cli: Cli) -> None:
    config = write_config(tmp_path, tiny_llama)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, err = cli("run", config)
    assert status == 2 and "another process" in err and "folder:" in err


def test_what_is_of_something_else_is_not_taken_over(tmp_path: Path, tiny_llama: Path, cli: Cli) -> None:
    config = write_config(tmp_path, tiny_llama)
    (tmp_path / "collected").mkdir()
    (tmp_path / "collected" / "mine").write_text("mine")
    status, _, err = cli("run", config)
    assert status == 2 and "collected exists already" in err and (tmp_path / "collected" / "mine").read_text() == "mine"


def test_the_file_says_what_every_setting_means_and_is_read_as_it_was_written(tmp_path: Path) -> None:
    values = {"model": "org/name", "rank": 8, "collect": {"since": "30d", "chat": ["a.jsonl"]}, "hand_back": {"export": ["gguf"]}}
    (tmp_path / "config.yaml").write_text(commented(values, ["for this machine"]), encoding="utf-8")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == values
    text = (tmp_path / "config.yaml").read_text()
    assert all(f"{name}:" in text for name in (*Collect.model_fields, "answers", "fuse", "learning_rate", "folder"))
    live = yaml.safe_load(re.sub(r"(?m)^# ( *\w+:)", r"\1", text))  # a comment becomes a setting without its sign
    assert set(live) == {*KEYS, *FIELDS} and set(live["collect"]) == set(Collect.model_fields)


def test_places_in_the_file_are_seen_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there" / "model").mkdir(parents=True)
    file = tmp_path / "there" / "config.yaml"
    file.write_text("model: model\nfolder: road\ncollect: {chat: [./a.jsonl, org/name]}\n")
    monkeypatch.chdir(tmp_path)
    road = load_road(file, {"collect.logs": "./logs"})
    assert road.config.model == str(tmp_path / "there/model") and road.folder == tmp_path / "there/road"
    assert road.collect.chat == (str(tmp_path / "there/a.jsonl"), "org/name") and road.collect.logs == str(tmp_path / "logs")


@pytest.mark.parametrize(
    ("text", "told", "message", "hint"),
    [
        ("colect: {}", {}, "unknown setting 'colect'", "collect"),
        ("collect: {sytem: short}", {}, "unknown setting 'collect.sytem'", "collect.system"),
        ("", {"collect.system": "shrt"}, "the command line: collect.system = 'shrt'", "short"),
        ("hand_back: yes", {}, "hand_back = True: not settings", "checkpoint"),
        ("folder: 3", {}, "folder = 3", "folder"),
        ("evaluate: {answers: true}", {}, "evaluate.answers = True", "answers"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_nearest(
    tmp_path: Path, text: str, told: dict[str, Any], message: str, hint: str
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_road(tmp_path / "config.yaml", told)
    assert message in error.value.message and hint in error.value.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"export": ["gguf"], "quantisation": "q9"}, "kind 'q9' is none of"),
        ({"base": "not an id"}, "hand_back.base = not an id: no id of the Hub"),
    ],
)
def test_what_could_not_be_handed_back_is_said_before_anything_is_done(
    changes: dict[str, Any], said: str, tmp_path: Path, tiny_llama: Path, cli: Cli
) -> None:
    config = write_config(tmp_path, tiny_llama, hand_back=changes)
    status, _, err = cli("run", config)
    assert status == 2 and said in err and not (tmp_path / "collected").exists()


def test_a_hint_of_a_stage_is_in_the_words_of_the_file(tmp_path: Path, tiny_llama: Path, cli: Cli) -> None:
    config = write_config(tmp_path, tiny_llama, engine="torch", attention="blocks")
    status, _, err = cli("run", config)
    assert status == 2 and err.splitlines()[-1] == f"hint: leave it out, or use engine: mlx (in {config})"


def test_a_dry_run_speaks_in_the_words_of_the_file_too(tmp_path: Path, tiny_llama: Path, cli: Cli) -> None:
    config = write_config(tmp_path, tiny_llama)
    (tmp_path / "collected").mkdir()
    (tmp_path / "collected/mine.txt").write_text("mine")
    status, _, err = cli("run", config, "--dry-run")
    assert status == 2 and "--out" not in err and "`folder:`" in err, err


@pytest.mark.long
def test_train_takes_the_same_file_and_says_what_is_for_run(gone: Path, cli: Cli, tmp_path: Path) -> None:
    status, out, err = cli("train", gone / "config.yaml", "--data", gone / "dataset", "--out", tmp_path / "mine", "--dry-run")
    assert status == 0 and "rank: 4   (set)" in out
    assert "collect, evaluate, hand_back are for mlx-finetune run" in err


def start(config: Path, folder: Path) -> subprocess.Popen[bytes]:
    """`run` in a process of its own."""
    with (folder / "log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "mlx_finetune", "run", str(config)], stdout=log, stderr=log)


@pytest.mark.long
def test_killed_at_any_moment_it_ends_with_the_same_adapter(engine_name: str, tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, tiny_llama, engine=engine_name, steps=12)
    assert start(tmp_path / "straight/config.yaml", tmp_path).wait() == 0
    killed, moment, kills = tmp_path / "killed", random.Random(0), 0
    for seen in MOMENTS:
        process = start(killed / "config.yaml", tmp_path)
        while process.poll() is None and not list(killed.glob(seen)):
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert start(killed / "config.yaml", tmp_path).wait() == 0, (tmp_path / "log").read_text()
    one, other = (tmp_path / name / "run/latest/adapter_model.safetensors" for name in ("straight", "killed"))
    assert kills >= 5 and one.read_bytes() == other.read_bytes()
    assert {path.name for path in killed.rglob(".*")} <= {".lock"}  # nothing half-made is left
    assert {path.name for path in killed.iterdir()} == {path.name for path in (tmp_path / "straight").iterdir()}


@pytest.mark.long
def test_control_c_ends_it_with_the_command_that_goes_on(engine_name: str, tiny_llama: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_llama, engine=engine_name, steps=500)
    process = start(config, tmp_path)
    while not list((tmp_path / "run").glob("checkpoints/step-*")) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert (tmp_path / "log").read_text().strip().endswith(f"next: mlx-finetune run {config}")


def test_control_c_in_the_last_step_ends_the_road_behind_the_training(tiny_llama: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_llama, engine="mlx", steps=1, eval_every=1, sample_prompts=2, sample_tokens=200)
    process, metrics = start(config, tmp_path), tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and '"train"' in metrics.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    ended = f"interrupted: train is done, and saved\nnext: mlx-finetune run {config}"
    assert (tmp_path / "log").read_text().strip().endswith(ended)
    assert not (tmp_path / "run/evaluation.json").exists() and not (tmp_path / "tuned").exists()


@pytest.mark.long
def test_a_road_with_torch_is_gone_to_its_end_too(tiny_llama: Path, tmp_path: Path, cli: Cli) -> None:
    config = write_config(tmp_path, tiny_llama, engine="torch", hand_back={"export": ["peft", "gguf", "ollama"]})
    status, out, err = cli("run", config)
    assert status == 0 and "export ollama" in out, err
    assert load_config(tmp_path / "run/config.yaml", {}).engine == "torch" and list((tmp_path / "gguf").glob("*.gguf"))
    before = files_of(tmp_path)
    assert cli("run", config)[0] == 0 and files_of(tmp_path) == before
