"""road.json: what each stage of `run` made, of what, and when; it checks itself, and what was made against it."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json, write_json
from mlx_finetune.installed import PACKAGES, versions
from mlx_finetune.training.manifest import sha256

FILE, FORMAT = "road.json", 1
HINT = "bring it back; without it run looks at what is there, and makes anew what it cannot tell the origin of, beside the old"


class Stamp(BaseModel):
    """Of a file: bytes, time of its last change in nanoseconds, and SHA-256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    time: int
    sha256: str


class Record(BaseModel):
    """What a stage made. `made`: a folder or a file, seen from the folder of the road; `files`: in it, by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    inputs: dict[str, Any]
    made: str
    files: dict[str, Stamp]
    at: str
    versions: dict[str, str]


class Written(BaseModel):
    """The file. `making`: where a stage was writing at that time; `just_made`: files there, with size and time, once it had.

    `moving`: the stage whose file of places was being put right. `folder`: where it stood.
    `ended`: whether every stage was gone through.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    folder: str = ""
    stages: dict[str, Record] = {}
    making: str = ""
    just_made: dict[str, tuple[int, int]] = {}
    moving: str = ""
    ended: bool = True
    sha256: str = ""


@dataclass
class State:
    """What is known of the folder of a road."""

    folder: Path
    written: Written = field(default_factory=lambda: Written(format=FORMAT))

    @classmethod
    def open(cls, folder: Path) -> "State":
        """Of a folder that may not be there yet.

        Raises:
            UserError: the file is damaged, was altered, or comes from a later version.
        """
        path = folder / FILE
        if not path.is_file():
            return cls(folder)
        found = read_json(path)
        if isinstance(found, dict) and type(found.get("format")) is int and found["format"] > FORMAT:
            message = f"{path}: of format {found['format']}; this version reads format {FORMAT}"
            raise UserError(message, hint="update mlx-finetune")
        try:
            written = Written.model_validate(found)
        except ValidationError as error:
            raise UserError(f"{path}: not what run writes: {error.errors()[0]['msg'].lower()}", hint=HINT) from error
        if written.sha256 != _digest(found):  # as it stands there: an earlier version knew fewer fields
            raise UserError(f"{path}: was altered since run wrote it", hint=HINT)
        return cls(folder, written)

    def record(self, stage: str) -> Record | None:
        """What the stage made the last time."""
        return self.written.stages.get(stage)

    @contextmanager
    def writing(self, out: Path) -> Iterator[None]:
        """Inside, `out` is written. A killed process leaves word of it; one that fails does not: what comes there is not ours."""
        self._write(making=self._named(out), just_made={}, ended=False)
        try:
            yield
        finally:
            if self.written.making:
                self._write(making="", just_made={})

    def wrote(self, out: Path) -> None:
        """Says that `out` is whole, before its bytes are read: killed from now on, it is known to be ours as it is."""
        self._write(just_made=_sizes(out))

    def keep(self, stage: str, inputs: dict[str, Any], made: Path, files: Iterable[Path]) -> None:
        """That the stage is done."""
        at = datetime.now().astimezone().isoformat(timespec="seconds")
        stamps = {path.relative_to(made).as_posix() if path != made else "": stamp(path) for path in sorted(files)}
        record = Record(stage=stage, inputs=inputs, made=self._named(made), files=stamps, at=at, versions=versions(PACKAGES))
        self._write(stages=self.written.stages | {stage: record}, making="", just_made={})

    def put(self, name: str, record: Record) -> None:
        """Under another name too."""
        self._write(stages=self.written.stages | {name: record})

    @contextmanager
    def moving(self, whole: Mapping[str, Record], stage: str) -> Iterator[bool]:
        """Inside, what the stage made is put right after a move, if it is among the whole ones; then it is stamped again.

        A killed process leaves word of it, and the old place of the road.
        """
        then, record = self.written.folder, whole.get(stage)
        self._write(moving=stage, folder=then)
        yield record is not None
        new = {}
        if record:
            files = {each: stamp(self.place(record) / each if each else self.place(record)) for each in record.files}
            new = {stage: record.model_copy(update={"files": files})}
        self._write(stages=self.written.stages | new, moving="", folder=then)

    def moved(self) -> None:
        """That the road stands where it is now."""
        self._write(moving="")

    def end(self) -> None:
        """That every stage was gone through."""
        if not self.written.ended:
            self._write(ended=True, making="", just_made={})

    def was_making(self, path: Path) -> bool:
        """Whether a killed process was writing there."""
        return self.written.making == self._named(path)

    def had_made(self, path: Path) -> bool:
        """Whether a killed process wrote just what stands there."""
        return self.was_making(path) and self.written.just_made == _sizes(path)

    def place(self, record: Record) -> Path:
        """Where what was made stands."""
        return self.folder / record.made

    def difference(self, record: Record, but: str = "") -> str | None:
        """What is no longer as it was made, in words; None where all of it is there. Same size and time count as the same.

        but: the name of a file that may be another.
        """
        made = self.place(record)
        if not made.exists():
            return f"{record.made} is gone"
        for name, said in record.files.items():
            path = made / name if name else made
            if not path.is_file():
                return f"{record.made}/{name} is gone"
            status = path.stat()
            if name and name == but:
                continue
            if status.st_size != said.size or (status.st_mtime_ns != said.time and sha256(path) != said.sha256):
                return f"{f'{record.made}/{name}' if name else record.made} was altered"
        return None

    def is_only_ours(self, record: Record) -> bool:
        """Whether nothing stands there but what was made, as it was made."""
        made = self.place(record)
        there = {path.relative_to(made).as_posix() for path in made.rglob("*") if not path.is_dir()} if made.is_dir() else {""}
        return self.difference(record) is None and there <= set(record.files)

    def _named(self, path: Path) -> str:
        path = path.absolute()
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)

    def _write(self, **changes: Any) -> None:
        written = self.written.model_copy(update={"folder": str(self.folder)} | changes)
        self.written = written.model_copy(update={"sha256": _digest(written.model_dump(mode="json"))})
        write_json(self.folder / FILE, self.written.model_dump(mode="json"))


def stamp(path: Path) -> Stamp:
    """Of a file as it is now."""
    status = path.stat()
    return Stamp(size=status.st_size, time=status.st_mtime_ns, sha256=sha256(path))


def files_in(made: Path) -> list[Path]:
    """All files of a folder."""
    return [path for path in made.rglob("*") if not path.is_dir()]


def _sizes(made: Path) -> dict[str, tuple[int, int]]:
    files = files_in(made) if made.is_dir() else [made]
    status = {path.relative_to(made).as_posix(): path.lstat() for path in files}
    return {name: (one.st_size, one.st_mtime_ns) for name, one in status.items()}


def _digest(plain: dict[str, Any]) -> str:
    without = {name: value for name, value in plain.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(without, sort_keys=True).encode()).hexdigest()
