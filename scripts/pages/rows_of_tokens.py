"""Pictures of rows of tokens: one rendering against what a server is sent, and rows folded into a tree."""

from collections.abc import Iterator, Sequence

import numpy as np
from svg import drawing, legend, line, rect, text

from mlx_finetune.data.batches import Batch, Example
from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.examples import make_examples
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.data.trees import Tree, plan, tokens_of

WIDTH = 760
LEFT = 16
BAR = 22
THOUGHT = "<think>\nI look at what is there before I change anything, and then do one thing at a time.\n</think>\n\n"


def turns_said(count: int) -> str:
    return f"{count} turn{'s' if count != 1 else ''}"


def exactness(conversation: Conversation, template: ChatTemplate) -> str:
    """One rendering of a log with thoughts against what a server is sent, turn by turn."""
    made = make_examples(conversation, template, 4096).examples
    tokens, weights, kinds = _rendered_once(conversation, template)
    scale = (WIDTH - 2 * LEFT) / max(len(one.tokens) for one in made)
    learned = (("system", "read"), ("learned", "learned as the model writes it"), ("wrong", "learned without its thought"))
    parts = [*legend(LEFT, 28, learned)]
    parts.append(text(LEFT, 64, f"rendered once: {turns_said(kinds.count('wrong'))} of {len(kinds)} lost their thoughts"))
    parts += bar(tokens, weights, 72, scale, kinds)
    y = 124
    parts.append(
        text(
            LEFT, y, f"as prepared: {turns_said(sum(len(one.turns) for one in made))} in {len(made)} examples, each as it is served"
        )
    )
    for one in made:
        parts += bar(one.tokens, one.weights, y + 8, scale, ["learned"] * len(one.turns), 11)
        y += 14
    return drawing(
        WIDTH, y + 22, "A template that takes thoughts out of earlier turns: one rendering against one example a turn", parts
    )


def _rendered_once(conversation: Conversation, template: ChatTemplate) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The tokens of the log as the template renders it whole, 1 where a turn stands, and of each turn whether its thought does."""
    whole, place, kinds = template.render(conversation.messages), 0, []
    weights = np.zeros(len(template.prompt_tokens(whole)), np.float32)
    for message in conversation.messages:
        if message.role == "assistant":
            said = message.content.removeprefix(THOUGHT).strip()
            place = whole.index(said, place)
            thought = whole[:place].endswith(THOUGHT)
            start = place - (len(THOUGHT) if thought else 0)
            place += len(said)
            weights[len(template.prompt_tokens(whole[:start])) : len(template.prompt_tokens(whole[:place]))] = 1
            kinds.append("learned" if thought else "wrong")
    return np.zeros(len(weights), np.int32), weights, kinds


def bar(
    tokens: np.ndarray, weights: np.ndarray, y: float, scale: float, kinds: Sequence[str], height: float = BAR
) -> Iterator[str]:
    """A row of tokens from its first to its last; the learned stretches in turn have those kinds."""
    yield rect(LEFT, y, len(tokens) * scale, height, "system")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights > 0, [0]]).astype(int)))
    for kind, (start, end) in zip(kinds, zip(edges[::2], edges[1::2], strict=True), strict=True):
        yield rect(LEFT + start * scale, y, (end - start) * scale, height, kind)


def tree(examples: Sequence[Example]) -> str:
    """The rows of a step, and the same folded."""
    batches = [Batch.of([one]) for one in examples]
    (folded,) = plan(batches, 10**6)
    scale = (WIDTH - 2 * LEFT) / max(len(one.tokens) for one in examples)
    parts = [
        *legend(LEFT, 28, (("system", "read"), ("learned", "learned"))),
        text(LEFT, 64, f"{len(examples)} rows: {tokens_of(batches):,} tokens"),
    ]
    y = 74.0
    for one in examples:
        parts += bar(one.tokens, one.weights, y, scale, ["learned"] * len(one.turns), 11)
        y += 14
    y += 34
    parts.append(text(LEFT, y, f"folded into a tree: {len(folded.inputs):,} tokens, the same loss and the same gradient"))
    parts += _branches(folded, y + 12, scale)
    lanes = len(folded.segments)
    return drawing(WIDTH, int(y + 12 + 14 * lanes + 16), "Examples that begin alike, as rows and folded into a tree", parts)


def _branches(folded: Tree, top: float, scale: float) -> Iterator[str]:
    """Each segment in a lane of its own, at its place in its row, joined to where it branches off."""
    learns = np.zeros(len(folded.inputs), bool)
    learns[folded.places[folded.weights > 0]] = True
    lane_of = {segment.end: lane for lane, segment in enumerate(folded.segments)}
    for lane, segment in enumerate(folded.segments):
        x, y = LEFT + int(folded.positions[segment.start]) * scale, top + 14 * lane
        if segment.sees:
            parent = next(number for end, number in sorted(lane_of.items()) if segment.sees[-1][1] <= end)
            yield line(x, top + 14 * parent + 11, x, y)
        yield rect(x, y, (segment.end - segment.start) * scale, 11, "system")
        inside = learns[segment.start : segment.end]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], inside, [0]]).astype(int)))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            yield rect(x + start * scale, y, (end - start) * scale, 11, "learned")
