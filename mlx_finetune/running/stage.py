"""What a stage of `run` is: it says what it would do and why, and does it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from mlx_finetune.data.dataset import Dataset
from mlx_finetune.errors import UserError
from mlx_finetune.files import copy_file, half_made, leftovers, remove
from mlx_finetune.models.hub import HUB_ID, check_model_folder, folder_in_cache, model_folder
from mlx_finetune.road import Road
from mlx_finetune.running.state import Record, State, files_in
from mlx_finetune.terminal import Done, say

OLD = "old"
Action = Literal["skip", "do", "go on", "off", "wait"]
DOES: dict[Action, str] = {"skip": "done", "do": "to do", "go on": "goes on", "off": "left out", "wait": "waits"}


@dataclass(frozen=True)
class Verdict:
    """What a stage will do; `why` in words. wait: known only once an earlier stage is done. off: it was not asked for."""

    action: Action
    why: str

    @property
    def acts(self) -> bool:
        """Whether something is written."""
        return self.action in ("do", "go on")


@dataclass
class Work:
    """What the stages share. `newest`: new conversations even where an earlier start was not gone through."""

    road: Road
    state: State
    command: str  # the same again
    newest: bool = False
    found: dict[str, Path] = field(default_factory=dict)  # what the stages so far have made, by stage

    @property
    def collected(self) -> Path:
        """Folder of the conversations."""
        return self.road.folder / "collected"

    @property
    def data(self) -> Path:
        """Folder of the prepared data set."""
        return Path(self.road.config.data or self.road.folder / "dataset")

    @property
    def dataset(self) -> Dataset:
        """Opened anew each time: an earlier stage may have made another."""
        return Dataset.open(self.data)

    def model_here(self) -> Path | None:
        """The model's folder; None where it would have to be downloaded. Downloads nothing."""
        name = self.road.config.model
        if not name:
            raise UserError(f"{self.road.file}: no model", hint="a line `model: ...` names a folder, or a hub id such as org/name")
        if Path(name).exists() or not HUB_ID.fullmatch(name):
            return model_folder(name)  # or says what is wrong with it
        folder = folder_in_cache(name)
        if folder is None:
            return None
        try:
            check_model_folder(folder)
        except UserError:  # a download that broke off: it goes on, or says what is wrong
            return None
        return folder


class Stage(ABC):
    """One of the road. `after`: stages whose results it needs."""

    name: str
    after: tuple[str, ...] = ()

    def __init__(self, work: Work) -> None:
        self.work = work

    @abstractmethod
    def look(self) -> Verdict:
        """What it would do now; changes nothing."""

    @abstractmethod
    def do(self) -> Done:
        """Does it, and keeps the record."""

    def adopt(self) -> None:  # noqa: B027  most have nothing to adopt
        """Keeps the record of what is there, where that says something else."""

    @property
    def record(self) -> Record | None:
        """What it made the last time."""
        return self.work.state.record(self.name)


class Made(Stage):
    """A stage that makes one file or folder of its inputs, all of them known beforehand."""

    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """Whatever decides on the result."""

    @abstractmethod
    def wanted_place(self) -> Path:
        """Where it is made, unless something else stands there."""

    @abstractmethod
    def make(self, out: Path) -> Done:
        """Writes `out`, which does not exist."""

    def off(self) -> str | None:
        """Why there is nothing to do at all, in words."""
        return None

    def look(self) -> Verdict:
        """By the record of the last time."""
        if why := self.off():
            return Verdict("off", why)
        record, inputs, state = self.record, self.inputs(), self.work.state
        if record is None:
            return Verdict("do", "not done yet")
        changed = [name for name, value in inputs.items() if record.inputs.get(name) != value]
        if changed:
            return Verdict("do", f"other {', '.join(changed)} than {record.made} was made of")
        if difference := state.difference(record):
            return Verdict("do", difference)
        self.work.found[self.name] = state.place(record)
        return Verdict("skip", f"{record.made}, of {record.at}")

    def do(self) -> Done:
        """Makes it; what stood there gives way only where it is just what was made before."""
        out, inputs, state = self.place(), self.inputs(), self.work.state
        with state.writing(out):
            with aside(out):
                done = self.make(out)
            state.wrote(out)
            state.keep(self.name, inputs, out, files_in(out) if out.is_dir() else [out])
        self.work.found[self.name] = out
        return done

    def place(self) -> Path:
        """The wanted one, or a new name where what stands there is not ours, or no longer as it was made."""
        record, state, wanted = self.record, self.work.state, self.wanted_place()
        old = state.place(record) if record else wanted
        bring_back(wanted)
        bring_back(old)
        if record and old.parent == wanted.parent and old.exists() and state.is_only_ours(record):
            return old
        if not wanted.exists() or state.had_made(wanted):
            return wanted
        new = free(wanted)
        say(f"{wanted} is not as run made it, and stays: the new one is {new}")
        return new


class MadeInRun(Made):
    """A file of a fixed name in the run's folder, which its verb replaces at once. What is not ours is copied first."""

    @property
    def record(self) -> Record | None:
        """Of the run that is wanted now: settings may go to and fro between runs, and each keeps what was made of it."""
        if "train" not in self.work.found:
            return super().record
        state, out = self.work.state, self.wanted_place()
        found = (state.record(name) for name in (self.name, f"{self.name} {out.parent.name}"))
        return next((one for one in found if one and state.place(one) == out), None)

    def do(self) -> Done:
        """Makes it."""
        out, inputs, state, record = self.wanted_place(), self.inputs(), self.work.state, self.record
        bring_back(out)
        ours = record is not None and state.difference(record) is None
        last = state.record(self.name)
        if last and (of := state.place(last).parent) != out.parent:
            state.put(f"{self.name} {of.name}", last)
        if out.exists() and not ours and not state.had_made(out):
            copy = free(out)
            copy_file(out, copy)
            say(f"{out} is not as run made it: it is kept as {copy}")
        with state.writing(out):
            done = self.make(out)
            state.wrote(out)
            state.keep(self.name, inputs, out, [out])
        self.work.found[self.name] = out
        return done


def free(path: Path) -> Path:
    """The first of path, path-2, path-3 ... that nothing stands at."""
    number, name = 1, path
    stem, suffix = (path.stem, path.suffix) if path.is_file() else (path.name, "")
    while name.exists() or name.is_symlink():
        number += 1
        name = path.with_name(f"{stem}-{number}{suffix}")
    return name


@contextmanager
def aside(out: Path) -> Iterator[None]:
    """Inside, nothing stands at `out`. What stood there is deleted once a new one does, and has its name again otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        yield
        return
    scratch = Path(mkdtemp(dir=out.parent, prefix=half_made(out)))
    out.replace(scratch / OLD)
    try:
        yield
    finally:
        if not out.exists():
            (scratch / OLD).replace(out)
        remove(scratch)


def bring_back(out: Path) -> None:
    """Puts right what a killed process left of writing `out`: the old one has its name again, the half-made one is gone."""
    for path in leftovers(out):
        for old in (path / OLD, path / out.name):
            if old.exists() and not out.exists():
                old.replace(out)
        remove(path)
