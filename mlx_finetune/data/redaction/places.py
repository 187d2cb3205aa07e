"""Where secrets stand whatever they look like: URLs, headers, cookies, and files made for them; with all other rules in a table."""

import re
from collections.abc import Iterator
from itertools import chain

from mlx_finetune.data.redaction import Found
from mlx_finetune.data.redaction.commands import URL_WORDS, command_rules
from mlx_finetune.data.redaction.keyblocks import RULES as KEY_BLOCKS
from mlx_finetune.data.redaction.names import LITERALS, is_basic, kind_of_value, named_afterwards, named_secrets
from mlx_finetune.data.redaction.values import is_password, is_placeholder, is_token, whole_end
from mlx_finetune.data.redaction.vendors import Rule, vendor_rules

LONGEST = 2000  # characters of a header's value that are read to judge it
LONGEST_HEADER = 20_000  # of cookies together
LONGEST_JWK = 8000  # to either side of its type
LONGEST_MANIFEST = 40_000  # to either side of its kind

URL = re.compile(
    r"""://(?P<user>\[REDACTED:url_token:\d+\](?=:)|[^\s:/?#@'"<>\\`]{0,20000})(?::(?P<secret>[^\s/?'"<>\\`]{0,20000}))?@(?=[\w\[.$%{-])"""
)
# A slash in a password, which a URL should write as %2F; what begins like a port and a path is none.
SLASHED = re.compile(r"""://[^\s:/?#@'"<>\\`]{1,100}:(?!\d+/)(?P<secret>[^\s?@'"<>\\`]{1,200})@(?=[\w.-]+(?::\d|/))""")
DATABASES = ("postgres", "postgresql", "mysql", "mariadb", "mongodb", "mongodb+srv", "redis", "rediss", "amqp", "amqps")
AUTHORIZATION = re.compile(
    r"""authorization\\{0,3}["']?\]?\s{0,3}[:=,]\s{0,3}\\{0,3}["']?
    (?:(?P<scheme>bearer|basic|token|apikey|api-key|bot|key|negotiate|splunk)[ =]{1,3}(?:token=)?|[a-z][\w-]{1,40}[ ]{1,3})?
    \\{0,3}["']?(?P<secret>[\w+/=.~:-]{8,2000}+)(?!\()""",
    re.IGNORECASE | re.VERBOSE,
)
BEARER = re.compile(r"(?:bearer|basic)[ ]{1,3}(?P<secret>[\w+/=.~-]{8,2000}+)(?!\()", re.IGNORECASE)
PARAMETER = re.compile(r"""[\s,;&]{0,20}(?P<name>[\w-]{1,40})=\\{0,3}["']?(?P<value>[\w+/%][^\s"',;&\\]{0,2000})(?:\\{0,3}["'])?""")
SIGNED = re.compile(r"signature|token|response|mac|secret|key|pass", re.IGNORECASE)
COOKIES = re.compile(r"""cookie\\{0,3}["']?\s{0,3}[:=]\s{0,3}""", re.IGNORECASE)
CURL_COOKIES = re.compile(rf"curl{URL_WORDS}(?:-[A-Za-z#]{{0,9}}b|--cookie)[ =]{{1,3}}")
CURL = re.compile(r"\bcurl\b")
COOKIE_LINE = re.compile(r"""["']?(?P<cookies>[^\n"'\\]+)""")
SESSION = re.compile(r"sess|sid|auth|token|jwt|remember|login|identity|connect", re.IGNORECASE)
SIGNATURE = re.compile(r"(?:x-(?:amz|goog)-signature|[?&]sig)=(?P<secret>[A-Za-z0-9%+/=]{30,2000})", re.IGNORECASE)
BASIC_PAIR = re.compile(
    r"""(?:auth|BasicAuth|basic_auth)\s{0,3}=?\s{0,3}\(\s{0,9}["'][^"'\n]{1,100}["'],\s{0,9}["'](?P<secret>[^"'\n]{1,200})["']"""
)
PGPASS = re.compile(r"(?:\\n|^)?[\w.*-]{1,100}:(?:\d{1,5}|\*):[\w*.-]{1,80}:[\w*.-]{1,80}:(?P<secret>[^\s:]{3,200})(?:\s|\\n|\Z)")
PRIVATE_PARTS = re.compile(
    r"""(?P<quote>\\{0,3}["'])(?:d|p|q|dp|dq|qi|k)(?P=quote)\s{0,9}:\s{0,9}(?P=quote)(?P<secret>[\w-]{20,3000})(?P=quote)"""
)
MNEMONIC = re.compile(
    r"""(?:seed[ ]phrase|recovery[ ]phrase|mnemonic)[\w ]{0,20}["'`]{0,3}\s{0,3}(?:[:=]|is)\s{0,9}["'`]{0,3}
    (?P<secret>[a-z]{3,8}(?:[ ][a-z]{3,8}){11,23})\b""",
    re.IGNORECASE | re.VERBOSE,
)
GO_DSN = re.compile(r"@(?:tcp|unix|udp)\(")
ORACLE = re.compile(r"""jdbc:oracle:\w{1,9}:[\w$#]{1,80}/(?P<secret>[^\s"'@/]{1,200})@""")
LOGIN = re.compile(r"""\.login\(\s{0,9}["'][^"'\n]{1,100}["'],\s{0,9}["'](?P<secret>[^"'\n]{1,200})["']\s{0,9}\)""")
MANIFEST = re.compile(r"""["']?kind["']?:\s{0,9}["']?Secret\b""")
MANIFEST_MARKS = ("\n---", "kind: Secret", 'kind": "Secret', 'kind: "Secret')  # where a manifest's neighbours begin
DATA = re.compile(
    r"""^(?P<indent>[ \t]*)["']?(?P<field>data|stringData)["']?:[ \t]*\{?[ \t]*\n"""
    r"""(?P<rows>(?:(?P=indent)[ \t]+[^\n]*(?:\n|\Z)){1,100})""",
    re.MULTILINE,
)
ROW = re.compile(r"""^[ \t]+["']?[\w.-]{1,100}["']?:[ \t]*["']?(?P<secret>[^\s"',]{4,20000})["']?,?[ \t]*$""", re.MULTILINE)


def rules() -> dict[str, tuple[Rule, ...]]:
    """Every literal that may lead to a secret, in small letters, and what to try where it stands."""
    table: dict[str, tuple[Rule, ...]] = {}
    names = ((literal, named_secrets) for literal in LITERALS)
    for literal, rule in chain(vendor_rules(), KEY_BLOCKS, PLACES, command_rules(), names):
        known = table.get(literal.lower(), ())
        table[literal.lower()] = known if rule in known else (*known, rule)
    return table


def _url(text: str, position: int) -> Iterator[Found]:
    match = URL.match(text, position)
    if not match:
        slashed = SLASHED.match(text, position) if text[max(0, position - 12) : position].lower().endswith(DATABASES) else None
        if slashed and not is_placeholder(slashed["secret"]):
            yield Found("url_password", *slashed.span("secret"))
        return
    user, password = match["user"], match["secret"]
    if (is_token(user) or user.startswith("[")) and not is_password(password or "", literal=False):
        if user[0] != "[" and not text.endswith("ssh", 0, position):
            yield Found("url_token", *match.span("user"))  # https://<token>@, https://<token>:@, https://<token>:x-oauth-basic@
    elif password and password != user and not is_placeholder(password):
        yield Found("url_password", *match.span("secret"))


def _authorization(text: str, position: int) -> Iterator[Found]:
    match = AUTHORIZATION.match(text, position)
    if not match:
        return
    if not match["scheme"] and PARAMETER.match(text, match.start("secret")):
        yield from _parameters(text, match.start("secret"))
    elif is_token(match["secret"]) or (match["scheme"] and (is_basic(match["secret"]) or is_password(match["secret"], False))):
        start, end = match.span("secret")
        yield Found("authorization", start, whole_end(text, start, end, LONGEST))


def _parameters(text: str, at: int) -> Iterator[Found]:
    """Of AWS4-HMAC-SHA256, OAuth, Digest and the like: Credential=..., Signature=..."""
    for _ in range(30):
        match = PARAMETER.match(text, at)
        if not match:
            return
        if SIGNED.search(match["name"]) and is_token(match["value"]):
            yield Found("authorization", *match.span("value"))
        at = match.end()


def _bearer(text: str, position: int) -> Iterator[Found]:
    match = BEARER.match(text, position)
    if match and (
        is_token(match["secret"]) if text[position] in "bB" and text[position + 1] in "eE" else is_basic(match["secret"])
    ):
        start, end = match.span("secret")
        yield Found("authorization", start, whole_end(text, start, end, LONGEST))


def _cookie(text: str, position: int) -> Iterator[Found]:
    if head := COOKIES.match(text, position):
        yield from _cookies(text, head.end(), COOKIES)


def _curl_cookies(text: str, position: int) -> Iterator[Found]:
    if head := CURL_COOKIES.match(text, position):
        yield from _cookies(text, head.end(), CURL)


def _cookies(text: str, at: int, following: re.Pattern[str]) -> Iterator[Found]:
    """The cookies of a session from `at` to the end of the line, but not beyond where `following` begins others."""
    after = following.search(text, at, at + LONGEST_HEADER)
    line = COOKIE_LINE.match(text, at, after.start() if after else at + LONGEST_HEADER)
    at = line.start("cookies") if line else at
    for cookie in line["cookies"].split(";") if line else ():
        name, _, value = cookie.partition("=")
        start = at + len(name) + 1
        at += len(cookie) + 1
        if SESSION.search(name[-80:]) and "csrf" not in name.lower() and is_token(value.strip()):
            yield Found("cookie", start, start + len(value.rstrip()))


def _signature(text: str, position: int) -> Iterator[Found]:
    if match := SIGNATURE.match(text, position):
        yield Found("url_signature", *match.span("secret"))


def _basic_pair(text: str, position: int) -> Iterator[Found]:
    match = BASIC_PAIR.match(text, position)
    if match and is_password(match["secret"], literal=True):
        yield Found("password", *match.span("secret"))


def _pgpass(text: str, position: int) -> Iterator[Found]:
    start = text.rfind("\n", max(0, position - 100), position) + 1 or max(0, position - 100)
    match = PGPASS.match(text, start)
    if match and not is_placeholder(match["secret"]):
        yield Found("password", *match.span("secret"))


def _go_dsn(text: str, position: int) -> Iterator[Found]:
    """user:password@tcp(host:port)/name"""
    if not GO_DSN.match(text, position):
        return
    start = max(position - 200, 0)
    start = 1 + max(start - 1, *(text.rfind(sign, start, position) for sign in " \t\n\"'`"))
    user, colon, password = text[start:position].partition(":")
    if colon and password != user.rpartition("=")[2] and not is_placeholder(password) and len(password) >= 3:
        yield Found("url_password", position - len(password), position)


def _oracle(text: str, position: int) -> Iterator[Found]:
    match = ORACLE.match(text, position)
    if match and not is_placeholder(match["secret"]):
        yield Found("url_password", *match.span("secret"))


def _login(text: str, position: int) -> Iterator[Found]:
    """server.login("ann@mail.test", "...")"""
    match = LOGIN.match(text, position)
    if match and is_password(match["secret"], literal=" " in match["secret"]):
        yield Found("password", *match.span("secret"))


def _jwk(text: str, position: int) -> Iterator[Found]:
    """The private parts of a key in JSON: of the object around "kty", up to the next one."""
    begin = max(0, position - LONGEST_JWK, text.rfind("{", max(0, position - LONGEST_JWK), position))
    end = min(at if (at := text.find(sign, position + 5, position + LONGEST_JWK)) >= 0 else len(text) for sign in ("}", '"kty"'))
    for match in PRIVATE_PARTS.finditer(text, begin, min(end, position + LONGEST_JWK)):
        yield Found("private_key", *match.span("secret"))


def _mnemonic(text: str, position: int) -> Iterator[Found]:
    """The words of a wallet."""
    if match := MNEMONIC.match(text, position):
        yield Found("mnemonic", *match.span("secret"))


def _manifest(text: str, position: int) -> Iterator[Found]:
    """A Kubernetes Secret: every value under its `data`, in base64, and under its `stringData`."""
    if not MANIFEST.match(text, position):
        return
    begin, end = max(0, position - LONGEST_MANIFEST), position + LONGEST_MANIFEST
    for mark in sorted(MANIFEST_MARKS, key=lambda mark: not text.startswith(mark, position)):  # what is likely near bounds the rest
        begin = max(begin, text.rfind(mark, begin, position) + 1)
        end = at if (at := text.find(mark, position + 1, end)) >= 0 else end
    for data in DATA.finditer(text, begin, end):
        for row in ROW.finditer(text, *data.span("rows")):
            encoded = data["field"] == "data" and re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", row["secret"])
            if (encoded and len(row["secret"]) % 4 == 0) or kind_of_value("password", row["secret"], literal=True):
                yield Found("secret", *row.span("secret"))


PLACES: list[tuple[str, Rule]] = [
    ("://", _url),
    ("authorization", _authorization),
    ("bearer ", _bearer),
    ("basic ", _bearer),
    ("cookie", _cookie),
    ("x-amz-signature", _signature),
    ("x-goog-signature", _signature),
    ("?sig=", _signature),
    ("&sig=", _signature),
    ("auth=", _basic_pair),
    ("auth =", _basic_pair),
    ("basicauth(", _basic_pair),
    ("curl", _curl_cookies),
    *((literal, _go_dsn) for literal in ("@tcp(", "@unix(", "@udp(")),
    ("jdbc:oracle:", _oracle),
    (".login(", _login),
    ('"kty"', _jwk),
    *((literal, _mnemonic) for literal in ("seed phrase", "recovery phrase", "mnemonic")),
    ('"value', named_afterwards),
    ("'value", named_afterwards),
    ("kind: secret", _manifest),
    ('kind: "secret', _manifest),
    ('kind": "secret', _manifest),
    *((literal, _pgpass) for literal in (":5432:", ":5433:", ":6432:", ":5431:", ":*:")),
]
