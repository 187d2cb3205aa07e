"""Addresses of people; not those of machines, and not what else holds an @: react@18.2.0, git@github.com:, @decorator."""

import re
from collections.abc import Iterator

from mlx_finetune.data.redaction import Found

LOCAL_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._%+-"
# The domains that mail is read at; most others of two letters are file endings or attributes (x@y.T, a@b.py).
DOMAIN = re.compile(
    r"@(?:[A-Za-z0-9-]{1,63}\.){1,5}(?:com|org|net|edu|gov|mil|int|info|biz|name|app|dev|xyz|email|tech|cloud|online|site|world|io|ai|co|me|tv|eu"
    r"|ac|ae|ar|at|au|be|bg|br|ca|ch|cl|cn|cz|de|dk|ee|es|fi|fr|gr|hk|hr|hu|id|ie|il|in|ir|is|it|jp|ke|kr|lt|lu|lv|mx|my|ng|nl|no|nz|pe"
    r"|ph|pk|pl|pt|ro|ru|se|sg|si|sk|th|tr|tw|ua|uk|us|vn|za)(?![A-Za-z0-9@_]|[.-][A-Za-z0-9]|[:/][^\s])",
    re.IGNORECASE,
)
MACHINES = re.compile(
    r"^(?:git|hg|svn|noreply|no-reply|donotreply|do-not-reply|mailer-daemon|root)@|noreply|@(?:users\.noreply\.|example\.|.*\.example\.|localhost)",
    re.IGNORECASE,
)


def emails_in(text: str) -> Iterator[Found]:
    """Every address of a person in the text."""
    at = text.find("@")
    while at >= 0:
        head = text[max(0, at - 64) : at]
        local = head[len(head.rstrip(LOCAL_CHARACTERS)) :].lstrip("._%+-")
        domain = DOMAIN.match(text, at)
        if local and domain and not MACHINES.search(local + domain[0]):
            before = text[max(0, at - len(local) - len("mailto:")) : at - len(local)]
            if before == "mailto:" or before[-1:] not in ("/", ":", "@"):
                yield Found("email", at - len(local), domain.end())
        at = text.find("@", at + 1)
