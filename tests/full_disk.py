"""Runs a command in a folder on a disk of its own that is small, or read only: a file system in memory that nobody else sees."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

SCRIPT = 'set -e; mount -t tmpfs -o size="$1" tmpfs "$2"; cp -a "$3"/. "$2"; [ "$4" = rw ] || mount -o remount,ro "$2"; '
SCRIPT += 'from="$2" to="$5"; shift 5; set +e; "$@"; status=$?; cp -a "$from"/. "$to"; exit $status'


def on_small_disk(kept: Path, place: Path, size: int, command: Sequence[str], mode: str = "rw") -> subprocess.CompletedProcess[str]:
    """`place` holds a copy of what is in `kept`, on a disk of `size` bytes; afterwards, what the command made of it."""
    place.mkdir()
    (left := place.with_name(f"{place.name}.left")).mkdir()
    inside = ["unshare", "-rm", "sh", "-c", SCRIPT, "sh", str(size), str(place), str(kept), mode, str(left), *command]
    done = subprocess.run(inside, capture_output=True, text=True, check=False, timeout=600)
    place.rmdir()
    left.rename(place)
    return done


def need_small_disks() -> None:
    """Skips the test where this machine lets nobody mount one."""
    try:
        tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"no unshare(1) on {sys.platform}: a full disk cannot be had without a disk")
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.decode().strip()}")
