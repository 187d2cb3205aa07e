"""A command that may write only into one folder and does not see a person's home, where the system has a tool for that."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_finetune.errors import UserError

TOOLS = {"linux": "bwrap", "darwin": "sandbox-exec"}
HINTS = {
    "linux": "install bubblewrap (apt install bubblewrap)",
    "darwin": "sandbox-exec is part of macOS: see that /usr/bin is in PATH",
}
# Of macOS: only the folder and what the system keeps for temporary files may be written; the network is this machine's alone.
PROFILE = """\
(version 1)
(allow default)
(deny file-write*)
(allow file-write* (subpath {folder}) (subpath "/dev"))
(deny file-read* (subpath {home}))
(allow file-read* {readable})
(deny network*)
(allow network* (local ip "localhost:*") (remote ip "localhost:*") (remote unix-socket))
"""


def confinement(name: str) -> str | None:
    """The tool that `name` (auto, bwrap, sandbox-exec or none) means here; None where there is none, or none is wanted.

    Raises:
        UserError: the one that is named is not there, or of another system.
    """
    tool = TOOLS.get(sys.platform)
    if name in ("auto", "none"):
        return tool if name == "auto" and tool and shutil.which(tool) else None
    if name not in TOOLS.values():
        raise UserError(f"--sandbox {name}: not one of auto, {', '.join(TOOLS.values())}, none", hint="leave it out for auto")
    if name != tool or not shutil.which(name):
        raise UserError(f"--sandbox {name}: not there on this machine", hint=HINTS.get(sys.platform, "--sandbox none"))
    return name


def confined(tool: str | None, command: Sequence[str], folder: Path, home: Path, readable: Sequence[Path]) -> list[str]:
    """The command, which may then write only below `folder`.

    `home` is hidden but for `folder` and `readable`, which hold programs. On Linux the network stays; on macOS only this machine's.
    """
    folder, home, known = folder.resolve(), home.resolve(), [path.resolve() for path in readable]
    if tool == "bwrap":
        mounts = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", "--tmpfs", str(home)]
        for path in known:
            mounts += ["--ro-bind", str(path), str(path)]
        mounts += ["--bind", str(folder), str(folder), "--chdir", str(folder)]
        return [tool, *mounts, "--unshare-pid", "--unshare-ipc", "--new-session", "--die-with-parent", *command]
    if tool == "sandbox-exec":
        quoted = [_quoted(path) for path in (*known, folder)]
        profile = PROFILE.format(
            folder=_quoted(folder), home=_quoted(home), readable=" ".join(f"(subpath {one})" for one in quoted)
        )
        return [tool, "-p", profile, *command]
    return list(command)


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
