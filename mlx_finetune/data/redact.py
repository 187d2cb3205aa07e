"""Secrets become placeholders, the person's home folder and account name become /home/user and user.

There is no rule on entropy alone, so git hashes, UUIDs, digests and base64 stay. This is no guarantee: what neither looks like a
known kind of key nor stands where secrets stand is not found.
"""

import hashlib
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import PurePath
from typing import Any, NamedTuple

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.redaction import Found
from mlx_finetune.data.redaction.bare import bare_secrets
from mlx_finetune.data.redaction.emails import emails_in
from mlx_finetune.data.redaction.identity import homes_to_hide, identity_edits, named_homes, user_to_hide
from mlx_finetune.data.redaction.literals import Literals
from mlx_finetune.data.redaction.names import kind_of_name, kind_of_value
from mlx_finetune.data.redaction.places import rules as secret_rules
from mlx_finetune.data.redaction.strings import rewritten, texts_of
from mlx_finetune.data.redaction.vendors import Rule
from mlx_finetune.errors import UserError

__all__ = ["PLACEHOLDER", "Found", "Ledger", "Name", "Rules", "find", "find_all", "redact_conversation", "redact_text"]

PLACEHOLDER = re.compile(r"\[REDACTED:[a-z][a-z0-9_]*:[0-9]+\]")
PATTERN_PREFIX = "re:"
REMEMBERED = 2**16  # digests of texts without a secret; some ten megabytes
LONG_ENOUGH = 1000  # characters from which a digest is cheaper than a search
GENERAL_KINDS = frozenset("aws_secret_key api_key authorization basic_auth cookie credential email password secret token".split())

Name = Callable[[str, str], str]  # (kind, value) -> the placeholder


@dataclass(frozen=True)
class Rules:
    """What is replaced besides secrets, and what is left alone.

    `homes` and `user`: what becomes /home/user and user (empty: nothing). `allow`: texts, or regular expressions behind `re:`,
    that are never redacted: a secret within such a text, or one in which such an expression is found.
    """

    emails: bool = False
    homes: tuple[str, ...] = ()
    user: str = ""
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in self.allow:
            if pattern.startswith(PATTERN_PREFIX):
                try:
                    empty = re.compile(pattern.removeprefix(PATTERN_PREFIX)).search("")
                except (re.error, OverflowError, RecursionError) as error:
                    raise UserError(f"allow {pattern!r:.80}: {error}", hint="leave out re: to mean the text itself") from error
                if empty:
                    raise UserError(f"allow {pattern!r:.80}: allows everything", hint="--no-redact keeps all secrets")

    @classmethod
    def for_person(
        cls,
        home: PurePath,
        user: str,
        more_homes: Iterable[PurePath | str] = (),
        emails: bool = False,
        allow: Iterable[str] = (),
        personal: bool = True,
    ) -> "Rules":
        """The rules for whoever collects; `personal` False leaves home and name.

        A home and user such as root say nothing of a person and stay; `more_homes`, which a person names, go whatever they are.

        Raises:
            UserError: something behind `re:` is no regular expression, or one of `more_homes` no absolute path.
        """
        allowed = tuple(allow)
        homes = tuple(dict.fromkeys(homes_to_hide([str(home)]) + named_homes(map(str, more_homes)))) if personal else ()
        hidden = user_to_hide(user) if personal else ""
        kept = tuple(one for one in homes if one not in allowed)
        return cls(emails, kept, "" if hidden in allowed else hidden, allowed)

    def to_json(self) -> dict[str, Any]:
        """As it stands in collect.json. Who the person is becomes four digits: enough to see a change, too few to find a name."""
        person = "\0".join((self.user, *self.homes))
        mark = hashlib.sha256(person.encode("utf-8", "replace")).hexdigest()[:4] if person else ""
        return {"emails": self.emails, "personal": mark, "allow": list(self.allow)}


class Ledger:
    """Numbers the secrets of each kind from 1, in order of first appearance; keeps digests, never values."""

    def __init__(self) -> None:
        self._placeholders: dict[bytes, tuple[str, str]] = {}  # digest of the value -> kind, placeholder
        self._distinct: Counter[str] = Counter()
        self._occurrences: Counter[str] = Counter()

    def name(self, kind: str, value: str) -> str:
        """The placeholder of this secret: the same value has the same one, under whichever kind it came first."""
        digest = _digest(value)
        if digest not in self._placeholders:
            self._distinct[kind] += 1
            self._placeholders[digest] = kind, f"[REDACTED:{kind}:{self._distinct[kind]}]"
        kind, placeholder = self._placeholders[digest]
        self._occurrences[kind] += 1
        return placeholder

    def counts(self) -> dict[str, tuple[int, int]]:
        """By kind: how often, and how many different ones."""
        return {kind: (self._occurrences[kind], count) for kind, count in self._distinct.items()}

    def __repr__(self) -> str:
        return f"Ledger({self.counts()})"


def find(text: str, rules: Rules) -> list[Found]:
    """Secrets in the text (and e-mail addresses where the rules say so), from left to right, none overlapping another."""
    return find_all([(text, "")], rules)[0]


def redact_text(text: str, rules: Rules, name: Name) -> str:
    """The text with placeholders, and without the person's home and name."""
    return _redacted(text, [_Edit.of(text, one) for one in find(text, rules)], rules, name)


def redact_conversation(conversation: Conversation, rules: Rules, name: Name) -> Conversation:
    """The conversation with every text in it redacted: of every role, calls, schemas, meta, names and ids.

    JSON is decoded, its strings redacted, and only those that change are written anew. A secret found in one place is taken
    out wherever it stands bare in the conversation.
    """
    texts = list(texts_of(conversation))
    edits = [[_Edit.of(text, one) for one in found] for (text, _), found in zip(texts, find_all(texts, rules), strict=True)]
    known: dict[str, str] = {}  # value -> kind
    for edit in chain.from_iterable(edits):
        known.setdefault(edit.value, edit.kind)
    if known:
        bare: defaultdict[int, list[_Edit]] = defaultdict(list)
        for index, start, end, value in bare_secrets([text for text, _ in texts], known):
            bare[index].append(_Edit(start, end, value, known[value]))
        edits = [_beside([edit._replace(kind=known[edit.value]) for edit in of], bare[i]) for i, of in enumerate(edits)]
    new = {}
    for (text, field), of in zip(texts, edits, strict=True):
        if of or rules.homes or rules.user:
            new[text, field] = _redacted(text, of, rules, name)
    changed = any(text != after for (text, _), after in new.items())
    return rewritten(conversation, lambda text, field: new.get((text, field), text)) if changed else conversation


def _redacted(text: str, edits: list["_Edit"], rules: Rules, name: Name) -> str:
    """Secrets first; then, where none is, the person."""
    if person := identity_edits(text, rules.homes, rules.user):
        edits = _beside(edits, [_Edit(*edit) for edit in person])
    if not edits:
        return text
    parts, end = [], 0
    for edit in edits:
        parts += [text[end : edit.start], name(edit.kind, edit.value) if edit.kind else edit.value]
        end = edit.end
    return "".join([*parts, text[end:]])


class _Edit(NamedTuple):
    """What takes the place of characters `start` to `end`: the name of the secret `value`, or `value` where there is no kind."""

    start: int
    end: int
    value: str
    kind: str = ""

    @classmethod
    def of(cls, text: str, found: Found) -> "_Edit":
        """For a secret in the text."""
        return cls(found.start, found.end, text[found.start : found.end], found.kind)


def _beside(taken: list[_Edit], more: Iterable[_Edit]) -> list[_Edit]:
    """Both, in order, without those of `more` that overlap an earlier one."""
    starts, kept, last = [edit.start for edit in taken], list(taken), 0
    for edit in sorted(more):
        after = bisect_right(starts, edit.start)
        if (after and taken[after - 1].end > edit.start) or (after < len(taken) and starts[after] < edit.end) or edit.start < last:
            continue
        kept.append(edit)
        last = edit.end
    return sorted(kept)


def find_all(texts: Sequence[tuple[str, str]], rules: Rules) -> list[list[Found]]:
    """As `find`, in each text; also the text itself, where the name of the field that it stands in promises a secret."""
    every = _secrets([text for text, _ in texts])
    for (text, field), found in zip(texts, every, strict=True):
        kind = kind_of_name(field) if field else None
        if kind and (kind := kind_of_value(kind, text, literal=True)):
            found.append(Found(kind, 0, len(text)))
        if rules.emails:
            found += emails_in(text)
    return [_settled(text, found, rules) if found else found for (text, _), found in zip(texts, every, strict=True)]


def _settled(text: str, found: Iterable[Found], rules: Rules) -> list[Found]:
    """Merged, without what is allowed and what is a placeholder already: https://[REDACTED:url_token:1]@ has no password."""
    placed = [match.span() for match in PLACEHOLDER.finditer(text)]
    found = [one for one in found if not any(start <= one.start and one.end <= end for start, end in placed)]
    return [one for one in _merged(found) if not _allowed(text[one.start : one.end], text, one, rules.allow)]


def _secrets(texts: Sequence[str]) -> list[list[Found]]:
    """Every hit of every rule in each text; nothing is searched where the same long text was searched in vain before."""
    digests = [_digest(text) if len(text) >= LONG_ENOUGH else b"" for text in texts]
    every: list[list[Found]] = [[] for _ in texts]
    searched = [index for index, digest in enumerate(digests) if digest not in _CLEAN]
    last = -1
    ends: dict[Rule, int] = {}  # of what a rule found last in this text: within it there is nothing more for it to find
    for number, position, rules in _literals().hits([texts[index] for index in searched]):
        index = searched[number]
        if index != last:
            last, ends = index, {}
        for rule in rules:
            if position >= ends.get(rule, 0):
                for one in rule(texts[index], position):
                    every[index].append(one)
                    ends[rule] = one.end
    for index in searched:
        if digests[index] and not every[index]:
            if len(_CLEAN) >= REMEMBERED:
                _CLEAN.clear()
            _CLEAN.add(digests[index])
    return every


_CLEAN: set[bytes] = set()  # of this process: digests of long texts without a secret


@cache
def _literals() -> Literals[tuple[Rule, ...]]:
    return Literals(secret_rules())


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()[:16]


def _merged(found: Iterable[Found]) -> list[Found]:
    """Overlapping ones become one, with the kind that says most: a vendor's rather than that of the name before it."""
    merged: list[Found] = []
    for one in sorted(found, key=lambda one: (one.start, one.end, one.kind)):
        if merged and one.start < merged[-1].end:
            last = merged.pop()
            kind = min(last.kind, one.kind, key=lambda kind: (kind in GENERAL_KINDS, kind))
            one = Found(kind, last.start, max(last.end, one.end))
        merged.append(one)
    return merged


def _allowed(value: str, text: str, found: Found, allow: Iterable[str]) -> bool:
    for allowed in allow:
        if allowed.startswith(PATTERN_PREFIX):
            if re.search(allowed.removeprefix(PATTERN_PREFIX), value):
                return True
        elif allowed and text.find(allowed, max(0, found.end - len(allowed)), found.start + len(allowed)) >= 0:
            return True
    return False
