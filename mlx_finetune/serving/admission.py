"""Who is let in, before anything of a request is read: by Host, Origin and key; and how much of its body, and how slowly."""

import asyncio
import hmac
import ipaddress
import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mlx_finetune.serving.requests import Refusal

if TYPE_CHECKING:
    from starlette.requests import Request

MOST_BYTES = 16 * 2**20  # of a request
MOST_HELD = 4 * MOST_BYTES  # of all requests that are being read
BODY_WITHIN = 60.0  # seconds


def is_local(host: str) -> bool:
    """Whether the address is this machine's own, which no other reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_host(request: "Request") -> None:
    """A page of the web whose name was made to lead here is not to read answers, nor any other page to ask.

    Raises:
        Refusal: the request is for another name than this machine's own, or comes from a page that is not of this machine.
    """
    host = request.headers.get("host", "")
    if not is_local(_name(host)):
        raise Refusal(f"this server answers to localhost, not to {host!r:.80}", status=403)
    for origin in request.headers.getlist("origin"):
        if not is_local(_host_of(origin)):
            raise Refusal("this server answers to no page of the web", status=403)


def _name(host: str) -> str:
    return host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def check_key(request: "Request", key: str) -> None:
    """Compares the bytes of either, in a time that does not tell how much of them is right; raises Refusal."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if key and not hmac.compare_digest(given.encode("latin-1"), os.fsencode(key)):
        raise Refusal("the API key is missing, or not this server's", code="invalid_api_key", status=401)


class Bodies:
    """Reads bodies piece by piece, so that no more than the limits is ever held, of one and of all."""

    def __init__(self, within: float = BODY_WITHIN) -> None:
        self._within, self._held = within, 0

    async def read(self, request: "Request") -> bytes:
        """The whole body.

        Raises:
            Refusal: it is too large, too slow or no JSON, or too many others are being read.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a page of the web may send without asking
            raise Refusal(f"the content type is {kind[:60]!r}, not application/json", status=415)
        length = request.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > MOST_BYTES):
            raise _too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._within):
                async for part in request.stream():
                    size, self._held = size + len(part), self._held + len(part)
                    parts.append(part)
                    if size > MOST_BYTES:
                        raise _too_large()
                    if self._held > MOST_HELD:
                        raise Refusal("too many large requests at once: try again later", code="overloaded", status=503)
            return b"".join(parts)
        except TimeoutError as error:
            raise Refusal(f"the body did not come within {self._within:g} seconds", status=408) from error
        finally:
            self._held -= size


def _too_large() -> Refusal:
    return Refusal(f"the body is larger than {MOST_BYTES >> 20} MB", code="request_too_large", status=413)
