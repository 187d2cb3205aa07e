"""Blocks of private keys: whole or cut off at either end, numbered, quoted, indented, escaped, in base64 once more."""

import base64
import re
from collections.abc import Iterator

from mlx_finetune.data.redaction import Found
from mlx_finetune.data.redaction.values import is_placeholder
from mlx_finetune.data.redaction.vendors import Rule

LONGEST_BLOCK = 200_000  # characters between BEGIN and END
LONGEST_TAIL = 20_000  # characters before an END without a BEGIN

NAME = r"(?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
BLOCK = re.compile(f"-----BEGIN {NAME}")
BLOCK_END = re.compile(f"-----END {NAME}|-----BEGIN ")
END = re.compile(f"-----END {NAME}")
BODY_LINE = re.compile(r"[A-Za-z0-9+/=]{24,}")
# What stands before a line of the body: blanks, quotes, marks of a diff, the number that a tool prints, file:number: of grep.
NUMBER = r"(?:(?:[\w./~-]{1,100}+:)?\d{1,6}(?:[:|→]|[ ]{0,4}\t|[ ]{2,4})[ ]{0,4})?+"
MARKS = rf"""(?:\s|\\+[nrt]|["'+,|>#*.-]|\$(?=\r?\n)){{0,60}}+{NUMBER}"""
PIECE = re.compile(rf"{MARKS}(?:(?:Proc-Type|DEK-Info|Version|Comment|Hash):[^\n\\]{{0,100}}|[A-Za-z0-9+/=]{{16,}}+)")
LAST_PIECE = re.compile(rf"""\$?(?:\r?\n|\\+n)[ \t>"'+|]{{0,20}}{NUMBER}[A-Za-z0-9+/=]{{1,15}}(?=\$?\s*(?:\n|\Z)|\\+n|["'])""")
BREAK = re.compile(r"\r?\n|(?:\\+r)?\\+n")
LINE_BEFORE = re.compile(rf"{MARKS}(?P<body>[A-Za-z0-9+/=]*)[ \t\"',$\\|-]*")
LAST_RUN = re.compile(r"(?<![A-Za-z0-9+/=])[A-Za-z0-9+/=]{40,}\Z")
PUTTY = re.compile(r"Private-Lines: \d{1,4}(?:\s|\\n){1,9}(?P<secret>[A-Za-z0-9+/=]{16,}(?:(?:\s|\\n){1,9}[A-Za-z0-9+/=]{16,})*)")
ENCODED_HEAD = re.compile(r"[A-Za-z0-9+/]{56}")  # characters of base64 that hold the BEGIN line of any kind of key
ENCODED_LINE = re.compile(r"(?:\s{0,80}|(?:\\+[rn]){0,2})(?P<body>[A-Za-z0-9+/]++={0,2}+)(?![\w:.-])")


def private_key(text: str, position: int) -> Iterator[Found]:
    """To its END line; where that is missing or far behind other text, as far as it looks like the body of a key."""
    begin = BLOCK.match(text, position - 3) if position >= 3 else None
    if not begin:
        return
    end = BLOCK_END.search(text, begin.end(), begin.end() + LONGEST_BLOCK)
    if end and end[0].startswith("-----END") and _is_mostly_body(text, begin.end(), end.start()):
        stop = end.end()
    else:
        stop = _body_end(text, begin.end())
    if _has_body(text, begin.end(), stop):
        yield Found("private_key", begin.start(), stop)


def key_end(text: str, position: int) -> Iterator[Found]:
    """The lines before an END line whose BEGIN is cut off."""
    end = END.match(text, position - 3) if position >= 3 else None
    if not end:
        return
    above = max(0, end.start() - LONGEST_TAIL)
    if (dashes := text.rfind("-----", above, end.start())) >= 0:
        above = dashes + 5
    begin = BLOCK.match(text, max(0, text.rfind("-----BEGIN ", max(0, above - 80), above)))
    if begin and begin.end() == above:
        return
    first = _body_begin(text, above, end.start())
    if _has_body(text, first, end.start()):
        yield Found("private_key", first, end.end())


def putty_key(text: str, position: int) -> Iterator[Found]:
    """The private part of PuTTY's own format."""
    if match := PUTTY.match(text, position):
        yield Found("private_key", *match.span("secret"))


def encoded_key(text: str, position: int) -> Iterator[Found]:
    """A key block in base64, in one line or wrapped, as kubeconfig and `base64 key.pem` write it."""
    head = ENCODED_HEAD.match(text, position)
    if not head or b"PRIVATE KEY" not in base64.b64decode(head[0]):
        return
    end, last = position, ""
    while line := ENCODED_LINE.match(text, end):
        if last and ("--" in _decoded(last) or (len(line["body"]) < 16 and "--" not in _decoded(line["body"]))):
            break
        end, last = line.end(), line["body"]
    yield Found("private_key", position, max(end, head.end()))


def _is_mostly_body(text: str, start: int, end: int) -> bool:
    """Whether a third of it is base64 in long runs; a note that lines were left out does not end a key, a chapter does."""
    return 3 * sum(map(len, BODY_LINE.findall(text, start, end))) >= end - start - 200


def _has_body(text: str, start: int, end: int) -> bool:
    return any(not is_placeholder(line) for line in BODY_LINE.findall(text, start, end))


def _body_end(text: str, at: int) -> int:
    stop = at + LONGEST_BLOCK
    while piece := PIECE.match(text, at, stop):
        at = piece.end()
    last = LAST_PIECE.match(text, at, stop)
    return last.end() if last else at


def _body_begin(text: str, start: int, end: int) -> int:
    """Where the lines of base64 begin that reach to `end`; only the last of them may be short."""
    breaks = [one.span() for one in BREAK.finditer(text, start, end)]
    begin = end
    lines = zip([start, *(after for _, after in breaks)], [*(before for before, _ in breaks), end], strict=True)
    for number, (first, after) in enumerate(reversed(list(lines))):
        line = LINE_BEFORE.fullmatch(text, first, after)
        if not line or (len(line["body"]) < 16 and number > 1):
            run = LAST_RUN.search(text, max(first, after - 200), after)  # behind what is no part of it: {"key": "...
            return run.start() if run else begin
        begin = line.start("body") if line["body"] else begin
    return begin


def _decoded(line: str) -> str:
    """The last characters that a line of base64 stands for."""
    return base64.b64decode(line[: len(line) // 4 * 4][-16:]).decode("latin-1")


RULES: list[tuple[str, Rule]] = [
    ("--begin ", private_key),
    ("--end ", key_end),
    ("private-lines:", putty_key),
    ("ls0tls1crudjti", encoded_key),
]
