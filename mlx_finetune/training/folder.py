"""The folder of a run: who may begin one in it, and that one process at a time trains there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_finetune.errors import UserError
from mlx_finetune.files import leftovers, refuse_existing, remove
from mlx_finetune.training.lock import LOCK, locked, refuse_running
from mlx_finetune.training.made_from import FILE

EXISTS = "choose another --out, or --resume to go on with it"
FIRST = ("config.yaml", FILE)  # written first, and config.yaml last of them: with it the folder is a run


def refuse_run(run: Path) -> None:
    """Raises UserError where a process trains in the folder, or something stands there but what a killed start left."""
    refuse_running(run)
    if not _only_leftovers(run):
        refuse_existing(run, EXISTS)


@contextmanager
def for_one_run(run: Path, resumed: bool) -> Iterator[None]:
    """Inside, the folder is there and locked. One that did not become a run is gone afterwards.

    Raises:
        UserError: another process trains there, a new run would not be the first in the folder, or it cannot be made.
    """
    try:
        run.mkdir(0o700, parents=True, exist_ok=True)  # answers to a person's prompts lie there
    except FileExistsError as error:
        raise UserError(f"{run} exists already", hint=EXISTS) from error
    except OSError as error:
        raise UserError(f"{run}: {error.strerror}", hint="choose another --out") from error
    if not resumed and not _only_leftovers(run):
        refuse_run(run)
    with locked(run):
        if not resumed and not _only_leftovers(run):
            refuse_existing(run, EXISTS)
        try:
            yield
        finally:
            if not resumed and not (run / "config.yaml").is_file():
                for path in _left_by_start(run):
                    remove(path)
                if not any(run.iterdir()):
                    run.rmdir()


def _only_leftovers(run: Path) -> bool:
    """Whether nothing is in the folder but what a start leaves that was killed before there was a run."""
    return run.is_dir() and not run.is_symlink() and set(run.iterdir()) <= set(_left_by_start(run))


def _left_by_start(run: Path) -> list[Path]:
    return [run / LOCK, run / FILE, *(path for name in FIRST for path in leftovers(run / name))]
