"""OpenAssistant (oasst1, oasst2): the best path of each tree becomes one conversation.

Messages are joined by id, in any order of rows; what is deleted, not reviewed, synthetic or badly labelled falls away with
all its replies; then the best-ranked reply is taken at each step. Among replies that nobody ranked, such as all
prompters', the first of the file is taken.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mlx_finetune.data.conversation import Conversation, Message, Role
from mlx_finetune.data.sources import BadLine, Item, Rejected
from mlx_finetune.data.sources.oasst_files import HINT, Row, read_rows, shown
from mlx_finetune.data.sources.oasst_messages import Post, posts_of
from mlx_finetune.data.sources.relevance import is_relevant
from mlx_finetune.errors import UserError

SOURCE = "openassistant"
LICENSE = "Apache-2.0"
READY = "ready_for_export"
STATES = (
    *("initial_prompt_review", "growing", "ranking", "ready_for_scoring", "scoring_failed", "aborted_low_grade"),
    *("halted_by_moderator", "backlog_ranking", "prompt_lottery_waiting"),
)
# What an assistant must not learn to write. Violence is left out: it is a subject (history, fiction), not a manner.
BAD_LABELS = ("spam", "lang_mismatch", "not_appropriate", "pii", "hate_speech", "sexual_content", "toxicity")
# Whose voice it is. "trained by" counts in the first person only: networks are trained by many things.
LEAKS = {
    "names Open Assistant or LAION": re.compile(r"\bopen[ _-]?assistant\b|\blaion\b", re.IGNORECASE),
    "speaks as an AI": re.compile(
        r"\bas an? (?:\w+ )?(?:ai\b|artificial intelligence|language model)"
        r"|\bi(?: am|['\u2019]m| was) (?:(?:just|only|simply|merely|also|actually) )?(?:an? )?(?:\w+ )?"
        r"(?:ai\b|artificial intelligence|language model|chatgpt|chat ?bot)"
        r"|\b(?:i|i['\u2019]ve|i['\u2019]m|me) (?:was |am |have been |been )?(?:created|developed|trained|built|made) by\b"
        r"|\b(?:ai|assistant|language model),? (?:created|developed|trained|built|made) by\b"
        r"|\bmy (?:training data|knowledge cut-?off)\b",
        re.IGNORECASE,
    ),
    "is pasted from another assistant's page": re.compile(r"^[ \t>*`]*+(?:[a-z+#]{1,15}Copy code|Copy code[ \t]*$)", re.MULTILINE),
}


@dataclass(frozen=True)
class Options:
    """What is taken of OpenAssistant. Labels run from 0 to 1, the mean of the raters; one that is absent rules nothing out."""

    relevant: Literal["code", "any"] = "code"  # code: about programming, the shell or developer tools
    languages: tuple[str, ...] = ("en",)  # of every message; none: any. "pt" takes pt-BR too
    min_quality: float = 0.5  # of an assistant's message
    max_bad: float = 0.5  # a message that reaches this in spam, pii, ... (BAD_LABELS) is left out; 1: none is
    identity: bool = True  # cut a conversation before the assistant says who it is (LEAKS)

    def __post_init__(self) -> None:
        assert self.relevant in ("code", "any"), self.relevant
        assert 0 <= self.min_quality <= 1 and 0 <= self.max_bad <= 1, (self.min_quality, self.max_bad)

    def to_json(self) -> dict[str, Any]:
        """As it stands in collect.json."""
        return asdict(self) | {"languages": list(self.languages)}


EVERYTHING = Options(relevant="any", languages=(), min_quality=0.0, max_bad=1.0, identity=False)


@dataclass(frozen=True, slots=True)
class _Node:
    """What is kept of a message; its text only where it can be used."""

    id: str
    parent: str | None
    tree: str | None
    state: str | None
    role: Role
    text: str
    lang: str
    rank: float | None
    created: str
    fault: str  # why it, and all that answers it, is left out; empty where it is not


def read(source: str | Path, options: Options = Options()) -> Iterator[Item]:
    """One conversation a tree, or why there is none, and every row that could not be read.

    Args:
        source: a hub id such as OpenAssistant/oasst1, a folder of parquet or JSON Lines, or one such file.

    Raises:
        UserError: there is no such thing, or nothing in it is a message or a tree.
    """
    loose: dict[str, _Node] = {}  # messages of which later rows may hold the rest
    trees: set[str] = set()
    first_fault, found = "", False
    for row in read_rows(source):
        nodes = _nodes(row, loose.keys(), options)
        if isinstance(nodes, BadLine):
            first_fault = first_fault or (f" (line {nodes.line}: {nodes.reason})" if nodes.line else f" ({nodes.reason})")
            yield nodes
            continue
        found = True
        if nodes.whole:
            yield from _conversations(nodes.by_id, trees, options)
        else:
            loose |= {name: node for name, node in nodes.by_id.items() if name not in loose}
    if not found:
        raise UserError(f"{shown(source)}: no message or tree of OpenAssistant's in it{first_fault}", hint=HINT)
    yield from _conversations(loose, trees, options)


@dataclass(frozen=True)
class _Nodes:
    by_id: dict[str, _Node]
    whole: bool


def _nodes(row: Row | BadLine, known: Set[str], options: Options) -> _Nodes | BadLine:
    if isinstance(row, BadLine):
        return row
    try:
        posts = posts_of(row.value)
    except ValueError as error:
        return BadLine(row.path, row.line, str(error))
    if not posts.thread and any(post.id in known for post in posts.posts):
        return BadLine(row.path, row.line, "a message whose id an earlier one has")
    return _Nodes({post.id: _node(post, options) for post in posts.posts}, posts.whole)


def _node(post: Post, options: Options) -> _Node:
    fault = _fault(post, options)
    text = "" if fault or not _language_is_wanted(post.lang, options) else post.text
    return _Node(post.id, post.parent, post.tree, post.state, post.role, text, post.lang, post.rank, post.created, fault)


def _fault(post: Post, options: Options) -> str:
    if post.deleted:
        return "is deleted"
    if post.synthetic:
        return "is synthetic"
    if not post.reviewed:
        return "did not pass review"
    if not post.text.strip():
        return "is empty"
    for label in BAD_LABELS:
        if post.labels.get(label, 0) >= options.max_bad and options.max_bad < 1:
            return f"is labelled {label}"
    if post.role == "assistant" and post.labels.get("quality", 1) < options.min_quality:
        return "is of low quality"
    return ""


def _language_is_wanted(lang: str, options: Options) -> bool:
    """Codes are those of BCP 47: a language, or a language, a hyphen and a region."""
    lang = lang.lower()
    return not options.languages or any(lang == name.lower() or lang.startswith(f"{name.lower()}-") for name in options.languages)


def _conversations(nodes: Mapping[str, _Node], trees: set[str], options: Options) -> Iterator[Item]:
    """One item a tree, in the order of their first messages; then one for each tree that has lost its first message.

    `trees` are those that were met before, to which these are added.
    """
    replies: dict[str, list[_Node]] = defaultdict(list)
    for node in nodes.values():
        if node.parent:
            replies[node.parent].append(node)
    for root in [node for node in nodes.values() if not node.parent]:
        name = root.tree or root.id
        result = Rejected(name, SOURCE, "another tree has the same id") if name in trees else _best(name, root, replies, options)
        trees.add(name)
        yield result
    for name in dict.fromkeys(_tree_names(nodes)):
        if name not in trees:
            trees.add(name)
            yield Rejected(name, SOURCE, "the first message is not in the file")


def _tree_names(nodes: Mapping[str, _Node]) -> Iterable[str]:
    """Which tree each message belongs to: it says so itself, or one above it does, or the uppermost's id stands for it.

    A ring of messages that answer one another has no uppermost; then the one where the ring closes counts as it.
    """
    names: dict[str, str] = {}
    for node in nodes.values():
        below: dict[str, _Node] = {}
        while node.id not in names and node.id not in below and not node.tree and node.parent and node.parent in nodes:
            below[node.id] = node
            node = nodes[node.parent]
        name = names.get(node.id) or node.tree or node.id
        names.update(dict.fromkeys([*below, node.id], name))
    return names.values()


def _best(name: str, root: _Node, replies: Mapping[str, Sequence[_Node]], options: Options) -> Conversation | Rejected:
    """The best path of a tree as a conversation, or why it is not taken."""
    path, reason = _best_path(name, root, replies)
    if not reason and not all(_language_is_wanted(node.lang, options) for node in path):
        reason = "not all of it is in a wanted language"
    whole = len(path)
    if not reason and options.identity:
        path, leak = _before_leak(path)
        reason = f"its first answer {leak}" if leak and not path else ""
    if reason:
        return Rejected(name, SOURCE, reason)
    messages = tuple(Message(node.role, node.text) for node in path)
    if options.relevant == "code" and not is_relevant(messages):
        return Rejected(name, SOURCE, "not about programming, the shell or developer tools")
    meta = {
        "name": name,
        "lang": root.lang,
        "message_ids": [node.id for node in path],
        "time": _time(node.created for node in path),
        "cut": f"the next answer {leak}" if len(path) < whole else "",
    }
    return Conversation(messages, SOURCE, name, LICENSE, {key: value for key, value in meta.items() if value})


def _best_path(name: str, root: _Node, replies: Mapping[str, Sequence[_Node]]) -> tuple[list[_Node], str]:
    """From the first message the best reply at each step, up to the last answer; or no path, and why."""
    if root.state not in (None, READY):
        return [], f"tree is {root.state}, not {READY}" if root.state in STATES else "tree is in a state that is not known"
    if root.role != "user" or root.fault:
        return [], f"first message {root.fault or 'is no question'}"
    path = [root]
    while sound := [node for node in _answers(path[-1], name, replies) if not node.fault]:
        path.append(min(sound, key=_order))
    del path[len(path) - len(path) % 2 :]  # a question that nobody answered
    if path:
        return path, ""
    unsound = sorted(_answers(root, name, replies), key=_order)
    return [], f"no reply is left: the best {unsound[0].fault}" if unsound else "no reply"


def _answers(node: _Node, tree: str, replies: Mapping[str, Sequence[_Node]]) -> list[_Node]:
    """The replies to it by the other role; one that says that it belongs to another tree is none."""
    return [reply for reply in replies.get(node.id, ()) if reply.role != node.role and reply.tree in (None, tree)]


def _order(node: _Node) -> float:
    """0 is the best; a reply that nobody ranked counts only where no other is ranked, and then the first does."""
    return float("inf") if node.rank is None else node.rank


def _before_leak(path: list[_Node]) -> tuple[list[_Node], str]:
    """The path up to the answer before the first that says who it is, and what that one does; "" where none does."""
    for index, node in enumerate(path):
        if node.role == "assistant":
            for what, pattern in LEAKS.items():
                if pattern.search(node.text):
                    return path[: index - 1], what
    return path, ""


def _time(created: Iterable[str]) -> str:
    """When the last of them was written, in UTC; empty where none says."""
    moments = []
    for text in created:
        try:
            moment = datetime.fromisoformat(text)
            moments.append((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC))
        except (ValueError, OverflowError):  # no date, or one before the year 1
            continue
    return max(moments).strftime("%Y-%m-%dT%H:%M:%SZ") if moments else ""
