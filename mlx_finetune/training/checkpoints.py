"""The checkpoints of a run together: the last whole one, which are kept, and what a killed process left."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_finetune.errors import UserError
from mlx_finetune.files import half_made, leftovers, remove, sync_folder
from mlx_finetune.training.checkpoint import point
from mlx_finetune.training.made_from import FILE as MADE_FROM
from mlx_finetune.training.manifest import NewerCheckpoint, check_whole

FOLDER = "checkpoints"
LINKS = ("best", "latest")
# What a run writes as it goes, by its name in the folder. Of what other verbs write there nothing is touched.
_whole: dict[Path, tuple[tuple[str | int, ...], ...]] = {}  # found so by this process: its files' names, sizes and times
WRITTEN = ("config.yaml", MADE_FROM, "chat_template.jinja", "metrics.jsonl", "samples.jsonl", "tracked.json", "loss.png")


@dataclass(frozen=True)
class DamagedCheckpoint:
    """One that cannot be gone on with, and why."""

    folder: Path
    reason: str


def saved(run: Path) -> list[Path]:
    """The folders of checkpoints, by their steps. Folders appear whole; whether they still are is not looked at."""
    folders = [path for path in (run / FOLDER).glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))


def last_checkpoint(run: Path) -> Path | None:
    """The one with the most steps."""
    return max(saved(run), key=lambda folder: int(folder.name.removeprefix("step-")), default=None)


def last_whole(run: Path) -> tuple[Path | None, list[DamagedCheckpoint]]:
    """The whole checkpoint with the most steps, None where none was saved yet; and the damaged ones after it, last one first.

    Raises:
        UserError: some were saved and none is whole, or a later version of this program saved one.
    """
    damaged: list[DamagedCheckpoint] = []
    for folder in reversed(saved(run)):
        try:
            _look_once(folder)
        except NewerCheckpoint:
            raise
        except UserError as error:
            damaged.append(DamagedCheckpoint(folder, error.message.removeprefix(f"{folder}: ")))
        else:
            return folder, damaged
    if damaged:
        what = f"{damaged[0].folder}: {damaged[0].reason}; and there is no whole checkpoint before it"
        raise UserError(what, hint=f"bring its files back, or remove {run / FOLDER} to train from the first step on")
    return None, []


def _look_once(folder: Path) -> None:
    """`check_whole`, whose word holds as long as no file there is another: what is loaded is looked at anew all the same."""
    try:
        status = {path.name: path.stat() for path in sorted(folder.iterdir())}
    except OSError:
        status = {}  # something is amiss, and is named
    stamps = tuple((name, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for name, one in status.items())
    if not stamps or _whole.get(folder.absolute()) != stamps:
        check_whole(folder)
        _whole[folder.absolute()] = stamps


def set_aside(damaged: Sequence[DamagedCheckpoint]) -> None:
    """Their names are free for the steps that come again; nothing of them is deleted."""
    for one in damaged:
        one.folder.replace(aside(one.folder))
        sync_folder(one.folder.parent)


def aside(folder: Path) -> Path:
    """The name that a damaged checkpoint is given."""
    number, name = 1, folder.with_name(f"{folder.name}.damaged")
    while name.exists():
        number += 1
        name = folder.with_name(f"{folder.name}.damaged-{number}")
    return name


def prune(run: Path, keep: int | None) -> None:
    """Deletes all but the newest `keep` and those that `best` and `latest` point to; what a crash leaves of it, `clear` removes."""
    if keep is None:
        return
    pointed = {(run / name).resolve() for name in LINKS}
    for folder in saved(run)[:-keep]:
        if folder.resolve() not in pointed:
            remove(folder.replace(folder.with_name(f"{half_made(folder)}{secrets.token_hex(4)}")))


def clear(run: Path) -> None:
    """Removes what a killed process left half-written or half-deleted. The run must be locked."""
    for name in WRITTEN:
        for path in leftovers(run / name):
            remove(path)
    for link in LINKS:
        remove(run / f".{link}.new")
    for path in (run / FOLDER).glob(".step-*"):
        name = path.name.removeprefix(".").split(".")[0]
        if name.removeprefix("step-").isdecimal() and path in leftovers(run / FOLDER / name):
            remove(path)


def mend_links(run: Path, checkpoint: Path | None) -> None:
    """`latest` points to the checkpoint that the run goes on from, and neither link to one that is gone."""
    if checkpoint:
        point(run / "latest", checkpoint)
    for name in LINKS:
        if (run / name).is_symlink() and not (run / name).exists():
            (run / name).unlink()
