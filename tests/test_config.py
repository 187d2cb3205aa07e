"""Settings: strict, named in the error, and the same after a round trip."""

from pathlib import Path
from typing import Any

import pytest

from mlx_finetune.config import FIELDS, RunConfig, default, load_config, make_config, parse_assignments, save_config
from mlx_finetune.errors import UserError


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learnig_rate", "learning_rate"),
        ("lr_rank", "rank"),
        ("batchsize", "batch_size"),
        ("epoch", "epochs"),
        ("max_len", "max_length"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_known_one(tmp_path: Path, key: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"unknown setting '{key}'") as error:
        load_config(write(tmp_path, f"{key}: 1\n"), {})
    assert error.value.hint == f"did you mean {nearest}?"
    assert error.value.message.startswith(str(tmp_path / "config.yaml"))


@pytest.mark.parametrize("key", ["zzzzzz", "1", "", "null", "true", "[1, 2]"])
def test_a_setting_like_no_other_is_refused_with_all_that_there_are(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match="unknown setting") as error:
        load_config(write(tmp_path, f"{key or chr(39) * 2}: 1\n" if key != "[1, 2]" else "zz zz: 1\n"), {})
    assert error.value.hint == f"known settings: {', '.join(FIELDS)}"


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 2e-4", "learning_rate", 2e-4),  # a string to YAML 1.1
        ("learning_rate: 1E-5", "learning_rate", 1e-5),
        ("alpha: 16", "alpha", 16.0),
        ("max_length: 8k", "max_length", 8192),
        ("max_length: 8K", "max_length", 8192),
        ("max_length: ' 2 k '", "max_length", 2048),
        ("max_length: 1m", "max_length", 1024**2),
        ("max_length: 4096", "max_length", 4096),
        ("rank: 8.0", "rank", 8),
        ("steps: null", "steps", None),
        ("target_modules: q_proj, v_proj", "target_modules", ("q_proj", "v_proj")),
        ("target_modules: [q_proj]", "target_modules", ("q_proj",)),
        ("target_modules: all-linear", "target_modules", "all-linear"),
        ("valid_fraction: 0", "valid_fraction", 0.0),
        ("validation_by: hash", "validation_by", "hash"),
        ("openassistant_share: 0", "openassistant_share", 0.0),
        ("openassistant_share: .999", "openassistant_share", 0.999),
        ("openassistant_valid_fraction: 1e-2", "openassistant_valid_fraction", 0.01),
        ("test_fraction: 0.1", "test_fraction", 0.1),
    ],
)
def test_a_value_is_read_as_people_write_it(tmp_path: Path, text: str, name: str, value: Any) -> None:
    assert getattr(load_config(write(tmp_path, text), {}), name) == value
    assert getattr(load_config(None, parse_assignments([text.replace(": ", "=", 1)])), name) == value


@pytest.mark.parametrize(
    "text",
    [
        "learning_rate: .nan", "learning_rate: nan", "learning_rate: inf", "learning_rate: 0", "learning_rate: -1e-4",
        "epochs: .inf", "max_length: 63", "max_length: 8.5k", "max_length: -8k", "max_length: 8kb", "max_length: [1]",
        "max_length: null", "rank: 0", "rank: 8.5", "rank: yes", "rank: eight", "seed: -1", "seed: 2020-01-01", "dropout: 1",
        "valid_fraction: 1.0", "engine: tpu", "dtype: int8", "target_modules: []", "target_modules: ''", "target_modules: ','",
        "target_modules: 5", "target_modules: [1]", "model: 3", "steps: 0", "num_layers: 0", "weight_decay: -0.1",
        "learning_rate: true", "validation_by: name", "validation_by: null", "openassistant_share: 1", "openassistant_share: -0.1",
        "openassistant_share: 30%", "openassistant_valid_fraction: 1.0", "test_fraction: nan", "test_fraction: 1",
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    name = text.split(":")[0]
    for load in (
        lambda: load_config(write(tmp_path, text), {}),
        lambda: load_config(None, parse_assignments([text.replace(": ", "=")])),
    ):
        with pytest.raises(UserError, match=name) as error:
            load()
        assert error.value.hint and "\n" not in error.value.message + error.value.hint


@pytest.mark.parametrize(
    "text", ["a: [1", "a: b: c", "- rank", "rank", "{1: 2}: 3", "!!python/object:x.y {}", "\x01", "%", "x: 2026-13-45"]
)
def test_what_is_not_settings_in_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_config(path, {})
    assert error.value.message.startswith(f"{path}: ")
    assert error.value.hint and "\n" not in error.value.message + error.value.hint


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(UserError) as error:
            load_config(path, {})
        assert error.value.message.startswith(f"{path}: ")


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing yet\n"), {}) == load_config(None, {})
    assert default("rank") == load_config(None, {}).rank


def test_the_command_line_beats_the_file_and_each_is_blamed_for_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, "rank: 4\nalpha: 8\n")
    config = load_config(path, parse_assignments(["rank=32"]))
    assert (config.rank, config.alpha, config.epochs) == (32, 8.0, default("epochs"))
    with pytest.raises(UserError, match=r"^the command line: rank = 0"):
        load_config(path, {"rank": 0})
    with pytest.raises(UserError, match=r"config\.yaml: rank = 0"):
        load_config(write(tmp_path, "rank: 0\n"), {"rank": 4})


@pytest.mark.parametrize("assignment", ["rank", "rank=[1", "=3", "rank=", "seed=2026-13-45"])
def test_an_assignment_that_cannot_be_read_is_named(assignment: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, parse_assignments([assignment]))
    assert error.value.hint


def test_the_saved_settings_come_back_equal(tmp_path: Path) -> None:
    values = {"model": "/m ö", "learning_rate": 1e-5, "target_modules": ("q_proj", "v_proj"), "steps": 7, "max_grad_norm": 1 / 3}
    config = make_config(values, "a")
    save_config(tmp_path / "a.yaml", config)
    assert load_config(tmp_path / "a.yaml", {}) == config
    assert make_config(config.to_dict(), "a") == config
    assert list(config.to_dict()) == list(FIELDS)


def test_every_setting_is_described() -> None:
    for name, field in RunConfig.model_fields.items():
        assert field.description, name
