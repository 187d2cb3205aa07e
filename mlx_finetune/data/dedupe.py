"""What stands twice in a collection: equal conversations, forks and beginnings of others, and near-duplicates.

Everything is decided from small fingerprints, so that no text need be held. Each turn is learned once: a conversation whose
turns are all learned in others is dropped; of a fork that has turns of its own the shared ones become context. Nothing depends
on the order in which conversations are read.
"""

import base64
import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.minhash import jaccard, shingles, signature

SOURCES = ("gptme", "chat", "openassistant")  # of equal conversations that of the first source is kept
FEW_SHINGLES = 10  # a shorter conversation is a duplicate only of an equal one
BANDS, ROWS = 32, 4  # of the signature: at a similarity of 0.7 a pair meets in some band with a chance of 0.9998
DOUBT = 0.12  # the estimate of a signature may be so far below the truth (2.5 standard deviations at 0.7)
MOST_IN_BUCKET = 64  # conversations that one bucket remembers
MOST_COMPARED = 8  # exact comparisons for one conversation
REMEMBERED = 256  # sets of shingles in memory


@dataclass(frozen=True)
class Fingerprint:
    """All that is remembered of a conversation: about 1 kB."""

    name: str
    source: str
    group: str
    time: str
    exact: str  # of the folded text without the system prompt
    chain: np.ndarray  # uint64 [assistant turns]: of everything up to and including the turn, without the system prompt
    turns: np.ndarray  # int32 [assistant turns]: their places in the conversation
    learnable: np.ndarray  # bool [assistant turns]
    signature: np.ndarray  # uint32 [128], zeros where near-duplicates are not looked for
    shingles: int

    def to_json(self) -> list[Any]:
        """Compact; `from_json` gives it back."""
        arrays = (self.chain, self.turns, self.learnable, self.signature)
        packed = [base64.b64encode(array.tobytes()).decode() for array in arrays]
        return [self.name, self.source, self.group, self.time, self.exact, self.shingles, *packed]

    @classmethod
    def from_json(cls, row: list[Any]) -> "Fingerprint":
        """What `to_json` wrote; raises ValueError or LookupError where it did not."""
        kinds: tuple[Any, ...] = (np.uint64, np.int32, np.bool_, np.uint32)
        chain, turns, learnable, signs = [np.frombuffer(base64.b64decode(row[6 + i]), kind) for i, kind in enumerate(kinds)]
        return cls(row[0], row[1], row[2], row[3], row[4], chain, turns, learnable, signs, row[5])


@dataclass(frozen=True)
class Decision:
    """By index of the fingerprints. `context`: places of turns that are learned in another conversation."""

    dropped: dict[int, str]  # with the reason
    context: dict[int, tuple[int, ...]]
    groups: list[str]  # of the earliest member of the cluster: stable as the collection grows, but where two clusters are joined


def fingerprint(conversation: Conversation, near: bool = True) -> Fingerprint:
    """Of the conversation as it is kept; `near` False leaves out what only near-duplicates need."""
    messages = conversation.messages
    lead = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    chain, folded = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    hashes, turns = [], []
    for place, message in enumerate(messages[lead:], lead):
        calls = "".join(f"\0{call.name}\0{call.arguments}" for call in message.tool_calls)
        content = message.content.strip() + calls
        chain.update(f"{message.role}\0{len(content)}\0{content}".encode("utf-8", errors="replace"))
        folded.update(f"{message.role}\0{' '.join(content.split()).casefold()}\0".encode("utf-8", errors="replace"))
        if message.role == "assistant":
            hashes.append(int.from_bytes(chain.copy().digest(), "little"))
            turns.append(place)
    values = shingles_of(conversation) if near else np.zeros(0, np.uint64)
    return Fingerprint(
        name=conversation.name,
        source=conversation.source,
        group=conversation.group,
        time=str(conversation.meta.get("time") or ""),
        exact=folded.hexdigest(),
        chain=np.array(hashes, np.uint64),
        turns=np.array(turns, np.int32),
        learnable=np.array([messages[turn].weight > 0 for turn in turns], np.bool_),
        signature=signature(values),
        shingles=len(values),
    )


def shingles_of(conversation: Conversation) -> np.ndarray:
    """What near-duplicates are told by: the person's and the model's words. Prompts and tool output would make all alike."""
    return shingles(message.content for message in conversation.messages if message.role in ("user", "assistant"))


def decide(prints: Sequence[Fingerprint], shingles: Callable[[int], np.ndarray], threshold: float | None = 0.7) -> Decision:
    """What is dropped, what is only read, and who belongs together.

    `shingles(i)` gives `shingles_of` the i-th conversation again, for the exact check of a candidate; `threshold` is the least
    Jaccard similarity of near-duplicates, None looks for none. Of near-duplicates the one with the most turns stays, then the
    newest; one is dropped only if it is near enough to one that stays.
    """
    clusters = _Clusters(prints)
    order = _order(prints)
    dropped = _equal(prints, order, clusters)
    context: dict[int, tuple[int, ...]] = {}
    _share_turns(prints, [i for i in order if i not in dropped], clusters, dropped, context)
    if threshold is not None:
        _near(prints, [i for i in order if i not in dropped], shingles, threshold, clusters, dropped)
        # What a near-duplicate would have taught on behalf of a fork is learned in the fork again.
        context.clear()
        _share_turns(prints, [i for i in order if i not in dropped], clusters, dropped, context)
    return Decision(dropped, context, clusters.labels())


def _order(prints: Sequence[Fingerprint]) -> list[int]:
    """The best first: most turns, then by source, then the newest, then by name."""
    order = sorted(range(len(prints)), key=lambda i: (prints[i].name, prints[i].exact))
    order.sort(key=lambda i: prints[i].time, reverse=True)
    order.sort(key=lambda i: (-int(prints[i].learnable.sum()), _rank(prints[i].source)))
    return order


def _rank(source: str) -> int:
    return SOURCES.index(source) if source in SOURCES else len(SOURCES)


class _Clusters:
    """Who belongs together; starts with the sources' own groups."""

    def __init__(self, prints: Sequence[Fingerprint]) -> None:
        self._prints = prints
        self._parent = list(range(len(prints)))
        first: dict[tuple[str, str], int] = {}
        for i, one in enumerate(prints):
            self.join(i, first.setdefault((one.source, one.group), i))

    def _root(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        """The two belong together from now on."""
        self._parent[self._root(i)] = self._root(j)

    def labels(self) -> list[str]:
        """For each the group of the earliest in its cluster; of a person's own conversations, where there are some."""
        earliest: dict[int, tuple[int, str, str, str]] = {}
        for i, one in enumerate(self._prints):
            root, key = self._root(i), (_rank(one.source), one.time, one.name, one.group)
            earliest[root] = min(earliest.get(root, key), key)
        return [earliest[self._root(i)][3] for i in range(len(self._prints))]


def _equal(prints: Sequence[Fingerprint], order: Sequence[int], clusters: _Clusters) -> dict[int, str]:
    dropped: dict[int, str] = {}
    first: dict[str, int] = {}
    for i in order:
        kept = first.setdefault(prints[i].exact, i)
        if kept != i:
            clusters.join(i, kept)
            dropped[i] = f"duplicate of {prints[kept].name}"
    return dropped


def _share_turns(
    prints: Sequence[Fingerprint],
    order: Sequence[int],
    clusters: _Clusters,
    dropped: dict[int, str],
    context: dict[int, tuple[int, ...]],
) -> None:
    """Each turn belongs to the first conversation that can teach it; one without a turn of its own is dropped."""
    owners: dict[int, int] = {}  # a turn with all before it -> who teaches it
    for i in order:
        one = prints[i]
        others = [owners.get(key) for key in one.chain.tolist()]
        known = [owner for owner in others if owner is not None]
        learnable = one.learnable.tolist()
        own = [key for key, owner, learn in zip(one.chain.tolist(), others, learnable, strict=True) if learn and owner is None]
        if known and (len(known) > 1 or 2 * len(known) >= len(others) or not own):  # one greeting in common says nothing
            clusters.join(i, known[-1])
        if known and not own:
            whole = others[-1] is not None
            dropped[i] = f"{'beginning' if whole else 'same turns as a part'} of {prints[known[-1]].name}"
            continue
        owners |= dict.fromkeys(own, i)
        shared = [
            turn for turn, owner, learn in zip(one.turns.tolist(), others, learnable, strict=True) if learn and owner is not None
        ]
        if shared:
            context[i] = tuple(shared)


class _Shingles:
    """The sets that were asked for last."""

    def __init__(self, read: Callable[[int], np.ndarray]) -> None:
        self._read = read
        self._sets: OrderedDict[int, np.ndarray] = OrderedDict()

    def of(self, i: int) -> np.ndarray:
        """Read again only where it was not asked for lately."""
        if i not in self._sets:
            self._sets[i] = self._read(i)
        self._sets.move_to_end(i)
        if len(self._sets) > REMEMBERED:
            self._sets.popitem(last=False)
        return self._sets[i]


def _near(
    prints: Sequence[Fingerprint],
    order: Sequence[int],
    read: Callable[[int], np.ndarray],
    threshold: float,
    clusters: _Clusters,
    dropped: dict[int, str],
) -> None:
    """Drops what is near to one that stays. Those dropped still bring others into the cluster."""
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    sets = _Shingles(read)
    for i in order:
        if prints[i].shingles < FEW_SHINGLES:
            continue
        bands = [(band, key.tobytes()) for band, key in enumerate(prints[i].signature.reshape(BANDS, ROWS))]
        compared = _candidates(prints, i, {j for band in bands for j in buckets[band]}, threshold)
        for j in compared:
            similarity = jaccard(sets.of(i), sets.of(j))
            if similarity >= threshold:
                clusters.join(i, j)
                if j not in dropped:
                    dropped[i] = f"near-duplicate of {prints[j].name} ({similarity:.2f})"
                    break
        for band in bands:
            if len(buckets[band]) < MOST_IN_BUCKET:
                buckets[band].append(i)


def _candidates(prints: Sequence[Fingerprint], i: int, met: set[int], threshold: float) -> list[int]:
    """Those of `met` that may be near enough, the nearest first; how near is estimated from the signatures."""
    least, most = threshold * prints[i].shingles, prints[i].shingles / threshold
    fitting = sorted(j for j in met if least <= prints[j].shingles <= most)
    if not fitting:
        return []
    signs = np.stack([prints[j].signature for j in fitting])
    estimates = (signs == prints[i].signature).mean(axis=1)
    nearest = np.argsort(-estimates, kind="stable")[:MOST_COMPARED]
    return [fitting[k] for k in nearest.tolist() if estimates[k] >= threshold - DOUBT]
