"""What training is refused for, and what stops a run: each in one line, and nothing is lost or overwritten."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from short_runs import losses, prepared, run, settings

from mlx_finetune.config import make_config
from mlx_finetune.engines import open_engine
from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.compare import open_run
from mlx_finetune.models.weights import fingerprint
from mlx_finetune.training.checkpoint import Origin, save_checkpoint
from mlx_finetune.training.checkpoints import last_checkpoint
from mlx_finetune.training.run import execute, plan_run


@pytest.fixture(scope="module")
def data(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tiny_llama, tmp_path_factory.mktemp("data"), "ls")


def test_what_prepare_was_told_cannot_be_asked_of_train(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    for name, value in (("validation_by", "time"), ("openassistant_share", 0.1), ("test_fraction", 0.5)):
        with pytest.raises(UserError, match=f"{name} = {value}, but .* was prepared with") as error:
            plan_run(make_config(settings(tiny_llama, data, tmp_path / "run", "torch", **{name: value}), "test"))
        assert name in error.value.hint


def test_an_existing_run_folder_is_refused_and_untouched(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already") as error:
        plan_run(make_config(settings(tiny_llama, data, tmp_path / "run", "torch"), "test"))
    assert "--resume" in error.value.hint
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_loss_that_is_not_a_number_stops_the_run_and_saves_nothing(
    engine_name: str, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    values = settings(tiny_llama, data, tmp_path / "run", engine_name, learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=1e30)
    plan = plan_run(make_config(values, "test"))
    with pytest.raises(UserError, match="loss") as error:
        execute(plan, lambda done, steps, note: None)
    assert "learning_rate" in error.value.hint
    assert last_checkpoint(plan.run) is None


def test_a_checkpoint_with_a_nan_is_not_written(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(settings(tiny_llama, data, tmp_path, "torch"), "test")
    engine = open_engine(config, tiny_llama)
    state = engine.state()
    next(iter(state.values()))[0, 0] = np.nan
    engine.load_state(state, 1)
    with pytest.raises(UserError, match="not a finite number"):
        save_checkpoint(tmp_path, engine, 1, config, Origin("d", fingerprint(tiny_llama)))
    assert not list(tmp_path.glob("checkpoints/*"))


def test_of_two_starts_with_one_name_the_first_is_left_alone(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    values = settings(tiny_llama, data, tmp_path / "run", "torch", steps=2)
    first, second = plan_run(make_config(values, "test")), plan_run(make_config(values | {"rank": 8}, "test"))
    execute(first, lambda done, steps, note: None)
    before = (first.run / "config.yaml").read_text()
    with pytest.raises(UserError, match="exists already"):
        execute(second, lambda done, steps, note: None)
    assert (first.run / "config.yaml").read_text() == before and len(losses(first.run, "train")) == 2


def test_fuse_and_evaluate_refuse_a_base_that_is_not_the_one_trained_on(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    folder = run(settings(model, data, tmp_path / "run", "torch", steps=2))
    assert open_run(folder, "best")[1] == model
    tensors = load_file(model / "model.safetensors")
    save_file({name: array * np.float32(1.3) for name, array in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="trained with model"):
        open_run(folder, "best")
