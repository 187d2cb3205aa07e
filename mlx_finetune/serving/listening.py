"""Where a server listens: an address that is had before a model is loaded, and the server itself, here or in a thread."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlx_finetune.errors import UserError
from mlx_finetune.serving.connections import protocol_class
from mlx_finetune.serving.defaults import HOST
from mlx_finetune.serving.http import Front
from mlx_finetune.serving.opened import Opened
from mlx_finetune.serving.served import Served
from mlx_finetune.serving.worker import Worker

if TYPE_CHECKING:
    import uvicorn

PATIENCE = 2  # seconds for open connections once the server is to end


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to the address before anything is loaded; raises UserError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # UnicodeError: what can be no name at all
        reason = error.strerror if isinstance(error, OSError) else "not a name of a machine"
        raise UserError(f"--host {host}: {reason}", hint="--host 127.0.0.1 serves this machine alone") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(f"port {port} of {host}: {error.strerror}", hint="--port 0 takes one that is free") from error
    return listener


def http_server(front: Front, ready: Callable[[], None], **bounds: Any) -> "uvicorn.Server":
    """To be run with the socket; Ctrl-C and SIGTERM end it, and are raised again then. `ready`: called once it takes requests.

    `bounds`: as `protocol_class` has them.
    """
    import uvicorn

    config = uvicorn.Config(
        front.application(), log_level="critical", access_log=False, server_header=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=PATIENCE, http=protocol_class(**bounds),  # h11: unlike httptools it has a limit for headers
    )  # fmt: skip

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    return Server(config)


@contextmanager
def in_background(
    served: Served, open_model: Callable[[], Opened], key: str = "", log: Callable[[str], None] = lambda line: None, **bounds: Any
) -> Iterator[str]:
    """While inside, the model is served at the address that is given, by threads of this process; `bounds`: as `http_server`."""
    with listening(HOST, 0) as listener:
        worker, ready = Worker(open_model), threading.Event()
        worker.start()
        server = http_server(Front(served, worker, key, log), ready.set, **bounds)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server", daemon=True)
        thread.start()
        ready.wait()
        try:
            yield url_of(listener, HOST)
        finally:
            server.should_exit = True
            thread.join()
            worker.stop()


def url_of(listener: socket.socket, host: str) -> str:
    """As clients on this machine, or those who know its name, write it."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104  shown, not bound
    return f"http://{shown}:{listener.getsockname()[1]}"
