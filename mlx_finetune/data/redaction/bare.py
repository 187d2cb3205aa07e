"""Known secrets where nothing around them says what they are."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from urllib.parse import quote

from mlx_finetune.data.redaction.literals import Literals
from mlx_finetune.data.redaction.values import is_opaque

KEY_LINE = re.compile(r"[A-Za-z0-9+/=]{40,}")
HEAD = 8  # characters by which a known secret is looked up; shorter ones are not taken out where they stand bare


def bare_secrets(texts: Sequence[str], known: Mapping[str, str]) -> Iterator[tuple[int, int, int, str]]:
    """Which text, start, end and the secret: as it is, as a URL writes it, or a line of a private key. `known`: value -> kind."""
    values = dict(reversed([(form, value) for value, kind in known.items() for form in _forms(value, kind)]))
    lengths = sorted(set(map(len, values)), reverse=True)
    for index, start, _ in Literals({form[:HEAD]: None for form in values}).hits(texts) if values else ():
        for length in lengths:
            value = values.get(texts[index][start : start + length])
            if value is not None and _stands_alone(texts[index], start, start + length):
                yield index, start, start + length, value
                break


def _forms(value: str, kind: str) -> Iterable[str]:
    lines = KEY_LINE.findall(value) if kind == "private_key" else ()
    return (form for form in (value, quote(value, safe=""), *lines) if len(form) >= HEAD and is_opaque(form))


def _stands_alone(text: str, start: int, end: int) -> bool:
    """No letter or digit on either side, but for the letter of an escape before it."""
    return not text[end : end + 1].isalnum() and (not text[start - 1 : start].isalnum() or text[start - 2 : start - 1] == "\\")
