"""A name and its value: DB_PASSWORD=..., "apiKey": "...", --token ..., <password>...</password>, name: X / value: ..."""

import base64
import binascii
import re
from collections.abc import Iterator
from functools import lru_cache

from mlx_finetune.data.redaction import Found
from mlx_finetune.data.redaction.values import is_marked, is_password, is_placeholder, is_token

LITERALS = "pass pwd psw _pw -pw secret token key credential auth".split()
NAME_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-."
LONGEST_NAME, LONGEST_VALUE = 60, 400

CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[-.]+")
# What may stand behind the word that counts: DB_PASSWORD_PROD, api_key_2, token_base64.
TAIL = re.compile(
    r"(?:_?\d+|_(?:v\d+|prod|production|dev|development|stage|staging|live|test|sandbox|main|primary|secondary|old|new|current"
    r"|previous|default|value|val|raw|plain|plaintext|b64|base64|base|string|str|text|env|var|confirm|confirmation|again))+$"
)
PASSWORD = re.compile(
    r"(?:.*passw(?:or)?d|.*passwort|.*passphrase|(?:.*_)?(?:pass|pwd|pw|psw|pswd|passcode|pass_phrase)|.*(?:requirepass|masterauth)"
    r"|(?:db|user|smtp|mail|ftp|admin|root|ssh|sql|mysql|pg|http|proxy|login|account|redis|ldap|vpn|wifi|cert|key|store)(?:pass|pwd))$"
)
KEY = re.compile(
    r"(?:.*_)?(?:api|access|secret|private|auth|encrypt|encryption|signing|sign|signature|app|application|master|client|account"
    r"|shared|service|license|licence|subscription|admin|consumer|webhook|jwt|hmac|aes|cipher|storage|session|root|rest|write|ingest"
    r"|ssh|bot|server|developer|user|deploy|instrumentation|preshared|pre_shared|wg|wireguard|fernet|django|rails|flask)s?_?key$"
)
TOKEN = re.compile(r".*token$")
SECRET = re.compile(r".*secret(?:_?(?:access)?_?(?:key|token))?(?:_base)?$|.*secret$")
CREDENTIAL = re.compile(r"(?:.*_)?(?:credentials?|auth|bearer|authkey|authorization)$")
AWS_SECRET = re.compile(r".*(?:secret_?access_?key|aws_?secret(?:_?key)?)$")
# Names of this form whose values are no one's secret.
PUBLIC = re.compile(
    r"(?:.*_)?(?:csrf|xsrf|csrfmiddleware|public|pub|publishable|next|page|paging|pagination|continuation|cursor|sync|cancellation"
    r"|cancel|eos|bos|pad|sep|cls|mask|unk|special|stop|end|start|cache|sort|partition|primary|foreign|idempotency|dedup|unique|host"
    r"|object|known|map|dict|json|config|registry|column|row|prompt|image|mask|verification|site|recaptcha_site)(?:_?(?:token|key))+$"
)
PHRASE = re.compile(r"\b(api|access|secret|private|licen[cs]e|account|encryption|signing)[ ]$", re.IGNORECASE)

QUOTE = r"""\\{0,3}["'`]"""
BINDING = re.compile(
    rf"""[A-Za-z0-9_.-]{{0,{LONGEST_NAME}}}+(?P<close>{QUOTE})?\]?
    (?:(?P<annotated>[ \t]{{0,9}}:[ \t]{{0,9}}[A-Za-z][\w.\[\], |]{{0,40}}?[ \t]{{0,9}}=[ \t]{{0,9}}(?={QUOTE}))
      |(?P<equals>[ \t]{{0,40}}(?::=|=>|={{1,3}}|!=)[ \t]{{0,40}})
      |(?P<colon>[ \t]{{0,40}}:(?!:)(?:\*\*)?[ \t]{{0,40}}(?:[|>][-+]?[ \t]{{0,9}}\n[ \t]{{1,40}})?)
      |(?P<pair>[ \t]{{0,9}},[ \t]{{0,9}}(?={QUOTE}))
      |(?P<value>[,\s]{{1,80}}(?:{QUOTE})?[vV]alue(?:{QUOTE})?\s{{0,9}}[:=]\s{{0,9}})
      |(?P<element>>)
      |(?P<table>[ \t]{{0,40}}\|[ \t]{{0,40}})
      |(?P<said>[ \t]{{1,9}}(?:is|was|is[ ]now)[: \t]{{1,9}})
      |(?P<space>[ \t]{{1,40}}))""",
    re.VERBOSE,
)
QUOTED = re.compile(
    rf"[rbfuRBFU]{{0,2}}(?P<quote>{QUOTE})(?P<secret>(?:(?!(?P=quote))(?:\\.|[^\n])){{1,{LONGEST_VALUE}}})(?P=quote)"
)
WHOLE = re.compile(rf"[^\s\\]{{1,{LONGEST_VALUE}}}")  # to the next blank
BARE = re.compile(rf"""[^\s"'`\\<>|,;(){{}}\[\]&]{{1,{LONGEST_VALUE}}}""")
NESTED = re.compile(rf"([A-Za-z_][\w.-]{{0,{LONGEST_NAME}}})[=:]")  # a name and value of its own
LINE_END = re.compile(r"[ \t]*(?:\r?\n|\Z|\\[nr])")
LINE_BEGIN = re.compile(
    r"(?:^|\n|\\n)(?P<indent>[ \t]*(?:- +)?)(?:export +|set +|setx +|ENV +|ARG +|\$env:|env +|-e +|[+>-] ?)?[\"']?$"
)
DOCKER = re.compile(r"(?:^|\n)[ \t]*(?:ENV|ARG)[ \t]+$")
FLAG = re.compile(r"(?:^|[\s\"'`=])--?$")


def named_secrets(text: str, position: int) -> Iterator[Found]:
    """The value of the name that holds the literal at `position`, where it is a secret."""
    binding = BINDING.match(text, position)
    if not binding:
        return
    head = text[max(0, position - LONGEST_NAME) : position]
    stem = head.rstrip(NAME_CHARACTERS)
    name = (
        head[len(stem) :] + text[position : binding.start("close") if binding["close"] else binding.start(binding.lastgroup or 0)]
    )
    dashes = len(name) - len(name.lstrip("-."))
    if phrase := PHRASE.search(stem) if name.lower() == "key" else None:
        name = f"{phrase[1]}_key"
    kind = kind_of_name(name.strip("-.").rstrip("]"))
    if kind:
        yield from _value(text, binding, kind, name, stem + name[:dashes])


@lru_cache(maxsize=4096)
def kind_of_name(name: str) -> str | None:
    """password, token, api_key, secret, credential or aws_secret_key; None for a name that promises no secret."""
    plain = TAIL.sub("", CAMEL.sub("_", name).lower().strip("_"))
    if PUBLIC.match(plain):
        return None
    for kind, pattern in KINDS.items():
        if pattern.match(plain):
            return kind
    return "api_key" if re.fullmatch(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*_KEY", name) else None


KINDS = {
    "aws_secret_key": AWS_SECRET,
    "password": PASSWORD,
    "api_key": KEY,
    "token": TOKEN,
    "secret": SECRET,
    "credential": CREDENTIAL,
}


def kind_of_value(kind: str, value: str, literal: bool) -> str | None:
    """The kind again (or a better one) where the value of such a name is a secret, else None."""
    if kind == "password":
        return kind if is_password(value, literal) or is_token(value) else None
    if kind == "aws_secret_key" and re.fullmatch(r"[A-Za-z0-9/+]{40}", value):
        return None if is_marked(value) else kind
    if kind == "credential":
        return "basic_auth" if is_basic(value) else kind if is_token(value) else None
    return kind if is_token(value) or (literal and _short_token(value)) else None


def _short_token(value: str) -> bool:
    """Of 8 to 15 characters: only what no name looks like, with digits within the letters or two kinds of letters and signs."""
    if not 8 <= len(value) < 16 or is_placeholder(value) or not value.isascii() or any(map(str.isspace, value)):
        return False
    return bool(re.fullmatch(r"[A-Za-z0-9+/=_-]+", value) and len(re.findall(r"\d(?=[A-Za-z])|[a-z](?=[A-Z\d])", value)) >= 3)


def is_basic(value: str) -> bool:
    """Whether this is base64 of user:password."""
    if len(value) < 8 or len(value) % 4 or not re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", value):
        return False
    try:
        user, colon, password = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return False
    return bool(user and colon) and (user + password).isprintable() and not is_placeholder(password)


def _value(text: str, binding: re.Match[str], kind: str, name: str, head: str) -> Iterator[Found]:
    form, at = binding.lastgroup or "", binding.end()
    flag = form == "space" and FLAG.search(head)
    if (form == "pair" and not binding["close"]) or (form == "element" and head[-1:] not in ("<", ":")):
        return
    quoted = QUOTED.match(text, at)
    if form == "space" and not flag and not DOCKER.search(head):
        yield from _after_blank(text, at, kind if len(name) > 4 else "", quoted)
        return
    if quoted:
        literal = form not in ("pair", "table", "said") or (kind == "password" and form == "said")
        start, end = quoted.span("secret")
    else:
        start, end, literal = _unquoted(text, at, form, name, head)
        if form == "space" and not flag:
            literal = True
    if end > start and (found := kind_of_value(kind, text[start:end], literal)):
        yield Found(found, start, end)


def _after_blank(text: str, at: int, kind: str, quoted: re.Match[str] | None) -> Iterator[Found]:
    """`authtoken 2Ab...`, `requirepass 2Ab...`, SQL's `PASSWORD 'hunter2'`: a blank says little, so the value must say more."""
    match = quoted or BARE.match(text, at)
    group = "secret" if quoted else 0
    if match and (is_token(match[group]) or (quoted and kind == "password" and is_password(match[group], literal=False))):
        yield Found(kind, *match.span(group))


def _unquoted(text: str, at: int, form: str, name: str, head: str) -> tuple[int, int, bool]:
    """Where a value without quotes stands, and whether it must be literal, since no program has a name in this place."""
    whole, bare = WHOLE.match(text, at), BARE.match(text, at)
    if not whole or not bare:
        return at, at, False
    if (nested := NESTED.match(whole[0])) and kind_of_name(nested[1]):
        return at, at, False
    line = LINE_BEGIN.search(head)
    alone = bool(line and LINE_END.match(text, whole.end()))
    tight = form == "equals" and binding_is_tight(text, at)
    if line and tight and (name.isupper() or (alone and not line["indent"] and not name.startswith(("self.", "this.")))):
        return at, _without_end(text, at, whole.end()), not name.islower() or alone
    end = bare.end()
    if text[end : end + 1] and text[end] in "([{":
        return at, at, False
    if form == "said" and not (LINE_END.match(text, end) or text[end - 1] in ".,;!" or text[end] in ",;"):
        return at, at, False
    literal = form == "element" or (tight and head.endswith("-")) or (form == "colon" and alone and bool(line))
    return at, end - (len(bare[0]) - len(bare[0].rstrip(".,:;"))), literal


def binding_is_tight(text: str, at: int) -> bool:
    """name=value, no blanks: a shell or a file of settings rather than a program."""
    return text[at - 1] == "=" and text[at - 2 : at - 1].strip() not in ("", "=", "!", ":")


def _without_end(text: str, start: int, end: int) -> int:
    """A shell's quote, bracket or semicolon behind NAME=value is no part of it."""
    return start + len(text[start:end].rstrip("\"'`;),"))
