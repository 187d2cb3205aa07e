"""What stands in files at some point of a conversation, as far as the conversation itself shows it.

A file is known from a `save` that worked, from a `cat` of it alone, from its text in what the person sent; `append` and `patch`
that worked carry it on. After a command that may have written to any file none is known.
"""

import re
from collections.abc import Sequence
from posixpath import normpath

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.fences import blocks
from mlx_finetune.data.tool_calls import Call
from mlx_finetune.data.turns import calls_of
from mlx_finetune.evaluation.patches import DoesNotApply, Malformed, apply

CAT = re.compile(r"\s*cat\s+(?!-)([^\s|;&<>$`*?'\"\\]+)\s*\Z")
STDOUT = re.compile(r"^(`{3,})stdout\n(.*?)\n?^\1$", re.MULTILINE | re.DOTALL)
# What of a result says that more was written, or less is shown, than the file.
NOT_THE_FILE = ("```stderr", "Return code:", "output truncated", "timed out", " cut …")  # the last: of a window
WRITES = re.compile(
    r">|\btee\b|\bsed\b.*-i|\bperl\b|\bgit\s+(?:checkout|stash|reset|apply|restore|revert|merge|rebase|pull|switch|cherry-pick|clean|mv|rm|am)\b"
    r"|\b(?:mv|cp|rm|patch|unzip|tar|rsync|curl|wget|install|make)\b|--fix|\bformat\b|\bfmt\b|\b(?:black|isort|prettier|autopep8)\b|--write"
)
HARMLESS = re.compile(r"\d?>\s*(?:&\d|/dev/null)")
CODE_WRITES = re.compile(r"open\(|write|Path\(|shutil|subprocess|os\.|!")
KEEPS_FILES = frozenset(["read", "complete", "todo", "tmux", "gh", "memory", "vent", "choice", "form", "elicit", "progress"])


def known_files(messages: Sequence[Message], tool_format: str) -> dict[str, str]:
    """The text of each file that is known behind the last message, by its path as it is written there."""
    files: dict[str, str] = {}
    calls: list[Call] = []
    for place, message in enumerate(messages):
        if message.role == "user":
            files |= {normpath(b.info): b.content + "\n" for b in blocks(message.content) if len(b.fence) > 3 and _is_path(b.info)}
        elif message.role == "assistant":
            calls = calls_of(message, tool_format)
            following = next((i for i in range(place + 1, len(messages)) if messages[i].role == "assistant"), len(messages))
            after = (m.content for m in messages[place + 1 : following] if m.role in ("system", "tool"))
            result = "\n\n".join(after)
            for call in calls:
                _note(files, call, result)
    return files


def path_of(call: Call) -> str:
    """The file that a call is about, as the keys of `known_files` have it; "" where it names none."""
    return normpath(call.argument) if call.argument else ""


def _is_path(info: str) -> bool:
    return " " not in info and ("." in info or "/" in info)


def _note(files: dict[str, str], call: Call, result: str) -> None:
    path = path_of(call)
    if call.tool == "save":
        files.pop(path, None)
        if _says("Saved to ", path, result):
            files[path] = _ended(call.content)
    elif call.tool == "append" and path in files:
        before = files.pop(path)
        if _says("Appended to ", path, result):
            files[path] = _ended(before) + _ended(call.content)
    elif call.tool == "patch":
        _note_patch(files, path, call.content, result)
    elif call.tool == "shell":
        _note_command(files, call.content, result)
    elif call.tool not in KEEPS_FILES and not (call.tool == "ipython" and not CODE_WRITES.search(call.content)):
        files.clear()


def _note_patch(files: dict[str, str], path: str, patch: str, result: str) -> None:
    if path not in files or not re.search(r"^Patch (?:successfully )?applied", result, re.MULTILINE):
        return
    try:
        files[path] = apply(patch, files[path])
    except (Malformed, DoesNotApply):  # the log knows better: it was another file
        del files[path]


def _note_command(files: dict[str, str], command: str, result: str) -> None:
    if WRITES.search(HARMLESS.sub("", command)):
        files.clear()
    elif (cat := CAT.match(command)) and not any(part in result for part in NOT_THE_FILE):
        shown = STDOUT.search(result)
        if shown:
            files[normpath(cat[1])] = shown[2] + "\n"


def _says(words: str, path: str, result: str) -> bool:
    """Whether a line of the result says so of this file, whose path it may write in another way."""
    name = path.rpartition("/")[2]
    return any(line.startswith(words) and name in line for line in result.splitlines())


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"
