"""What the tests share: models (a tiny random Llama, SmolLM2 from its GGUF), the real data, the command line."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from tiny_models import make_tiny

import mlx_finetune.engines.mlx  # noqa: F401  before any test imports mlx: its fast BLAS
from mlx_finetune.cli import main
from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face

# In the background of a shell a Ctrl-C is ignored, also by the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

GPTME = Path(__file__).parents[1] / ".venv" / "gptme" / "bin" / "python"
Answer = tuple[int, str, str]  # of the command line: exit status, stdout, stderr


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: 4 layers, hidden size 64, untied, float32, with a tokenizer and a ChatML template."""
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama", tokenizer=True)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: a Llama of one layer as files alone, with a tokenizer and a ChatML template; made without torch."""
    from genuine_models import write_model

    write_model(folder := tmp_path_factory.mktemp("small") / "model")
    return folder


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


@pytest.fixture(scope="session")
def gptme_python() -> str:
    """An interpreter that has gptme 0.35.1: the one that GPTME_PYTHON names, or that of scripts/test."""
    python = os.environ.get("GPTME_PYTHON") or str(GPTME)
    if not Path(python).is_file():
        pytest.skip(
            "gptme is not there: scripts/test installs it into .venv/gptme, or GPTME_PYTHON names an interpreter that has it"
        )
    asked = [python, "-c", "from importlib.metadata import version; print(version('gptme'))"]
    if (found := subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()) != "0.35.1":
        pytest.skip(f"{python} has gptme {found or 'not at all'}, and not 0.35.1")
    return python


@pytest.fixture
def gptme_home(tmp_path: Path) -> dict[str, str]:
    """An environment in which gptme reads and writes nothing of this person's, and asks the network for nothing."""
    names = ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")
    own = {name: str(tmp_path / "home") for name in names} | {"GPTME_TIKTOKEN_TIMEOUT": "0"}
    (tmp_path / "home").mkdir()
    return {name: value for name, value in os.environ.items() if name != "GPTME_LOGS_HOME"} | own


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A real browser."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


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
