"""What the doctor says of one thing."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "optional", "note", "fails"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do where that is of use.

    ok: nothing to do; optional: not there, and not needed; note: it works, but not well or not for all; fails: something will fail.
    """

    what: str
    state: State
    found: str
    advice: str = ""
