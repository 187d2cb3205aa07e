"""Calls in gptme's xml format: `<tool-use><shell>ls</shell></tool-use>`, or `<function_calls><invoke name="shell">`.

Source: gptme 0.35.1, tools/base.py (`_iter_from_xml_etree`, what runs where lxml is not installed; gptme does not require it).
The whole message has to be well-formed: an unescaped `&&` or `<` anywhere in it and no call is run.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from xml.parsers import expat

DEEPEST = 8  # calls within calls that are read
ROOT = "<root>"


@dataclass(frozen=True)
class XmlCall:
    """One call, whether or not there is such a tool. `start` and `end` are places in the text, of the tool's element."""

    tool: str
    argument: str
    content: str
    start: int
    end: int
    invoked: bool  # written as <invoke name="...">
    listed: int  # where in the document the <tool-use> around it begins


def xml_calls(text: str) -> list[XmlCall]:
    """Every call of the text, in the order in which gptme runs them: that in which their tools are first named in it."""
    if not any(f"<{tag}>" in text and f"</{tag}>" in text for tag in ("tool-use", "function_calls")):
        return []
    try:
        data = f"{ROOT}{text}</root>".encode()
        calls = _Reader().read(data)
    except (expat.ExpatError, UnicodeEncodeError):  # not well-formed; half a character
        return []
    place_of = _characters(data, [place for call in calls for place in (call.start, call.end)])
    calls = [replace(call, start=place_of[call.start], end=place_of[call.end]) for call in calls]
    first: dict[str, int] = {}
    for call in calls:
        if _opening(call) not in first:
            place = text.find(_opening(call))
            first[_opening(call)] = len(text) if place == -1 else place
    return sorted(calls, key=lambda call: (first[_opening(call)], call.invoked, call.listed, call.start))


def _opening(call: XmlCall) -> str:
    return f'<invoke name="{call.tool}"' if call.invoked else f"<{call.tool}"


def _characters(data: bytes, places: Iterable[int]) -> dict[int, int]:
    """For each place in the bytes of the document that place in the text."""
    found: dict[int, int] = {}
    before = len(ROOT)
    characters = 0
    for place in sorted(set(places)):
        characters += len(data[before:place].decode())
        found[place], before = characters, place
    return found


@dataclass(frozen=True)
class _Begun:
    tool: str
    argument: str
    start: int  # bytes
    texts: int  # how many pieces of text came before it
    invoked: bool
    listed: int


class _Reader:
    """Reads elements as they come: no tree is built of what may be nested without end."""

    def __init__(self) -> None:
        self.parser = expat.ParserCreate("utf-8", "}")
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = lambda text: self.texts.append(text)
        self.texts: list[str] = []
        self.open: list[tuple[str, int, list[_Begun]]] = []
        self.calls: list[XmlCall] = []
        self.depth = self.lists = 0  # of open calls, of open <function_calls>

    def read(self, data: bytes) -> list[XmlCall]:
        """Raises ExpatError where the document is not well-formed."""
        self.data = data
        self.parser.Parse(data, True)
        return self.calls

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        begun, place = [], self.parser.CurrentByteIndex
        if self.depth < DEEPEST:
            around, listed, _ = self.open[-1] if self.open else ("", 0, [])
            if around == "tool-use":
                begun.append(_Begun(name, " ".join(attributes.values()), place, len(self.texts), False, listed))
            if name == "invoke" and self.lists and attributes.get("name"):
                tool = attributes.pop("name")
                begun.append(_Begun(tool, " ".join(attributes.values()), place, len(self.texts), True, 0))
        self.open.append((name, place, begun))
        self.depth += len(begun)
        self.lists += name == "function_calls"

    def _end(self, name: str) -> None:
        _, _, begun = self.open.pop()
        self.depth -= len(begun)
        self.lists -= name == "function_calls"
        end = self.data.find(b">", self.parser.CurrentByteIndex) + 1
        for call in begun:
            content = "".join(self.texts[call.texts :]).strip()
            self.calls.append(XmlCall(call.tool, call.argument, content, call.start, end, call.invoked, call.listed))
