"""`run`: what it refuses to make over, and what it takes for the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
from conftest import Answer
from test_run import add_log, files_of, write_config

from mlx_finetune.config import RunConfig
from mlx_finetune.errors import UserError
from mlx_finetune.planning.doctor.model import model_findings
from mlx_finetune.road import load_road
from mlx_finetune.running import moved
from mlx_finetune.running.data_stages import CollectStage, PrepareStage
from mlx_finetune.running.stage import Work
from mlx_finetune.running.state import State
from mlx_finetune.training import checkpoints
from mlx_finetune.training.checks import check_settings, may_change
from mlx_finetune.training.manifest import MOMENTS, PROGRESS, write_manifest
from mlx_finetune.training.start import ADAPTER, adapter_id

Cli = Callable[..., Answer]


def work_of(config: Path, **told: object) -> Work:
    """As `run` has it."""
    road = load_road(config, told)
    return Work(road, State.open(road.folder), "")


def in_cache(monkeypatch: pytest.MonkeyPatch, cache: Path, model: Path, *names: str) -> None:
    """These files of the model in a Hub cache as org/name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    commit, top = "0" * 40, cache / "models--org--name"
    (top / "refs").mkdir(parents=True, exist_ok=True)
    (top / "refs" / "main").write_text(commit)
    (top / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(model / name, top / "snapshots" / commit / name)


@pytest.mark.parametrize("stage", ["collect", "prepare"])
def test_a_file_that_a_person_put_into_the_data_stays_and_is_named(stage: str, tmp_path: Path, tiny_llama: Path, cli: Cli) -> None:
    config, until = write_config(tmp_path, tiny_llama), ("--until", stage)
    assert cli("run", config, *until)[0] == 0
    note = tmp_path / {"collect": "collected", "prepare": "dataset"}[stage] / "notes.md"
    note.write_text("mine")
    assert cli("run", config, *until)[0] == 0  # nothing is new, so nothing is replaced
    add_log(tmp_path / "logs", 9)
    status, _, err = cli("run", config, *until)
    assert status == 2 and f"{note} was not made by run" in err and "move it away" in err
    assert note.read_text() == "mine"
    note.unlink()
    (note.parent / ".DS_Store").write_bytes(b"")
    assert cli("run", config, *until)[0] == 0


def test_a_file_put_in_between_look_and_do_stays_too(tmp_path: Path, tiny_llama: Path, cli: Cli) -> None:
    config = write_config(tmp_path, tiny_llama)
    assert cli("run", config, "--until", "prepare")[0] == 0
    for stage, name in ((CollectStage(work_of(config)), "collected"), (PrepareStage(work_of(config)), "dataset")):
        (tmp_path / name / "notes.md").write_text("mine")
        with pytest.raises(UserError, match=r"notes\.md was not made by run"):
            stage.do()


def test_tags_that_lie_in_what_is_collected_are_refused(tmp_path: Path, tiny_llama: Path, cli: Cli) -> None:
    config = write_config(tmp_path, tiny_llama)
    assert cli("run", config, "--until", "collect")[0] == 0
    (tmp_path / "collected" / "my.yaml").write_text("")
    status, _, err = cli("run", config, "--until", "collect", "--set", f"collect.tags={tmp_path}/collected/my.yaml")
    assert status == 2 and "collect.tags" in err and "move it out of" in err
    (tmp_path / "collected" / "my.yaml").unlink()
    assert cli("run", config, "--until", "collect", "--set", f"collect.tags={tmp_path}/collected/tags.yaml")[0] == 0


def test_a_model_of_which_a_part_is_here_is_downloaded_first(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    config = write_config(tmp_path, Path("org/name"))
    assert cli("run", config, "--until", "collect")[0] == 0
    in_cache(monkeypatch, tmp_path / "cache", tiny_llama, "config.json")
    assert "is downloaded first" in PrepareStage(work_of(config)).look().why
    [found] = model_findings("org/name", "torch")
    assert found.state == "note" and "only partly on this machine" in found.found and "hf download org/name" in found.advice
    in_cache(monkeypatch, tmp_path / "cache", tiny_llama, *(path.name for path in tiny_llama.iterdir() if path.is_file()))
    assert PrepareStage(work_of(config)).look().action == "do" and work_of(config).model_here()


def test_a_data_set_of_something_else_stays_where_the_model_comes_only_now(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    config = write_config(tmp_path, tiny_llama)
    assert cli("run", config, "--until", "prepare")[0] == 0
    (tmp_path / "road.json").unlink()  # as the data set of another command
    work = work_of(config, **{"model": "org/name", "max_length": 128})
    stage, before = PrepareStage(work), files_of(tmp_path / "dataset")
    in_cache(monkeypatch, tmp_path / "cache", tiny_llama, "config.json")
    assert stage.look().action == "do"
    whole = [path.name for path in tiny_llama.iterdir() if path.is_file()]
    monkeypatch.setattr(
        "mlx_finetune.running.data_stages.model_folder",
        lambda name: (in_cache(monkeypatch, tmp_path / "cache", tiny_llama, *whole), work.model_here())[1],
    )
    with pytest.raises(UserError, match="was not made by run"):
        stage.do()
    assert files_of(tmp_path / "dataset") == before


def test_an_altered_data_set_is_refused_before_a_model_is_downloaded(tmp_path: Path, tiny_llama: Path, cli: Cli) -> None:
    config = write_config(tmp_path, tiny_llama)
    assert cli("run", config, "--until", "prepare")[0] == 0
    (tmp_path / "dataset" / "train.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="was altered since run made it"):
        PrepareStage(work_of(config, model="org/not-here")).look()


def with_chat(folder: Path, model: Path, **changes: object) -> Path:
    """A road with a chat file of its own."""
    folder.mkdir()
    turns = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "In the third drawer."}]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    return write_config(folder, model, collect={"logs": "logs", "chat": ["chat.jsonl"], "near_duplicates": 0}, **changes)


def did(cli: Cli, config: Path, until: str, *told: str) -> list[str]:
    """The stages that `run` went through anew."""
    status, out, err = cli("run", config, "--until", until, "--json", *told)
    assert status == 0, err
    return [row["stage"] for row in json.loads(out)["stages"] if row["did"]]


def test_a_chat_file_that_moves_with_the_road_is_not_read_again(tmp_path: Path, tiny_llama: Path, cli: Cli) -> None:
    assert did(cli, with_chat(tmp_path / "old", tiny_llama), "collect") == ["collect"]
    (tmp_path / "old").rename(tmp_path / "new")
    assert did(cli, tmp_path / "new" / "config.yaml", "collect") == []


@pytest.mark.parametrize("killed_at", ["collect.json", "dataset.json"])
def test_killed_while_a_moved_road_is_put_right_it_does_that_again(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, killed_at: str
) -> None:
    (tmp_path / "old").mkdir()
    shutil.copytree(tiny_llama, tmp_path / "old" / "model")
    config = write_config(tmp_path / "old", Path("model"))
    assert did(cli, config, "prepare") == ["collect", "prepare"]
    (tmp_path / "old").rename(tmp_path / "new")
    write = moved.write_json

    def killed(path: Path, value: object) -> None:
        write(path, value)
        if path.name == killed_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(moved, "write_json", killed)
    assert cli("run", tmp_path / "new" / "config.yaml", "--until", "prepare")[0] == 130
    assert State.open(tmp_path / "new").written.folder == str(tmp_path / "old")
    monkeypatch.setattr(moved, "write_json", write)
    assert did(cli, tmp_path / "new" / "config.yaml", "prepare") == []
    assert State.open(tmp_path / "new").written.folder == str(tmp_path / "new")


def checkpoint(folder: Path, **said: object) -> Path:
    """With a manifest."""
    folder.mkdir(parents=True)
    (folder / MOMENTS).write_bytes(b"moments")
    (folder / ADAPTER).write_bytes(b"weights")
    (folder / PROGRESS).write_text(json.dumps({"step": 1, "format": 2} | said))
    write_manifest(folder)
    return folder


def test_a_checkpoint_is_read_once_and_again_where_a_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, looked = checkpoint(tmp_path / "checkpoints/step-000001"), []
    check = checkpoints.check_whole
    monkeypatch.setattr(checkpoints, "check_whole", lambda folder: (looked.append(folder), check(folder)))
    for _ in range(3):
        assert checkpoints.last_whole(tmp_path) == (folder, [])
    assert len(looked) == 1
    (folder / ADAPTER).write_bytes(b"WEIGHTS")
    for _ in range(2):
        with pytest.raises(UserError, match="holds other bytes"):
            checkpoints.last_whole(tmp_path)


def test_a_run_goes_on_with_the_same_adapter_at_another_place(tmp_path: Path) -> None:
    adapter, other = checkpoint(tmp_path / "adapter"), checkpoint(tmp_path / "other")
    (other / ADAPTER).write_bytes(b"another")
    told = RunConfig(adapter_path="/gone").to_dict()
    folder = checkpoint(tmp_path / "step-000001", config=told, adapter=adapter_id(str(adapter)))
    check_settings(folder, RunConfig(adapter_path=str(adapter)))
    for wrong in (str(other), ""):
        with pytest.raises(UserError, match="adapter_path"):
            check_settings(folder, RunConfig(adapter_path=wrong))
    assert not may_change("adapter_path", "/gone", "")


@pytest.mark.long
def test_a_moved_road_goes_on_from_the_adapter_in_it(tmp_path: Path, tiny_llama: Path, cli: Cli) -> None:
    config = with_chat(tmp_path / "old", tiny_llama, engine="mlx", steps=2)
    assert did(cli, config, "train")[-1] == "train"
    shutil.copytree((tmp_path / "old/run/best").resolve(), tmp_path / "old/adapter")
    shutil.rmtree(tmp_path / "old/run")
    assert did(cli, config, "train", f"--set=adapter_path={tmp_path}/old/adapter") == ["train"]
    (tmp_path / "old").rename(tmp_path / "new")
    config, told = tmp_path / "new/config.yaml", f"--set=adapter_path={tmp_path}/new/adapter"
    assert did(cli, config, "train", told) == []
    shutil.rmtree(tmp_path / "new/run/checkpoints/step-000002")
    assert did(cli, config, "train", told) == ["train"]
    state = State.open(tmp_path / "new")
    record = state.record("train")
    assert record and record.made == "run" and state.difference(record) is None
    assert not (tmp_path / "new/run-2").exists()


@pytest.mark.long
def test_the_record_of_a_run_that_went_on_is_of_what_is_there(tmp_path: Path, tiny_llama: Path, cli: Cli) -> None:
    config = write_config(tmp_path, tiny_llama, engine="mlx", steps=12, learning_rate=50.0, eval_every=1)  # the loss goes up
    told = "--set=patience=1"
    assert did(cli, config, "train", told)[-1] == "train"
    first = State.open(tmp_path).record("train")
    assert did(cli, config, "train", "--set=patience=8") == ["train"]
    state = State.open(tmp_path)
    record = state.record("train")
    assert record and first and record.files != first.files and state.difference(record) is None
