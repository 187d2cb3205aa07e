"""From a model's name to a checked folder; the Hub is a small server on this machine that speaks the Hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_finetune.errors import UserError
from mlx_finetune.models.hub import check_model_folder, hub_revision, model_folder

COMMIT = "c" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b'{"model": {"vocab": {}}}',
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"MIT",
    "pytorch_model.bin": b"a pickle",
    "modeling_custom.py": b"raise SystemExit",
    "original/consolidated.safetensors": b"weights again",
    "onnx/config.json": b"{}",
}
PICKLED = {
    "config.json": b'{"model_type": "mpt"}',
    "pytorch_model-00001-of-00002.bin": b"a pickle",
    "pytorch_model-00002-of-00002.bin": b"another",
    "pytorch_model.bin.index.json": b"{}",
    "spiece.model": b"pieces",
    "training_args.bin": b"a pickle of something else",
    "old/pytorch_model.bin": b"weights again",
    "modeling_custom.py": b"raise SystemExit",
}
REPOSITORIES = {"org/model": FILES, "org/pickled": PICKLED}


class Hub(BaseHTTPRequestHandler):
    """Knows `REPOSITORIES`, and org/gated, which it gives to nobody."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        headers = {"X-Repo-Commit": COMMIT}
        status, body = 404, b"{}"
        name = next((name for name in REPOSITORIES if f"/{name}/" in f"{path}/"), "")
        files = REPOSITORIES.get(name, {})
        if name and path.startswith(f"/api/models/{name}/tree/"):
            entries = [{"type": "file", "path": file, "size": len(data), "oid": file} for file, data in files.items()]
            status, body = 200, json.dumps(entries).encode()
        elif name and path.startswith(f"/api/models/{name}"):
            status, body = 200, json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode()
        elif name and path.startswith(f"/{name}/resolve/{COMMIT}/"):
            status, body = 200, files[path.partition(COMMIT + "/")[2]]
            headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        elif "org/gated" in path:
            status, headers = 403, {"X-Error-Code": "GatedRepo"}
        else:
            headers = {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that has all that is asked for."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_bytes(FILES[name])
    save_file({"weight": np.ones((2, 3), np.float32)}, folder / "model.safetensors")
    return folder


def resolve(name: str, cache: Path, endpoint: str, pickles: bool = False, **environment: str) -> str:
    """`model_folder` in a process of its own, since huggingface_hub reads its settings once: what it says."""
    program = (
        "import sys; from mlx_finetune.errors import UserError; from mlx_finetune.models.hub import model_folder\n"
        f"try: print(model_folder(sys.argv[1], pickles={pickles}))\n"
        "except UserError as error: print(error.message, error.hint, sep=' -> ')"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", program, name],
        env=own | {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"} | environment,
        cwd=cache,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return line


def test_a_hub_model_is_downloaded_without_code_pickles_or_second_copies_and_then_found_offline(hub, tmp_path):
    found = Path(resolve("org/model", tmp_path, hub))
    files = {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "LICENSE"}
    assert (found / "config.json").read_bytes() == FILES["config.json"]
    assert resolve("org/model", tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1") == str(found)


def test_torch_files_are_downloaded_only_where_they_are_asked_for_and_there_is_nothing_else(hub, tmp_path):
    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    settings = {"config.json", "pytorch_model.bin.index.json", "spiece.model"}
    assert files(Path(resolve("org/pickled", tmp_path, hub))) == settings
    found = Path(resolve("org/pickled", tmp_path, hub, pickles=True))
    assert files(found) == settings | {"pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"}
    assert hub_revision(found) == COMMIT and hub_revision(tmp_path) is None
    assert resolve("org/pickled", tmp_path, "http://127.0.0.1:9", pickles=True, HF_HUB_OFFLINE="1") == str(found)
    assert "pytorch_model.bin" not in files(Path(resolve("org/model", tmp_path, hub, pickles=True)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "org/gated",
            "org/gated: the Hub gives this model only to people who accepted its terms -> accept its terms on",
        ),
        ("org/none", "org/none: no such local folder, and the Hub has no such model -> check the spelling"),
        ("org/two--dashes", "org/two--dashes: no such model folder, and no Hub id -> give a local folder"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line_with_a_remedy(name, message, hub, tmp_path):
    assert resolve(name, tmp_path, hub).startswith(message)


@pytest.mark.parametrize(("environment", "reason"), [({}, "no way to the Hub"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE")])
def test_a_model_that_is_nowhere_is_one_line_without_a_network(environment, reason, tmp_path):
    line = resolve("org/model", tmp_path, "http://127.0.0.1:9", **environment)
    assert line.startswith("org/model: no such local folder, not in the Hub's cache") and reason in line


def test_a_local_folder_comes_before_the_hub(folder, tmp_path, monkeypatch):
    assert model_folder(folder) == folder
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_folder("org/model") == Path("org/model")


@pytest.mark.parametrize("name", ["nowhere", "./org/model", "/nowhere/at/all", "a/b/c", "../x/y", "org/"])
def test_a_name_that_is_neither_folder_nor_hub_id_never_asks_the_network(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such model folder"):
        model_folder(name)


def test_a_file_is_not_a_model_folder(folder):
    with pytest.raises(UserError, match="a file, not a model folder"):
        model_folder(folder / "config.json")


def test_a_whole_folder_passes(folder):
    check_model_folder(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    check_model_folder(folder)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", r"no \*\.safetensors"),
        ("tokenizer.json", "no tokenizer"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_what_a_folder_lacks_is_named(gone, message, folder):
    (folder / gone).unlink()
    with pytest.raises(UserError, match=message) as caught:
        check_model_folder(folder)
    assert str(folder) in caught.value.message and caught.value.hint


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such model folder"):
        check_model_folder(tmp_path / "nowhere")


def test_a_cut_download_is_found_before_training(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors: cut at byte"):
        check_model_folder(folder)
