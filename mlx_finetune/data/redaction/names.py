"""A name and its value: DB_PASSWORD=..., "apiKey": "...", --token ..., <password>...</password>, name: X / value: ..."""

import base64
import binascii
import re
from collections.abc import Iterator
from functools import lru_cache

from mlx_finetune.data.redaction import Found
from mlx_finetune.data.redaction.values import is_marked, is_password, is_placeholder, is_token, is_wordy, whole_end

LITERALS = [
    *"pass pwd psw _pw -pw secret token key credential auth".split(),
    *(name + sign for name in ("pw", "psk", "pat") for sign in "=:\"'"),
    *(name + " =" for name in ("pw", "psk", "_pat")),
]
NAME_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-."
LONGEST_NAME, LONGEST_VALUE = 60, 400  # of a longer value its beginning is judged

CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[-.]+")
# What may stand behind the word that counts: DB_PASSWORD_PROD, api_key_2, token_base64.
TAIL = re.compile(
    r"(?:_?\d+|_(?:v\d+|prod|production|dev|development|stage|staging|live|test|sandbox|main|primary|secondary|old|new|current"
    r"|previous|default|value|val|data|raw|plain|plaintext|b64|base64|base|string|str|text|env|var|confirm|confirmation|again))+$"
)
PASSWORD = re.compile(
    r"(?:.*passw(?:or)?d|.*passwort|.*passphrase|(?:.*_)?(?:pass|pwd|pw|psw|pswd|passcode|pass_phrase|psk)|.*(?:requirepass|masterauth)"
    r"|(?:db|user|smtp|mail|ftp|admin|root|ssh|sql|mysql|pg|http|proxy|login|account|redis|ldap|vpn|wifi|cert|key|store)(?:pass|pwd))$"
)
KEY = re.compile(
    r"(?:.*_)?(?:api|access|secret|private|auth|encrypt|encryption|signing|sign|signature|app|application|master|client|account"
    r"|shared|service|license|licence|subscription|admin|consumer|webhook|jwt|hmac|aes|cipher|storage|session|root|rest|write|ingest"
    r"|ssh|bot|server|developer|user|deploy|instrumentation|preshared|pre_shared|wg|wireguard|fernet|django|rails|flask|unseal|recovery)s?_?key$"
)
TOKEN = re.compile(r".*token$|(?:.*_)?pat$")  # personal access token; a pattern just as often, see values
SECRET = re.compile(r".*secret(?:_?(?:access)?_?(?:key|token))?(?:_base)?$|.*secret$")
CREDENTIAL = re.compile(r"(?:.*_)?(?:credentials?|auth|bearer|authkey|authorization)$")
AWS_SECRET = re.compile(r".*(?:secret_?access_?key|aws_?secret(?:_?key)?)$")
# Names of this form whose values are no one's secret.
PUBLIC = re.compile(
    r"(?:.*_)?(?:csrf|xsrf|csrfmiddleware|public|pub|publishable|next|page|paging|pagination|continuation|cursor|sync|cancellation"
    r"|cancel|eos|bos|pad|sep|cls|mask|unk|special|stop|end|start|cache|sort|partition|primary|foreign|idempotency|dedup|unique|host"
    r"|object|known|map|dict|json|config|registry|column|row|prompt|image|mask|verification|site|recaptcha_site)(?:_?(?:token|key))+$"
)
PHRASE = re.compile(
    r"\b(secret access|api|access|secret|private|licen[cs]e|account|encryption|signing|unseal|recovery)[ ]$", re.IGNORECASE
)

QUOTE = r"""\\{0,3}["'`]"""
# What a program wraps around a text without changing what it says.
WRAPPER = (
    r"(?:(?:new[ ])?(?:(?:std::)?string|String(?:::from|::new)?|str|bytes|Some|Ok|Box::new|aws\.String|\[\]byte|Buffer\.from|ptr"
    r"|Secret(?:Str|Bytes|String|Box)?(?:::new|::from)?|Password|SecureString|ConvertTo-SecureString(?:[ ]-String)?"
    rf"|(?:base64\.)?b64decode)[( ](?={QUOTE}))?"
)
BINDING = re.compile(
    rf"""[A-Za-z0-9_.-]{{0,{LONGEST_NAME}}}+(?P<close>{QUOTE})?\]?
    (?:(?P<annotated>[ \t]{{0,9}}:[ \t]{{0,9}}[A-Za-z&*]
        (?:[\w. |&'?*]|::|[\[<][^=\n"]{{0,40}}[\]>]){{0,60}}+=[ \t]{{0,9}}{WRAPPER}(?={QUOTE}))
      |(?P<list>[ \t]{{0,9}}[:=][ \t]{{0,9}}(?:\[|\(|\{{|vec!\[)\s{{0,40}}(?={QUOTE}))
      |(?P<equals>[ \t]{{0,40}}(?::=|=>|={{1,3}}|!=)[ \t]{{0,40}}{WRAPPER})
      |(?P<colon>[ \t]{{0,40}}(?:[ ]\[[^\]\n]{{0,60}}\]|(?<=[kK]ey)[ ]\d{{1,2}})?:(?!:)(?:\*\*)?[ \t]{{0,40}}
        (?:[|>][-+]?[ \t]{{0,9}}\n[ \t]{{1,40}})?{WRAPPER})
      |(?P<value>[,\s]{{1,80}}(?:{QUOTE})?[vV]alue(?:{QUOTE})?\s{{0,9}}[:=]\s{{0,9}})
      |(?P<pair>[ \t]{{0,9}},[ \t]{{0,9}}(?={QUOTE}))
      |(?P<otherwise>[ \t]{{0,9}}(?:\|\||\?\?|\bor\b)[ \t]{{0,9}}(?={QUOTE})|\{{(?={QUOTE}))
      |(?P<plist></key>\s{{0,40}}<string>)
      |(?P<sql>(?<=PASSWORD)\((?={QUOTE}))
      |(?P<element>>)
      |(?P<table>[ \t]{{0,40}}\|[ \t]{{0,40}})
      |(?P<said>[ \t]{{1,9}}(?:is|was|is[ ]now|lautet|ist)[: \t]{{1,9}})
      |(?P<space>[ \t]{{1,40}}))""",
    re.VERBOSE,
)
QUOTED = re.compile(
    rf"[rbfuRBFU]{{0,2}}(?P<quote>{QUOTE})(?P<secret>(?:(?!(?P=quote))(?:\\.|[^\n\\])){{1,{LONGEST_VALUE}}}+)(?P<closed>(?P=quote))?"
)
WHOLE = re.compile(rf"[^\s\\]{{1,{LONGEST_VALUE}}}")  # to the next blank
BARE = re.compile(rf"""[^\s"'`\\<>|,;(){{}}\[\]&]{{1,{LONGEST_VALUE}}}""")
QUOTED_REST, WHOLE_REST = re.compile(r"""[^\s"'`\\]*+"""), re.compile(r"[^\s\\]*+")  # of a value longer than the longest
BARE_REST = re.compile(r"""[^\s"'`\\<>|,;(){}\[\]&]*+""")
BLANK = re.compile(r"\s")
COMMA = re.compile(r"\s{0,99},\s{0,99}")
MOST_LISTED = 100  # values
VALUE_FIRST = re.compile(
    rf"""(?P<quote>{QUOTE})value(?P=quote)\s{{0,9}}:\s{{0,9}}(?P=quote)(?P<secret>[^\s"'\\]{{4,{LONGEST_VALUE}}}+)(?P=quote)\s{{0,9}},
    \s{{0,40}}(?P=quote)(?:name|key)(?P=quote)\s{{0,9}}:\s{{0,9}}(?P=quote)(?P<name>[\w.-]{{1,{LONGEST_NAME}}})(?P=quote)""",
    re.VERBOSE | re.IGNORECASE,
)
NESTED = re.compile(rf"([A-Za-z_][\w.-]{{0,{LONGEST_NAME}}})[=:]")  # a name and value of its own
LINE_END = re.compile(r"[ \t]*(?:\r?\n|\Z|\\[nr])")
LINE_BEGIN = re.compile(
    r"(?:^|\n|\\n)(?P<indent>[ \t]*(?:- +)?)(?:export +|set +|setx +|ENV +|ARG +|\$env:|env +|-e +|[+>-] ?)?[\"']?$"
)
SETS = re.compile(r"(?:^|[\n;])[ \t]*(?:ENV|ARG|setenv|SetEnv|setx|set -g?x)[ \t]+$")
FLAG = re.compile(r"(?:^|[\s\"'`=])--?$")


def named_secrets(text: str, position: int) -> Iterator[Found]:
    """The value of the name that holds the literal at `position`, where it is a secret."""
    binding = BINDING.match(text, position)
    if not binding:
        return
    head = text[max(0, position - LONGEST_NAME) : position]
    stem = head.rstrip(NAME_CHARACTERS)
    form = binding.lastgroup or ""
    name = head[len(stem) :] + text[position : binding.start("close" if binding["close"] else form)]
    dashes = len(name) - len(name.lstrip("-."))
    if phrase := PHRASE.search(stem) if name.lower() == "key" else None:
        name = f"{phrase[1].replace(' ', '_')}_key"
    kind = kind_of_name(name.strip("-.").rstrip("]"))
    if not kind and form == "list":
        kind = kind_of_name(name.strip("-.")[:-1])  # api_keys
    if not kind or (form in ("equals", "colon", "pair") and name.lower().endswith("authorization")):
        return  # headers have a rule of their own
    if form == "list":
        yield from _listed(text, binding.end(), kind)
    yield from _value(text, binding, kind, name, stem + name[:dashes])


def named_afterwards(text: str, position: int) -> Iterator[Found]:
    """{"value": "...", "name": "DB_PASSWORD"}"""
    match = VALUE_FIRST.match(text, position)
    kind = kind_of_name(match["name"]) if match else None
    if match and kind and (kind := kind_of_value(kind, match["secret"], literal=True)):
        yield Found(kind, *match.span("secret"))


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
    if len(value) > LONGEST_VALUE:
        if BLANK.search(value):
            return None
        value = value[:LONGEST_VALUE]
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


def _listed(text: str, at: int, kind: str) -> Iterator[Found]:
    """api_keys = ["...", "..."]"""
    for _ in range(MOST_LISTED):
        quoted = QUOTED.match(text, at)
        if not quoted or not quoted["closed"]:
            return
        if is_token(quoted["secret"]):
            yield Found(kind, *quoted.span("secret"))
        comma = COMMA.match(text, quoted.end())
        at = comma.end() if comma else len(text)


def _value(text: str, binding: re.Match[str], kind: str, name: str, head: str) -> Iterator[Found]:
    form, at = binding.lastgroup or "", binding.end()
    flag = form == "space" and FLAG.search(head)
    if (form == "pair" and not binding["close"]) or (form == "element" and head[-1:] not in ("<", ":")):
        return
    quoted = _quoted(text, at)
    if form == "space" and not flag and not SETS.search(head):
        yield from _after_blank(text, at, kind if len(name) > 4 else "", quoted)
        return
    if quoted:
        literal = form not in ("pair", "table", "said", "list", "otherwise", "sql") or (kind == "password" and form == "said")
        start, end, rest = *quoted.span("secret"), QUOTED_REST
    elif binding["close"] and head[-1:].isspace():
        return  # a sentence in quotes: "all cases pass": check_3s_pass
    else:
        start, end, literal, rest = _unquoted(text, at, form, name, head)
        literal = literal or (form == "space" and not flag)
    if end > start and (found := kind_of_value(kind, text[start:end], literal)):
        yield Found(found, start, _without_end(text, start, whole_end(text, start, end, LONGEST_VALUE, rest), rest))


def _quoted(text: str, at: int) -> re.Match[str] | None:
    """A text in quotes; one that is cut off at the end of the text, or longer than the longest, must hold no blank."""
    quoted = QUOTED.match(text, at)
    if not quoted or quoted["closed"]:
        return quoted
    whole = quoted.end("secret") < len(text) and len(quoted["secret"]) < LONGEST_VALUE
    return None if whole or BLANK.search(quoted["secret"]) else quoted


def _after_blank(text: str, at: int, kind: str, quoted: re.Match[str] | None) -> Iterator[Found]:
    """`authtoken 2Ab...`, `requirepass 2Ab...`, SQL's `PASSWORD 'hunter2'`: a blank says little, so the value must say more."""
    match = quoted or BARE.match(text, at)
    group = "secret" if quoted else 0
    if match and (is_token(match[group]) or (quoted and kind == "password" and is_password(match[group], literal=False))):
        start, end = match.span(group)
        yield Found(kind, start, whole_end(text, start, end, LONGEST_VALUE, QUOTED_REST if quoted else BARE_REST))


def _unquoted(text: str, at: int, form: str, name: str, head: str) -> tuple[int, int, bool, re.Pattern[str]]:
    """Where a value without quotes stands, whether it must be literal, since no program has a name in this place, and its rest."""
    whole, bare = WHOLE.match(text, at), BARE.match(text, at)
    if not whole or not bare:
        return at, at, False, BARE_REST
    if (nested := NESTED.match(whole[0])) and kind_of_name(nested[1]):
        return at, at, False, BARE_REST
    line = LINE_BEGIN.search(head)
    alone = bool(line and (len(whole[0]) == LONGEST_VALUE or LINE_END.match(text, whole.end())))
    tight = form == "equals" and binding_is_tight(text, at)
    if line and tight and (name.isupper() or (alone and not line["indent"] and not name.startswith(("self.", "this.")))):
        return at, _without_end(text, at, whole.end(), WHOLE_REST), not name.islower() or alone, WHOLE_REST
    end = bare.end()
    if text[end : end + 1] and text[end] in "([{":
        return at, at, False, BARE_REST
    ends = LINE_END.match(text, end) or text[end - 1] in ".,;!" or text[end] in ",;"
    if form == "said" and not ends and (is_wordy(bare[0]) or not re.search(r"\d", bare[0])):
        return at, at, False, BARE_REST
    literal = form in ("element", "plist") or (tight and head.endswith("-")) or (form == "colon" and alone and bool(line))
    return at, _without_end(text, at, end, BARE_REST), literal, BARE_REST


def binding_is_tight(text: str, at: int) -> bool:
    """name=value, no blanks: a shell or a file of settings rather than a program."""
    return text[at - 1] == "=" and text[at - 2 : at - 1].strip() not in ("", "=", "!", ":")


def _without_end(text: str, start: int, end: int, rest: re.Pattern[str]) -> int:
    """A shell's quote, bracket or semicolon behind NAME=value is no part of it, nor the full stop of a sentence."""
    if rest is QUOTED_REST or end - start == LONGEST_VALUE:  # nothing yet to strip: it goes on
        return end
    return start + len(text[start:end].rstrip("\"'`;)," if rest is WHOLE_REST else ".,:;"))
