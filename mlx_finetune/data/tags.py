"""tags.yaml: which conversations a person keeps, drops, or weighs, by name, id or pattern."""

import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_finetune.data.conversation import LEAST_WEIGHT, MOST_WEIGHT
from mlx_finetune.errors import UserError
from mlx_finetune.reading import plain_yaml, read_whole
from mlx_finetune.terminal import printable

KEEP, DROP = "keep", "drop"
LARGEST_TAGS = 16 * 2**20  # bytes: of 200,000 names
Tag = str | float  # keep, drop, or a weight
TAGS_HINT = "a line is `NAME: keep`, `NAME: drop` or `NAME: 2.5` (a weight); collect writes such a file, tags.yaml"
HEADER = """\
# Edit and pass with --tags. NAME: a weight (1 is as usual, at 2.5 its turns count 2.5 times), drop, or keep (whatever collect's
# rules and its other options say). Patterns such as "2026-01-*" do too; a name of its own wins over them, a later pattern over an
# earlier one.
"""


def read_tags(path: Path) -> dict[str, Tag]:
    """A YAML file of `NAME: keep`, `NAME: drop` and `NAME: weight`.

    Raises:
        UserError: with the place and the value.
    """
    text = read_whole(path, TAGS_HINT, LARGEST_TAGS)
    try:
        values = plain_yaml(text.decode(), typed=False)  # names such as 2026-01-01 stay text
    except ValueError as error:
        raise UserError(f"{path}: not YAML: {error}", hint=TAGS_HINT) from error
    if values is None or values == "":
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{path}: not a list of names with their tags", hint=TAGS_HINT)
    return {name: _tag(value, f"{path}: {name}") for name, value in values.items()}


def _tag(value: Any, place: str) -> Tag:
    if value in (KEEP, DROP):
        return str(value)
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = -1.0
    if weight == 0 or LEAST_WEIGHT <= weight <= MOST_WEIGHT:
        return weight
    raise UserError(f"{place}: {value!r:.60} is not keep, drop or a weight from {LEAST_WEIGHT} to {MOST_WEIGHT}", hint=TAGS_HINT)


def tag_of(names: Sequence[str], tags: Mapping[str, Tag]) -> Tag | None:
    """What the tags say of a conversation of these names: a name wins over a pattern, a later line over an earlier one."""
    for own in names:
        if own in tags:
            return tags[own]
    return next((tag for pattern, tag in reversed(list(tags.items())) if is_meant(pattern, names)), None)


def is_meant(pattern: str, names: Sequence[str]) -> bool:
    """Whether one of the names is the pattern, or matches it as a shell would."""
    return any(fnmatch.fnmatchcase(own, pattern) for own in names)


def any_meant(pattern: str, names: Iterable[str]) -> bool:
    """Whether some of many names match the pattern."""
    return any(sign in pattern for sign in "*?[") and bool(fnmatch.filter(names, pattern))


class Line(NamedTuple):
    """What is written of one conversation: its names, its own first, and why it was rejected if it was."""

    names: tuple[str, ...]
    note: str
    reason: str = ""


def tag_lines(lines: Iterable[Line], tags: Mapping[str, Tag]) -> Iterator[str]:
    """The text of a tags file for these conversations, in which the tags that were given stand as they were.

    What is as usual has the weight 1; what was rejected, or is meant by a pattern, is commented out.
    """
    yield HEADER
    lines = [line for line in lines if line.names[0].isprintable()]
    own = {line.names[0] for line in lines}
    for pattern, tag in tags.items():
        if pattern not in own:
            yield f"{json.dumps(pattern, ensure_ascii=False)}: {_text(tag)}\n"
    for line in lines:
        name, note = json.dumps(line.names[0], ensure_ascii=False), printable(line.note or line.reason)
        if line.names[0] in tags:
            yield f"{name}: {_text(tags[line.names[0]])}  # {note}\n"
        elif tag_of(line.names, tags) is not None:
            yield f"# {name}: 1  # tagged above; {note}\n"
        elif line.reason:
            yield f"# {name}: keep  # rejected: {note}\n"
        else:
            yield f"{name}: 1  # {note}\n"


def _text(tag: Tag) -> str:
    return tag if isinstance(tag, str) else f"{tag:g}"
