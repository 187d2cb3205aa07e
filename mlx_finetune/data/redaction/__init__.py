"""What counts as a secret and where it stands; mlx_finetune/data/redact.py takes them out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Found:
    """One secret: characters `start` to `end` (exclusive) of a text."""

    kind: str
    start: int
    end: int
