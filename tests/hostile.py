"""Files made hostile: bytes that are cut, flipped and swapped, and JSON whose values become what nobody expects there."""

import json
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, settings

# Of property tests: the same cases each time, however long one takes, and none that is made smaller.
ALIKE = settings(derandomize=True, deadline=None, database=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))

# What may stand in place of any JSON value; text stands for itself, so that it may be what `json.dumps` never writes.
RAW = (
    "null",
    "true",
    "false",
    "0",
    "-1",
    "1",
    "2",
    "1.5",
    "-0.0",
    "1e308",
    "1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    "9" * 30,
    "9" * 5000,
    str(2**31),
    str(2**63),
    str(2**64),
    '""',
    '" "',
    '"\\u0000"',
    '"\\ud800"',
    '"a\\nb"',
    '"\u2028"',
    '"\\u001b[2J"',
    '"x"',
    '"../x"',
    '"/etc/passwd"',
    '"' + "x" * 3000 + '"',
    '"0001-01-01T00:00:00+23:59"',
    '"9999-12-31T23:59:59-23:59"',
    '"F32"',
    '"user"',
    "[]",
    "{}",
    "[[]]",
    "[null]",
    "[{}]",
    '{"":null}',
    '{"a":{"a":{}}}',
    "[1,2,3]",
    "[" * 60 + "]" * 60,
    "[" * 100_000 + "]" * 100_000,
)
BYTES = (
    b"\x00",
    b"\xff",
    b"\x80",
    b"\n",
    b"\r\n",
    b"\r",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"\xed\xa0\x80",
    b"\x1b[2J",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"- ",
    b"&a [*a,*a]",
    b"*a",
    b"\t",
    b"\xff" * 8,
    b"\x00" * 8,
    b"9" * 20,
    b"[" * 2000,
    b"!!int ''",
    b"!!timestamp x",
    b"\\u0000",
    b"\\ud800",
    b"{% for i in range(9) %}",
)
MOST = 1 << 20  # bytes of what is made


def damaged(data: bytes, seed: int) -> bytes:
    """Another file each time, and the same for the same seed: one to four damages."""
    random = Random(seed)
    for _ in range(random.randint(1, 4)):
        structured = random.random() < 0.6
        data = (_json(data, random) if structured else None) or _bytes(data, random)
    return data[:MOST]


def _bytes(data: bytes, random: Random) -> bytes:
    """A cut, a flip, an insertion, a removal, a repetition or a swap."""
    at, end = sorted((random.randint(0, len(data)), random.randint(0, len(data))))
    kind = random.randrange(8)
    if kind == 0:
        return data[:at]
    if kind == 1 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
    if kind in (2, 3):
        return data[:at] + random.choice(BYTES) + data[at:]
    if kind == 4:
        return data[:at] + data[min(end, at + 64) :]
    if kind == 5:
        return data[:end] + data[at:end] + data[end:]
    if kind == 6:
        return data[:at] + random.randbytes(random.randint(1, 8)) + data[at + 8 :]
    return data[end:] + data[:at]


def _json(data: bytes, random: Random) -> bytes | None:
    """One value, key or line of JSON (or JSON Lines) is another; None where it is neither."""
    lines = data.split(b"\n")
    whole = len(lines) == 1 or not lines[0].startswith(b"{") or not lines[0].rstrip().endswith(b"}")
    number = 0 if whole else random.randrange(len(lines))
    try:
        value = json.loads(data if whole else lines[number])
    except (ValueError, RecursionError):
        return None
    try:
        text = _changed(value, random).encode("utf-8", errors="surrogatepass")
    except RecursionError:
        return None
    return text if whole else b"\n".join([*lines[:number], text, *lines[number + 1 :]])


def _changed(value: Any, random: Random) -> str:
    """JSON text of the value with one place of it another."""
    mark = "\ue123"
    places = _places(value)
    if not places:
        return random.choice(RAW)
    holder, key = random.choice(places)
    kind = random.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random.choice(("x" * 300, "", "\u2028", "a\nb", "role", "name"))] = holder.pop(key)
    elif kind == 2:
        other, place = random.choice(places)
        try:
            holder[key] = json.loads(json.dumps(other[place]))
        except (LookupError, TypeError, ValueError):
            holder[key] = None
    else:
        holder[key] = mark
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    return text.replace(f'"{mark}"', random.choice(RAW)).replace(json.dumps(mark), random.choice(RAW))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Everything that stands inside: its holder and its key."""
    found, waiting = [], [value]
    while waiting:
        holder = waiting.pop()
        inside = list(holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ())
        found += [(holder, key) for key, _ in inside]
        waiting += [one for _, one in inside]
    return found
