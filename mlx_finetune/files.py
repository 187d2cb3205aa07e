"""Files that appear whole or not at all."""

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mlx_finetune.errors import UserError
from mlx_finetune.reading import read_whole

DAMAGED = "bring the file back, or make its folder again"


@contextmanager
def atomic_file(path: Path, private: bool = False) -> Iterator[IO[str]]:
    """A UTF-8 text file that takes its name only when it is whole and on the disk; on an error the old file stays.

    `private`: nobody else on this machine may read it, whatever the umask.

    Raises:
        UserError: nothing can be written there.
        OSError: there is no room for it; it names the file.
    """
    with _atomic(path, "w", private, encoding="utf-8", newline="\n") as file:
        yield file


def write_bytes(path: Path, content: bytes) -> None:
    """The same for bytes; see `atomic_file`."""
    with _atomic(path, "wb") as file:
        file.write(content)


@contextmanager
def _atomic(path: Path, mode: str, private: bool = False, **how: Any) -> Iterator[IO[Any]]:
    with _place_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=half_made(path))
    temporary = Path(name)
    try:
        with os.fdopen(handle, mode, **how) as file:
            yield file
            file.flush()
            _to_disk(file.fileno())
        temporary.chmod(0o600 if private else 0o666 & ~_umask())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:  # a write names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, replace_old: bool = False, private: bool = False) -> Iterator[Path]:
    """A folder that takes its name only when the block ends without an error.

    With `replace_old` the folder that has the name gives way at the very end; until then it stays as it is, and hands on who may
    enter. `private`: a new one is for nobody else on this machine, whatever the umask.

    Raises:
        UserError: `path` exists, for nothing is overwritten unasked, or nothing can be written there.
    """
    with _place_named(path):
        if not replace_old:
            refuse_existing(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=half_made(path)))
    try:
        yield temporary
        for file in temporary.iterdir():  # safetensors writes for oneself alone
            if file.is_file() and not file.is_symlink():
                file.chmod(0o666 & ~_umask())
        old = replace_old and path.is_dir()
        temporary.chmod(path.stat().st_mode & 0o777 if old else 0o700 if private else 0o777 & ~_umask())
        sync_folder(temporary)
        if replace_old:
            _swap(temporary, path)
        else:
            refuse_existing(path)
            temporary.replace(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def half_made(path: Path) -> str:
    """How the name begins of what is written, or deleted, beside `path`; eight characters of chance follow."""
    return f".{path.name}.part-"


def leftovers(path: Path) -> list[Path]:
    """What a killed process left of writing `path`: hidden files and folders beside it, of the names that are given here."""
    name = re.compile(rf"{re.escape(half_made(path))}[a-z0-9_]{{8}}")
    return sorted(found for found in path.parent.glob(".*") if name.fullmatch(found.name))


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """A file of its own, writable; on APFS a clone, which takes neither time nor space until it is changed."""
    if not clone_file(source, target):
        shutil.copyfile(source, target)
        target.chmod(0o644)


def clone_file(source: Path, target: Path) -> bool:
    """On APFS a writable clone; false elsewhere, and where source and target lie on two file systems."""
    target.parent.mkdir(exist_ok=True)
    if not (sys.platform == "darwin" and _clone(source, target)):
        return False
    target.chmod(0o644)
    return True


def _clone(source: Path, target: Path) -> bool:
    """clonefile(2); false where the file system cannot, or where source and target lie on two of them."""
    libc: Any = ctypes.CDLL(None)
    status: int = libc.clonefile(os.fsencode(source.resolve()), os.fsencode(target), 0)
    return status == 0


def sync(path: Path) -> None:
    """Waits until the file stands on the disk."""
    with path.open("rb") as file:
        _to_disk(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the names in the folder stand on the disk; some file systems do not know how, and keep order by themselves."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _to_disk(handle: int) -> None:
    """fsync(2); on macOS through the drive's own cache, where the file system can."""
    if full := getattr(fcntl, "F_FULLFSYNC", None):
        with suppress(OSError):
            fcntl.fcntl(handle, full)
            return
    os.fsync(handle)


def _swap(new: Path, old: Path) -> None:
    """`new` takes the name of `old`, which is then deleted; where that fails, `old` has its name again."""
    aside = Path(tempfile.mkdtemp(dir=old.parent, prefix=half_made(old))) / old.name
    old.replace(aside)
    try:
        new.replace(old)
    except OSError:
        aside.replace(old)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)


@contextmanager
def _place_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}", hint="choose another place") from error


def _umask() -> int:
    """What the person withholds from others; Python can only read it by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def refuse_existing(path: Path, hint: str = "") -> None:
    """Raises UserError where something of that name stands already."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already", hint=hint or "choose another --out, or move the old one away")


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, written atomically."""
    with atomic_file(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path) -> Any:
    """Raises UserError with the place where the file is missing, no ordinary file, or not JSON."""
    text = read_whole(path, DAMAGED, missing="no such file")
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}", hint=DAMAGED) from error
