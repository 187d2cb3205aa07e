"""What stands twice in a collection: equal conversations, forks and beginnings of others, and near-duplicates.

Everything is decided from small fingerprints, so that no text need be held. Each turn is learned once: a conversation whose
turns are all learned in others is dropped; of a fork that has turns of its own the shared ones become context. Nothing depends
on the order in which conversations are read.
"""

import base64
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mlx_finetune.data.clusters import Clusters
from mlx_finetune.data.conversation import Conversation, Message
from mlx_finetune.data.minhash import BINS, Neighbours, bands_of, jaccard, may_reach, shingles, signature

SOURCES = ("gptme", "chat", "openassistant")  # of conversations that are as good that of the first source is kept
FEW_SHINGLES = 10  # with fewer of its own a conversation is a duplicate only of an equal one
GREETING = 8  # with fewer shingles a shared beginning makes no fork
CHARACTERS = 6  # in a word, and the blank behind it
MOST_KEPT, MOST_DROPPED = 64, 8  # conversations that one bucket remembers
MOST_COMPARED = 8  # exact comparisons of one conversation with those kept, and as many with those dropped
REMEMBERED = 2**22  # shingles in memory, 32 MB
# As they are stored: the same bytes on every platform.
ARRAYS = {"chain": "<u8", "turns": "<i4", "learnable": "|b1", "seen": "<i4", "signature": "<u4"}


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """All that is remembered of a conversation: about 1 kB, and 17 bytes for each assistant turn."""

    name: str
    source: str
    group: str
    time: str  # ISO 8601 in UTC, or ""
    exact: int  # 64 bits, of the folded text without the system prompt
    shingles: int
    chain: np.ndarray  # uint64 [assistant turns]: of everything up to and including the turn, without the system prompt
    turns: np.ndarray  # int32 [assistant turns]: their places in the conversation
    learnable: np.ndarray  # bool [assistant turns]
    seen: np.ndarray  # int32 [assistant turns]: shingles up to and including the turn; about, where they are not counted
    signature: np.ndarray  # uint32 [128], zeros where near-duplicates are not looked for

    def to_json(self) -> list[Any]:
        """Compact; `from_json` gives it back."""
        values = (getattr(self, one.name) for one in fields(self))
        return [base64.b64encode(v.tobytes()).decode() if isinstance(v, np.ndarray) else v for v in values]

    @classmethod
    def from_json(cls, row: list[Any]) -> "Fingerprint":
        """What `to_json` wrote; raises ValueError or TypeError where it did not."""
        packed = zip(ARRAYS.items(), row[6:], strict=True)
        arrays = {key: np.frombuffer(base64.b64decode(text, validate=True), kind) for (key, kind), text in packed}
        turns = {len(arrays[key]) for key in ("chain", "turns", "learnable", "seen")}
        if len(turns) > 1 or len(arrays["signature"]) != BINS:
            raise ValueError("a fingerprint whose parts do not fit")
        if [type(value) for value in row[:6]] != [str, str, str, str, int, int]:
            raise ValueError("a fingerprint with another kind of value")
        name, source, group, time, exact, count = row[:6]
        return cls(name, source, group, time, exact, count, *(arrays[key] for key in ARRAYS))


@dataclass(frozen=True)
class Decision:
    """By index of the fingerprints. `context`: places of turns that are learned in another conversation.

    `groups`: one label a cluster, the group of its earliest member. It stays as newer conversations join, but where one of
    them joins two clusters: then both have the label of the older.
    """

    dropped: dict[int, str]  # with the reason
    context: dict[int, tuple[int, ...]]
    groups: list[str]


def fingerprint(conversation: Conversation, near: bool = True) -> Fingerprint:
    """Of the conversation as it is kept; `near` False leaves out what only near-duplicates need."""
    messages = conversation.messages
    lead = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    exact, so_far = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    hashes, turns = [], []
    for place, message in enumerate(messages[lead:], lead):
        calls = "".join(f"\0{call.name}\0{call.arguments}" for call in message.tool_calls)
        for digest, text in ((so_far, message.content.strip() + calls), (exact, _folded(message.content + calls))):
            raw = text.encode("utf-8", errors="surrogatepass")
            digest.update(f"{message.role}\0{len(raw)}\0".encode() + raw)
        if message.role == "assistant":
            hashes.append(int.from_bytes(so_far.digest(), "little"))
            turns.append(place)
    if near:
        values, seen = shingles(_texts(messages))
    else:
        lengths = [len(text.strip()) // CHARACTERS for text in _texts(messages)]
        values, seen = np.zeros(0, np.uint64), np.cumsum(lengths, dtype=np.int32)
    spoken = [message.role for message in messages if message.role in ("user", "assistant")]
    return Fingerprint(
        name=conversation.name,
        source=conversation.source,
        group=conversation.group,
        time=str(conversation.meta.get("time") or ""),
        exact=int.from_bytes(exact.digest(), "little"),
        shingles=len(values),
        chain=np.array(hashes, np.uint64),
        turns=np.array(turns, np.int32),
        learnable=np.array([messages[turn].weight > 0 for turn in turns], np.bool_),
        seen=seen[[i for i, role in enumerate(spoken) if role == "assistant"]],
        signature=signature(values),
    )


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    """The person's and the model's words, calls too. Prompts and tool output would make all alike."""
    for message in messages:
        if message.role in ("user", "assistant"):
            yield " ".join((message.content, *(f"{call.name} {call.arguments}" for call in message.tool_calls)))


def shingles_of(conversation: Conversation) -> np.ndarray:
    """uint64, sorted, each once: what near-duplicates are told by."""
    return shingles(_texts(conversation.messages))[0]


def decide(prints: Sequence[Fingerprint], shingles: Callable[[int], np.ndarray], threshold: float | None = 0.7) -> Decision:
    """What is dropped, what is only read, and who belongs together.

    `shingles(i)` gives `shingles_of` the i-th conversation again, for the exact check of a candidate; `threshold` is the least
    Jaccard similarity of near-duplicates, None looks for none. A beginning that two share does not make them alike: it is
    learned once anyhow, so what follows it is compared. Of near-duplicates the one with the most turns stays, then the newest;
    one is dropped only if it is near enough to one that stays. Fewer are found at a threshold below 0.5.
    """
    assert threshold is None or 0 < threshold <= 1, threshold
    order = sorted(range(len(prints)), key=lambda i: _tie(prints[i]))
    order.sort(key=lambda i: prints[i].time, reverse=True)
    rank = {source: place for place, source in enumerate(SOURCES)}
    order.sort(key=lambda i: (-int(prints[i].learnable.sum()), -len(prints[i].turns), rank.get(prints[i].source, len(rank))))
    best = [prints[i] for i in order]  # from here on a conversation is its place in this order
    clusters, taught = _clusters(best), _Taught(best)
    near = None if threshold is None else _Near(best, lambda i: shingles(order[i]), threshold, clusters)
    dropped, context = {}, {}
    for i in range(len(best)):
        reason = taught.reason_to_drop(i)
        if near and not reason.startswith("duplicate"):  # a beginning too may be like one that is not
            near_reason = near.place(i, droppable=not reason)
            reason = reason or near_reason
        if reason:
            dropped[order[i]] = reason
        elif elsewhere := taught.teach(i):
            context[order[i]] = elsewhere
    labels = dict(zip(order, _labels(best, clusters), strict=True))
    return Decision(dropped, context, [labels[i] for i in range(len(prints))])


def _tie(one: Fingerprint) -> tuple[Any, ...]:
    return one.name, one.source, one.group, one.exact, one.chain.tobytes(), one.learnable.tobytes()


def _clusters(prints: Sequence[Fingerprint]) -> Clusters:
    """Who belongs together by the sources' own groups, equal texts, and the beginnings of forks; a greeting alone is none."""
    clusters = Clusters(len(prints))
    first: dict[tuple[Any, ...], int] = {}
    for i, one in enumerate(prints):
        clusters.join(i, first.setdefault(("exact", one.exact), i))
        if one.group:
            clusters.join(i, first.setdefault((one.source, one.group), i))
        begun = int(np.searchsorted(one.seen, GREETING))
        if begun < len(one.chain):
            clusters.join(i, first.setdefault(("turn", int(one.chain[begun])), i))
    return clusters


def _labels(prints: Sequence[Fingerprint], clusters: Clusters) -> list[str]:
    """For each the group of the earliest in its cluster; one whose time is not known counts as late."""
    earliest: dict[int, tuple[bool, str, str, str]] = {}
    for i, one in enumerate(prints):
        root, key = clusters.root(i), (not one.time, one.time, one.name, one.group or one.name)
        earliest[root] = min(earliest.get(root, key), key)
    return [earliest[clusters.root(i)][3] for i in range(len(prints))]


class _Taught:
    """Which turn, with all before it, is learned where."""

    def __init__(self, prints: Sequence[Fingerprint]) -> None:
        self._prints = prints
        self._ends = np.cumsum([len(one.chain) for one in prints]).tolist()
        chains = np.concatenate([np.zeros(0, np.uint64), *(one.chain for one in prints)])
        distinct, keys = np.unique(chains, return_inverse=True)
        self._keys = keys.ravel().astype(np.int32)
        self._teacher = np.full(len(distinct), -1, np.int32)
        self._holder = np.full(len(distinct), -1, np.int32)  # a kept conversation that has the turn, learned or not
        self._equals: dict[int, list[int]] = {}  # the kept ones

    def _keys_of(self, i: int) -> np.ndarray:
        return self._keys[self._ends[i] - len(self._prints[i].chain) : self._ends[i]]

    def reason_to_drop(self, i: int) -> str:
        """Empty where it has a turn to teach that no kept one has."""
        one, keys = self._prints[i], self._keys_of(i)
        equals = [j for j in self._equals.get(one.exact, ()) if len(self._prints[j].learnable) == len(keys)]
        if equals and not (one.learnable & ~np.any([self._prints[j].learnable for j in equals], axis=0)).any():
            return f"duplicate of {self._prints[equals[0]].name}"
        learnable = keys[one.learnable]
        teachers = self._teacher[learnable] if len(learnable) else self._holder[keys]
        if not len(teachers) or (teachers < 0).any():
            return ""
        return f"beginning of {self._prints[int(teachers[-1])].name}"

    def teach(self, i: int) -> tuple[int, ...]:
        """The i-th is kept; gives back the places of its turns that are learned elsewhere."""
        one, keys = self._prints[i], self._keys_of(i)
        elsewhere = one.learnable & (self._teacher[keys] >= 0)
        self._teacher[keys[one.learnable & ~elsewhere]] = i
        self._holder[keys[self._holder[keys] < 0]] = i
        self._equals.setdefault(one.exact, []).append(i)
        return tuple(one.turns[elsewhere].tolist())


class _Near:
    """Near-duplicates among those placed so far."""

    def __init__(
        self, prints: Sequence[Fingerprint], read: Callable[[int], np.ndarray], threshold: float, clusters: Clusters
    ) -> None:
        self._prints, self._threshold, self._clusters = prints, threshold, clusters
        self._read, self._held = read, 0
        self._sets: OrderedDict[int, np.ndarray] = OrderedDict()
        signatures = np.array([one.signature for one in prints], np.uint32).reshape(-1, BINS)
        self._sizes = np.array([one.shingles for one in prints], np.int64)
        bands = bands_of(signatures)
        self._kept, self._dropped = (Neighbours(signatures, self._sizes, bands, most) for most in (MOST_KEPT, MOST_DROPPED))

    def place(self, i: int, droppable: bool) -> str:
        """The reason to drop it, if there is one; those dropped still bring others into their cluster."""
        if self._prints[i].shingles < FEW_SHINGLES:
            return ""
        kept = self._kept.like(i, self._threshold)
        j, similarity = next(self._near(i, *self._teaching_alike(i, *kept)), (i, 0.0)) if droppable else (i, 0.0)
        self._clusters.join(i, j)
        goes = j != i or not droppable
        for likely in ([kept[0]] if goes else []) + [self._dropped.like(i, self._threshold)[0]]:
            for other, _ in self._near(i, likely):
                self._clusters.join(i, other)
        (self._dropped if goes else self._kept).add(i)
        return f"near-duplicate of {self._prints[j].name} ({similarity:.2f})" if j != i else ""

    def _teaching_alike(self, i: int, likely: np.ndarray, estimates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those that may be alike in what follows the turns that both begin with, and how many shingles those have."""
        shared = np.array([self._shared(i, j) for j in likely.tolist()], np.int64)
        if shared.any():
            size = self._prints[i].shingles
            fits = may_reach(self._threshold, estimates, size, self._sizes[likely], shared) & (size - shared >= FEW_SHINGLES)
            likely, shared = likely[fits], shared[fits]
        return likely, shared

    def _near(self, i: int, likely: np.ndarray, shared: np.ndarray | None = None) -> Iterator[tuple[int, float]]:
        """Those near to it with how near, the likeliest first; without `shared` only of other clusters: they begin otherwise."""
        apart = shared is None
        shared = np.zeros(len(likely), np.int64) if shared is None else shared
        compared = 0
        for j, common in zip(likely.tolist(), shared.tolist(), strict=True):
            if apart and self._clusters.together(i, j):
                continue
            if compared == MOST_COMPARED:
                return
            compared += 1
            similarity = jaccard(self._set(i), self._set(j), common)
            if similarity >= self._threshold:
                yield j, similarity

    def _shared(self, i: int, j: int) -> int:
        """How many shingles the turns have that both begin with."""
        one, other = self._prints[i], self._prints[j]
        turns = min(len(one.chain), len(other.chain))
        if not turns or one.chain[0] != other.chain[0]:
            return 0
        differ = one.chain[:turns] != other.chain[:turns]
        common = int(differ.argmax()) or turns  # the first is equal
        return int(one.seen[common - 1])

    def _set(self, i: int) -> np.ndarray:
        """Read again only where it was not asked for lately."""
        if i not in self._sets:
            self._sets[i] = self._read(i)
            self._held += len(self._sets[i])
        self._sets.move_to_end(i)
        while self._held > REMEMBERED and len(self._sets) > 1:
            self._held -= len(self._sets.popitem(last=False)[1])
        return self._sets[i]
