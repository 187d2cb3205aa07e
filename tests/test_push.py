"""What goes to the Hub and what never does, and the talk with it: huggingface_hub itself, against a small server in its place."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import make_tiny

from mlx_finetune.errors import UserError
from mlx_finetune.export.push import choose_files, find_private, push

# Built here, so that no scanner takes this file for a leak.
KEY = "ghp_" + "A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8"[:36]
HOME = Path("/home/jo.nasim")
PRIVATE_FILES = ("optimizer.safetensors", "metrics.jsonl", "train.jsonl", "loss.png", ".env", "data.arrow", "notes.txt", "evil.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, never written to."""
    folder = make_tiny("llama", tmp_path_factory.mktemp("push") / "model", tokenizer=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return folder


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(model, tmp_path / "folder"))


def test_only_what_a_model_consists_of_is_uploaded(folder):
    for name in PRIVATE_FILES:
        (folder / name).write_text("private")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "model.safetensors").write_text("private")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").symlink_to("/etc/passwd")
    upload = choose_files(folder)
    assert set(upload.left_out) == {*PRIVATE_FILES, "checkpoints/model.safetensors", "LICENSE"}
    assert {"model.safetensors", "config.json", "tokenizer.json", "additional_chat_templates/tools.jinja"} <= set(upload.files)
    assert upload.files["config.json"] == (folder / "config.json").stat().st_size


def test_nothing_that_a_link_leads_to_and_nothing_hidden_is_uploaded(folder, tmp_path):
    """Of folders too: a file of this person's under the name of one that goes."""
    secret = tmp_path / "home"
    (secret / ".ssh").mkdir(parents=True)
    for name in ("id_rsa", "LICENSE", "tools.jinja", "config.json", "model.safetensors"):
        (secret / ".ssh" / name).write_text("private")
    (folder / "LICENSE").symlink_to(secret / ".ssh" / "id_rsa")
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(os.path.relpath(secret / ".ssh" / "config.json", folder))
    (folder / "additional_chat_templates").symlink_to(secret / ".ssh", target_is_directory=True)
    (folder / ".git").mkdir()
    for name in (".git/config", ".git/LICENSE", ".netrc", ".cache.json", "..jinja"):
        (folder / name).write_text("private")
    files = choose_files(folder).files
    assert {"LICENSE", "generation_config.json"}.isdisjoint(files) and all("/" not in name and name[0] != "." for name in files)
    assert not any((folder / name).read_bytes() == b"private" for name in files) and "model.safetensors" in files


def test_what_goes_where_and_how_large_it_is_is_shown_before_it_is_asked_for(hub, folder):
    done = run_push(hub, folder, "kim/tuned", "--dry-run", "--public")
    assert "https://huggingface.co/kim/tuned, PUBLIC: " in done.stderr and not hub.asked
    for name, size in choose_files(folder).files.items():
        assert name in done.stdout and f"{size:,}" in done.stdout


@pytest.mark.parametrize(("name", "message"), [("config.yaml", "a run"), ("progress.json", "a run, or a checkpoint")])
def test_a_run_and_its_checkpoints_are_not_pushed(name, message, folder):
    (folder / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        choose_files(folder)


def test_a_folder_without_weights_is_not_pushed(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        choose_files(folder)
    with pytest.raises(UserError, match="no such folder"):
        choose_files(tmp_path / "nowhere")


def test_a_plain_model_has_nothing_private_in_it(folder):
    assert find_private(folder, list(choose_files(folder).files), HOME) == []


def spoil_card(folder: Path) -> None:
    (folder / "README.md").write_text(f"# A model\n\nexport GITHUB_TOKEN={KEY}\n")


def spoil_config(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"_name_or_path": f"{HOME}/models/base"}))


def spoil_with_a_place(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"_name_or_path": str(folder.parent)}))


def spoil_vocabulary(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({f"{HOME}/secret": 5}))


def spoil_metadata(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"note": f"token {KEY}"})


def spoil_gguf(folder: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_description(f"made with {KEY}")
    writer.add_array("tokenizer.ggml.tokens", [f"x{KEY}", "b"])  # half of a vocabulary looks like a secret
    writer.add_tensor("a", np.zeros(4, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()


def spoil_template(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}\n{# " + KEY + " #}")


def spoil_weights(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"made in": f"{HOME}/run"})


@pytest.mark.parametrize(
    ("spoil", "file", "line", "allow"),
    [
        (spoil_card, "README.md", 3, KEY),
        (spoil_config, "config.json", 1, str(HOME)),
        (spoil_with_a_place, "config.json", 1, "re:^/"),
        (spoil_vocabulary, "added_tokens.json", 0, str(HOME)),
        (spoil_weights, "model.safetensors", 0, str(HOME)),
        (spoil_metadata, "model.safetensors", 0, KEY),
        (spoil_gguf, "model.gguf", 0, KEY),
        (spoil_template, "additional_chat_templates/tools.jinja", 2, KEY),
    ],
)
def test_what_says_who_one_is_is_found_by_file_and_line_unless_it_is_allowed(spoil, file, line, allow, folder):
    spoil(folder)
    names = list(choose_files(folder).files)
    found = find_private(folder, names, HOME)
    assert [(one.file, one.line) for one in found] == [(file, line)]
    assert find_private(folder, names, HOME, [allow]) == []
    assert find_private(folder, names, HOME, ["something else"]) == found


@pytest.mark.parametrize("place", ["/fsx/somebody/checkpoints/step-9", f"/fsx/{'name' * 100}/step-9"])
def test_paths_of_other_peoples_machines_stay(place, folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"_name_or_path": place}))
    (folder / "README.md").write_text("cd /home/user/project\n")
    assert find_private(folder, list(choose_files(folder).files), HOME) == []


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's API as a commit of small files takes; what it was asked for is kept in the server's `asked`."""

    def _answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, content in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), content)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        server: Any = self.server
        if server.private is None:
            self._answer(
                {"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
            )
        else:
            self._answer({"id": "kim/tuned", "private": server.private, "siblings": [], "tags": []})

    def do_POST(self) -> None:
        server: Any = self.server
        raw = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = self.path.split("?")[0]
        server.asked.append((path, self.headers["Authorization"], raw))
        if server.refuses and path == "/api/repos/create":
            self._answer({"error": "You may not"}, 403)
        elif path == "/api/repos/create":
            self._answer({"url": f"http://{self.headers['Host']}/kim/tuned", "name": "kim/tuned"})
        elif path.endswith("/preupload/main"):
            files = json.loads(raw)["files"]
            self._answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif path.endswith("/commit/main"):
            self._answer(
                {"commitUrl": f"http://{self.headers['Host']}/kim/tuned/commit/1", "commitOid": "1", "pullRequestUrl": None}
            )
        else:
            self._answer({})

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""


@pytest.fixture
def hub() -> Iterator[Any]:
    """A running server; `private`: of the repository, None where there is none."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.private, server.refuses = [], None, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run_push(hub: Any, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a program of its own: huggingface_hub reads its settings once."""
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_of_the_test"}
    own |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", **environment}
    command = [sys.executable, "-m", "mlx_finetune", "push", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ | own, timeout=120, check=False
    )


def committed(hub: Any) -> dict[str, bytes]:
    """The files of the commit."""
    (body,) = (raw for path, _, raw in hub.asked if path.endswith("/commit/main"))
    lines = [json.loads(line) for line in body.splitlines()]
    return {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"}


def test_the_files_arrive_as_they_are_in_a_private_repository(hub, folder):
    (folder / "metrics.jsonl").write_text("private")
    done = run_push(hub, folder, "kim/tuned", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["url"].endswith("/kim/tuned/commit/1") and result["left_out"] == ["metrics.jsonl"]
    assert committed(hub) == {name: (folder / name).read_bytes() for name in result["files"]}
    (created,) = (json.loads(raw) for path, _, raw in hub.asked if path == "/api/repos/create")
    assert created.get("private") is True or created.get("visibility") == "private"
    assert {token for _, token, _ in hub.asked} == {"Bearer hf_of_the_test"}


def test_a_public_repository_is_not_pushed_to_unasked(hub, folder):
    hub.private = False
    refused = run_push(hub, folder, "kim/tuned", "--yes")
    assert refused.returncode == 2 and "is there already, and public" in refused.stderr and not hub.asked
    done = run_push(hub, folder, "kim/tuned", "--yes", "--public")
    assert done.returncode == 0 and set(committed(hub)) == set(choose_files(folder).files)


def test_without_a_terminal_and_a_yes_nothing_is_sent(hub, folder):
    done = run_push(hub, folder, "kim/tuned")
    assert done.returncode == 2 and "hint: --yes" in done.stderr and not hub.asked
    done = run_push(hub, folder, "kim/tuned", "--dry-run")
    assert done.returncode == 0 and "model.safetensors" in done.stdout and not hub.asked


def test_a_hub_that_is_not_reached_is_one_line(hub, folder):
    offline = run_push(hub, folder, "kim/tuned", "--yes", HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "HF_HUB_OFFLINE is set" in offline.stderr
    away = run_push(hub, folder, "kim/tuned", "--yes", HF_ENDPOINT="http://127.0.0.1:9")
    assert away.returncode == 2 and "kim/tuned: the Hub was not reached" in away.stderr and not hub.asked


def test_where_the_hub_does_not_let_one_write_that_is_one_line(hub, folder):
    hub.refuses = True
    done = run_push(hub, folder, "kim/tuned", "--yes")
    assert done.returncode == 2 and "does not let you write there" in done.stderr and "Traceback" not in done.stderr


def test_what_looks_private_is_not_sent(folder, cli):
    spoil_card(folder)
    status, out, err = cli("push", folder, "kim/tuned", "--yes")
    assert (status, out) == (2, "") and "README.md:3: " in err and "nothing was uploaded" in err and KEY not in err


def test_a_name_that_is_none_and_no_token_are_said(folder, cli, monkeypatch, tmp_path):
    status, _, err = cli("push", folder, "tuned", "--yes")
    assert status == 2 and "tuned: not the name of a repository" in err
    status, _, err = cli("push", folder, "kim/tuned", "--yes", "--allow", "re:(")
    assert status == 2 and "re:(" in err
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    status, _, err = cli("push", folder, "kim/tuned", "--yes")
    assert status == 2 and "not logged in" in err


def test_a_repository_that_has_become_public_meanwhile_gets_nothing(folder):
    """`push` asks the Hub itself, and before anything is sent."""

    class Client:
        def repo_info(self, repo: str) -> Any:
            return type("Info", (), {"private": False})()

    with pytest.raises(UserError, match="public"):
        push(Client(), folder, "kim/tuned", ["config.json"], public=False)


def test_a_files_name_does_not_steer_the_terminal(folder, cli):
    (folder / "\x1b]0;owned\x07\x1b[2J.jinja").write_text(f"{{# {KEY} #}}")
    (folder / "\x1b[2Jnotes").write_text("")
    status, out, err = cli("push", folder, "kim/tuned", "--dry-run")
    assert status == 2 and "owned" in err and "\x1b" not in out + err
    (folder / "\x1b]0;owned\x07\x1b[2J.jinja").write_text("{{ messages }}")
    status, out, err = cli("push", folder, "kim/tuned", "--dry-run")
    assert status == 0 and "owned" in out and "notes" in err and "\x1b" not in out + err
