"""What is remembered of a conversation so that what stands twice is found: small, for the text is not held."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mlx_finetune.data.conversation import Conversation, Message
from mlx_finetune.data.minhash import BINS, shingles, signature

SOURCES = ("gptme", "chat", "openassistant")  # the first source's are kept rather than what is like them in others
CHARACTERS = 6  # in a word, and the blank behind it
# As they are stored: the same bytes on every platform.
ARRAYS = {"chain": "<u8", "turns": "<i4", "learnable": "|b1", "seen": "<i4", "signature": "<u4"}


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """All that is remembered of a conversation: about 1 kB, and 17 bytes for each assistant turn."""

    name: str
    source: str
    group: str
    time: str  # of the last message: ISO 8601 in UTC, or ""
    begun: str  # of the first message, where that is known; else as `time`
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

    @property
    def tie(self) -> tuple[Any, ...]:
        """Orders those that nothing else does; where it is equal all is."""
        return self.name, self.source, self.group, self.exact, self.chain.tobytes(), self.learnable.tobytes()

    @classmethod
    def from_json(cls, row: list[Any]) -> "Fingerprint":
        """What `to_json` wrote; raises ValueError or TypeError where it did not."""
        packed = zip(ARRAYS.items(), row[7:], strict=True)
        arrays = {key: np.frombuffer(base64.b64decode(text, validate=True), kind) for (key, kind), text in packed}
        turns = {len(arrays[key]) for key in ("chain", "turns", "learnable", "seen")}
        if len(turns) > 1 or len(arrays["signature"]) != BINS:
            raise ValueError("a fingerprint whose parts do not fit")
        if [type(value) for value in row[:7]] != [str, str, str, str, str, int, int]:
            raise ValueError("a fingerprint with another kind of value")
        name, source, group, time, begun, exact, count = row[:7]
        return cls(name, source, group, time, begun, exact, count, *(arrays[key] for key in ARRAYS))


def rank_of(source: str) -> int:
    """Its place among `SOURCES`; one that is not among them goes last."""
    return SOURCES.index(source) if source in SOURCES else len(SOURCES)


def fingerprint(conversation: Conversation, near: bool = True) -> Fingerprint:
    """Of the conversation as it is kept; `near` False leaves out what only near-duplicates need."""
    messages = conversation.messages
    lead = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    exact, so_far = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    hashes, turns = [], []
    for place, message in enumerate(messages[lead:], lead):
        calls = "".join(f"\0{call.name}\0{call.arguments}" for call in message.tool_calls)
        for digest, raw in ((so_far, _bytes(message.content.strip() + calls)), (exact, _folded(message.content + calls))):
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
    time = str(conversation.meta.get("time") or "")
    return Fingerprint(
        name=conversation.name,
        source=conversation.source,
        group=conversation.group,
        time=time,
        begun=str(conversation.meta.get("begun") or time),
        exact=int.from_bytes(exact.digest(), "little"),
        shingles=len(values),
        chain=np.array(hashes, np.uint64),
        turns=np.array(turns, np.int32),
        learnable=np.array([messages[turn].weight > 0 for turn in turns], np.bool_),
        seen=seen[[i for i, role in enumerate(spoken) if role == "assistant"]],
        signature=signature(values),
    )


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


def _folded(text: str) -> bytes:
    """Without blanks and in small letters."""
    return _bytes(text.casefold()).translate(None, b" \t\n\r\v\f")


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    """The person's and the model's words, calls too. Prompts and tool output would make all alike."""
    for message in messages:
        if message.role in ("user", "assistant"):
            yield " ".join((message.content, *(f"{call.name} {call.arguments}" for call in message.tool_calls)))


def shingles_of(conversation: Conversation) -> np.ndarray:
    """uint64, sorted, each once: what near-duplicates are told by."""
    return shingles(_texts(conversation.messages))[0]
