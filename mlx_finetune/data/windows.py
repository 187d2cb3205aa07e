"""A long conversation becomes windows, cut between messages, in which each assistant turn is learned exactly once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_finetune.data.conversation import Conversation, Message

Count = Callable[[Message], int]  # tokens that a message takes

WHOLE_SYSTEM = 3 / 4  # of a window: a longer system prompt is shortened in the first window too
SHORT_SYSTEM = 1 / 8  # of a window: to this much, in all windows that do not begin with the conversation
LONG_OUTPUT = 1 / 8  # of a window: what a tool wrote is shortened to this
LONG_MESSAGE = 1 / 4  # of the room beside the system prompt: any other message that is only read
OLD_CONTEXT = 1 / 4  # of that room: messages that an earlier window had already


@dataclass(frozen=True)
class Window:
    """What one example is made of. `turns[i]` is the place in the conversation of the i-th learned message."""

    messages: tuple[Message, ...]
    turns: tuple[int, ...]
    whole: bool  # the conversation from its start on, nothing cut: what a server is sent


@dataclass(frozen=True)
class Windows:
    """All of one conversation, and what did not fit whole."""

    windows: tuple[Window, ...]
    too_long: tuple[int, ...]  # places of the assistant turns that no window has room for: not learned
    shortened: int  # messages that are only read and had lines cut from their middle
    left_out: int  # messages that are only read and that no window has room for
    turn_tokens: int = 0  # of all turns that are to be learned
    truncated_tokens: int = 0  # how many of them stand in the first `max_length` tokens, which plain truncation would learn
    short_prompts: int = 0  # windows that begin with a part of the system prompt


def cut(conversation: Conversation, count: Count, max_length: int, tools: int = 0) -> Windows:
    """Windows of at most `max_length` tokens by `count`, each ending on a learned turn; `tools` is what the schemas take of it.

    A conversation that fits is one window, untouched. Else the first window is as much of it as fits whole: what a server is sent.
    Every later one begins with the system prompt in an eighth of a window, goes on with what the person asked last and up to a
    quarter of earlier messages that are only read, and long tool output keeps its head and its tail. A tool's result stands in
    no window without its call, and a call is never shortened.
    """
    messages, max_length = conversation.messages, max_length - tools
    turns = [i for i, message in enumerate(messages) if message.role == "assistant" and message.weight > 0]
    if not turns:
        return Windows((), (), 0, 0)
    body = list(messages[: turns[-1] + 1])
    sizes = [count(message) for message in body]
    counted = Windows((), (), 0, 0, turn_tokens=sum(sizes[i] for i in turns), truncated_tokens=_truncated(sizes, turns, max_length))
    if sum(sizes) <= max_length:
        return replace(counted, windows=(Window(tuple(body), tuple(turns), whole=True),))
    lead = next(i for i, message in enumerate(body) if message.role != "system")
    first = _fitting(sizes, turns, max_length) if sum(sizes[:lead]) <= max_length * WHOLE_SYSTEM else []
    windows = [Window(tuple(body[: first[-1] + 1]), tuple(first), whole=True)] if first else []
    rest = turns[len(first) :]
    system, taken = _fit_system(body[:lead], sum(sizes[:lead]), count, int(max_length * SHORT_SYSTEM))
    room = max_length - taken
    left = [i for i in rest if sizes[i] <= room * (1 - LONG_MESSAGE)]
    cut_prompt = system != tuple(body[:lead])
    read = sorted(set(range(lead, len(body))) - set(left)) if left else []
    short = _shorten_read(body, sizes, read, count, int(max_length * LONG_OUTPUT), int(room * LONG_MESSAGE))
    later, left_out = _windows(system, body, sizes, lead, first[-1] + 1 if first else lead, left, room)
    windows += later
    seen = {message.content for window in later for message in window.messages}
    shortened = sum(body[i].content in seen for i in short) + (lead if later and cut_prompt else 0)
    short_prompts, too_long = len(later) if cut_prompt else 0, tuple(sorted(set(rest) - set(left)))
    return replace(
        counted, windows=tuple(windows), too_long=too_long, shortened=shortened, left_out=left_out, short_prompts=short_prompts
    )


def _truncated(sizes: Sequence[int], turns: Sequence[int], max_length: int) -> int:
    """Tokens of the turns that stand in the first `max_length`."""
    ends = np.cumsum(sizes)
    return sum(int(np.clip(max_length - (ends[i] - sizes[i]), 0, sizes[i])) for i in turns)


def _fitting(sizes: Sequence[int], turns: Sequence[int], max_length: int) -> list[int]:
    """The turns up to which the conversation fits as it is."""
    ends = np.cumsum(sizes)
    return [i for i in turns if ends[i] <= max_length]


def _shorten_read(body: list[Message], sizes: list[int], read: Sequence[int], count: Count, output: int, message: int) -> list[int]:
    """Shortens those that are only read: a tool's output to `output` tokens, others to `message`. Which these were."""
    shortened = []
    for i in read:
        limit = output if body[i].role in ("system", "tool") else message
        if sizes[i] > limit and not body[i].tool_calls:
            short = shorten(body[i], count, limit)
            if (size := count(short)) < sizes[i]:
                body[i], sizes[i] = short, size
                shortened.append(i)
    return shortened


def _windows(
    system: Sequence[Message], body: list[Message], sizes: list[int], lead: int, fresh: int, turns: list[int], room: int
) -> tuple[list[Window], int]:
    """The windows, and how many messages stand in none of them. `fresh`: the first message that no window had yet."""
    calls = _calls_of(body)
    windows, left_out, done = [], 0, 0
    while done < len(turns):
        start, used, last, question = _first_asked(body, sizes, calls, lead, fresh, turns[done], room)
        left_out += max(start - fresh, 0)
        following = done + 1
        while following < len(turns) and used + sum(sizes[last + 1 : turns[following] + 1]) <= room:
            if any(calls.get(i, i) < start for i in range(last + 1, turns[following])):
                break
            used += sum(sizes[last + 1 : turns[following] + 1])
            last = turns[following]
            following += 1
        learned = turns[done:following]
        kept = [m if i in learned else replace(m, weight=0.0) for i, m in enumerate(body[start : last + 1], start)]
        windows.append(Window((*system, *question, *kept), tuple(learned), whole=False))
        done, fresh = following, last + 1
    return windows, left_out


def _calls_of(body: Sequence[Message]) -> dict[int, int]:
    """The places of tools' results, and of the turns that made the calls; a result of no call is not among them."""
    made: dict[str, int] = {}
    calls = {}
    for i, message in enumerate(body):
        made |= {call.id: i for call in message.tool_calls}
        if message.role == "tool" and message.tool_call_id in made:
            calls[i] = made[message.tool_call_id]
    return calls


def _first_asked(
    body: list[Message], sizes: list[int], calls: dict[int, int], lead: int, fresh: int, turn: int, room: int
) -> tuple[int, int, int, tuple[Message, ...]]:
    """As `_first`, and what the person asked last before it; nothing where it begins with a person's message itself.

    A tool's output right behind the system prompt would be taken for a part of that; and the model would not know its task.
    """
    taken = 0
    while True:
        start, used, last = _first(body, sizes, calls, lead, fresh, turn, room - taken)
        asked = max((i for i in range(lead, start) if body[i].role == "user"), default=-1)
        if body[start].role == "user" or asked < 0 or sizes[asked] + sizes[turn] > room:
            return start, used, last, ()
        if used + sizes[asked] <= room:
            return start, used + sizes[asked], last, (body[asked],)
        taken = sizes[asked]  # more than before, for what `_first` took leaves that much


def _first(
    body: list[Message], sizes: list[int], calls: dict[int, int], lead: int, fresh: int, turn: int, room: int
) -> tuple[int, int, int]:
    """Start, tokens and last message of a window that has only its first learned turn and what stands before it."""
    start, used, old = turn, sizes[turn], 0
    while start > lead and used + sizes[start - 1] <= room:
        if start <= fresh:
            old += sizes[start - 1]
            if old > room * OLD_CONTEXT:
                break
        start -= 1
        used += sizes[start]
    begin = _sensible_start(body, calls, start, fresh, turn)
    return begin, used - sum(sizes[start:begin]), turn


def _sensible_start(body: list[Message], calls: dict[int, int], start: int, fresh: int, turn: int) -> int:
    """The first place from `start` on where neither an answer without its question stands nor, up to `turn`, a result alone."""
    while True:
        begin = start
        while start < fresh and body[start].role == "assistant":
            start += 1
        for i in range(start, turn):
            if calls.get(i, i) < start:
                start = i + 1
        if start == begin:
            return start


def _fit_system(system: Sequence[Message], size: int, count: Count, limit: int) -> tuple[tuple[Message, ...], int]:
    """The system prompt as later windows begin with it, and its tokens."""
    if size <= limit:
        return tuple(system), size
    short = shorten(Message("system", "\n\n".join(message.content for message in system)), count, limit)
    return ((short,), taken) if (taken := count(short)) < size else (tuple(system), size)


def shorten(message: Message, count: Count, limit: int) -> Message:
    """Head and tail of the message in about `limit` tokens, with a line that says how much was cut from the middle."""
    lines = message.content.splitlines(keepends=True)
    share = limit / max(count(message), 1)
    while True:
        characters = int(len(message.content) * share)
        head, tail = _ends(lines, characters * 2 // 3, characters // 3)
        cut_lines = len(lines) - len(head) - len(tail)
        text = f"{''.join(head)}… {cut_lines} lines cut …\n{''.join(tail)}"
        if not head and not tail:
            half, length = characters // 2, len(message.content)
            text = f"{message.content[:half]}… {length - 2 * half} characters cut …{message.content[length - half :]}"
        short = replace(message, content=text)
        if count(short) <= limit or characters == 0:
            return short
        share *= 0.8


def _ends(lines: list[str], head: int, tail: int) -> tuple[list[str], list[str]]:
    """Whole lines from the start and the end that fit into so many characters."""
    first = 0
    while first < len(lines) and len(lines[first]) <= head:
        head -= len(lines[first])
        first += 1
    last = len(lines)
    while last > first and len(lines[last - 1]) <= tail:
        tail -= len(lines[last - 1])
        last -= 1
    return lines[:first], lines[last:]
