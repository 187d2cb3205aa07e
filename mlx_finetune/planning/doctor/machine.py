"""The machine: system, Python, memory, disk, and what a shell may have set too low."""

import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlx_finetune.planning.advice import gb
from mlx_finetune.planning.doctor import mac
from mlx_finetune.planning.doctor.findings import Finding, State
from mlx_finetune.planning.machine import GIB, container_limit, cpu_name
from mlx_finetune.terminal import is_utf8

PYTHON = (3, 11)
TIGHT = 4 * GIB  # of free memory; a small model takes it
FULL, LITTLE = GIB, 20 * GIB  # of free disk: nothing can be saved; one model of 7 billion parameters takes 15 GB
FILES = 1024  # that a process may have open; a server holds one for each connection, a shell of macOS allows 256
NOT_YOURS: dict[str, tuple[State, str]] = {
    "Hub's cache": ("note", "models cannot be downloaded: export HF_HOME to a folder of yours"),
    "this folder": ("note", "go to a folder of yours: runs are written where you are"),
    "temporary files": ("fails", "export TMPDIR to a folder of yours"),
}


def machine_findings() -> Iterator[Finding]:
    """What is found here, in order."""
    from huggingface_hub.constants import HF_HUB_CACHE

    yield from _system()
    yield python(sys.version_info[:3])
    total, free = memory_here()
    yield memory(total, free, container_limit())
    yield from disks(Path(HF_HUB_CACHE), Path.cwd())
    yield from writable(
        {"Hub's cache": Path(HF_HUB_CACHE), "this folder": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    )
    yield encoding(sys.stdout.encoding or "")
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _system() -> Iterator[Finding]:
    if sys.platform == "darwin":
        answer = subprocess.run(["/usr/sbin/sysctl", *mac.NAMES], capture_output=True, text=True, check=False, timeout=10)
        yield from mac.mac_findings(mac.sysctl_values(answer.stdout), os.environ)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", "ok", f"{cpu_name()}, {cores} cores")
    yield system(platform.system(), release())


def release() -> Mapping[str, str]:
    """/etc/os-release and its like; empty where a system has none."""
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def system(name: str, told: Mapping[str, str]) -> Finding:
    """Linux, or something that this was not made for."""
    if name != "Linux":
        return Finding("system", "note", name, "this is made for macOS and Linux; on Windows take WSL")
    return Finding("system", "ok", f"{told.get('PRETTY_NAME', 'Linux')}; what is said of Macs is left out")


def python(version: tuple[int, ...]) -> Finding:
    """Of the interpreter that this runs in."""
    told = ".".join(map(str, version))
    if version < PYTHON:
        return Finding("Python", "fails", told, f"install Python {'.'.join(map(str, PYTHON))} or later")
    return Finding("Python", "ok", f"{told}, {sys.prefix}")


def memory_here() -> tuple[int, int]:
    """Bytes: all of it, and what programs can have without others being moved out."""
    import psutil

    found = psutil.virtual_memory()
    return found.total, found.available


def memory(total: int, free: int, limit: int | None) -> Finding:
    """How much there is, and whether much else is open."""
    told = f"{gb(total)}, {gb(free)} free"
    if limit is not None and limit < total:
        return Finding("memory", "note", f"{told}, but this container may hold {gb(limit)}", "plan, init and train count with that")
    if free < TIGHT:
        return Finding("memory", "note", told, "close other programs before you train: even a small model takes some GB")
    return Finding("memory", "ok", told)


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the one in which it would be made."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


def disks(cache: Path, here: Path) -> Iterator[Finding]:
    """Where the Hub's models are kept, and where runs are written."""
    for what, path in (("disk, Hub's cache", cache), ("disk, this folder", here)):
        yield disk(what, path, shutil.disk_usage(nearest_folder(path)).free)


def disk(what: str, path: Path, free: int) -> Finding:
    """Free bytes, where they matter."""
    told = f"{gb(free)} free in {path}"
    if free < FULL:
        return Finding(what, "fails", told, "make room: neither a model nor a checkpoint can be saved")
    if free < LITTLE:
        return Finding(
            what, "note", told, "enough for a small model; one of 7 billion parameters takes 15 GB, and its fused copy again"
        )
    return Finding(what, "ok", told)


def writable(places: Mapping[str, Path]) -> Iterator[Finding]:
    """Asked of the system; nothing is written."""
    good = True
    for what, path in places.items():
        place = nearest_folder(path)
        if not os.access(place, os.W_OK | os.X_OK):
            good = False
            state, advice = NOT_YOURS[what]
            yield Finding("may write", state, f"{what}: {place} is not yours to write", advice)
    if good:
        yield Finding("may write", "ok", ", ".join(places))


def encoding(name: str) -> Finding:
    """Of what is printed: conversations are in all languages."""
    if is_utf8(name):
        return Finding("text", "ok", "UTF-8")
    found = f"this terminal is told to be {name or 'nothing'}: other signs are shown by their numbers"
    return Finding("text", "note", found, "export PYTHONUTF8=1, or a locale such as C.UTF-8")


def open_files(limit: int) -> Finding:
    """How many a process may have open."""
    if limit == resource.RLIM_INFINITY or limit >= FILES:
        return Finding("open files", "ok", "no limit" if limit == resource.RLIM_INFINITY else f"{limit:,} at once")
    return Finding("open files", "note", f"{limit} at once", "before mlx-finetune serve: ulimit -n 4096")
