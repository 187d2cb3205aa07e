"""origin.json: a converted folder knows the weights that it was made from, and notices when they are no longer those."""

import json
import shutil
from pathlib import Path

import pytest
from test_convert import FOUR, change_config, converted

from mlx_finetune.errors import UserError
from mlx_finetune.export.convert import How
from mlx_finetune.models.importing import files_fingerprint
from mlx_finetune.models.origin import Origin, original_folder, read_origin, write_origin
from mlx_finetune.models.weights import fingerprint


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_llama, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def four(model: Path, tmp_path: Path) -> Path:
    converted(model, tmp_path / "four", How(FOUR, verify=False))
    return tmp_path / "four"


def test_a_converted_folder_names_its_original(model: Path, four: Path) -> None:
    origin = read_origin(four)
    assert origin and (origin.format, origin.model, origin.revision) == ("huggingface", str(model.resolve()), None)
    assert origin.fingerprint == fingerprint(model) and origin.verified is None and origin.dtype == "float32"
    assert origin.quantization == {"bits": 4, "group_size": 32, "mode": "affine"}
    assert original_folder(four) == model.resolve()


def test_a_folder_that_was_not_converted_is_its_own_original(model: Path) -> None:
    assert read_origin(model) is None and original_folder(model) == model


def test_an_original_that_is_gone_or_has_changed_is_named(model: Path, four: Path, tmp_path: Path) -> None:
    change_config(model, rope_theta=5.0)
    with pytest.raises(UserError, match="has changed since") as error:
        original_folder(four)
    assert str(model) in error.value.message and "--original PATH" in error.value.hint
    shutil.move(model, tmp_path / "moved")
    with pytest.raises(UserError, match="which is no longer there"):
        original_folder(four)


def test_an_origin_that_convert_did_not_write_is_refused(four: Path) -> None:
    for text in ("[]", "{", json.dumps({"format": "huggingface"})):
        (four / "origin.json").write_text(text)
        with pytest.raises(UserError, match=r"origin\.json"):
            read_origin(four)


def test_what_was_no_safetensors_is_whole_where_it_was_not_quantised(tmp_path: Path) -> None:
    origin = Origin("gguf", "/models/x.gguf", None, "0" * 16, None, "float32")
    write_origin(tmp_path, origin)
    assert read_origin(tmp_path) == origin and original_folder(tmp_path) == tmp_path
    (tmp_path / "origin.json").unlink()
    write_origin(tmp_path, Origin("gguf", "/models/x.gguf", None, "0" * 16, {"bits": 4}, "float32"))
    with pytest.raises(UserError, match="which holds no safetensors") as error:
        original_folder(tmp_path)
    assert error.value.hint.startswith("mlx-finetune convert /models/x.gguf --out DIR")


@pytest.mark.parametrize("place", [0, 50_000, 99_999])
def test_a_fingerprint_of_files_sees_beginning_end_and_size(place: int, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(bytes(100_000))
    before = files_fingerprint([file])
    changed = bytearray(100_000)
    changed[place] = 1
    file.write_bytes(changed)
    found = files_fingerprint([file])
    assert (found != before) == (place != 50_000)  # a sample is no proof for every byte
    file.write_bytes(bytes(100_001))
    assert files_fingerprint([file]) != before
