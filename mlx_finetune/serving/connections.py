"""Connections that take their time: uvicorn's own protocol waits for ever for a request that was begun, on any number of them."""

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_WITHIN = 20.0  # seconds for the first line and the headers of a request, from the connection or the answer before on
TAKEN_WITHIN, LEAST_TAKEN = 60.0, 1024  # seconds in which a client takes so many bytes of an answer that waits for it
MOST_CONNECTIONS = 256  # at once; others are closed as they come


def protocol_class(
    head_within: float = HEAD_WITHIN, most: int = MOST_CONNECTIONS, taken_within: float = TAKEN_WITHIN
) -> "type[H11Protocol]":
    """uvicorn's protocol with these bounds. Imported here: uvicorn is an extra."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Bounded(H11Protocol):
        _hurry: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.close()
                return
            self._wait_for_a_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            self._taken()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            """The client takes nothing, and the buffers are full."""
            super().pause_writing()
            self._wait_until_taken()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._taken()
            self._closes()

        def _taken(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None

        def _close(self) -> None:
            self.transport.close()
            self._closes()

        def _closes(self) -> None:
            """A connection that is being closed waits until what is left is taken, but not for ever."""
            if self.transport.is_closing():
                self._wait_until_taken()

        def _wait_until_taken(self, before: int | None = None) -> None:
            """Ends the connection where too little was taken since it was looked at, when `before` bytes were left."""
            left = self.transport.get_write_buffer_size()
            if before is not None and left > before - LEAST_TAKEN:
                self.transport.abort()
            elif before is not None or self._stalled is None:
                self._stalled = self.loop.call_later(taken_within, self._wait_until_taken, left)

        def handle_events(self) -> None:
            try:
                super().handle_events()
            except h11.LocalProtocolError:  # nonsense behind a request that is being answered: no other answer can be begun
                self.transport.close()
            self._wait_for_a_head()
            self._closes()

        def send_400_response(self, msg: str) -> None:
            if self.cycle is not None:
                self.cycle.disconnected = True  # else the application would answer too, behind this answer
                self.cycle.message_event.set()
            super().send_400_response(msg)
            self._closes()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait_for_a_head()
            self._closes()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._closes()

        def _wait_for_a_head(self) -> None:
            """Does nothing while a request is being read or answered; a timer that runs already is not set back."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self._hurry is None and not self.transport.is_closing():
                self._hurry = self.loop.call_later(head_within, self._close)

        def _stop_waiting(self) -> None:
            if self._hurry is not None:
                self._hurry.cancel()
                self._hurry = None

    return Bounded
