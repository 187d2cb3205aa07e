"""A command that may write only into folders of its own and does not see a person's home, where the system has a tool for that."""

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
SHARED = "/tmp"  # noqa: S108  which is hidden, not written to
SESSIONS = ("/run/user",)  # of Linux: sockets by which others of this person's programs can be told what to do
# Of macOS; the network is this machine's alone.
PROFILE = """\
(version 1)
(allow default)
(deny file-write*)
(allow file-write* {writable} (subpath "/dev"))
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


def confined(tool: str | None, command: Sequence[str], writable: Sequence[Path], home: Path, readable: Sequence[Path]) -> list[str]:
    """The command, which may then write only below the folders `writable`; it begins in the first of them.

    `home` is hidden but for these and `readable`, which hold programs. On Linux the network stays; on macOS only this machine's.
    """
    own, home = [folder.resolve() for folder in writable], home.resolve()
    # Not a folder that holds the home, such as / where the program is of /bin/sh: it would show the home again.
    known = [path for path in (path.resolve() for path in readable) if not home.is_relative_to(path)]
    if tool == "bwrap":
        mounts = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
        for hidden in (SHARED, *(place for place in SESSIONS if Path(place).is_dir()), str(home)):
            mounts += ["--tmpfs", hidden]
        for kind, paths in (("--ro-bind", known), ("--bind", own)):
            for path in paths:
                mounts += [kind, str(path), str(path)]
        apart = ["--unshare-pid", "--unshare-ipc", "--new-session", "--die-with-parent"]
        return [tool, *mounts, "--chdir", str(own[0]), *apart, *command]
    if tool == "sandbox-exec":
        profile = PROFILE.format(writable=_below(own), home=_quoted(home), readable=_below([*known, *own]))
        return [tool, "-p", profile, *command]
    return list(command)


def _below(paths: Sequence[Path]) -> str:
    return " ".join(f"(subpath {_quoted(path)})" for path in paths)


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
