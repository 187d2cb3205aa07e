"""Values of a JSON row that anybody may have written: read, shown and tidied without surprises, or refused by name."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from mlx_finetune.data.sources import printable
from mlx_finetune.terminal import printable as on_a_line

DEEPEST = 100  # levels of a JSON value that is kept
PLACE = re.compile(r"\[\d+\]|, turn \d+")


class RowError(Exception):
    """The row is not what its format says; the text names the field, in one line whatever stands there."""

    def __init__(self, text: str) -> None:
        super().__init__(on_a_line(text))


class CannotLearn(RowError):
    """The row is right, but nothing can be learned from it; the text names the field, its value and the cause.

    `countable` is the same for all rows of one cause: it has no places in lists and no value.
    """

    def __init__(self, cause: str, field: str = "", value: str = "") -> None:
        super().__init__(": ".join(filter(None, (field, value, cause))))
        name = PLACE.sub("", field).rpartition(".")[2]
        self.countable = f"{name}: {cause}" if name else cause


@dataclass(frozen=True)
class NotJson:
    """What stands for a value of a table that JSON has not: refused wherever it is looked at."""

    kind: str


def shown(value: Any) -> str:
    """A value in an error: of which kind it is, for it may be a piece of a conversation."""
    if isinstance(value, NotJson):
        return value.kind
    kinds = {str: "text", type(None): "nothing", bool: "true or false", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else "no JSON value")


def named(value: Any) -> str:
    """As `shown`, of what can only be a name: a role, a kind, an id, a key; short."""
    return repr(value[:40]) if isinstance(value, str) else shown(value)


def parsed(text: str, strict: bool = False) -> Any:
    """The JSON value of a text. NaN and Infinity, which are not JSON, mean null unless `strict`: pandas writes them so.

    Raises:
        ValueError: with the reason, for people.
    """

    def constant(name: str) -> None:
        if strict:
            raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON, or cut off: {error.msg.removesuffix(' at')}, column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not read: nested too deeply") from error


def tidy(value: Any, field: str, depth: int = 0) -> Any:
    """The same JSON value, which can be written as UTF-8.

    Raises:
        RowError: it is nested too deeply, or holds what JSON has not.
    """
    if depth > DEEPEST:
        raise RowError(f"{field}: nested more than {DEEPEST} deep")
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): tidy(one, field, depth + 1) for key, one in value.items()}
    if isinstance(value, list):
        return [tidy(one, field, depth + 1) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"{field}: a number that is too large for JSON")
    if isinstance(value, NotJson):
        raise RowError(f"{field}: {value.kind}, which JSON has not")
    return value


def object_of(value: Any) -> Any:
    """The value; where it is the JSON text of an object, that object."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return parsed(value)
        except ValueError:
            return value
    return value


def listed(value: Any, field: str) -> list[Any]:
    """A list, also where it stands as JSON text, or as Hugging Face's `Sequence` has it: an object of lists of equal length."""
    if isinstance(value, str):
        try:
            value = parsed(value)
        except ValueError as error:
            raise RowError(f"{field}: {error}") from error
    if isinstance(value, dict) and value:
        columns = list(value.values())
        if all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            value = [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if not isinstance(value, list):
        raise RowError(f"{field}: {shown(value)} is not a list")
    return value
