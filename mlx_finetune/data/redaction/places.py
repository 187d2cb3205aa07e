"""Where secrets stand whatever they look like: URLs, headers, command lines, key blocks, and files made for them."""

import re
from collections.abc import Iterator

from mlx_finetune.data.redaction import Found
from mlx_finetune.data.redaction.names import LITERALS, is_basic, kind_of_value, named_secrets
from mlx_finetune.data.redaction.values import is_password, is_placeholder, is_token
from mlx_finetune.data.redaction.vendors import Rule, vendor_rules

LONGEST_BLOCK = 20_000  # characters of a key block; the longest keys take a quarter of it

URL = re.compile(r"""://(?P<user>[^\s:/?#@'"<>\\`]{0,100})(?::(?P<secret>[^\s/?'"<>\\`]{1,300}))?@(?=[\w\[.$%{-])""")
AUTHORIZATION = re.compile(
    r"""authorization\\{0,3}["']?\]?\s{0,3}[:=,]\s{0,3}\\{0,3}["']?
    (?:(?P<scheme>bearer|basic|token|apikey|api-key|bot|key|negotiate|splunk)[ =]{1,3}(?:token=)?)?
    \\{0,3}["']?(?P<secret>[\w+/=.~:-]{8,2000})(?!\()""",
    re.IGNORECASE | re.VERBOSE,
)
BEARER = re.compile(r"(?:bearer|basic)[ ]{1,3}(?P<secret>[\w+/=.~-]{8,2000})(?!\()", re.IGNORECASE)
COOKIES = re.compile(r"""cookie\\{0,3}["']?\s{0,3}[:=]\s{0,3}(?P<cookies>[^\n"'\\]{1,2000})""", re.IGNORECASE)
NEXT_COOKIES = re.compile(r"""cookie\\{0,3}["']?\s{0,3}[:=]""", re.IGNORECASE)
SESSION = re.compile(r"sess|sid|auth|token|jwt|remember|login|identity|connect", re.IGNORECASE)
SIGNATURE = re.compile(r"(?:x-(?:amz|goog)-signature|[?&]sig)=(?P<secret>[A-Za-z0-9%+/=]{30,600})", re.IGNORECASE)
BASIC_PAIR = re.compile(
    r"""(?:auth|BasicAuth|basic_auth)\s{0,3}=?\s{0,3}\(\s{0,9}["'][^"'\n]{1,100}["'],\s{0,9}["'](?P<secret>[^"'\n]{1,200})["']"""
)
PGPASS = re.compile(r"(?:\\n|^)?[\w.*-]{1,100}:(?:\d{1,5}|\*):[\w*.-]{1,80}:[\w*.-]{1,80}:(?P<secret>[^\s:]{3,200})(?:\s|\\n|\Z)")
QUOTE = r"""(?:(?P<quote>["'])(?=[^\n]{3,200}?(?P=quote))|["']?)"""
SECRET = r"""(?P<secret>(?(quote)(?:(?!(?P=quote))(?:[^\n\\]|\\[^\n])){3,200}|[^\s"'|;&<>\\]{3,200}))"""
ARGUMENT = QUOTE + SECRET
COMMANDS = [  # what leads to it, and the command line from there on
    (
        "curl, wget",
        rf"(?:curl|wget)\b[^\n]{{0,500}}?\s(?:-u|--user|--proxy-user|-U|-a)[ =]{{1,3}}{QUOTE}[\w.@%+-]{{1,80}}:[\"']?{SECRET}",
    ),
    ("sshpass", rf"sshpass\s+-p\s{{0,3}}{ARGUMENT}"),
    ("mysql, mariadb", rf"(?:mysql|mariadb)[\w-]{{0,12}}[ \t][^\n|;]{{0,200}}?(?<=\s)-p{ARGUMENT}"),
    (
        "docker login, podman login, nerdctl login, oc login, skopeo login, registry login",
        rf"\w{{2,8}} login\b[^\n]{{0,200}}?\s-p[ =]{{1,3}}{ARGUMENT}",
    ),
    ("redis-cli", rf"redis-cli\b[^\n|;]{{0,200}}?\s-a\s{{1,3}}{ARGUMENT}"),
    ("ldap", rf"ldap\w+\b[^\n|;]{{0,300}}?\s-w\s{{1,3}}{ARGUMENT}"),
    ("smbclient", rf"smbclient\b[^\n|;]{{0,200}}?\s-U\s{{0,3}}{QUOTE}[\w\\.-]{{1,80}}%{SECRET}"),
    ("openssl", rf"openssl\b[^\n|;]{{0,300}}?\spass:{ARGUMENT}"),
    ("echo", rf"echo (?:-n )?{ARGUMENT}[\"']?[ ]{{0,3}}\|[ ]{{0,3}}(?:sudo[^\n|]{{0,40}} -S\b|[^\n|]{{0,200}}--password-stdin)"),
    ("echo", rf"echo (?:-n )?{QUOTE}[\w.-]{{1,60}}:{SECRET}[\"']?[ ]{{0,3}}\|[ ]{{0,3}}(?:sudo )?chpasswd"),
    (
        "machine",
        rf"machine\s{{1,9}}\S{{1,200}}\s{{1,9}}(?:(?:login|account)\s{{1,9}}\S{{1,100}}\s{{1,9}}){{0,2}}password\s{{1,9}}{ARGUMENT}",
    ),
    ("identified by", r"identified\s{1,3}(?:with\s\S{1,40}\s)?by\s{1,3}(?:password\s)?[\"'](?P<secret>[^\"'\n]{3,200})"),
]
BLOCK = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
BLOCK_END = re.compile(r"-----END (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----|-----BEGIN ")
BODY_LINE = re.compile(r"[A-Za-z0-9+/=]{24,}")
BLANKS = r"""(?:\s|\\+[nrt]|["'+,|>#*.]){0,60}"""
BODY = re.compile(  # of a block that is cut off: lines of base64, whatever quotes, indents or joins them, and headers
    rf"(?:{BLANKS}(?:(?:Proc-Type|DEK-Info|Version|Comment|Hash):[^\n\\]{{0,100}}|[A-Za-z0-9+/=]{{16,}}))*"
    rf"(?:(?:\r?\n|\\n)[ \t>\"']{{0,20}}[A-Za-z0-9+/=]{{1,15}}(?=\s|\\n|[\"']|\Z))?"
)
PUTTY = re.compile(r"Private-Lines: \d{1,4}(?:\s|\\n){1,9}(?P<secret>[A-Za-z0-9+/=]{16,}(?:(?:\s|\\n){1,9}[A-Za-z0-9+/=]{16,})*)")
MANIFEST = re.compile(r"""["']?kind["']?:\s{0,9}["']?Secret\b""")
MANIFEST_MARKS = ("\n---", "kind: Secret", 'kind": "Secret', 'kind: "Secret')  # where a manifest's neighbours begin
DATA = re.compile(
    r"""^(?P<indent>[ \t]*)["']?(?P<field>data|stringData)["']?:[ \t]*\{?[ \t]*\n"""
    r"""(?P<rows>(?:(?P=indent)[ \t]+[^\n]*(?:\n|\Z)){1,100})""",
    re.MULTILINE,
)
ROW = re.compile(r"""^[ \t]+["']?[\w.-]{1,100}["']?:[ \t]*["']?(?P<secret>[^\s"',]{4,4000})["']?,?[ \t]*$""", re.MULTILINE)


def rules() -> dict[str, tuple[Rule, ...]]:
    """Every literal that may lead to a secret, in small letters, and what to try where it stands."""
    table: dict[str, tuple[Rule, ...]] = {}
    commands = [
        (literal, _command(re.compile(form, re.IGNORECASE))) for literals, form in COMMANDS for literal in literals.split(", ")
    ]
    for literal, rule in [*vendor_rules(), *PLACES, *commands, *((literal, named_secrets) for literal in LITERALS)]:
        known = table.get(literal.lower(), ())
        table[literal.lower()] = known if rule in known else (*known, rule)
    return table


def _url(text: str, position: int) -> Iterator[Found]:
    match = URL.match(text, position)
    if not match:
        return
    user, password = match["user"], match["secret"]
    if password is None:
        if is_token(user) and not text.endswith("ssh", 0, position):
            yield Found("url_token", *match.span("user"))
    elif password != user and not is_placeholder(password):
        yield Found("url_password", *match.span("secret"))


def _authorization(text: str, position: int) -> Iterator[Found]:
    match = AUTHORIZATION.match(text, position)
    if match and (
        is_token(match["secret"]) or (match["scheme"] and (is_basic(match["secret"]) or is_password(match["secret"], False)))
    ):
        yield Found("authorization", *match.span("secret"))


def _bearer(text: str, position: int) -> Iterator[Found]:
    match = BEARER.match(text, position)
    if match and (
        is_token(match["secret"]) if text[position] in "bB" and text[position + 1] in "eE" else is_basic(match["secret"])
    ):
        yield Found("authorization", *match.span("secret"))


def _cookie(text: str, position: int) -> Iterator[Found]:
    cookies = COOKIES.match(text, position)
    at = cookies.start("cookies") if cookies else 0
    for cookie in NEXT_COOKIES.split(cookies["cookies"], 1)[0].split(";") if cookies else ():
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


def _command(pattern: re.Pattern[str]) -> Rule:
    def rule(text: str, position: int) -> Iterator[Found]:
        match = pattern.match(text, position)
        if match and is_password(match["secret"], literal=True):
            yield Found("password", *match.span("secret"))

    return rule


def _private_key(text: str, position: int) -> Iterator[Found]:
    """To its END line; where that is missing, as far as it looks like the body of a key."""
    begin = BLOCK.match(text, position - 3) if position >= 3 else None
    if not begin:
        return
    end = BLOCK_END.search(text, begin.end(), begin.end() + LONGEST_BLOCK)
    if end and end[0].startswith("-----END"):
        stop = end.end()
    else:
        body = BODY.match(text, begin.end(), begin.end() + LONGEST_BLOCK)
        stop = body.end() if body else begin.end()
    if any(not is_placeholder(line) for line in BODY_LINE.findall(text, begin.end(), stop)):
        yield Found("private_key", begin.start(), stop)


def _putty(text: str, position: int) -> Iterator[Found]:
    if match := PUTTY.match(text, position):
        yield Found("private_key", *match.span("secret"))


def _manifest(text: str, position: int) -> Iterator[Found]:
    """A Kubernetes Secret: every value under its `data`, in base64, and under its `stringData`."""
    if not MANIFEST.match(text, position):
        return
    begin = max(text.rfind(mark, max(0, position - 4000), position) for mark in MANIFEST_MARKS)
    ends = [at for mark in MANIFEST_MARKS if (at := text.find(mark, position + 1, position + 8000)) >= 0]
    begin, end = begin + 1 if begin >= 0 else max(0, position - 4000), min(ends, default=position + 8000)
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
    ("--begin ", _private_key),
    ("private-lines:", _putty),
    ("kind: secret", _manifest),
    ('kind: "secret', _manifest),
    ('kind": "secret', _manifest),
    *((literal, _pgpass) for literal in (":5432:", ":5433:", ":6432:", ":5431:", ":*:")),
]
