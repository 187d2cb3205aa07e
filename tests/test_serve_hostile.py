"""The server against those who mean it no good: raw bytes, pages of the web, slow and many connections. It answers afterwards."""

import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest
from finished_runs import make_base, make_run
from serving_client import CHAT, asked, send, text_of

from mlx_finetune.serving.admission import MOST_BYTES, Bodies, check_key
from mlx_finetune.serving.connections import protocol_class
from mlx_finetune.serving.listening import in_background
from mlx_finetune.serving.opened import Opened, find_source
from mlx_finetune.serving.requests import Refusal
from mlx_finetune.serving.served import Served

ASK, SECRET = "quokka lantern list 1", "zebra-crossing-zwölf"
SLOW, MOST = 1.0, 40  # of this server: seconds for a head, and connections
BODY = json.dumps(asked("m", ASK, max_tokens=2)).encode()


class Running:
    def __init__(self, url: str, log: list[str]) -> None:
        self.url, self.log, self.port = url, log, int(url.rpartition(":")[2])

    def raw(self, data: bytes, answers: int = 1, leaves: bool = False) -> bytes:
        """All that it says to these bytes, until it has closed or so many answers are whole; `leaves`: nobody waits for them."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            said = b""
            with suppress(ConnectionError):
                connection.sendall(data)
                if leaves:
                    connection.shutdown(socket.SHUT_WR)
                while not whole(said, answers) and (more := connection.recv(65536)):
                    said += more
            return said


def whole(said: bytes, answers: int) -> bool:
    """Whether so many answers are complete; one that says no length ends where the connection does."""
    while answers:
        head, found, said = said.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if not found or (length is None and b" 100 " not in head) or len(said) < int(length[1] if length else 0):
            return False
        said = said[int(length[1]) if length else 0 :]
        answers -= b"HTTP/1.1 100" not in head
    return True


@contextmanager
def running(run: Path, **bounds: Any) -> Iterator[Running]:
    source, log = find_source(str(run), "", ""), list[str]()
    with in_background(Served(source, "m", 4), lambda: Opened(source), log=log.append, **bounds) as url:
        yield Running(url, log)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    make_base(root, changes={"max_position_embeddings": 256})
    return make_run(root, "torch", learning_rate=5e-2)


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Running]:
    with running(run, head_within=SLOW, most=MOST) as server:
        yield server


@pytest.fixture(scope="module")
def right(server: Running) -> str:
    return text_of(send(server.url, body=asked("m", ASK)))


def post(*more: bytes, body: bytes = BODY, length: bool = True, head: bytes = b"POST %s HTTP/1.1" % CHAT.encode()) -> bytes:
    lines = [head, b"Host: localhost", b"Content-Type: application/json", *more]
    return b"\r\n".join([*lines, *([b"Content-Length: %d" % len(body)] if length else []), b"", body])


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))


CHUNKED = b"Transfer-Encoding: chunked"
# What is sent, and how the first answer may begin; empty: it may also just close.
RAW: dict[str, tuple[bytes, tuple[bytes, ...]]] = {
    "plain": (post(), (b"HTTP/1.1 200",)),
    "HTTP/1.0": (post(head=b"POST %s HTTP/1.0" % CHAT.encode()), (b"HTTP/1.1 200",)),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (b"HTTP/1.1 4", b"")),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), (b"HTTP/1.1 400", b"")),
    "nothing": (b"", (b"",)),
    "line ends": (b"\r\n" * 1000, (b"HTTP/1.1 400", b"")),
    "in chunks": (post(CHUNKED, body=chunked(BODY[:9], BODY[9:]), length=False), (b"HTTP/1.1 200",)),
    "a chunk's size is no number": (post(CHUNKED, body=b"zz\r\n{}\r\n0\r\n\r\n", length=False), (b"HTTP/1.1 400",)),
    "nonsense in a body that is not read": (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" % CHAT.encode(),
        (b"HTTP/1.1 400",),
    ),
    "a chunk of endless size": (post(CHUNKED, body=b"f" * 40 + b"\r\n{}", length=False), (b"HTTP/1.1 4", b"")),
    "both lengths": (post(CHUNKED, body=chunked(BODY)), (b"HTTP/1.1 200", b"HTTP/1.1 400")),
    "two lengths": (post(b"Content-Length: 3"), (b"HTTP/1.1 400",)),
    "a negative length": (post(b"Content-Length: -1", length=False), (b"HTTP/1.1 400",)),
    "a length of many digits": (post(b"Content-Length: " + b"9" * 5000, length=False), (b"HTTP/1.1 400", b"HTTP/1.1 413")),
    "a length of Arabic digits": (post("Content-Length: ٣".encode(), length=False), (b"HTTP/1.1 400",)),
    "a longer body is promised": (post(body=BODY).replace(b"Length: %d" % len(BODY), b"Length: 999"), (b"HTTP/1.1 4", b"")),
    "many headers": (post(*(b"X-%d: y" % i for i in range(20_000))), (b"HTTP/1.1 4", b"")),
    "a long header": (post(b"X: " + b"y" * 200_000), (b"HTTP/1.1 4", b"")),
    "a header with a line end": (post(b"X: a\r\n b"), (b"HTTP/1.1 200", b"HTTP/1.1 400")),
    "a header with a zero": (post(b"X: a\0b"), (b"HTTP/1.1 400",)),
    "a header's name is a sign": (post("ü: b".encode()), (b"HTTP/1.1 400",)),
    "no host": (b"GET /v1/models HTTP/1.1\r\n\r\n", (b"HTTP/1.1 400", b"HTTP/1.1 403")),
    "no host, HTTP/1.0": (b"GET /v1/models HTTP/1.0\r\n\r\n", (b"HTTP/1.1 403",)),
    "two hosts": (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", (b"HTTP/1.1 400", b"HTTP/1.1 403")),
    "a whole address": (b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n", (b"HTTP/1.1 40",)),
    "a proxy's method": (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", (b"HTTP/1.1 40",)),
    "an unknown method": (b"FETCH /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", (b"HTTP/1.1 405",)),
    "a method that is none": (b"\xff\xfe /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", (b"HTTP/1.1 400",)),
    "TRACE": (b"TRACE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", (b"HTTP/1.1 405",)),
    "a path upwards": (b"GET /v1/models/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", (b"HTTP/1.1 404",)),
    "a path with a zero": (b"GET /v1/models/%00%ff%0d%0aX:y HTTP/1.1\r\nHost: localhost\r\n\r\n", (b"HTTP/1.1 404",)),
    "a long path": (b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", (b"HTTP/1.1 404",)),
    "a websocket": (
        b"GET /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        (b"HTTP/1.1 405",),
    ),
    "HTTP/2 by upgrade": (
        post(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"),
        (b"HTTP/1.1 200",),
    ),
    "continue": (post(b"Expect: 100-continue"), (b"HTTP/1.1 100", b"HTTP/1.1 200")),
    "compressed": (post(b"Content-Encoding: gzip"), (b"HTTP/1.1 200", b"HTTP/1.1 415")),
    "a body of another kind": (post(b"Content-Type: text/plain"), (b"HTTP/1.1 4", b"HTTP/1.1 200")),
    "two of them in a row": (post() + post(), (b"HTTP/1.1 200",)),
    "nonsense behind one": (post() + b"\x00\x01\x02 nonsense\r\n\r\n", (b"HTTP/1.1 200", b"HTTP/1.1 400")),
    "a request hidden in a body": (
        post(b"Content-Length: 0", length=False, body=b"GET /secret HTTP/1.1\r\n\r\n"),
        (b"HTTP/1.1 400",),
    ),
    "a GET with a body": (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", (b"HTTP/1.1 200",)),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_bytes_get_an_answer_of_http_or_none_and_no_traceback(
    server: Running, right: str, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    sent, allowed = RAW[name]
    said = server.raw(sent, 2 if name == "two of them in a row" else 1, leaves="promised" in name or "endless" in name)
    assert said.startswith(tuple(each for each in allowed if each)) or (b"" in allowed and not said), said[:300]
    assert b"HTTP/1.1 5" not in said and b"Traceback" not in said
    assert capfd.readouterr().err == ""
    if name == "two of them in a row":
        assert said.count(b"HTTP/1.1 200") == 2


def test_nonsense_behind_an_answer_that_did_not_wait_for_the_body_ends_the_connection_and_is_no_fault(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 415")
        connection.sendall(b"zz\r\n\r\n")
        with suppress(ConnectionResetError):
            while connection.recv(65536):
                pass
    assert caplog.records == []


def test_after_all_that_the_answer_is_the_same(server: Running, right: str) -> None:
    assert text_of(send(server.url, body=asked("m", ASK))) == right


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example", "file://", "http://[::1"])
def test_a_page_of_the_web_is_not_answered_even_where_it_says_json(server: Running, origin: str) -> None:
    got = send(server.url, body=asked("m", ASK), Origin=origin)
    assert got.status == 403 and "page of the web" in got.body["error"]["message"]
    assert send(server.url, CHAT, method="OPTIONS", Origin=origin).status == 405  # a preflight gets no leave
    assert send(server.url, "/health", method="GET", Host="evil.example").status == 403
    assert not any(name.lower().startswith("access-control") for name in got.headers)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "text/plain; application/json"]
)
def test_what_a_form_of_a_page_can_send_is_not_read(server: Running, kind: str) -> None:
    assert send(server.url, body=asked("m", ASK), Content_Type=kind).status == 415


def test_a_page_of_this_machine_may_ask(server: Running) -> None:
    for origin in ("http://localhost:3000", "http://127.0.0.1", "http://[::1]:8080"):
        assert send(server.url, "/v1/models", method="GET", Origin=origin).status == 200


@pytest.mark.parametrize("begun", [b"", b"POST /v1/chat", b"POST %s HTTP/1.1\r\nHost: localhost\r\nX: " % CHAT.encode()])
def test_who_does_not_come_to_the_end_of_a_head_is_shown_out(server: Running, begun: bytes) -> None:
    """Also where a byte comes now and then, and behind an answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        if begun.startswith(b"POST /v1/chat/"):
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        connection.sendall(begun)
        closed = False
        while not closed and time.monotonic() - began < 8:
            with suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
                connection.sendall(b"y" if begun else b"")
            connection.settimeout(0.2)
            try:
                closed = connection.recv(100) == b""
            except TimeoutError:
                continue
            except ConnectionResetError:
                closed = True
        assert closed and time.monotonic() - began < 6


def test_who_comes_when_it_is_full_is_sent_away_at_once(run: Path) -> None:
    with running(run, head_within=60, most=3) as server, ExitStack() as held:
        first = [held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10)) for _ in range(3)]
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as late, suppress(ConnectionResetError):
                assert late.recv(1) == b""
        first[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert first[0].recv(100).startswith(b"HTTP/1.1 200")


def test_who_takes_nothing_of_its_answers_is_let_go_of(run: Path) -> None:
    ask = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100
    with running(run, taken_within=1, most=1) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.settimeout(5)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # once all buffers between the two are full, and time is over
            for _ in range(100_000):
                connection.sendall(ask)
        health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert server.raw(health).startswith(b"HTTP/1.1 200")  # the only place is free again


def test_a_connection_that_is_closed_does_not_wait_for_ever_until_its_last_answer_is_taken() -> None:
    """What is left of it is more than the system's buffers take, and less than what tells the server to stop writing."""
    import uvicorn

    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"60000")]})
        await send({"type": "http.response.body", "body": bytes(60_000)})

    how = {"lifespan": "off", "ws": "none", "log_level": "critical", "http": protocol_class(taken_within=0.5)}
    server = uvicorn.Server(uvicorn.Config(large, **how))
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as connection:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(listener.getsockname())
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        for wanted in (True, False):
            until = time.monotonic() + 10
            while bool(server.server_state.connections) != wanted and time.monotonic() < until:
                time.sleep(0.05)
            assert bool(server.server_state.connections) == wanted
        server.should_exit = True
        thread.join(10)


def test_who_opens_many_connections_does_not_keep_others_out(server: Running, right: str) -> None:
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(3 * MOST)]
    try:
        time.sleep(SLOW + 1)  # those that were let in have said nothing for too long
        assert text_of(send(server.url, body=asked("m", ASK))) == right
    finally:
        for each in held:
            each.close()


class Asking:
    """As much of a request as reading a body looks at."""

    def __init__(self, parts: list[bytes], delay: float = 0, **headers: str) -> None:
        self.headers = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        self._parts, self._delay = parts, delay

    async def stream(self) -> Any:
        import asyncio

        for part in self._parts:
            await asyncio.sleep(self._delay)
            yield part


def test_a_slow_body_and_many_large_ones_are_refused_and_leave_nothing_held() -> None:
    import asyncio

    bodies = Bodies(within=0.05)

    def status(asking: Any) -> int:
        with pytest.raises(Refusal) as refused:
            asyncio.run(bodies.read(asking))
        return refused.value.status

    assert status(Asking([b"{"] * 100, delay=0.01)) == 408
    assert status(Asking([b"a" * MOST_BYTES, b"b"])) == 413 and status(Asking([], content_length="9" * 5000)) == 413

    async def five() -> list[Any]:
        large = [Asking([b"a" * (MOST_BYTES - 1), b"b"], delay=0.005) for _ in range(5)]
        return await asyncio.gather(*(bodies.read(each) for each in large), return_exceptions=True)  # type: ignore[arg-type]

    bodies._within = 5
    assert [each.status for each in asyncio.run(five()) if isinstance(each, Refusal)] == [503]
    assert bodies._held == 0 and asyncio.run(bodies.read(Asking([b"{", b"}"]))) == b"{}"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", ["", "Bearer ", "Bearer secre", "Bearer secret1", "Bearer SECRET", "Basic secret", "Bearer ßecret"]
)
def test_only_the_whole_key_is_the_key(given: str) -> None:
    given = given.encode().decode("latin-1")  # as headers are read
    asking = Asking([], **({"authorization": given} if given else {}))
    with pytest.raises(Refusal) as refused:
        check_key(asking, "secret")  # type: ignore[arg-type]
    assert refused.value.status == 401 and "hmac.compare_digest(" in getsource(check_key), "in constant time"
    check_key(Asking([], authorization="Bearer secret"), "secret")  # type: ignore[arg-type]


NAMES = "model messages tools stream stop temperature top_p seed max_tokens tool_choice stream_options n role content".split()
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e308,
    10**30,
    "",
    "m",
    "\0",
    "\ud800",
    "x" * 70_000,
    [],
    {},
    [[]],
    [None],
    {"": {}},
    SECRET,
)


def nested(depth: int) -> Any:
    value: Any = SECRET
    for _ in range(depth):
        value = [value] if depth % 2 else {"a": value}
    return value


def changed(value: Any, chance: random.Random) -> Any:
    """A request with something of it otherwise, some levels down."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice([*value, *NAMES])
        return value | {key: changed(value.get(key), chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        return [*value[:place], changed(value[place], chance), *value[place + 1 :] * chance.choice((0, 1, 1, 3))]
    return nested(chance.choice((3, 60, 900, 5000))) if chance.random() < 0.05 else chance.choice(VALUES)


def mutated(chance: random.Random) -> bytes:
    """Of the kind that a client would send, of nearly that kind, or bytes."""
    call = {"id": "c", "type": "function", "function": {"name": "shell", "arguments": '{"command": "ls"}'}}
    messages = [{"role": "user", "content": SECRET}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": SECRET}]}]
    value: Any = asked("m", ASK, max_tokens=1) | {"messages": messages, "stream": chance.random() < 0.3, "stop": ["x"]}
    for _ in range(chance.randint(1, 3)):
        value = changed(value, chance)
    try:
        body = bytearray(json.dumps(value).encode())
    except RecursionError:
        return b"[" * 100_000
    if chance.random() < 0.3:
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(body) + 1)
            body[place : place + chance.randint(0, 3)] = chance.choice(
                (b"", b"\xff", b'"', b"{", b"[" * 50, b"NaN", b"1e999", b"\\u0000")
            )
    return bytes(body)


def try_bodies(server: Running, seed: int, count: int) -> dict[int, int]:
    """How often each status came; an answer that is none fails."""
    chance, seen = random.Random(seed), dict[int, int]()
    for number in range(count):
        body = mutated(chance)
        got = send(server.url, body=body)
        assert got.status < 500, (seed, number, got, body[:300])
        if got.status != 200:
            assert set(got.body["error"]) == {"message", "type", "param", "code"} and len(got.body["error"]["message"]) < 400, got
        seen[got.status] = seen.get(got.status, 0) + 1
    return seen


def try_raw(server: Running, seed: int, count: int) -> None:
    chance = random.Random(seed)
    for number in range(count):
        data = bytearray(chance.choice(list(RAW.values()))[0][:4000])
        for _ in range(chance.randint(1, 5)):
            place, other = chance.randrange(len(data) + 1), chance.choice(list(RAW.values()))[0]
            data[place : place + chance.randint(0, 9)] = chance.choice(
                (b"", b"\r\n", b"\0", b": ", b"\r\n\r\n", b" ", other[:300], b"chunked")
            )
        said = server.raw(bytes(data), leaves=True)
        assert b"HTTP/1.1 5" not in said and (not said or said.startswith(b"HTTP/1.1 ")), (
            seed,
            number,
            bytes(data)[:300],
            said[:200],
        )


@pytest.mark.parametrize("count", [60, pytest.param(4000, marks=pytest.mark.long)])
def test_mutated_requests_get_no_500_and_nothing_of_them_is_logged(
    server: Running, right: str, count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = try_bodies(server, count, count)
    try_raw(server, count, count)
    assert {200, 400} <= seen.keys(), seen
    err = capfd.readouterr().err
    assert "Traceback" not in err and SECRET not in err and not any(SECRET in line for line in server.log)
    assert text_of(send(server.url, body=asked("m", ASK))) == right


def test_a_fault_of_ours_tells_the_log_nothing_of_what_was_said(
    server: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exceptions of Python quote the value that they met."""
    before = len(server.log)
    for fault in (KeyError(SECRET), ValueError(f"no {SECRET}"), TypeError(SECRET), UnicodeError(SECRET)):

        def question(served: Served, request: Any, fault: Exception = fault) -> Any:
            raise fault

        monkeypatch.setattr(Served, "question", question)
        got = send(server.url, body=asked("m", SECRET))
        assert got.status == 500 and SECRET not in json.dumps(got.body, ensure_ascii=False)
    err = capfd.readouterr().err
    assert type(fault).__name__ in err and "Traceback" in err and "in question" in err
    assert SECRET not in err and not any(SECRET in line for line in server.log[before:])


def test_a_run_folder_is_not_reachable_by_http(server: Running) -> None:
    for path in ("/config.yaml", "/static/config.yaml", "/v1/files", "/docs", "/openapi.json", "/..%2f..%2fetc/passwd"):
        assert send(server.url, path, method="GET").status == 404
