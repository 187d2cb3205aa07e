"""A chat template in Ollama's language, found by asking the model's own and proven against it, or refused.

What stands between two messages is read off renderings of the model's Jinja template; a Go template is built of it, and
both are rendered with many chats of gptme's shape. Ollama's language is Go's: https://pkg.go.dev/text/template
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_finetune.data.conversation import Message, Role
from mlx_finetune.data.probing import GPTME
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError

ROLES: tuple[Role, ...] = ("system", "user", "assistant")
FIRST, LEAD = "first", "lead"  # before any message; behind a system message that opens the chat
SYSTEM, USER, ASSISTANT = ROLES
SHAPES = (
    (SYSTEM, USER, ASSISTANT, USER, SYSTEM, ASSISTANT, SYSTEM, USER, ASSISTANT, USER),
    (USER, ASSISTANT, SYSTEM, ASSISTANT, SYSTEM),
)
CHATS = 200  # with which the translation is proven
CONTENTS = (
    "Run the tests.", "```shell\npytest -q 2>&1 | tail -40\n```", "def add(a, b):\n    return a + b", "naïve 你好 🙂",
    "{{ .Content }} and {% if x %}", "<b>&amp;</b> \"it's\" C:\\temp", "a\n\n\nb", "1", "<system>\nnote\n</system>",
)  # fmt: skip
# What templates treat in ways of their own, and Ollama hands on as it is.
PECULIAR = {"outer blanks of messages": "  answer \n", "thinking in earlier turns": "<think>\nhm\n</think>\n\nanswer"}
SERVE = "serve the GGUF with llama.cpp (llama-server --jinja), which renders the model's own template"
ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)

Gaps = Mapping[tuple[str, str], str]  # (what stood before, role, or "" for the answer that is asked for) -> text


@dataclass(frozen=True)
class Translation:
    """`source` for Modelfile's TEMPLATE; `remarks`: where Ollama cannot give the text that was trained."""

    source: str
    remarks: tuple[str, ...]


def translate(template: ChatTemplate, bos: str, place: str) -> Translation:
    """The Go template that gives the same text as `template`; `bos`: what Ollama puts in front by itself; `place` for errors.

    Raises:
        UserError: the text depends on more than the roles of neighbours, so that no such template gives it.
    """
    try:
        gaps = _gaps(template, bos)
        source = _go_template(gaps)
        _prove(template, source, bos)
        remarks = tuple(_remarks(template, source, bos))
    except Refused as refused:
        raise UserError(f"{place}: its chat template has no proven translation for Ollama: {refused}", hint=SERVE) from refused
    return Translation(source, remarks)


def collate(messages: Sequence[Message]) -> list[Message]:
    """What Ollama does before any template: neighbours of one role become one message (template.go, `collate`)."""
    found: list[Message] = []
    for message in messages:
        if found and found[-1].role == message.role and message.role != "tool":
            found[-1] = replace(found[-1], content=f"{found[-1].content}\n\n{message.content}")
        else:
            found.append(message)
    return found


def render_go(source: str, messages: Sequence[Message]) -> str:
    """The text that Go's text/template makes of `messages`, for the part of its language that is written here."""
    pieces = ACTION.split(source)
    text, place = _run(pieces, 0, {"$messages": list(messages)})
    assert place >= len(pieces)
    return text


def _asked(template: ChatTemplate, messages: Sequence[Message], bos: str) -> str:
    return template.render(messages, True).removeprefix(bos)


def _gaps(template: ChatTemplate, bos: str) -> Gaps:
    """Raises Refused where the same neighbours have other texts between them elsewhere."""
    gaps: dict[tuple[str, str], str] = {}
    for roles in SHAPES:
        for count in range(1, len(roles) + 1):
            if roles[count - 1] == "assistant" or (count == 1 and roles[0] == "system"):
                continue  # no answer is asked for there
            chat = [Message(role, f"mark{number}end") for number, role in enumerate(roles[:count])]
            for key, gap in _between(chat, _asked(template, chat, bos)):
                if gaps.setdefault(key, gap) != gap:
                    raise Refused(f"what stands between {' and '.join(key)} is not always the same")
    return gaps


def _between(chat: Sequence[Message], text: str) -> Iterator[tuple[tuple[str, str], str]]:
    state, place = FIRST, 0
    for message in chat:
        found = text.find(message.content, place)
        if found < 0:
            raise Refused(f"a message of role {message.role} is lost, or stands in front of an earlier one")
        yield (state, message.role), text[place:found]
        place = found + len(message.content)
        state = LEAD if state == FIRST and message.role == "system" else message.role
    yield (state, ""), text[place:]


def _go_template(gaps: Gaps) -> str:
    if any("{{" in gap or "}}" in gap or '"""' in gap for gap in gaps.values()):
        raise Refused("it writes {{, }} or three quotation marks")
    return _by_role(gaps) or _by_neighbours(gaps)


def _by_role(gaps: Gaps) -> str:
    """The short form, where each role has its own text before and behind it; empty where that is not so."""
    merged: dict[tuple[str, str], str] = {}
    for (state, role), gap in gaps.items():
        if merged.setdefault(("system" if state == LEAD else state, role), gap) != gap:
            return ""
    behind = {state: _common([gap for (before, _), gap in merged.items() if before == state]) for state, _ in merged}
    before = {role: {gap[len(behind[state]) :] for (state, to), gap in merged.items() if to == role} for role in (*ROLES, "")}
    if any(len(texts) != 1 for texts in before.values()):
        return ""
    start, texts = behind[FIRST], {role: found.pop() for role, found in before.items()}
    ends = {behind[role].removesuffix(start) for role in ROLES if behind[role].endswith(start)}
    after_role = texts["user"].removeprefix("user")
    if len(ends) == 1 and all(texts[role] == role + after_role for role in ROLES):
        one = f"{start}{{{{ .Role }}}}{after_role}{{{{ .Content }}}}{ends.pop()}"
        return f"{{{{ range .Messages }}}}{one}{{{{ end }}}}{start}{texts['']}"
    branches = [(f'eq .Role "{role}"', f"{texts[role]}{{{{ .Content }}}}{behind[role]}") for role in ROLES]
    return f"{start}{{{{ range .Messages }}}}{_choice(branches)}{{{{ end }}}}{texts['']}"


def _by_neighbours(gaps: Gaps) -> str:
    """The general form, which remembers what stood before."""
    branches = []
    for role in ROLES:
        cases = [(state, gap) for (state, to), gap in gaps.items() if to == role]
        inner = _choice([(f'eq $last "{state}"', gap) for state, gap in cases])
        after = '{{ if eq $last "first" }}{{ $last = "lead" }}{{ else }}{{ $last = "system" }}{{ end }}'
        after = after if role == "system" else f'{{{{ $last = "{role}" }}}}'
        branches.append((f'eq .Role "{role}"', f"{inner}{{{{ .Content }}}}{after}"))
    ends = _choice([(f'eq $last "{state}"', gap) for (state, to), gap in gaps.items() if not to])
    return f'{{{{ $last := "{FIRST}" }}}}{{{{ range .Messages }}}}{_choice(branches)}{{{{ end }}}}{ends}'


def _choice(branches: Sequence[tuple[str, str]]) -> str:
    """The text of the first condition that holds."""
    return "{{ if " + "{{ else if ".join(f"{condition} }}}}{text}" for condition, text in branches) + "{{ end }}"


def _common(texts: Sequence[str]) -> str:
    shortest = min(texts, key=len)
    return next((shortest[:n] for n in range(len(shortest), 0, -1) if all(text.startswith(shortest[:n]) for text in texts)), "")


def _prove(template: ChatTemplate, source: str, bos: str) -> None:
    rng = random.Random(0)  # noqa: S311  the same chats each time
    for _ in range(CHATS):
        chat = list(_chat(rng))
        if render_go(source, chat) != _asked(template, chat, bos):
            raise Refused("its text depends on more than the roles of neighbouring messages")


def _chat(rng: random.Random) -> Iterator[Message]:
    """As gptme sends one, neighbours of one role joined: perhaps a system message, then all roles, last one that asks."""
    if rng.random() < 0.5:
        yield Message("system", rng.choice(CONTENTS))
    last: Role = "user"
    yield Message("user", rng.choice(CONTENTS))
    for _ in range(rng.randrange(6)):
        if last != "assistant":
            yield Message("assistant", rng.choice(CONTENTS))
        last = rng.choice((SYSTEM, USER))
        yield Message(last, rng.choice(CONTENTS))
        if last == "system" and rng.random() < 0.3:
            last = "user"
            yield Message("user", rng.choice(CONTENTS))


def _remarks(template: ChatTemplate, source: str, bos: str) -> Iterator[str]:
    chat = GPTME[:-1]
    if bos and not template.render(chat, True).startswith(bos):
        yield f"Ollama puts {bos} in front of a chat, which the model's template does not"
    if _asked(template, chat, bos) != render_go(source, collate(chat)):
        yield "Ollama joins neighbouring messages of one role, as gptme's system messages are; the model learned them apart"
    for name, content in PECULIAR.items():
        chat = (Message("user", content.strip()), Message("assistant", content), Message("user", content))
        if _asked(template, chat, bos) != render_go(source, chat):
            yield f"the model's template changes {name}, Ollama leaves them as they are"


def _run(pieces: Sequence[str], place: int, names: dict[str, object], skip: bool = False) -> tuple[str, int]:
    """Runs up to the `end` or `else` that closes the block; texts stand at even places, actions at odd ones."""
    text = ""
    while place < len(pieces):
        if place % 2 == 0:
            text += "" if skip else pieces[place]
            place += 1
            continue
        action = pieces[place].split(maxsplit=1)
        match action[0]:
            case "end" | "else":
                return text, place
            case "range":
                messages = names["$messages"]
                assert isinstance(messages, list) and action[1].strip() == ".Messages"
                _, end = _run(pieces, place + 1, names, skip=True)
                for message in [] if skip else messages:
                    names |= {".Role": message.role, ".Content": message.content}
                    text += _run(pieces, place + 1, names)[0]
                place = end + 1
            case "if":
                part, place = _branches(pieces, place, names, skip)
                text += part
            case name:
                if not skip:
                    text += _evaluate(name, action[1:], names)
                place += 1
    return text, place


def _branches(pieces: Sequence[str], place: int, names: dict[str, object], skip: bool) -> tuple[str, int]:
    text, done = "", skip
    while pieces[place].strip() != "end":
        condition = pieces[place].strip().removeprefix("else").strip().removeprefix("if").strip()
        chosen = not done and (not condition or _holds(condition, names))
        part, place = _run(pieces, place + 1, names, skip=not chosen)
        text, done = text + part, done or chosen
    return text, place + 1


def _holds(condition: str, names: Mapping[str, object]) -> bool:
    operation, left, right = condition.split()
    assert operation == "eq"
    return names[left] == right.strip('"')


def _evaluate(name: str, rest: Sequence[str], names: dict[str, object]) -> str:
    if not rest:
        return str(names[name])
    operation, value = rest[0].split()
    assert operation in ("=", ":=")
    names[name] = value.strip('"')
    return ""
