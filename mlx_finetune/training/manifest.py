"""What a checkpoint is made of: each file by its size and SHA-256, so that another one, or half of one, is never taken for it."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json, write_json

MANIFEST, PROGRESS = "manifest.json", "progress.json"
MOMENTS = "optimizer.safetensors"
FORMAT = 2  # in progress.json; that of version 1 says no format and has no manifest
DAMAGED = "remove this folder to go on from the one before"


class NewerCheckpoint(UserError):
    """Written by a later version of this program: it may be whole, and is not gone back behind."""


def write_manifest(folder: Path) -> None:
    """Of all files that are in the folder."""
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"files": files})


def sha256(path: Path) -> str:
    """Of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_progress(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        UserError: that is damaged, of a later version, or not of the step that the folder is named after.
    """
    progress = read_json(folder / PROGRESS)
    if not isinstance(progress, dict) or type(progress.get("step")) is not int or type(progress.get("format", 1)) is not int:
        raise UserError(f"{folder}/{PROGRESS}: not a checkpoint's", hint=DAMAGED)
    if progress.get("format", 1) > FORMAT:
        message = f"{folder}: a checkpoint of format {progress['format']}; this version reads formats 1 to {FORMAT}"
        raise NewerCheckpoint(message, hint="update mlx-finetune")
    named = re.fullmatch(r"step-(\d+)", folder.resolve().name)
    if named and int(named[1]) != progress["step"]:
        raise UserError(f"{folder}: holds the checkpoint of step {progress['step']}", hint="give the folder its own name back")
    return progress


def made_from(checkpoint: Path) -> dict[str, str]:
    """What tells a checkpoint, or an adapter from elsewhere, from any other: contents by their hashes, no place on a machine.

    checkpoint: the folder's name; sha256: of its manifest, which has that of each file, or of the file that holds its weights.
    data, model, adapter: what the run learned from, by content, and the adapter that it began with.
    """
    name = checkpoint.resolve().name
    if not (checkpoint / PROGRESS).is_file():
        files = sorted(path for path in checkpoint.glob("*.safetensors") if path.name != MOMENTS)
        return {"adapter": sha256(files[0])} if files else {}
    whole, progress = checkpoint / MANIFEST, read_progress(checkpoint)
    found = {"checkpoint": name, "sha256": sha256(whole if whole.is_file() else checkpoint / PROGRESS)}
    return found | {key: str(progress[key]) for key in ("data", "model", "adapter") if progress.get(key)}


def is_of(evaluation: Mapping[str, Any], made: Mapping[str, str]) -> bool:
    """Whether an evaluation.json is of this checkpoint: by its name, and where it says so by its content."""
    told = evaluation.get("made_from")
    same = not isinstance(told, dict) or not told or told.get("sha256") == made.get("sha256")
    return same and evaluation.get("checkpoint") == made.get("checkpoint")


def check_whole(folder: Path, moments: bool = True) -> dict[str, Any]:
    """`progress.json`, once each file is found to be the one that was saved; the optimizer's only where `moments` is true.

    Raises:
        UserError: a file is missing, cut, altered, or of another checkpoint. Of format 1 only what is missing or cut is seen.
    """
    progress = read_progress(folder)
    reason = _of_format_1(folder, moments) if progress.get("format", 1) == 1 else _against_manifest(folder, moments)
    if reason:
        raise UserError(f"{folder}: not a whole checkpoint: {reason}", hint=DAMAGED)
    return progress


def _against_manifest(folder: Path, moments: bool) -> str | None:
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if (
        not isinstance(files, dict)
        or not {PROGRESS, MOMENTS} < set(files)
        or not all(isinstance(said, dict) for said in files.values())
    ):
        return f"{MANIFEST} is not a checkpoint's"
    wanted = {name: said for name, said in files.items() if moments or name != MOMENTS}
    return next(filter(None, (_difference(folder / name, said) for name, said in sorted(wanted.items()))), None)


def _difference(path: Path, said: dict[str, Any]) -> str | None:
    if not path.is_file() or path.parent / path.name != path:
        return f"{path.name} is missing"
    if path.stat().st_size != said.get("size"):
        return f"{path.name} has {path.stat().st_size} bytes and was saved with {said.get('size')}"
    return None if sha256(path) == said.get("sha256") else f"{path.name} holds other bytes than were saved"


def _of_format_1(folder: Path, moments: bool) -> str | None:
    paths = [path for path in sorted(folder.glob("*.safetensors")) if path.name != MOMENTS]
    if not paths:
        return "its weights are missing"
    if moments and not (folder / MOMENTS).is_file():
        return f"{MOMENTS} is missing"
    for path in [*paths, folder / MOMENTS] if moments else paths:
        if not path.is_file():  # the library would wait for a pipe
            return f"{path.name} is not an ordinary file"
        try:
            with safe_open(path, "np"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name}: {error}"
    return None
