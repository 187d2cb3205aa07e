"""Files that appear whole or not at all."""

import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mlx_finetune.errors import UserError

DAMAGED = "bring the file back, or make its folder again"


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[str]]:
    """A UTF-8 text file that takes its name only when it is whole; on an error the old file stays.

    Raises:
        UserError: nothing can be written there.
    """
    with _place_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, replace_old: bool = False) -> Iterator[Path]:
    """A folder that takes its name only when the block ends without an error.

    With `replace_old` the folder that has the name gives way at the very end; until then it stays as it is.

    Raises:
        UserError: `path` exists, for nothing is overwritten unasked, or nothing can be written there.
    """
    with _place_named(path):
        if not replace_old:
            refuse_existing(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if replace_old:
            _swap(temporary, path)
        else:
            refuse_existing(path)
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    return libc.clonefile(os.fsencode(source.resolve()), os.fsencode(target), 0) == 0


def sync(path: Path) -> None:
    """Waits until the file stands on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _swap(new: Path, old: Path) -> None:
    """`new` takes the name of `old`, which is then deleted; where that fails, `old` has its name again."""
    aside = Path(tempfile.mkdtemp(dir=old.parent, prefix=f".{old.name}.")) / old.name
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


def new_folder(path: Path) -> None:
    """Makes the folder and is the only one who did: of two programs that try, one gets it.

    Raises:
        UserError: something of that name exists, or the place cannot be written to.
    """
    try:
        path.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{path} exists already", hint="choose another --out, or move the old one away") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", hint="choose another --out") from error


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
    """Raises UserError with the place where the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file", hint=DAMAGED) from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", hint=DAMAGED) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}", hint=DAMAGED) from error
