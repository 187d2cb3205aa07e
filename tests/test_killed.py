"""A run that is killed at any moment ends bit-identical to one that was not."""

import random
import shutil
from pathlib import Path

import pytest
from killed_runs import KILLS, MOMENTS, finish, kill_at, log, make_data, same, settings, start

from mlx_finetune.config import make_config
from mlx_finetune.models.gguf import find_smollm2
from mlx_finetune.training.run import execute, plan_run


@pytest.fixture(scope="module")
def data(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tiny_llama, tmp_path_factory.mktemp("data"))


def check_killed(run: Path, straight: Path, values: dict[str, object], kills: list[str], seed: str) -> None:
    chance = random.Random(seed)
    for moment in kills:
        while (
            killed := kill_at(start(run, values if not (run / "config.yaml").is_file() else None), run, moment, chance, 2)
        ) is None:
            for path in (run, log(run)):  # it was over before: another one
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(killed)
    finish(run, values)
    assert same(run, straight) == []


def test_a_run_killed_in_the_midst_of_writing_ends_bit_identical_to_one_that_was_not(
    engine_name: str, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    values = settings(tiny_llama, data, engine_name, steps=4)
    execute(plan_run(make_config(values | {"out": str(tmp_path / "straight")}, "test")), lambda done, steps, standing: None)
    check_killed(tmp_path / "run", tmp_path / "straight", values, ["writing"], engine_name)


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(KILLS)))
def test_killed_at_any_moment_a_run_ends_bit_identical_to_one_that_was_not(
    number: int, engine_name: str, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    values = settings(tiny_llama, data, engine_name)
    finish(tmp_path / "straight", values)
    check_killed(tmp_path / "run", tmp_path / "straight", values, [KILLS[number]], f"{engine_name} {number}")


@pytest.mark.long
def test_killed_again_and_again_smollm2_ends_bit_identical(engine_name: str, smollm2: Path, tmp_path: Path) -> None:
    find_smollm2()
    values = settings(smollm2, make_data(smollm2, tmp_path), engine_name, steps=4, learning_rate=1e-3)
    finish(tmp_path / "straight", values)
    check_killed(tmp_path / "run", tmp_path / "straight", values, list(MOMENTS)[:3], engine_name)
