"""What a person may have meant: the nearest known name, option or file."""

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

CUTOFF = 0.6  # of difflib's ratio: two letters of six may be wrong


def nearest(word: str, known: Iterable[str], cutoff: float = CUTOFF) -> str | None:
    """The known word most like it, whatever is written large; None where none is near."""
    by_folded = {one.casefold(): one for one in known}
    found = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=cutoff)
    return by_folded[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "", cutoff: float = CUTOFF) -> str:
    """A hint: `did you mean X?`, or `otherwise` where nothing is near."""
    found = nearest(word, known, cutoff)
    return f"did you mean {found}?" if found else otherwise


def nearest_path(path: Path) -> Path | None:
    """What lies in the folder that does exist and is called nearly so; None where there is none, or it may not be read."""
    path = path.expanduser()
    try:
        names = os.listdir(path.parent)  # noqa: PTH208  the names alone
    except OSError:
        return None
    found = nearest(path.name, (name for name in names if not name.startswith(".")))
    return path.parent / found if found else None


def path_hint(path: Path | str, otherwise: str) -> str:
    """A hint where there is no such file or folder."""
    near = nearest_path(Path(path))
    return f"did you mean {near}?" if near else otherwise


# What says of a folder that it is of this kind, what that is, and what takes it.
KINDS = (
    ("dataset.json", "a prepared data set", "train --data and inspect take it"),
    ("collect.json", "a collection", "prepare takes it"),
    ("metrics.jsonl", "a run", "evaluate, report, chat, serve, fuse and export take it"),
    ("progress.json", "a checkpoint of a run", "give the run, with --checkpoint"),
    ("adapter_config.json", "an adapter", "fuse takes it"),
    ("config.json", "a model folder", "--model takes it"),
    ("conversation.jsonl", "one conversation of gptme", "give the folder that it lies in"),
)
LONGEST = 1024  # of a path
LINE = re.compile(r":\d+$")
MISSING = re.compile(r"no such|not a run|not a prepared|no config|neither a run|no losses", re.IGNORECASE)
UNFIT = re.compile(r"no (config|dataset|conversations|list|\*/conv)|not a |neither |a folder, not|is a directory", re.IGNORECASE)


def kind_of(folder: Path) -> str | None:
    """What a folder of ours or of gptme is, and what takes it; None where it is neither."""
    if not folder.is_dir():
        return None
    for name, kind, use in KINDS:
        if (folder / name).exists():
            return f"{folder} is {kind}: {use}"
    if next(folder.glob("*/conversation.jsonl"), None):
        return f"{folder} is a logs folder of gptme: collect takes it"
    return None


def hint_of(message: str, hint: str) -> str:
    """The hint of an error `PLACE: what is wrong`: the file meant, or what the folder is, where that can be said; else `hint`."""
    place, _, wrong = message.partition(": ")
    path = Path(LINE.sub("", place)).expanduser()
    if len(place) > LONGEST or not wrong:
        return hint
    if not os.path.lexists(path):
        parent = path.parent
        return path_hint(path, hint) if MISSING.match(wrong) and parent.is_dir() else hint
    within = next((each for each in (path, path.parent) if each != Path() and each.is_dir()), None)
    return (within and UNFIT.match(wrong) and kind_of(within)) or hint
