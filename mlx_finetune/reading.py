"""Files that strangers or a crash may have written: read so that nothing blocks, and nothing is held that is too large."""

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard

import yaml

from mlx_finetune.errors import UserError

LARGEST = 128 * 2**20  # bytes of a file that is read whole: the largest tokenizer.json has 40 MB
LARGEST_SETTINGS = 2**18  # bytes of YAML, of which a reader takes 100 kB a second
LONGEST_LINE = 16 * 2**20  # bytes; gptme sends at most 200,000 characters of files in a message
CHUNK = 2**20  # bytes of a line that is passed over
LONGEST_NAME, LONGEST_PATH = 255, 4000  # bytes of the name of a file, and of all names of its place
DEEPEST = 50  # levels of lists and maps
MOST_DIGITS = 400  # of a number: beyond any float
# What PyYAML raises for text that is none, beside its own errors: `!!int ""`, `!!timestamp x`, a day that is not in the calendar.
NOT_YAML = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class Line:
    """One line with its end; `raw` is None where it is too long."""

    number: int
    raw: bytes | None


def open_ordinary(path: Path) -> IO[bytes]:
    """The file for reading, through links, if it is an ordinary one.

    Raises:
        OSError: it is missing or unreadable, a folder, or a pipe or device, which could block or never end.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, "not an ordinary file" if number == errno.EINVAL else os.strerror(number), str(path))
    return os.fdopen(handle, "rb")


def read_whole(path: Path, hint: str, most: int = LARGEST, missing: str = "") -> bytes:
    """All of a file of at most so many bytes. `missing`: what is said where there is none, instead of the system's words.

    Raises:
        UserError: it is missing, unreadable, larger, or no ordinary file.
    """
    try:
        with open_ordinary(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size + 1) if size <= most else None
            if data and len(data) > size:  # it grew, or is one of the system's that say no size
                data += file.read(most + 1 - size)
    except FileNotFoundError as error:
        raise UserError(f"{path}: {missing or error.strerror}", hint=hint) from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", hint=hint) from error
    if data is None or len(data) > most:
        bound = f"{most >> 20} MB" if most >> 20 else f"{most >> 10} kB"
        raise UserError(f"{path}: larger than {bound}, as no such file is", hint=hint)
    return data


def is_file_name(name: Any, ending: str) -> TypeGuard[str]:
    """Whether it names a file of the folder at hand, which every file system can have, and not one elsewhere."""
    is_plain = isinstance(name, str) and name.endswith(ending) and name.isprintable() and Path(name).name == name
    return is_plain and len(name.encode()) <= LONGEST_NAME


def can_be_a_place(path: str) -> bool:
    """Whether a file system can have it at all: asked about another, Python gives an error instead of an answer."""
    sizes = [len(name.encode(errors="surrogatepass")) for name in (path, *path.split("/"))]
    return "\0" not in path and sizes[0] <= LONGEST_PATH and max(sizes[1:]) <= LONGEST_NAME


def lines_of(file: IO[bytes], longest: int = LONGEST_LINE) -> Iterator[Line]:
    """Every line; of one that is too long only the number is given, and it is never held whole."""
    number = 0
    while raw := file.readline(longest + 1):
        number += 1
        if len(raw) > longest and not raw.endswith(b"\n"):
            while (rest := file.readline(CHUNK)) and not rest.endswith(b"\n"):
                pass
            yield Line(number, None)
        else:
            yield Line(number, raw)


class _Bounded(yaml.BaseLoader):
    """All values are text. Without what makes a small text large (aliases) or slow (brackets in brackets)."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs have no types for it
        if isinstance(event, yaml.events.AliasEvent):
            what = f"an alias, *{event.anchor:.40}: write what it stands for"
            raise yaml.composer.ComposerError(None, None, what, event.start_mark)  # type: ignore[arg-type]  # a mark of C does too
        self._depth += 1
        self._refuse_deeper(self._depth, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def fetch_flow_collection_start(self, token: Any) -> Any:
        self._refuse_deeper(self.flow_level, self.get_mark())
        return super().fetch_flow_collection_start(token)

    def _refuse_deeper(self, depth: int, mark: Any) -> None:
        if depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested more than {DEEPEST} deep", mark)


class _Plain(_Bounded, yaml.SafeLoader):
    """And without what a person did not mean: one name twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        values = super().construct_mapping(node, deep=True)
        if len(values) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "one name stands there twice", node.start_mark)
        return values

    def construct_yaml_int(self, node: Any) -> Any:
        if len(node.value) > MOST_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, f"a number of {len(node.value)} digits", node.start_mark)
        return super().construct_yaml_int(node)


_Plain.add_constructor("tag:yaml.org,2002:int", _Plain.construct_yaml_int)


def plain_yaml(text: str, typed: bool = True) -> Any:
    """The value of a text in YAML, of plain values; all of them are text where `typed` is false.

    Raises:
        ValueError: it is none, or not plain; with a reason of one short line.
    """
    try:
        return yaml.load(text, Loader=_Plain if typed else _Bounded)  # noqa: S506  both make plain values only
    except NOT_YAML as error:
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """PyYAML's own has the place on lines of its own."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        said = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        return f"line {mark.line + 1}, column {mark.column + 1}: {said[:160]}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
