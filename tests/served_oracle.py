"""Whether examples are right, judged from outside: nothing here comes from the code that makes them.

What a server feeds is rendered and tokenized by transformers; what a turn is, is told by its text.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.exact import Pieces
from mlx_finetune.data.template import ChatTemplate

Tools = Sequence[dict[str, Any]]
EMPTY_THOUGHT = re.compile(r"^\s*<think>\s*</think>\s*")


@dataclass
class Verdict:
    """Turns of one conversation: exact, learned in another context, not learned; and each thing that is wrong."""

    exact: int = 0
    inexact: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, other: "Verdict") -> None:
        """Counts what the other has counted as well."""
        self.exact += other.exact
        self.inexact += other.inexact
        self.refused += other.refused
        self.wrong += other.wrong

    @property
    def outcome(self) -> str:
        """One word for all of it."""
        turns = self.exact + self.inexact.total()
        if self.wrong:
            return "WRONG"
        if self.refused:
            return "refused in part" if turns else "refused"
        return "inexact" if self.inexact else "exact"


class Server:
    """What serves a model: transformers' own tokenizer with the template that was trained."""

    def __init__(self, folder: Path, template: ChatTemplate) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.jinja = template.source
        backend = self.tokenizer.backend_tokenizer
        self.control = {number: token.content for number, token in backend.get_added_tokens_decoder().items() if token.special}
        stops = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
        self.stops = set(stops)

    def render(self, messages: Sequence[Message], prompt: bool, tools: Tools) -> str | None:
        """The text; None where the template does not take the messages."""
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    _rows(messages),
                    tools=list(tools) or None,
                    chat_template=self.jinja,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            )
        except (TemplateError, TypeError, ValueError):
            return None

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def named(self, text: str) -> list[str]:
        """The control tokens that stand in a text."""
        return re.findall("|".join(map(re.escape, sorted(self.control.values(), key=len, reverse=True))), text)

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False))


def _rows(messages: Sequence[Message]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for m in messages:
        row: dict[str, Any] = {"role": m.role, "content": m.content.strip() if m.role == "assistant" else m.content}
        if m.tool_calls:
            functions = [(c.id, {"name": c.name, "arguments": json.loads(c.arguments)}) for c in m.tool_calls]
            row["tool_calls"] = [{"id": i, "type": "function", "function": function} for i, function in functions]
        if m.tool_call_id:
            row |= {"tool_call_id": m.tool_call_id, "name": "shell"}
        rows.append(row)
    return rows


def judge(server: Server, messages: Sequence[Message], tools: Tools, pieces: Pieces) -> Verdict:
    """Looks at all examples of a conversation."""
    verdict = Verdict(inexact=pieces.inexact.copy(), refused=pieces.refused.copy())
    expected = [i for i, m in enumerate(messages) if m.role == "assistant" and m.weight > 0]
    learned = Counter(turn for piece in pieces.pieces for turn in piece.window.turns)
    if set(learned) - set(expected) or any(count > 1 for count in learned.values()):
        verdict.wrong.append(f"turns {expected} were learned {dict(learned)} times")
    if learned.total() + pieces.refused.total() != len(expected):
        verdict.wrong.append(f"{learned.total()} learned and {pieces.refused.total()} refused are not {len(expected)} turns")
    for piece in pieces.pieces:
        encoded = piece.encoded
        runs = list(_runs(server, encoded.tokens.tolist(), encoded.weights.tolist()))
        if not len(runs) == len(piece.window.turns) == len(encoded.exact):
            verdict.wrong.append(f"{len(runs)} stretches are learned for {len(piece.window.turns)} turns")
            continue
        places = [i for i, m in enumerate(piece.window.messages) if m.role == "assistant" and m.weight > 0]
        for (start, ids, weights), turn, place, exact, as_text in zip(
            runs, piece.window.turns, places, encoded.exact, encoded.as_text, strict=True
        ):
            before, message = piece.window.messages[:place], messages[turn]
            if [m.content for m in before] != [m.content for m in messages[:turn]] or weights != {message.weight}:
                verdict.wrong.append(f"turn {turn} stands behind other messages, or weighs {weights}")
            context = encoded.tokens[:start].tolist()
            for wrong in _wrong(server, [*before, message], tools, context, ids, exact):
                verdict.wrong.append(f"turn {turn}: {wrong}")
            verdict.exact += exact
            if as_text and not exact:
                verdict.inexact["behind the name of a control token, kept as text"] += 1
    return verdict


def _runs(server: Server, tokens: list[int], weights: list[float]) -> Iterator[tuple[int, list[int], set[float]]]:
    """First place, tokens and weights of each learned stretch; a token at which a server stops ends it too."""
    start = None
    for place in range(len(tokens) + 1):
        learned = place < len(tokens) and weights[place] > 0
        if start is not None and (not learned or tokens[place - 1] in server.stops):
            yield start, tokens[start:place], set(weights[start:place])
            start = None
        if learned and start is None:
            start = place


def _wrong(
    server: Server, messages: Sequence[Message], tools: Tools, context: list[int], ids: list[int], exact: bool
) -> Iterator[str]:
    """What is wrong with the last message as it is learned behind `context`."""
    turn, said = messages[-1], messages[-1].content.strip()
    before, body = server.text(context), server.text(ids[:-1])
    prompt, through = server.render(messages[:-1], True, tools), server.render(messages, False, tools)
    if ids[-1] not in server.stops:
        yield f"ends with {server.text(ids[-1:])!r}, where no server stops"
    if exact and (prompt is None or server.tokens(prompt) != context):
        yield f"called exact, but stands behind {before[-80:]!r} instead of {(prompt or '')[-80:]!r}"
    # Of equal tokens the text is the prompt's: a control token may take the blanks behind it.
    read = prompt if exact and prompt and server.tokens(prompt) == context else before
    for other in messages[:-1]:
        text = other.content.strip()
        written = text in read or (other.role == "tool" and json.dumps(text, ensure_ascii=False)[1:-1] in read)
        if other.role != "assistant" and not written:
            yield f"what {other.role} said is lost: {text[:60]!r}"
    end, emitted = server.text(ids[-1:]), _emitted(prompt, through)
    opened = exact and (prompt or "").rstrip().endswith("<think>")
    # The prompt begins the thought; or it has begun one, and the turn has none to go on with.
    forms = [said, said.removeprefix("<think>").lstrip(), "\n</think>\n\n" + said] if opened else [said]
    if turn.tool_calls:
        yield from _wrong_call(turn, body)
    elif not any(_same(body, form) for form in forms) and not (emitted and (emitted + end).startswith(body + end)):
        # In one rendering a template may take the thought out of an earlier turn, and control tokens may stand behind it.
        tail = "".join(server.control[i] for i in ids[:-1] if i in server.control)
        if (exact and emitted) or body.removesuffix(tail) not in (said, said.rpartition("</think>")[2].strip()):
            yield f"learns {body[:80]!r} … {body[-40:]!r} for {said[:80]!r} … {said[-40:]!r}, emitted {(emitted or '')[:90]!r}"
    if exact and emitted is not None and not (opened and "</think>" in said):
        whole, short = emitted, EMPTY_THOUGHT.sub("", emitted)
        if not any(text.startswith(body + end) or text.rstrip() == body.rstrip() for text in (whole, short)):
            yield f"learns {(body + end)[-100:]!r} for {emitted[-100:]!r}"
    if opened and "</think>" not in body:
        yield f"the answer is learned as a thought: {body[:60]!r}"
    if said and not turn.tool_calls:
        own = next((form for form in (said, *forms, said.rpartition("</think>")[2].strip()) if form and form in body), None)
        made = [server.control[i] for i in ids[:-1] if i in server.control]
        around = "".join(body.rpartition(own)[::2]) if own else body
        if made != server.named(around):
            yield f"control tokens {made} inside of {body[:80]!r}"


def _same(one: str, other: str) -> bool:
    """Equal but for blanks at the edges of a thought."""
    return one == other or ("</think>" in one and "".join(one.split()) == "".join(other.split()))


def _emitted(prompt: str | None, through: str | None) -> str | None:
    """What the template says that a model writes behind the prompt."""
    return through[len(prompt) :] if prompt and through and through.startswith(prompt) else None


def _wrong_call(turn: Message, body: str) -> Iterator[str]:
    for made in turn.tool_calls:
        for text in (made.name, *json.loads(made.arguments).values()):
            forms = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]) if isinstance(text, str) else ()
            if forms and not any(form in body for form in forms):
                yield f"learns a call without {text!r}: {body!r}"
    if turn.content.strip() not in body:
        yield f"learns a call without the words beside it: {body!r}"
