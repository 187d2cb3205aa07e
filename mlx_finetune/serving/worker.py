"""One thread that computes all answers, one after the other: MLX wants one, and the model is busy anyway."""

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
        self._open, self._jobs, self._change = open_model, list[Job](), threading.Condition()
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
        """Raises Full where too many wait; those who have gone do not count."""
        with self._change:
            self._jobs = [each for each in self._jobs if not self._gone(each)]
            if len(self._jobs) >= MOST_WAITING:
                raise Full
            self._jobs.append(job)
            self._change.notify()

    @property
    def waiting(self) -> int:
        """How many questions nobody has looked at yet."""
        return sum(not self._gone(each) for each in self._jobs)

    def stop(self, seconds: float = 10) -> None:
        """Ends after the next token; waits at most so long."""
        with self._change:
            self._stopping.set()
            self._change.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            opened = self._open()
        except BaseException as error:  # noqa: BLE001  raised again by `start`, in the thread that waits there
            self._failed.append(error)
            return
        finally:
            self._ready.set()
        while job := self._next():
            self._answer(opened, job)

    def _next(self) -> Job | None:
        """The one that waits longest; None at the end."""
        with self._change:
            self._change.wait_for(lambda: self._jobs or self._stopping.is_set())
            return None if self._stopping.is_set() else self._jobs.pop(0)

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
