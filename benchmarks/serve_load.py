"""The server under load: twenty clients for minutes, answers, errors, times, memory, threads and sockets.

    .venv/bin/python benchmarks/serve_load.py [--out FOLDER]

Starts `mlx-finetune serve` as a program: a tiny model with each engine for six minutes, SmolLM2-135M-Instruct for three. Writes
serve_load.md and serve_load.json; exit status 1 where an answer is wrong or missing, or memory, threads or sockets grow.
Takes 25 minutes of two cores. SERVE_LOAD_MINUTES=0.5 tries it out.
"""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import numpy as np
import psutil
from tables import ENGINES, Figures, Table, run

from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CLIENTS, CHAT = 20, "/v1/chat/completions"
SHORT = float(os.environ.get("SERVE_LOAD_MINUTES", 0))
TEXT = """\
Twenty clients, each asking again as soon as it has its answer: whole and streamed, from a fixed set of questions and growing
talks; one request in six is left in the midst, one in twelve is nonsense. `wrong`: a greedy answer that is not, byte for byte,
the one that the same question got when nothing else was asked. `failed`: no answer, or another status than expected. Seconds are of
whole answers, with all the waiting for the nineteen others."""
GROWTH = """\
Of the server's process, as the kernel counts it. Memory: the highest of the second minute and of the last; the first fills the kept
conversations. Threads and sockets: eight seconds after the last client has gone, against before the first came."""
QUESTIONS = [f"quokka lantern list {i}" for i in range(12)]


@dataclass
class Count:
    """What all clients saw."""

    expected: dict[str, str]
    tokens: int  # of an answer
    seconds: list[float] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, seconds: float | None = None) -> None:
        with self.lock:
            self.seen[what] += 1
            if seconds is not None:
                self.seconds.append(seconds)


@dataclass(frozen=True)
class Server:
    """A running one."""

    port: int
    model: str
    process: psutil.Process

    def state(self) -> tuple[int, int, int]:
        """Resident bytes, threads, open sockets and files."""
        return self.process.memory_info().rss, self.process.num_threads(), self.process.num_fds()


@contextmanager
def serving(place: Path, engine: str, folder: Path) -> Iterator[Server]:
    """The program itself."""
    command = [sys.executable, "-m", "mlx_finetune", "serve", str(place), "--port", "0", "--json", "--engine", engine]
    with (
        (folder / f"{engine}.log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as program,
    ):
        assert program.stdout
        about = json.loads(program.stdout.readline())
        try:
            yield Server(int(about["url"].rpartition(":")[2]), about["models"][0], psutil.Process(program.pid))
        finally:
            program.terminate()


def ask(server: Server, messages: list[dict[str, str]], tokens: int, stream: bool) -> str:
    """One greedy answer; raises OSError, HTTPException or ValueError where there is none."""
    body = {"model": server.model, "messages": messages, "temperature": 0, "max_tokens": tokens, "stream": stream}
    connection = HTTPConnection("127.0.0.1", server.port, timeout=300)
    try:
        connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        raw = answer.read().decode()
    finally:
        connection.close()
    if answer.status != 200:
        raise ValueError(f"status {answer.status}")
    if not stream:
        return str(json.loads(raw)["choices"][0]["message"]["content"])
    events = [line.removeprefix("data: ") for line in raw.split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def leave(server: Server, question: str, tokens: int, chance: random.Random) -> None:
    """Asks, reads nothing or a little, and goes."""
    body = json.dumps({"model": server.model, "messages": [user(question)], "max_tokens": tokens, "stream": chance.random() < 0.7})
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        cut = chance.choice((len(head) // 2, len(head), len(head) + len(body) // 2, None, None, None))
        connection.sendall((head + body).encode()[:cut])
        if cut is None and chance.random() < 0.5:
            connection.recv(300)
        time.sleep(chance.random() / 5)


NONSENSE = (b"{", b"[]", b'{"model": "x"}', b"\xff", b'{"model": 3}', b"[" * 5000)


def nonsense(server: Server, chance: random.Random) -> int:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", CHAT, chance.choice(NONSENSE), {"Content-Type": "application/json"})
    status = connection.getresponse().status
    connection.close()
    return status


def client(server: Server, number: int, ends: float, count: Count) -> None:
    """Until the time is over."""
    chance = random.Random(number)
    said: list[dict[str, str]] = []
    while time.monotonic() < ends:
        began, what, question = time.monotonic(), chance.random(), chance.choice(QUESTIONS)
        try:
            if what < 1 / 6:
                leave(server, question, 64, chance)
                count.add("left")
            elif what < 1 / 4:
                count.add("refused" if 400 <= nonsense(server, chance) < 500 else "failed")
            elif what < 1 / 2:  # a conversation that grows
                said = [*said, user(question)] if len(said) < 6 else [user(question)]
                said.append({"role": "assistant", "content": ask(server, said, count.tokens, chance.random() < 0.5)})
                count.add("answered", time.monotonic() - began)
            else:
                right = ask(server, [user(question)], count.tokens, chance.random() < 0.5) == count.expected[question]
                count.add("answered" if right else "wrong", time.monotonic() - began)
        except (OSError, HTTPException, ValueError) as error:
            count.add("failed")
            print(f"client {number}: {type(error).__name__}: {error}", file=sys.stderr)


def measure_one(name: str, place: Path, engine: str, minutes: float, tokens: int, folder: Path) -> tuple[Figures, Figures]:
    """A row of each table."""
    with serving(place, engine, folder) as server:
        count = Count({question: ask(server, [user(question)], tokens, False) for question in QUESTIONS}, tokens)
        before, began = server.state(), time.monotonic()
        ends = began + 60 * minutes
        clients = [threading.Thread(target=client, args=(server, number, ends, count)) for number in range(CLIENTS)]
        for each in clients:
            each.start()
        states = []
        while any(each.is_alive() for each in clients):
            time.sleep(0.5)
            states.append((time.monotonic() - began, *server.state()))
        took = time.monotonic() - began
        time.sleep(8)  # connections that are kept alive are closed after five seconds
        after = server.state()
        still = all(ask(server, [user(question)], tokens, False) == text for question, text in count.expected.items())
    minute = min(60.0, 20 * minutes)
    second = max(rss for at, rss, _, _ in states if minute <= at < 2 * minute)
    last = max(rss for at, rss, _, _ in states if took - minute <= at)
    half, most = np.percentile(count.seconds, (50, 95))
    asked = sum(count.seen.values())
    load = {"served": name, "minutes": took / 60, "requests": asked, "a second": asked / took} | {
        what: count.seen[what] for what in ("answered", "left", "refused", "wrong", "failed")
    }
    load |= {"median s": float(half), "95 % within s": float(most), "right afterwards": still}
    grown = {
        "served": name,
        "MiB in minute 2": second / 2**20,
        "MiB in the last": last / 2**20,
        "grown by, %": 100 * (last / second - 1),
    }
    grown |= {
        "threads before": before[1],
        "threads more": after[1] - before[1],
        "files before": before[2],
        "files more": after[2] - before[2],
    }
    return load, grown


def measure(folder: Path) -> list[Table]:
    """Both engines on a tiny model, then a real one."""
    from finished_runs import runs_of_both

    rows = []
    runs = runs_of_both(folder / "tiny", context=512)
    for engine in ENGINES:
        rows.append(measure_one(f"tiny run, {engine}", runs[engine], engine, SHORT or 6, 16, folder))
    if not SHORT:
        gguf_to_hugging_face(find_smollm2(), folder / "smollm2")
        rows.append(measure_one("SmolLM2-135M-Instruct, torch", folder / "smollm2", "torch", 3, 16, folder))
    loads, grown = zip(*rows, strict=True)
    return [
        Table("Requests", TEXT, loads, {"wrong": 0, "failed": 0}, ("right afterwards",)),
        Table("Growth", GROWTH, grown, {"grown by, %": 3, "threads more": 8, "files more": 2}),
    ]


if __name__ == "__main__":
    run("serve_load", str(__doc__), measure)
