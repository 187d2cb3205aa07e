"""What the worker tells, carried from its thread to the one that serves, and what a client is told where an answer failed."""

import asyncio
import traceback
from contextlib import suppress

from mlx_finetune.errors import UserError, no_memory
from mlx_finetune.serving.answer import Question
from mlx_finetune.serving.requests import Refusal
from mlx_finetune.serving.worker import Event, Job
from mlx_finetune.terminal import one_line, say

QUOTING = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


class Events:
    """What the worker tells of one job, for the thread that serves."""

    def __init__(self, question: Question) -> None:
        """To be made in the thread that serves."""
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self._queue.put_nowait, event)

        self.job = Job(question, tell)

    async def next(self, seconds: float | None = None) -> Event | None:
        """The next one; None where none came for so long."""
        try:
            return await asyncio.wait_for(self._queue.get(), seconds)
        except TimeoutError:
            return None


def failure(error: Exception) -> Refusal:
    """What a client is told of an answer that failed."""
    if no_memory(error):
        return Refusal("no memory left for this answer: try a shorter conversation", code="out_of_memory", status=500)
    if isinstance(error, UserError):
        return Refusal(error.message, status=500)
    return Refusal(f"the answer failed ({type(error).__name__}); the server's own output says more", status=500)


def failed(error: Exception) -> Refusal:
    """As `failure`, and says it on stderr: in a line, or, where it is a fault of ours, with its places but without its words.

    An exception of such a kind says what it met, which may be a piece of a conversation.
    """
    quotes = isinstance(error, QUOTING) and not isinstance(error, UserError)
    say(f"an answer failed: {type(error).__name__}" + ("" if quotes else f": {one_line(str(error), 200)}"))
    if not no_memory(error) and not isinstance(error, UserError):
        say("Traceback (most recent call last):\n" + "".join(traceback.format_tb(error.__traceback__)).rstrip())
    return failure(error)
