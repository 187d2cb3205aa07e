"""The server: OpenAI's answers, what is refused, and that it goes on."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from finished_runs import runs_of_both
from serving_client import CHAT, asked, connected, events, send, streamed_text, text_of

from mlx_finetune.data.conversation import Message
from mlx_finetune.serving.admission import is_local
from mlx_finetune.serving.answer import Question
from mlx_finetune.serving.command import announce, warn
from mlx_finetune.serving.listening import in_background
from mlx_finetune.serving.opened import BASE, TUNED, Opened, find_source
from mlx_finetune.serving.sampling import Sampling
from mlx_finetune.serving.served import Served
from mlx_finetune.serving.worker import MOST_WAITING

ASK = "quokka lantern list 1"


@dataclass(frozen=True)
class Running:
    url: str
    opened: Opened  # in the server's own thread: only looked at
    log: list[str]
    name: str = "m"


def running(run: Path, **how: Any) -> Iterator[Running]:
    source, opened, log = find_source(str(run), "", ""), [], []

    def open_model() -> Opened:
        opened.append(Opened(source))
        return opened[0]

    with in_background(Served(source, "m", 32), open_model, log=log.append, **how) as url:
        yield Running(url, opened[0], log)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return runs_of_both(tmp_path_factory.mktemp("served"), context=256)


@pytest.fixture(scope="module", params=["mlx", "torch"])
def server(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Iterator[Running]:
    yield from running(runs[request.param])


@pytest.fixture(scope="module")
def mlx_server(runs: dict[str, Path]) -> Iterator[Running]:
    yield from running(runs["mlx"])


@pytest.fixture(scope="module")
def alone(runs: dict[str, Path]) -> Callable[..., list[int]]:
    """What a variant answers, computed by an engine that has read nothing else."""
    source = find_source(str(runs["torch"]), "", "")
    opened = Opened(source)

    def answer(*texts: str, variant: str = TUNED, limit: int = 16) -> list[int]:
        messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
        prompt = [int(token) for token in source.template.prompt(messages)]
        opened.forget()
        return list(opened.generate(variant, prompt, limit))

    return answer


def test_an_answer_is_an_object_of_openais_api(server: Running, alone: Callable[..., list[int]]) -> None:
    got = send(server.url, body=asked("m", ASK))
    expected = server.opened.template.decode(alone(ASK))
    assert got.status == 200 and "access-control-allow-origin" not in {name.lower() for name in got.headers}
    body = got.body
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-") and body["model"] == "m"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected}
    assert choice["finish_reason"] == ("length" if len(alone(ASK)) == 16 else "stop")
    read = len(server.opened.template.prompt([Message("user", ASK)]))
    written = len(alone(ASK))
    assert body["usage"] == {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def test_a_stream_says_the_same_in_pieces_and_then_what_it_took(server: Running) -> None:
    whole = send(server.url, body=asked("m", ASK))
    got = send(server.url, body=asked("m", ASK, stream=True, stream_options={"include_usage": True}))
    assert got.headers["content-type"].startswith("text/event-stream")
    assert streamed_text(got) == text_of(whole)
    first, *_, ended, usage = events(got)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert ended["choices"][0]["finish_reason"] == whole.body["choices"][0]["finish_reason"]
    assert usage["choices"] == [] and usage["usage"] == whole.body["usage"]
    assert {each["id"] for each in (first, ended, usage)} == {first["id"]}
    assert all(each["object"] == "chat.completion.chunk" for each in (first, ended, usage))
    without = events(send(server.url, body=asked("m", ASK, stream=True)))
    assert all(each["choices"] and "usage" not in each for each in without)


def test_the_base_answers_under_its_own_name(server: Running, alone: Callable[..., list[int]]) -> None:
    base = text_of(send(server.url, body=asked("m-base", ASK)))
    assert base == server.opened.template.decode(alone(ASK, variant=BASE)) != text_of(send(server.url, body=asked("m", ASK)))
    assert base == text_of(send(server.url, body=asked("m-base", ASK)))  # again, after the other one


def test_twenty_at_once_get_the_answers_that_they_get_alone(server: Running, alone: Callable[..., list[int]]) -> None:
    def one(number: int) -> str:
        """Half of them streamed, every third of the base."""
        name = "m" if number % 3 else "m-base"
        got = send(server.url, body=asked(name, f"list {number % 7}", stream=number % 2 == 0))
        return text_of(got) if number % 2 else streamed_text(got)

    expected = {
        (number, variant): server.opened.template.decode(alone(f"list {number}", variant=variant))
        for number in range(7)
        for variant in (TUNED, BASE)
    }
    with ThreadPoolExecutor(20) as pool:
        for number, text in enumerate(pool.map(one, range(20))):
            assert text == expected[number % 7, TUNED if number % 3 else BASE], number


def test_a_conversation_goes_on_as_if_it_were_read_from_its_beginning(server: Running, alone: Callable[..., list[int]]) -> None:
    texts = ["list 1"]
    for turn in range(4):
        answer = text_of(send(server.url, body=asked("m", *texts, max_tokens=8)))
        assert answer == server.opened.template.decode(alone(*texts, limit=8)), turn
        texts += [answer, f"and {turn}"]
        send(server.url, body=asked("m", f"another {turn}"))  # a title, as gptme asks for one in between


def test_a_stop_string_ends_an_answer_and_is_not_in_it(mlx_server: Running) -> None:
    text = text_of(send(mlx_server.url, body=asked("m-base", ASK, max_tokens=32)))
    stop = text[9:12]
    expected = text[: text.index(stop)]
    for stream in (False, True):
        got = send(mlx_server.url, body=asked("m-base", ASK, max_tokens=32, stop=["nowhere", stop], stream=stream))
        assert (streamed_text(got) if stream else text_of(got)) == expected
    assert send(mlx_server.url, body=asked("m-base", ASK, max_tokens=32, stop=stop)).body["choices"][0]["finish_reason"] == "stop"


def test_a_seed_gives_the_same_answer_and_another_seed_another(mlx_server: Running) -> None:
    answers = [text_of(send(mlx_server.url, body=asked("m", ASK, temperature=1, seed=seed))) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_models_are_listed_with_their_context(mlx_server: Running) -> None:
    got = send(mlx_server.url, "/v1/models", method="GET")
    assert [(one["id"], one["context_length"], one["owned_by"]) for one in got.body["data"]] == [
        ("m", 256, "mlx-finetune"),
        ("m-base", 256, "mlx-finetune"),
    ]
    assert send(mlx_server.url, "/v1/models/m", method="GET").body == got.body["data"][0]
    assert send(mlx_server.url, "/v1/models/x", method="GET").status == 404
    assert send(mlx_server.url, "/health", method="GET").body["status"] == "ok"


USER = [{"role": "user", "content": "a"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
CALL = {"id": "c", "type": "function", "function": {"name": "shell", "arguments": "{"}}
REFUSED: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b'{"model": ', 400, "not JSON"),
    "deep": (b"[" * 100_000, 400, "not JSON"),
    "digits": (b'{"model": ' + b"9" * 5000 + b"}", 400, "not JSON"),
    "NaN": (b'{"model": "m", "temperature": NaN}', 400, "not JSON"),
    "bytes": (b"\xff\xfe\x00", 400, "not JSON"),
    "half a character": (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogate"),
    "a list": ([], 400, "not a JSON object"),
    "nothing": (b"", 400, "not JSON"),
    "no model": ({"messages": USER}, 400, "model is missing"),
    "unknown model": ({"model": "gpt-4", "messages": USER}, 404, "there is m and m-base"),
    "no messages": ({"model": "m"}, 400, "messages is missing"),
    "messages": ({"model": "m", "messages": "a"}, 400, "messages is missing"),
    "message": ({"model": "m", "messages": ["a"]}, 400, "messages[0] is not an object"),
    "role": ({"model": "m", "messages": [{"role": "bot", "content": "a"}]}, 400, "messages[0].role"),
    "no role": ({"model": "m", "messages": [{"content": "a"}]}, 400, "messages[0].role = None"),
    "unhashable role": ({"model": "m", "messages": [{"role": {}, "content": "a"}]}, 400, "messages[0].role"),
    "content": ({"model": "m", "messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content"),
    "no content": ({"model": "m", "messages": [{"role": "user"}]}, 400, "messages[0].content"),
    "image": ({"model": "m", "messages": [{"role": "user", "content": [IMAGE]}]}, 400, "reads text only"),
    "part": ({"model": "m", "messages": [{"role": "user", "content": ["a"]}]}, 400, "messages[0].content[0]"),
    "calls": ({"model": "m", "messages": [{"role": "assistant", "tool_calls": [CALL]}]}, 400, "arguments is not JSON"),
    "call": ({"model": "m", "messages": [{"role": "assistant", "tool_calls": [1]}]}, 400, "tool_calls[0]"),
    "tools": ({"model": "m", "messages": USER, "tools": [{"type": "function"}]}, 400, "tools[0]"),
    "tools of no use": ({"model": "m", "messages": USER, "tools": [CALL]}, 400, "--tool-format markdown"),
    "temperature": ({"model": "m", "messages": USER, "temperature": 3}, 400, "from 0 to 2"),
    "temperature as text": ({"model": "m", "messages": USER, "temperature": "1"}, 400, "not a number"),
    "max_tokens": ({"model": "m", "messages": USER, "max_tokens": 0}, 400, "max_tokens"),
    "max_tokens as a truth": ({"model": "m", "messages": USER, "max_tokens": True}, 400, "not an integer"),
    "stop": ({"model": "m", "messages": USER, "stop": [1]}, 400, "stop"),
    "no stop": ({"model": "m", "messages": USER, "stop": False}, 400, "stop is neither"),
    "stream_options": ({"model": "m", "messages": USER, "stream_options": []}, 400, "stream_options is not an object"),
    "stream": ({"model": "m", "messages": USER, "stream": "yes"}, 400, "stream"),
    "parallel_tool_calls": ({"model": "m", "messages": USER, "parallel_tool_calls": 0}, 400, "neither true nor false"),
    "several": ({"model": "m", "messages": USER, "n": 2}, 400, "n = 2 is not supported"),
    "logprobs": ({"model": "m", "messages": USER, "logprobs": True}, 400, "logprobs"),
    "format": ({"model": "m", "messages": USER, "response_format": {"type": "json_object"}}, 400, "response_format"),
    "too long": ({"model": "m", "messages": [{"role": "user", "content": "a b " * 500}]}, 400, "maximum context length is 256"),
    "far too long": ({"model": "m", "messages": [{"role": "user", "content": "a" * 10_000}]}, 400, "10,000 characters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_refused_in_one_line_by_name(mlx_server: Running, name: str) -> None:
    body, status, words = REFUSED[name]
    got = send(mlx_server.url, body=body)
    assert got.status == status and words in got.body["error"]["message"], got
    assert set(got.body["error"]) == {"message", "type", "param", "code"} and len(got.body["error"]["message"]) < 300
    assert got.body["error"]["type"] == "invalid_request_error"


def test_paths_methods_hosts_kinds_and_sizes_are_looked_at(mlx_server: Running) -> None:
    url = mlx_server.url
    assert send(url, "/v1/completions", body={}).status == 404
    assert send(url, CHAT, method="GET").status == 405
    for kind in ("text/plain", ""):  # what a page of the web may send without asking
        assert send(url, body=b"{}", Content_Type=kind).status == 415
    assert send(url, "/v1/models", method="GET", Host="evil.example:80").status == 403
    for host in ("localhost:1", "127.0.0.1", "127.0.0.2:80", "[::1]:80", "LOCALHOST"):
        assert send(url, "/v1/models", method="GET", Host=host).status == 200, host
    large = b'{"model": "m", "messages": "' + b"a" * (17 * 2**20) + b'"}'
    for headers in ({}, {"Transfer-Encoding": "chunked"}):
        with connected(url) as connection:
            body = iter([large[i : i + 2**20] for i in range(0, len(large), 2**20)]) if headers else large
            try:
                connection.request("POST", CHAT, body, {"Content-Type": "application/json"} | headers, encode_chunked=bool(headers))
            except (BrokenPipeError, ConnectionResetError):
                continue  # it did not wait for the rest
            assert connection.getresponse().status == 413
    assert text_of(send(url, body=asked("m", ASK)))


def test_a_client_that_leaves_in_the_midst_stops_its_answer_and_no_other(mlx_server: Running) -> None:
    raw = json.dumps(asked("m-base", ASK, max_tokens=200, stream=True)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    before = len(mlx_server.log)
    for stream in (True, False):
        body = raw if stream else json.dumps(asked("m-base", ASK, max_tokens=200)).encode()
        sent = head.replace(str(len(raw)), str(len(body))).encode() + body
        host, port = mlx_server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
            if stream:
                assert b"200 OK" in connection.recv(200)
            else:
                time.sleep(0.05)
    assert text_of(send(mlx_server.url, body=asked("m", ASK)))
    deadline = time.monotonic() + 10
    while sum(" 499 " in line for line in mlx_server.log[before:]) < 2:
        assert time.monotonic() < deadline, mlx_server.log[before:]
        time.sleep(0.05)


def test_the_log_has_a_line_for_each_request_and_nothing_of_what_was_said(mlx_server: Running) -> None:
    before = len(mlx_server.log)
    send(mlx_server.url, body=asked("m", "a secret word"))
    send(mlx_server.url, body=asked("secret name", "a secret word"))
    ok, unknown = mlx_server.log[before:]
    assert ok.startswith(f"POST {CHAT} 200 ") and "tokens read, 16 written" in ok
    assert unknown.startswith(f"POST {CHAT} 404 ") and "secret" not in ok + unknown


def test_the_key_is_asked_for_where_there_is_one(runs: dict[str, Path]) -> None:
    for server in running(runs["torch"], key="s3cret-ü"):
        assert send(server.url, body=asked("m", ASK)).status == 401
        wrong = send(server.url, "/v1/models", method="GET", Authorization="Bearer no")
        assert wrong.status == 401 and wrong.body["error"]["code"] == "invalid_api_key"
        assert send(server.url, "/health", method="GET").status == 200
        right = "Bearer s3cret-ü".encode().decode("latin-1")  # as clients put it on the wire
        assert send(server.url, "/v1/models", method="GET", Authorization=right).status == 200


@pytest.fixture
def other_server(runs: dict[str, Path]) -> Iterator[Running]:
    yield from running(runs["mlx"])


def test_an_answer_that_fails_is_an_error_and_the_next_one_is_answered(
    other_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out in the midst of an answer, as MLX says it."""
    url, engine = other_server.url, other_server.opened.engine
    whole, generate = text_of(send(url, body=asked("m", ASK))), engine.generate

    def failing(*arguments: Any) -> Iterator[int]:
        for count, token in enumerate(generate(*arguments)):
            if count == 3:
                raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
            yield token

    monkeypatch.setattr(engine, "generate", failing)
    failed = send(url, body=asked("m", ASK))
    assert failed.status == 500 and failed.body["error"]["code"] == "out_of_memory"
    streamed = send(url, body=asked("m", ASK, stream=True))
    assert streamed.status == 200 and '"out_of_memory"' in streamed.body.strip().split("\n\n")[-1]
    monkeypatch.undo()
    assert text_of(send(url, body=asked("m", ASK))) == whole


def held(server: Running, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Answers wait until it is set."""
    hold, generate = threading.Event(), server.opened.engine.generate

    def slow(*arguments: Any) -> Iterator[int]:
        hold.wait(30)
        yield from generate(*arguments)

    monkeypatch.setattr(server.opened.engine, "generate", slow)
    return hold


def test_those_who_have_gone_keep_no_place_from_one_who_asks(other_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = held(other_server, monkeypatch)
    raw = json.dumps(asked("m", ASK)).encode()
    for _ in range(MOST_WAITING + 10):
        with connected(other_server.url) as connection:
            connection.request("POST", CHAT, raw, {"Content-Type": "application/json"})
            if connection.sock:
                connection.sock.shutdown(socket.SHUT_RDWR)
    with ThreadPoolExecutor(1) as pool:
        deadline = time.monotonic() + 20
        while sum(" 499 " in line for line in other_server.log) < MOST_WAITING + 10 and time.monotonic() < deadline:
            time.sleep(0.05)
        asking = pool.submit(send, other_server.url, body=asked("m", ASK, max_tokens=1))
        time.sleep(0.2)
        hold.set()
        assert asking.result().status == 200


def test_a_fault_of_ours_is_told_with_its_traceback_and_the_next_one_is_answered(
    runs: dict[str, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for server in running(runs["torch"]):
        with monkeypatch.context() as patched:
            patched.setattr(Served, "question", lambda served, request: dict[str, str]()["a fault"])
            got = send(server.url, body=asked("m", ASK))
        assert got.status == 500 and got.body["error"]["type"] == "server_error" and "KeyError" in got.body["error"]["message"]
        assert "Traceback" in capfd.readouterr().err and f"POST {CHAT} 500" in server.log[-1]
        assert text_of(send(server.url, body=asked("m", ASK)))


def test_too_many_that_wait_are_sent_away(other_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = held(other_server, monkeypatch)
    with ThreadPoolExecutor(80) as pool:
        asking = [pool.submit(send, other_server.url, body=asked("m", ASK, max_tokens=1)) for _ in range(70)]
        deadline = time.monotonic() + 20
        while not any(future.done() for future in asking) and time.monotonic() < deadline:
            time.sleep(0.05)
        hold.set()
        statuses = [future.result().status for future in asking]
    assert set(statuses) == {200, 503} and statuses.count(200) >= 64


def test_sampling_keeps_what_it_says() -> None:
    import numpy as np

    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    near = lambda found, expected: np.allclose(found, expected, atol=1e-6)  # noqa: E731
    assert Sampling(0).chooser() is None
    assert near(Sampling(1).probabilities(logits), [0.5, 0.3, 0.15, 0.05])
    assert near(Sampling(1, top_p=0.7).probabilities(logits), [0.625, 0.375, 0, 0])
    assert near(Sampling(1, top_p=0.0).probabilities(logits), [1, 0, 0, 0])
    assert near(Sampling(1, top_k=3).probabilities(logits), np.array([0.5, 0.3, 0.15, 0]) / 0.95)
    assert near(Sampling(1, min_p=0.5).probabilities(logits), [0.625, 0.375, 0, 0])
    assert near(Sampling(0.5).probabilities(logits), np.array([25, 9, 2.25, 0.25]) / 36.5)
    assert near(Sampling(1e-310).probabilities(logits), [1, 0, 0, 0])
    drawn = Sampling(1, seed=3).chooser()
    assert drawn and np.allclose(np.bincount([drawn(logits) for _ in range(4000)], minlength=4) / 4000, np.exp(logits), atol=0.03)
    assert Question("tuned", [1], 1).sampling.chooser() is None


def test_a_run_is_served_whose_data_is_gone_and_a_model_as_it_is(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = runs["mlx"].parent
    shutil.copytree(root / "mlx", tmp_path / "run", symlinks=True)
    config = (tmp_path / "run" / "config.yaml").read_text().replace(str(root / "dataset"), str(tmp_path / "gone"))
    (tmp_path / "run" / "config.yaml").write_text(config)
    source = find_source(str(tmp_path / "run"), "latest", "")
    assert not source.trained.known and source.variants == (TUNED, BASE)
    plain = find_source(str(root / "base"), "", "torch")
    assert plain.variants == (BASE,) and plain.context == 256 and plain.run is None
    prompt = [int(token) for token in plain.template.prompt([Message("user", ASK)])]
    tokens = [list(Opened(one).generate(BASE, prompt, 8)) for one in (source, plain)]
    assert tokens[0] == tokens[1]
    for each, key in ((source, ""), (plain, "s3cret")):
        announce(Served(each, "m", 1), "http://127.0.0.1:1", key, False)
        said = capsys.readouterr()
        assert "markdown is a guess" in said.err and "s3cret" not in said.out + said.err
        assert f"OPENAI_API_KEY={'$MLX_FINETUNE_API_KEY' if key else 'none'} gptme" in said.out


def test_what_cannot_be_served_is_one_line(
    runs: dict[str, Path], cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["torch"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, said = cli("serve", run, "--port", port)
        assert status == 2 and f"port {port} of 127.0.0.1" in said and "--port 0" in said
    for arguments, words in (
        (("serve", tmp_path / "none"), "no such model folder"),
        (("chat", tmp_path / "none"), "no such model folder"),
        (("serve", run, "--checkpoint", "step-9"), "no checkpoint 'step-9'"),
        (("serve", run.parent / "base", "--checkpoint", "best"), "not a run"),
        (("serve", run, "--name", "qwen3.5-mine"), "folds system messages"),
        (("serve", run, "--host", "nowhere.invalid", "--no-key"), "--host nowhere.invalid: "),
        (("serve", run, "--host", "a" * 70, "--no-key"), "--host aaa"),
        (("serve", run, "--host", "0.0.0.0"), "no key is asked for"),
        (("serve", run, "--no-key", "--api-key", "a"), "there is a key"),
        (("serve", run, "--port", "70000"), "--port"),
        (("chat", run, "--temperature", "3"), "--temperature"),
    ):
        status, out, said = cli(*arguments)
        assert (status, out) == (2, "") and words in said and "Traceback" not in said, said
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    status, _, said = cli("serve", run)
    assert status == 2 and "serve needs uvicorn" in said and "mlx-finetune[serve]" in said


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_the_command_says_where_it_is_and_ends_at_once_also_in_an_answer(runs: dict[str, Path], sent: signal.Signals) -> None:
    command = [sys.executable, "-m", "mlx_finetune", "serve", str(runs["torch"]), "--port", "0", "--json", "--max-tokens", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        about = json.loads(process.stdout.readline())
        assert about["models"] == ["base-torch", "base-torch-base"] and about["context_length"] == 256
        assert about["gptme"].endswith(f"OPENAI_API_KEY=none gptme -m local/base-torch --tool-format {about['tool_format']}")
        asking = threading.Thread(target=lambda: _tried(about["url"]))
        asking.start()
        time.sleep(0.3)
        process.send_signal(sent)
        assert process.wait(20) == (130 if sent == signal.SIGINT else 143)
        asking.join()
        assert "Traceback" not in process.stderr.read()


def _tried(url: str) -> None:
    with suppress(OSError, HTTPException):
        send(url, body=asked("base-torch-base", ASK, max_tokens=200))


def test_another_host_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(map(is_local, ("127.0.0.1", "127.0.0.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_local, ("0.0.0.0", "::", "192.168.1.2", "localhost.evil.example", "")))
    warn("0.0.0.0", False)
    said = capsys.readouterr().err
    assert "other machines reach this server" in said and "no key is asked for" in said and "whoever reaches it" in said
