"""One thread that computes all answers, one after the other: MLX wants one, and the model is busy anyway."""

import queue
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from mlx_finetune.errors import no_memory
from mlx_finetune.serving.answer import Answer, Question, answer
from mlx_finetune.serving.opened import Opened

MOST_WAITING = 64  # questions
Event = str | Answer | Exception  # a piece of text, then the end: the answer, or what went wrong


@dataclass
class Job:
    """A question on its way; `tell` is called from the worker's thread."""

    question: Question
    tell: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Full(Exception):
    """Too many are waiting."""


class Worker:
    """Opens a model in a thread of its own and answers what is put to it."""

    def __init__(self, open_model: Callable[[], Opened]) -> None:
        """`open_model` is called in the thread; `start` hands on what it raises."""
        self._open, self._jobs = open_model, queue.Queue[Job | None](MOST_WAITING)
        self._ready, self._failed = threading.Event(), list[BaseException]()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Returns when the model is in memory; raises what went wrong."""
        self._thread.start()
        while not self._ready.wait(0.2):  # so that Ctrl-C is heard
            pass
        if self._failed:
            raise self._failed[0]

    def put(self, job: Job) -> None:
        """Raises Full where too many wait."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full as full:
            raise Full from full

    @property
    def waiting(self) -> int:
        """How many questions nobody has looked at yet."""
        return self._jobs.qsize()

    def stop(self, seconds: float = 10) -> None:
        """Ends after the next token; waits at most so long."""
        self._stopping.set()
        while not self._jobs.empty():
            self._jobs.get_nowait()
        self._jobs.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            opened = self._open()
        except BaseException as error:  # noqa: BLE001  raised again by `start`, in the thread that waits there
            self._failed.append(error)
            return
        finally:
            self._ready.set()
        while job := self._jobs.get():
            self._answer(opened, job)

    def _answer(self, opened: Opened, job: Job) -> None:
        """Whatever fails in one answer is told to the one who asked; the next one is answered."""
        if self._gone(job):
            return
        said = Answer()
        try:
            with closing(answer(opened, job.question, said)) as pieces:
                for piece in pieces:
                    if self._gone(job):
                        return
                    if piece:
                        job.tell(piece)
        except Exception as error:  # noqa: BLE001  whatever it is, the server goes on
            if no_memory(error):
                opened.forget()
            job.tell(error)
        else:
            job.tell(said)

    def _gone(self, job: Job) -> bool:
        return job.cancelled.is_set() or self._stopping.is_set()
