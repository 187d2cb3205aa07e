"""The fenced code blocks of a message, as gptme reads them.

The rules are those of gptme 0.35.1 for a finished message (codeblock.py, `_extract_codeblocks`), written anew; they are not
CommonMark's. A block opens with three or more backticks at the start of a line and closes with the same number alone on a
line. Within it, a fence with a language opens a nested block; so does a bare fence with text right below it, where another
bare fence and more text follow (never in a shell or ipython block). A fence in a string over several lines, or with text
right below it in a here-document, is content. What stands before the first `</thinking>` or `</think>` is not read; nor is
anything where such a tag is never closed. A block that is not closed is none.
"""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

LINE_END = re.compile(r"\r\n|\r|\n")
FENCE = re.compile(r"`{3,}")
TWO_FENCES = re.compile(r"`{6}[^`\s]")  # "``````patch f": a block closes and the next one opens on one line
JOINED = re.compile(r"`{3,}\S|<think(?:ing)?>")  # what may stand right behind a closing fence: the next block, or thinking
NESTED_WITHIN = 20  # lines below a bare fence in which the one that closes it is looked for
MORE_WITHIN = 4  # lines below that one in which the outer block must go on
HEREDOC_WITHIN = 200  # lines in which a here-document must end
SHELLS = frozenset({"shell", "sh", "bash", "zsh", "fish", "ksh", "nu", "ps1", "powershell"})
PROGRAMS = SHELLS | {"ipython"}  # languages in which a bare fence means nothing

SHELL_TOKENS = {
    "": re.compile(r"""\\|\$'|\$\(\(|'|"|(?<!\S)#|(?<!<)<<(?!<)"""),
    "'": re.compile("'"),
    '"': re.compile(r'\\|"'),
    "$'": re.compile(r"\\|'"),
}
HEREDOC = re.compile(r"""-?\s*['"\\]?([^\s'"\\]+)""")  # behind <<: the word that ends the document
PYTHON_TOKENS = {
    "": re.compile(r"'''|\"\"\"|'|\"|#"),
    "'": re.compile(r"\\|'"),
    '"': re.compile(r'\\|"'),
    "'''": re.compile(r"\\|'''"),
    '"""': re.compile(r'\\|"""'),
}


@dataclass(frozen=True)
class Block:
    """One closed block. `info` is what stands behind its opening fence; `start`, `body` (its first line) and `end` are
    places in the text. `content` has no outer line ends, and "\\n" between its lines whatever the text has there."""

    info: str
    content: str
    start: int
    body: int
    end: int
    fence: str


def blocks(text: str) -> Iterator[Block]:
    """Every closed block that gptme would find, in order; linear in the length of the text."""
    visible = _visible(text)
    if visible is None or text.count("```", visible) < 2:
        return
    lines = Lines(text, visible)
    first = 0
    while first < len(lines.text):
        if TWO_FENCES.match(lines.text[first]):
            lines.cut(first, 3)
        fence = FENCE.match(lines.text[first])
        if not fence:
            first += 1
            continue
        info = lines.text[first][fence.end() :].strip()
        closing = _closing(lines, first, info, fence[0])
        if closing is None:
            return
        last, used = closing
        content = "\n".join(lines.text[first + 1 : last])
        yield Block(info, content, lines.start[first], lines.start[first + 1], lines.start[last] + used, fence[0])
        if used < len(lines.text[last]):
            lines.cut(last, used)
            first = last
        else:
            first = last + 1


def left_open(text: str) -> bool | None:
    """Whether a fence is open at the end of the text, so that what stands in it is no block; None where there is no fence."""
    visible = _visible(text)
    if visible is None or "```" not in text[visible:]:
        return None
    found = list(blocks(text))
    end = found[-1].end if found else visible
    fence = any(FENCE.match(line) for line in Lines(text, end).text)
    return fence if found or fence else None


def _visible(text: str) -> int | None:
    """Where the message begins behind its thinking; None where the thinking does not end."""
    if "think" not in text:
        return 0
    joined = None  # the end of thinking that began right behind a fence: no thinking for gptme
    for tag in ("thinking", "think"):
        close = text.find(f"</{tag}>")
        if close == -1:
            continue
        if re.search(rf"(?:\A|\n)<{tag}>", text[:close]) or f"<{tag}>" not in text[:close]:
            return close + len(tag) + 3
        joined = close + len(tag) + 3
    rest = text[joined or 0 :]
    for tag in ("thinking", "think"):
        begun = re.search(rf"(?:\A|\n)<{tag}>", rest)
        if begun and (joined is None or f"</{tag}>" not in rest[begun.start() :]):
            return None
    return 0


class Lines:
    """The lines of a text without their ends, and where each begins."""

    def __init__(self, text: str, begin: int) -> None:
        self.text: list[str] = []
        self.start: list[int] = []
        for end in LINE_END.finditer(text, begin):
            self.text.append(text[begin : end.start()])
            self.start.append(begin)
            begin = end.end()
        self.text.append(text[begin:])
        self.start.append(begin)

    def cut(self, line: int, characters: int) -> None:
        """Takes the first characters of a line away, once they have been read."""
        self.text[line] = self.text[line][characters:]
        self.start[line] += characters

    @cached_property
    def _places(self) -> dict[str, list[int]]:
        places: dict[str, list[int]] = defaultdict(list)
        for number, line in enumerate(self.text):
            places[line.strip()].append(number)
        return places

    def comes(self, word: str, after: int) -> bool:
        """Whether the word stands alone on one of the next lines."""
        places = self._places.get(word, [])
        following = bisect_right(places, after)
        return following < len(places) and places[following] <= after + HEREDOC_WITHIN


@dataclass
class _Inside:
    """What the lines of a block that was read so far leave open: a string, a here-document."""

    language: str
    quote: str = ""
    heredoc: str | None = None

    def read(self, line: str, lines: Lines, number: int) -> None:
        if self.language in SHELLS and self.heredoc is None:
            word, self.quote = _shell_line(line, self.quote)
            if word is not None and lines.comes(word, number):
                self.heredoc = word
        elif self.language in SHELLS and line.strip() == self.heredoc:
            self.heredoc, self.quote = None, ""
        elif self.language == "ipython":
            self.quote = _python_line(line, self.quote)

    @property
    def literal(self) -> bool:
        """Whether a bare fence is part of a string. Python's ordinary strings end with their line."""
        return bool(self.quote) if self.language in SHELLS else len(self.quote) == 3


def _closing(lines: Lines, first: int, info: str, fence: str) -> tuple[int, int] | None:
    """The line that closes the block and how many of its characters belong to the block; None where it stays open."""
    depth, inside, program = 1, _Inside(info), info in PROGRAMS
    for number in range(first + 1, len(lines.text)):
        line = lines.text[number]
        if depth == 1 and line.startswith(fence) and JOINED.match(line, len(fence)):
            return number, len(fence)
        if program:
            inside.read(line, lines, number)
        ticks = FENCE.match(line) if line.startswith("```") else None
        if not ticks:
            continue
        behind = line[ticks.end() :].strip()
        if not behind and (ticks[0] == fence or depth > 1):
            if inside.literal:
                continue
            if depth > 1:
                depth -= 1
            elif _text_follows(lines, number) and (not program or inside.heredoc):
                depth += _opens_nested(lines, number)
            else:
                return number, len(line)
        elif behind and (behind[0].isalnum() or behind[0] in "_/.~") and len(inside.quote) < 3:
            depth += 1
    return None


def _text_follows(lines: Lines, number: int) -> bool:
    line = lines.text[number + 1] if number + 1 < len(lines.text) else ""
    return bool(line.strip()) and not line.startswith("```")


def _opens_nested(lines: Lines, number: int) -> bool:
    """Whether a bare fence with text below it is closed by another one, behind which the outer block goes on."""
    for below in range(number + 1, min(number + NESTED_WITHIN, len(lines.text))):
        line = lines.text[below]
        stripped = line.strip()
        if FENCE.fullmatch(stripped):
            return any(more.strip() for more in lines.text[below + 1 : below + 1 + MORE_WITHIN])
        if line.startswith("```") and len(stripped) > 3:
            return False
    return False


def _shell_line(line: str, quote: str) -> tuple[str | None, str]:
    """The word that ends a here-document begun on this line, if any, and the quote that is open at the line's end."""
    place = 0
    while token := SHELL_TOKENS[quote].search(line, place):
        place = token.end()
        if token[0] == "\\":
            place += 1
        elif token[0] == "#":
            break
        elif token[0] == "$((":
            close = line.find("))", token.start() + 2)
            place = close + 2 if close != -1 else len(line)
        elif token[0] == "<<":
            word = HEREDOC.match(line, place)
            if word and not word[1].lstrip("+-").isdigit():  # x << 2 is arithmetic
                return word[1], ""
        else:
            quote = "" if quote else token[0]
    return None, quote


def _python_line(line: str, quote: str) -> str:
    """The quote that is open at the line's end; an ordinary string goes on only behind a backslash."""
    place = 0
    while token := PYTHON_TOKENS[quote].search(line, place):
        place = token.end()
        if token[0] == "\\":
            place += 1
        elif token[0] == "#":
            break
        else:
            quote = "" if quote else token[0]
    continues = (len(line) - len(line.rstrip("\\"))) % 2 == 1
    return quote if len(quote) == 3 or continues else ""
