"""What the tests share: models (a tiny random Llama, SmolLM2 from its GGUF), the real data, the command line."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import make_tiny

import mlx_finetune.engines.mlx  # noqa: F401  before any test imports mlx: its fast BLAS
from mlx_finetune.cli import main
from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face

Answer = tuple[int, str, str]  # of the command line: exit status, stdout, stderr


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: 4 layers, hidden size 64, untied, float32, with a tokenizer and a ChatML template."""
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama", tokenizer=True)


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: a tiny qwen3_moe whose first layer is dense, with a tokenizer."""
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("mixture") / "model", tokenizer=True, changes={"mlp_only_layers": [0]})


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in float32, as a Hugging Face folder."""
    out = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct"
    gguf_to_hugging_face(find_smollm2(), out)
    return out


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout."""
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"{path} is not here: it holds the real data, which is no part of the project")
    return path


@pytest.fixture(params=["mlx", "torch"])
def engine_name(request: pytest.FixtureRequest) -> str:
    """Each engine in turn."""
    return request.param


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Runs a verb in an empty folder, without colour."""
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> Answer:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return run
