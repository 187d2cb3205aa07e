"""Draws docs/images/ from the sample of gptme logs: every block and every colour is what the data layer makes of them."""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from rows_of_tokens import BAR, LEFT, THOUGHT, WIDTH, exactness, tree, turns_said
from svg import circle, drawing, legend, line, rect, text

from mlx_finetune.data.collect import collect
from mlx_finetune.data.conversation import Conversation, Message, read_conversations
from mlx_finetune.data.examples import make_examples
from mlx_finetune.data.found import Sources
from mlx_finetune.data.refine import Settings
from mlx_finetune.data.shown import runs_of
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.windows import Window, cut
from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face

IMAGES = Path(__file__).parents[2] / "docs" / "images"
DRIVING = Path(__file__).parents[2] / "benchmarks" / "results" / "driving_gptme.json"
LONG = "2026-06-05-retry-backoff-client"
SHORT = "2026-07-08-hopping-orange-fish"
MASKED = "2026-06-09-skipping-red-seal"
WINDOW = 768
HEAD = 30  # characters by which a shortened message is known
QWEN3 = "chat_templates/qwen3.jinja"  # of trl
LEGEND = (("system", "prompt"), ("user", "the person"), ("output", "output of tools"), ("read", "assistant, read"))


def kind_of(message: Message, lead: bool) -> str:
    """The colour of a message; gptme's tools answer with the role system."""
    if message.role == "assistant":
        return "learned" if message.weight > 0 else "read"
    return "user" if message.role == "user" else "system" if lead else "output"


def masks(conversation: Conversation, template: ChatTemplate) -> str:
    """The first turns of a log as the engine is fed them, token by token."""
    example = make_examples(conversation, template, 4096).examples[0]
    pieces = [(piece, run) for run in runs_of(example, template) for piece in run.pieces]
    size, height, wide, rows = 13, 21, 88, 42
    step = (WIDTH - 2 * LEFT) / wide
    parts, x, y = [*legend(LEFT, 26, (("learned", "learned: predicting it counts"), ("system", "only read")))], 0, 0
    for piece, run in pieces:
        for shown, breaks in _lines_of(piece):
            if x + len(shown) > wide:
                x, y = 0, y + 1
            if y >= rows:
                break
            if shown:
                left, top = LEFT + x * step, 46 + y * height
                parts.append(rect(left, top, len(shown) * step - 0.8, height - 3, "learned" if run.learned else "system"))
                parts.append(
                    text(left, top + 13, shown, "onlearned" if run.learned else "text", size, mono=True).replace(
                        " xml:space", f' textLength="{len(shown) * step - 0.8:.1f}" lengthAdjust="spacingAndGlyphs" xml:space'
                    )
                )
            x += len(shown)
            if breaks:
                x, y = 0, y + 1
    return drawing(
        WIDTH, 46 + rows * height + 8, "The first turns of a log, token by token: the assistant's tokens are learned", parts
    )


def _lines_of(piece: str) -> Iterator[tuple[str, bool]]:
    lines = piece.split("\n")
    for number, content in enumerate(lines):
        last = number == len(lines) - 1
        yield content + ("" if last else "↵"), not last


def windows(conversation: Conversation, template: ChatTemplate) -> str:
    """A log of several windows: each message where it stands in the log, in every window that has it."""
    found = cut(conversation, template.count, WINDOW)
    messages = conversation.messages
    sizes = [template.count(message) for message in messages]
    scale = (WIDTH - 2 * LEFT) / sum(sizes)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    lead = next(i for i, message in enumerate(messages) if message.role != "system")
    parts = [
        *legend(LEFT, 28, (*LEGEND, ("learned", "assistant, learned"))),
        text(LEFT, 66, f"the log: {sum(sizes):,} tokens, {len(messages)} messages"),
    ]
    for i, message in enumerate(messages):
        parts.append(rect(LEFT + starts[i] * scale, 74, sizes[i] * scale - 1, BAR, kind_of(replace(message, weight=0.0), i < lead)))
    y = 126
    for number, window in enumerate(found.windows, 1):
        tokens = sum(template.count(message) for message in window.messages)
        parts.append(text(LEFT, y, f"window {number}: {tokens} tokens, learns {turns_said(len(window.turns))}"))
        for i, message in _placed(window, messages):
            whole = template.count(message)
            shortened = message.content != messages[i].content
            kind = "learned" if i in window.turns else kind_of(replace(message, weight=0.0), i < lead)
            parts.append(rect(LEFT + starts[i] * scale, y + 8, max(whole * scale - 1, 2), BAR, kind))
            if shortened:
                parts.append(rect(LEFT + starts[i] * scale, y + 8, sizes[i] * scale - 1, BAR, "stroke"))
        y += 52
    share = found.truncated_tokens / found.turn_tokens
    parts.append(
        text(LEFT, y, f"cut off after {WINDOW} tokens, as is usual: {share:.0%} of what the assistant wrote would be learned")
    )
    for i, message in enumerate(messages):
        kept = max(0, min(sizes[i], WINDOW - int(starts[i])))
        if kept:
            parts.append(rect(LEFT + starts[i] * scale, y + 8, kept * scale - 1, BAR, kind_of(message, i < lead)))
    parts.append(text(LEFT, y + 56, "outlined: shortened, only the filled part is read", "faint", 13))
    return drawing(
        WIDTH, y + 72, f"A log cut into {len(found.windows)} windows, in which each turn of the assistant is learned once", parts
    )


def _placed(window: Window, messages: Sequence[Message]) -> Iterator[tuple[int, Message]]:
    """Which message of the log each one of the window is: the same, or the one of which it is a part."""
    last = window.turns[-1] + 1
    for message in reversed(window.messages):
        same = [i for i in range(last) if messages[i].role == message.role and messages[i].content == message.content]
        begun = [
            i for i in range(last) if messages[i].role == message.role and messages[i].content[:HEAD] == message.content[:HEAD]
        ]
        last = (same or begun)[-1]
        yield last, message


def roles(logs: Sequence[Conversation], template: ChatTemplate) -> str:
    """Whose tokens the sample's logs are, and which of them are learned."""
    tokens, learned, turns, read = Counter[str](), 0, 0, 0
    for log in logs:
        encoded = template.encode(log.messages)
        tokens.update(encoded.by_role)
        learned += int(np.count_nonzero(encoded.weights))
        turns += len(encoded.turns)
        read += sum(m.role == "assistant" for m in log.messages) - len(encoded.turns)
    named = {"system": "prompt and output of tools", "user": "the person", "assistant": "the assistant", "": "the chat template"}
    scale = (WIDTH - 2 * LEFT - 300) / max(tokens.values())
    parts = [
        text(
            LEFT,
            30,
            _of_logs(len(logs), sum(tokens.values()), learned, turns, read),
        )
    ]
    for number, (role, words) in enumerate(named.items()):
        y = 52 + 34 * number
        size = next(count for name, count in tokens.items() if name == role or (not role and name not in named))
        parts += [
            text(LEFT, y + 16, words),
            rect(LEFT + 220, y, size * scale, BAR, {"system": "output", "user": "user"}.get(role, "system")),
        ]
        if role == "assistant":
            parts += [rect(LEFT + 220, y, size * scale, BAR, "read"), rect(LEFT + 220, y, learned * scale, BAR, "learned")]
        parts.append(text(LEFT + 228 + size * scale, y + 16, f"{size:,}", "faint", 13))
    return drawing(WIDTH, 52 + 34 * len(named) + 8, "Tokens of the sample's logs by whose text they are", parts)


def _of_logs(logs: int, tokens: int, learned: int, turns: int, read: int) -> str:
    return f"{logs} logs, {tokens:,} tokens: {learned:,} of them learned in {turns_said(turns)}, {turns_said(read)} only read"


def driving() -> str:
    """Losses of base and tuned model by kind of token, as benchmarks/driving_gptme.py measured them."""
    rows = {row["of"]: row for row in json.loads(DRIVING.read_text(encoding="utf-8"))["tables"][0]["rows"]}
    named = {
        "prose": "prose",
        "inside a call": "inside a call",
        "first of a turn": "first token of a turn",
        "stop": "token that ends a turn",
    }
    left, scale = 200, (WIDTH - 200 - 140) / 5
    parts = [text(LEFT, 28, "held-out loss, nats a token; the band: the 95 % range of the tuned model's difference from the base")]
    parts += legend(LEFT, 54, (("faint", "base"), ("learned", "tuned: two epochs on the sample"), ("read", "95 % range")))
    for number, (name, words) in enumerate(named.items()):
        row, y = rows[name], 84 + 36 * number
        base, tuned = (left + row[which] * scale for which in ("base", "tuned"))
        low, high = (left + max(row["base"] + row[which], 0) * scale for which in ("low", "high"))
        parts += [text(LEFT, y + 5, words), rect(low, y - 8, high - low, 16, "read"), line(tuned, y, base, y)]
        parts += [circle(base, y, 6, "faint"), circle(tuned, y, 7, "learned")]
        parts.append(text(WIDTH - LEFT, y + 5, f"{row['base']:.2f} → {row['tuned']:.2f}", "text", 13, "end"))
    axis = 84 + 36 * len(named)
    parts.append(line(left, axis - 8, left + 5 * scale, axis - 8))
    parts += [text(left + n * scale, axis + 10, str(n), "faint", 13, "middle") for n in range(6)]
    return drawing(WIDTH, axis + 24, "Held-out losses of base and tuned model by kind of token", parts)


def collected(folder: Path) -> dict[str, Conversation]:
    """The sample's logs as collect writes them, by name."""
    collect(Sources(Path(str(files("mlx_finetune") / "sample" / "gptme-logs")), ()), Settings(), folder)
    return {str(one.meta["name"]): one for one in read_conversations(folder / "gptme.jsonl")}


def with_thoughts(conversation: Conversation) -> Conversation:
    """The same log as of a model that thinks first: the sample has none."""
    thought = (replace(m, content=THOUGHT + m.content) if m.role == "assistant" else m for m in conversation.messages)
    return replace(conversation, messages=tuple(thought))


def thinking_template(model: Path) -> ChatTemplate:
    """Qwen3's own chat template, as trl ships it, on the tokenizer at hand, which has its control tokens."""
    package = find_spec("trl")
    assert package and package.origin
    (model / "chat_template.jinja").write_text((Path(package.origin).parent / QWEN3).read_text(encoding="utf-8"), encoding="utf-8")
    return ChatTemplate.load(model)


def main() -> None:
    """All pictures, anew."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "SmolLM2-135M-Instruct"
        gguf_to_hugging_face(find_smollm2(), model)
        logs, template = collected(Path(folder) / "collected"), ChatTemplate.load(model)
        drawn = {
            "masks": masks(logs[MASKED], template),
            "windows": windows(logs[LONG], template),
            "roles": roles(list(logs.values()), template),
            "driving": driving(),
        }
        thinking, thoughtful = thinking_template(model), with_thoughts(logs[SHORT])
        drawn |= {"exactness": exactness(thoughtful, thinking), "tree": tree(make_examples(thoughtful, thinking, 4096).examples)}
    for name, content in drawn.items():
        (IMAGES / f"{name}.svg").write_text(content, encoding="utf-8")
        print(IMAGES / f"{name}.svg")


if __name__ == "__main__":
    main()
