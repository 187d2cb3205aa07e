"""Planning for a model on the Hub: headers by range requests from a small server on this machine that speaks its protocol."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from published_configs import PUBLISHED
from tiny_models import make_tiny

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """Knows org/model, org/bin (a config.json alone) and org/damaged; counts the bytes that it gives of weights."""

    files: dict[str, dict[str, bytes]]
    asked: list[tuple[str, str, int]]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        match = re.fullmatch(r"/(org/\w+)/resolve/\w+/(.+)", self.path.partition("?")[0])
        body = self.files.get(match[1], {}).get(match[2]) if match else None
        status, headers = (200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}) if body is not None else (404, {})
        if body is None:
            known = match and match[1] in self.files
            headers, body = {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"}, b""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and with_body and status == 200:
            start, end = int(wanted[1]), int(wanted[2])
            headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
            status, body = 206, body[start : end + 1]
        self.send_response(status)
        for name, value in (headers | {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.asked.append((self.path, self.headers.get("Range", ""), len(body)))
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 4096}
    made = make_tiny("qwen3", tmp_path_factory.mktemp("hub") / "model", tokenizer=False, changes=sizes)
    whole = {name: (made / name).read_bytes() for name in ("config.json", "model.safetensors")}
    replit = json.dumps(PUBLISHED["Replit-v2-CodeInstruct-3B"][0]).encode()
    Hub.files = {"org/model": whole, "org/bin": {"config.json": replit}}
    Hub.files["org/damaged"] = whole | {"model.safetensors": b"\xff" * 1000}
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def plan(name: str, cache: Path, endpoint: str, **environment: str) -> tuple[int, str, str]:
    """The verb in a process of its own, since huggingface_hub reads its settings once: exit status, stdout, stderr."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-m", "mlx_finetune.cli", "plan", "--model", name, "--chip", "M2", "--memory", "16GB", "--json"],
        env=own | {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"} | environment,
        cwd=cache,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_of_a_model_on_the_hub_only_config_and_headers_travel(hub: str, tmp_path: Path) -> None:
    Hub.asked.clear()
    status, out, err = plan("org/model", tmp_path, hub)
    assert status == 0, err
    model = json.loads(out)["model"]
    stored = Hub.files["org/model"]["model.safetensors"]
    header = 8 + int.from_bytes(stored[:8], "little")
    assert model["weight_bytes"] == model["parameters"] * 4 == len(stored) - header
    assert model["bytes_by_dtype"] == {"F32": model["weight_bytes"]} and model["remarks"] == []
    weights = [(ranged, size) for path, ranged, size in Hub.asked if path.endswith(".safetensors")]
    assert weights and all(ranged.startswith("bytes=") for ranged, _ in weights)
    assert sum(size for _, size in weights) < 110_000 < len(stored) / 10
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_model_without_safetensors_is_planned_from_its_config(hub: str, tmp_path: Path) -> None:
    status, out, err = plan("org/bin", tmp_path, hub)
    assert status == 0, err
    model = json.loads(out)["model"]
    assert model["bytes_by_dtype"] == {} and "computed from config.json" in model["remarks"][0]
    offline = plan("org/bin", tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")  # config.json is in the cache now
    assert json.loads(offline[1])["model"]["parameters"] == model["parameters"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/none", "error: org/none: no such local folder, and the Hub has no such model"),
        ("org/damaged", "error: org/damaged: damaged safetensors on the Hub"),
    ],
)
def test_what_the_hub_does_not_give_is_said_in_one_line(hub: str, tmp_path: Path, name: str, message: str) -> None:
    status, out, err = plan(name, tmp_path, hub)
    assert status == 2 and out == ""
    assert message in err and "Traceback" not in err


def test_without_a_way_to_the_hub_it_is_said(tmp_path: Path) -> None:
    status, out, err = plan("org/model", tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert status == 2 and out == "" and "no way to the Hub" in err
