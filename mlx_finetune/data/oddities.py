"""What a chat template does that a person would not expect of it, found by asking it."""

from collections.abc import Callable, Iterator, Sequence

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.policies import FROZEN, prints_date
from mlx_finetune.data.provenance import Refused

Render = Callable[[Sequence[Message], bool], str]  # (messages, generation prompt) -> text

USER, ANSWER = Message("user", "Uuu"), Message("assistant", "Aaa")
BLANKS = "  x\n\ny  "
THOUGHT = Message("assistant", "<think>\nwhy\n</think>\n\nAaa")
DEFAULT_PROMPT = 3  # words


def oddities(render: Render, source: str, pad_ends_turns: bool) -> Iterator[str]:
    """One sentence each. `source`: its Jinja; a chat that it refuses tells nothing."""
    if prints_date(source):
        fate = "and that of today stays in it" if FROZEN in source else "of each day, which cannot be kept"
        yield f"the chat template prints the date, {fate}"
    checks: tuple[tuple[Callable[[], bool], str], ...] = (
        (lambda: BLANKS not in render([Message("user", BLANKS), ANSWER], False), "takes blanks off the edges of messages"),
        (lambda: "why" not in render([USER, THOUGHT, USER, ANSWER], False), "takes thinking out of earlier turns"),
        (lambda: "<think>" in render([USER, ANSWER], False), "writes an empty think block before the last answer"),
        (lambda: render([USER], True).rstrip().endswith("<think>"), "begins the thinking in the prompt"),
        (lambda: _words_of_its_own(render) >= DEFAULT_PROMPT, "writes a system prompt of its own where there is none"),
    )
    for check, text in checks:
        try:
            if check():
                yield f"the chat template {text}"
        except Refused:
            continue
    if pad_ends_turns:
        yield "the tokenizer pads with a token that ends turns; here padding is told by its place"


def _words_of_its_own(render: Render) -> int:
    """Words that stand only where no system message does."""
    alone, led = (render(messages, False).split() for messages in ([USER, ANSWER], [Message("system", "Sss"), USER, ANSWER]))
    return sum(alone.count(word) > led.count(word) for word in set(alone))
