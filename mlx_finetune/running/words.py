"""What a verb advises, in the words of the file that `run` reads."""

import re
import shlex
from pathlib import Path

from mlx_finetune.config import FIELDS
from mlx_finetune.road import SECTIONS

GO_ON = re.compile(r"mlx-finetune train --resume --out (?:'(?:[^']|'\"'\"')*'|[^\s';]+)")
OPTION = re.compile(r"(?<![\w-])--(no-)?([a-z][a-z-]*[a-z])(?:[ =]([0-9][\w.]*|[A-Z]{2,}|torch|mlx|auto)(?![\w.]))?")
OTHERWISE = {"out": "folder", "to": "hand_back.export"}  # options that are called otherwise there
SECTION_OF = {key: name for name, (kind, _) in SECTIONS.items() for key in kind.model_fields if key not in FIELDS}


def in_words_of_run(hint: str, file: Path, command: str) -> str:
    """Options as keys of the file, and what goes on with a run as `command`, which goes on with all of it.

    Commands of other verbs stay as they are, for they are to be typed.
    """
    hint = GO_ON.sub(lambda found: command, hint)
    keyed = "; ".join(OPTION.sub(_key, part) if "mlx-finetune " not in part else part for part in hint.split("; "))
    return hint if keyed == hint else f"{keyed} (in {shlex.quote(str(file))})"


def _key(found: re.Match[str]) -> str:
    no, name, value = found[1] or "", found[2].replace("-", "_"), found[3]
    key = OTHERWISE.get(name) or (name if name in FIELDS else f"{SECTION_OF[name]}.{name}" if name in SECTION_OF else "")
    if not key:
        return found[0]
    return f"{key}: false" if no else f"{key}: {value}" if value else f"`{key}:`"
