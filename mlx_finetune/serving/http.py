"""The HTTP side: OpenAI's chat completions and models over Starlette, for one worker that computes."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_finetune.serving.admission import Bodies, check_host, check_key
from mlx_finetune.serving.answer import Answer, Question
from mlx_finetune.serving.bodies import WAITING, Reply, error_event
from mlx_finetune.serving.events import Events, failed
from mlx_finetune.serving.requests import ChatRequest, Refusal, read_body, read_request
from mlx_finetune.serving.served import Served
from mlx_finetune.serving.worker import MOST_WAITING, Full, Worker
from mlx_finetune.terminal import one_line, say

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

ALIVE = 10.0  # seconds without a word, after which a stream says that it is alive
MOST_READ = 4  # requests of which the prompt is made at once
GONE = 499  # as others call it, in the log: the client went away


@dataclass
class Asked:
    """One request on its way, and what the log says of it at its end: numbers, never contents."""

    request: "Request"
    say: Callable[[str], None] = say
    began: float = field(default_factory=time.monotonic)
    read: int = 0  # tokens
    written: int = 0
    status: int = GONE  # of a stream, which may end in the midst

    def log(self, status: int) -> None:
        """One line on stderr."""
        tokens = f" {self.read} tokens read, {self.written} written," if self.read else ""
        path = one_line(self.request.url.path, 80)
        self.say(f"{self.request.method} {path} {status}{tokens} {time.monotonic() - self.began:.2f} s")


@dataclass
class Front:
    """Takes requests, checks them, and hands on what the worker tells."""

    served: Served
    worker: Worker
    key: str = ""  # asked of every request where it is not empty
    say: Callable[[str], None] = say  # a line for each request
    local: bool = True  # bound to this machine: then only its own names are answered to
    bodies: Bodies = field(default_factory=Bodies)
    created: int = field(default_factory=lambda: int(time.time()))
    _noted: set[str] = field(default_factory=set)
    _reading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_READ))

    def __post_init__(self) -> None:
        assert self.served.way is None or self.served.way.marks  # proven now, not in the first request

    def application(self) -> "Starlette":
        """The routes."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        def refused(request: "Request", error: Exception) -> "Response":
            assert isinstance(error, HTTPException)
            said = {404: f"there is no {one_line(request.url.path, 80)}", 405: f"{request.method} is not for this path"}
            refusal = Refusal(said.get(error.status_code, error.detail), status=error.status_code)
            return self._refuse(Asked(request, self.say), refusal)

        routes = [
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/models", self._guarded(self._models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._guarded(self._model), methods=["GET"]),
            Route("/health", self._guarded(self._health, with_key=False), methods=["GET"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: refused, Exception: self._broken})

    def _guarded(
        self, handle: Callable[[Asked], Awaitable["Response"]], with_key: bool = True
    ) -> Callable[["Request"], Awaitable["Response"]]:
        from starlette.requests import ClientDisconnect

        async def guarded(request: "Request") -> "Response":
            asked = Asked(request, self.say)
            try:
                self._admit(request, with_key)
                return await handle(asked)
            except Refusal as refusal:
                return self._refuse(asked, refusal)
            except ClientDisconnect:
                return self._refuse(asked, Gone())

        return guarded

    def _refuse(self, asked: Asked, refusal: Refusal) -> "Response":
        from starlette.responses import JSONResponse

        asked.log(refusal.status)
        headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
        if refusal.status in (408, 413, 503):
            headers["Connection"] = "close"  # the rest of the body is not read
        return JSONResponse(refusal.to_json(), refusal.status, headers)

    def _broken(self, request: "Request", error: Exception) -> "Response":
        """A fault of ours before there was an answer; Starlette raises it again, and uvicorn says nothing of it."""
        return self._refuse(Asked(request, self.say), failed(error))

    def _admit(self, request: "Request", with_key: bool) -> None:
        if self.local:
            check_host(request)
        if with_key:
            check_key(request, self.key)

    async def _health(self, asked: Asked) -> "Response":
        """For whoever looks whether the server is there: no key is asked for."""
        from starlette.responses import JSONResponse

        return JSONResponse({"status": "ok", "waiting": self.worker.waiting})

    async def _models(self, asked: Asked) -> "Response":
        from starlette.responses import JSONResponse

        asked.log(200)
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self.served.variants]})

    async def _model(self, asked: Asked) -> "Response":
        from starlette.responses import JSONResponse

        name = asked.request.path_params["name"]
        if name not in self.served.variants:
            raise Refusal(f"there is no model {name!r:.100}", "model", "model_not_found", 404)
        asked.log(200)
        return JSONResponse(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": self.created, "owned_by": "mlx-finetune"}
        return about | {"context_length": self.served.source.context}

    async def _chat(self, asked: Asked) -> "Response":
        from starlette.responses import JSONResponse

        body = await self.bodies.read(asked.request)
        async with self._reading:
            chat, question = await asyncio.to_thread(self._read, body)  # a long prompt takes a moment
        asked.read = len(question.prompt)
        self._note(chat)
        events = self._put(question)
        reply = Reply(chat.model, len(question.prompt))
        if chat.stream:
            return _streamed(asked, events, _stream(asked, events, reply, chat.with_usage))
        try:
            pieces, answer = await _until_gone(asked.request, _collected(events))
        finally:
            events.job.cancelled.set()
        asked.written = len(answer.tokens)
        asked.log(200)
        return JSONResponse(reply.whole(pieces, answer))

    def _read(self, body: bytes) -> tuple[ChatRequest, Question]:
        chat = read_request(read_body(body))
        return chat, self.served.question(chat)

    def _note(self, chat: ChatRequest) -> None:
        note = self.served.unlike_training(chat)
        if note and note not in self._noted:
            self._noted.add(note)
            say(note)

    def _put(self, question: Question) -> "Events":
        events = Events(question)
        try:
            self.worker.put(events.job)
        except Full as full:
            raise Refusal(f"{MOST_WAITING} requests are waiting already: try again later", code="overloaded", status=503) from full
        return events


class Gone(Refusal):
    """The client went away: nobody reads what is answered."""

    def __init__(self) -> None:
        super().__init__("the client has gone", status=GONE)


async def _collected(events: Events) -> tuple[list[str], Answer]:
    pieces: list[str] = []
    while True:
        event = await events.next()
        if isinstance(event, Answer):
            return pieces, event
        if isinstance(event, Exception):
            raise failed(event)
        pieces.append(event or "")


async def _until_gone(request: "Request", answer: Any) -> Any:
    """What `answer` gives; raises Gone where the client leaves before."""
    waiting = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise Gone()
        return waiting.result()
    finally:
        waiting.cancel()
        leaving.cancel()


async def _left(request: "Request") -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _streamed(asked: Asked, events: Events, pieces: AsyncIterator[str]) -> "Response":
    """A response after which, however it ends, nothing is computed for it any more."""
    from starlette.responses import StreamingResponse

    class Streamed(StreamingResponse):
        async def __call__(self, *arguments: Any) -> None:
            try:
                await super().__call__(*arguments)
            finally:
                events.job.cancelled.set()
                asked.log(asked.status)

    return Streamed(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _stream(asked: Asked, events: Events, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. Where the client goes away, Starlette ends this in the midst."""
    yield reply.opening()
    while True:
        event = await events.next(ALIVE)
        if event is None:
            yield WAITING
        elif isinstance(event, str):
            asked.written += 1
            yield reply.piece(event)
        elif isinstance(event, Answer):
            asked.written, asked.status = len(event.tokens), 200
            for last in reply.ending(event, with_usage):
                yield last
            return
        else:
            refusal = failed(event)
            asked.status = refusal.status
            yield error_event(refusal.to_json())
            return
