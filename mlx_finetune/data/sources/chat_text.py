"""Text in which a whole chat is written down, back into its turns: what chat templates render, and transcripts with names.

Text without speakers is language modelling, which this project does not do: it learns what an assistant answers.
"""

import re
from dataclasses import dataclass

from mlx_finetune.data.sources.chat_messages import ROLES

START = re.compile(r"\s*(?:<s>|<\|begin_of_text\|>|<bos>|<\|startoftext\|>)?\s*")
SYSTEM_IN_USER = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>\s*", re.DOTALL)  # as Llama 2 has it
OWN_NAMES = {"inst": "user", "/inst": "assistant", "input": "user", "output": "assistant"}
NAMES = "Human|User|Assistant|Instruction|Input|Response|Output|System|GPT|AI"


@dataclass(frozen=True)
class _Markup:
    """How one family of templates writes a turn: `header` names the role in its first group, one of `ends` closes the turn."""

    header: re.Pattern[str]
    ends: tuple[str, ...]
    preamble: bool = False  # whether a system prompt may stand before the first header


MARKUPS = (
    _Markup(re.compile(r"<\|im_start\|>[ ]*(\w+)[ ]*\n?"), ("<|im_end|>", "<|endoftext|>")),
    _Markup(
        re.compile(r"<\|(?:start_header_id|header_start)\|>(\w+)<\|(?:end_header_id|header_end)\|>"),
        ("<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end_of_text|>"),
    ),
    _Markup(re.compile(r"<start_of_turn>(\w+)\n?"), ("<end_of_turn>", "<eos>")),
    _Markup(re.compile(r"<\|(system|user|assistant|observation|tool)\|>"), ("<|end|>", "<|endoftext|>", "</s>")),
    _Markup(re.compile(r"\[(/?INST)\]"), ("</s>", "<s>")),
    _Markup(re.compile(rf"#{{2,3}} ?({NAMES}):", re.IGNORECASE), ("</s>", "<|endoftext|>"), preamble=True),
    _Markup(re.compile(r"^(Human|User|Assistant|System|AI|USER|ASSISTANT|SYSTEM):", re.MULTILINE), ("</s>", "<|endoftext|>")),
)


def turns_of(text: str) -> list[tuple[str, str]] | None:
    """Role, as the text names it, and content of each turn; None where the text is not a chat of a person and an assistant.

    The text must begin with a turn's header (only before "###" may a system prompt stand). A last turn without text, as a
    generation prompt leaves it, is dropped.
    """
    start = START.match(text)
    assert start
    for markup in MARKUPS:
        first = markup.header.search(text, start.end())
        if first and (markup.preamble or first.start() == start.end()):
            turns = _turns(text, start.end(), markup)
            if {"user", "assistant"} <= {ROLES.get(role) for role, _ in turns}:
                return turns
    return None


def _turns(text: str, start: int, markup: _Markup) -> list[tuple[str, str]]:
    headers = list(markup.header.finditer(text, start))
    preamble = text[start : headers[0].start()].strip()
    turns = [("system", preamble)] if preamble else []
    for header, end in zip(headers, [*(later.start() for later in headers[1:]), len(text)], strict=True):
        name, content = header[1].lower(), text[header.end() : _end(text, header.end(), end, markup.ends)].strip()
        if name == "inst" and (system := SYSTEM_IN_USER.match(content)):
            turns.append(("system", system[1].strip()))
            content = content[system.end() :]
        if name == "input" and turns and turns[-1][0] == "instruction":  # Alpaca's second half of a question
            turns[-1] = ("user", f"{turns[-1][1]}\n{content}")
        else:
            turns.append((OWN_NAMES.get(name, name), content))
    return turns if not turns or turns[-1][1] else turns[:-1]


def _end(text: str, start: int, end: int, ends: tuple[str, ...]) -> int:
    """Where the turn's own text ends: before the marks and blanks behind it."""
    while end > start:
        if text[end - 1].isspace():
            end -= 1
        elif mark := next((mark for mark in ends if text.endswith(mark, start, end)), None):
            end -= len(mark)
        else:
            break
    return end
