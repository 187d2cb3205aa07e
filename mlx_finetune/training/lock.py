"""One process trains in a run's folder. The kernel lets go of the lock when that process ends, however it ends."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from mlx_finetune.errors import UserError
from mlx_finetune.terminal import say

LOCK = ".lock"  # in a run's folder: who trains there, or did; the file alone holds nothing off
ELSEWHERE = "choose another --out"
PATIENCE, BETWEEN = 0.2, 0.01  # seconds: who only looks, as `refuse_running`, holds the lock for a moment
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(run: Path, hint: str = ELSEWHERE) -> Iterator[None]:
    """Inside, no other process trains in the folder, which exists. A file system without locks is said aloud.

    hint: what else can be done where one does.

    Raises:
        UserError: another process does, or the file cannot be written.
    """
    try:
        handle = _acquired(run / LOCK, hint)
    except OSError as error:
        raise UserError(f"{run / LOCK}: cannot be written: {error.strerror}", hint=hint) from error
    try:
        yield
    finally:
        os.close(handle)


def refuse_running(run: Path) -> None:
    """Raises UserError where a process trains in the folder now; changes nothing."""
    try:
        handle = os.open(run / LOCK, os.O_RDONLY)
    except OSError:
        return  # no lock, or one that cannot be read: `locked` will say so
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _running(run) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    finally:
        os.close(handle)


def _acquired(path: Path, hint: str) -> int:
    until = time.monotonic() + PATIENCE
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            if time.monotonic() < until:
                time.sleep(BETWEEN)
                continue
            raise _running(path.parent, hint) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise
            say(f"{path.parent}: its file system has no locks ({error.strerror}): see to it that nothing else trains there")
        if _still_named(handle, path):
            break
        os.close(handle)  # a process that failed has removed it meanwhile, with its folder
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().astimezone().isoformat(timespec="seconds")}
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps(who).encode() + b"\n")
    return handle


def _still_named(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _running(run: Path, hint: str = ELSEWHERE) -> UserError:
    try:
        found = json.loads((run / LOCK).read_text(encoding="utf-8"))
        who = f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, TypeError, KeyError):  # it has only just begun, and has not said yet
        who = "which has only just begun"
    return UserError(f"{run}: another process trains there ({who})", hint=f"wait until it ends, or {hint}")
