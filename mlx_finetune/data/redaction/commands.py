"""Command lines that carry a secret: which option of which program, as a table."""

import re
from collections.abc import Callable, Iterator

from mlx_finetune.data.redaction import Found
from mlx_finetune.data.redaction.values import is_password, is_token, whole_end
from mlx_finetune.data.redaction.vendors import Rule

LONGEST = 200  # characters that are read to judge a value
REST = re.compile(r"""[^\s"'`|;&<>\\]*+""")
QUOTE = rf"""(?:(?P<quote>["'])(?=[^\n]{{3,{LONGEST}}}?(?P=quote))|["']?)"""
SECRET = rf"""(?P<secret>(?(quote)(?:(?!(?P=quote))(?:[^\n\\]|\\[^\n])){{3,{LONGEST}}}|[^\s"'|;&<>\\]{{3,{LONGEST}}}))"""
VALUE = rf"(?!-){QUOTE}{SECRET}"
PAIR = rf"{QUOTE}[\w.@%+-]{{1,80}}:[\"']?{SECRET}"  # user:secret
# The words between: to the end of the command, which goes on behind a backslash at the end of a line.
WORDS, URL_WORDS = (  # a URL may hold the signs that end a command
    rf"\b(?:[^\s\\{ends}]{{0,600}}+(?:\\[\s\S][^\s\\{ends}]{{0,300}}+){{0,9}}+[ \t]{{1,40}}+){{1,100}}?" for ends in ("|;", "")
)
TO_STDIN = (
    r"sudo[^\n|]{0,40} -S\b|(?:sudo )?(?:kinit|passwd|cryptsetup)\b"
    r"|[^\n|]{0,200}(?:--(?:password|passphrase|token)-stdin|--with-token|-pass(?:in)? stdin|--passphrase-fd)"
    r"|(?:wrangler|gh|fly|vercel|heroku|doppler|docker|podman) (?:\w+ )?(?:secrets?|env)\b"
)

PASSWORDS = [  # literals that lead to a command line, and its form from there on; case counts in options
    ("curl, wget", rf"{URL_WORDS}(?:-[uU][ =]{{0,3}}|-[A-Za-z#]{{1,9}}[uU][ ]{{1,3}}|--(?:proxy-)?user[ =]{{1,3}}){PAIR}"),
    ("http , https , xh ", rf"(?:https?|xh){URL_WORDS}(?:-a|--auth)[ =]{{1,3}}{PAIR}"),
    ("lftp", rf"lftp{WORDS}-u[ =]{{0,3}}{QUOTE}[\w.@%+-]{{1,80}},{SECRET}"),
    ("sshpass", rf"sshpass\s+-p\s{{0,3}}{VALUE}"),
    ("mysql, mariadb", rf"(?:mysql|mariadb)[\w-]{{0,12}}{WORDS}-p{VALUE}"),
    (
        "docker login, podman login, nerdctl login, oc login, skopeo login, registry login",
        rf"\w{{2,8}} login{WORDS}-p[ =]{{1,3}}{VALUE}",
    ),
    ("mongo, twine", rf"(?:mongo\w{{0,8}}|twine){WORDS}-p[ =]{{0,3}}{VALUE}"),
    ("sqlcmd, bcp , isql, zip ", rf"(?:sqlcmd|bcp|isql|zip){WORDS}-P\s{{0,3}}{VALUE}"),
    ("7z , 7za ", rf"7za?{WORDS}-p(?=\S){VALUE}"),
    ("sqlplus", rf"sqlplus\s+(?:-\w{{1,9}}\s+){{0,3}}[\"']?[\w$#]{{1,60}}/(?P<secret>[^\s\"'@/]{{3,{LONGEST}}})(?=[@\s\"'])"),
    ("redis-cli", rf"redis-cli{WORDS}-a\s{{1,3}}{VALUE}"),
    ("ldap", rf"ldap\w+{WORDS}-w\s{{1,3}}{VALUE}"),
    ("smbclient", rf"smbclient{WORDS}-U\s{{0,3}}{QUOTE}[\w\\.-]{{1,80}}%{SECRET}"),
    ("net use ", rf"net use{WORDS}/user:\S{{1,80}}\s+{VALUE}"),
    ("openssl", rf"openssl{WORDS}(?:pass:|-[kK]\s{{1,3}}){VALUE}"),
    ("ssh-keygen", rf"ssh-keygen{WORDS}-[NP]\s{{0,3}}{VALUE}"),
    ("htpasswd", rf"htpasswd\s+(?:-\w{{1,8}}\s+){{1,4}}(?:[^\s-]\S*\s+){{1,2}}{VALUE}[\"']?(?=[ \t]*(?:\n|[|;&]|\Z))"),
    ("mc alias ", rf"mc alias set\s+(?:\S{{1,200}}\s+){{3}}{VALUE}"),
    ("rabbitmqctl ", rf"rabbitmqctl (?:[^\n]{{0,40}}? )?(?:add_user|change_password)\s+\S{{1,80}}\s+{VALUE}"),
    ("poetry config ", rf"poetry config (?:--local )?http-basic\.\S{{1,80}}\s+\S{{1,80}}\s+{VALUE}"),
    ("secret set ", rf"secret set{WORDS}(?:-b|--body)[ =]{{1,3}}{VALUE}"),
    ("put-parameter ", rf"put-parameter(?=(?:[^\n\\]|\\[\s\S]){{0,500}}?SecureString){WORDS}--value[ =]{{1,3}}{VALUE}"),
    ("sudo ", rf"sudo [^\n]{{0,40}}?-S\s*<<<\s*{VALUE}"),
    ("echo, printf", rf"(?:echo|printf) (?:-n )?{QUOTE}{SECRET}[\"']?[ ]{{0,3}}\|[ ]{{0,3}}(?:{TO_STDIN})"),
    ("printf", rf"printf [\"'](?P<secret>[^\s\"'\\%]{{3,{LONGEST}}})(?:\\n[^\n|]{{0,{LONGEST}}})?[\"'] *\| *(?:sudo )?passwd"),
    ("echo", rf"echo (?:-n )?{QUOTE}[\w.-]{{1,60}}:{SECRET}[\"']?[ ]{{0,3}}\|[ ]{{0,3}}(?:sudo )?chpasswd"),
    (
        "machine",
        rf"machine\s{{1,9}}\S{{1,200}}\s{{1,9}}(?:(?:login|account)\s{{1,9}}\S{{1,100}}\s{{1,9}}){{0,2}}password\s{{1,9}}{VALUE}",
    ),
    ("identified by", r"(?i:identified\s{1,3}(?:with\s\S{1,40}\s)?by)\s{1,3}(?i:password\s)?[\"'](?P<secret>[^\"'\n]{3,200})"),
]
TOKENS = [  # those whose value must look like a token
    ("curl", rf"curl{URL_WORDS}-[A-Za-z#]{{0,9}}u[ =]{{0,3}}[\"']?(?P<secret>[\w.-]{{16,{LONGEST}}}):(?=[\s\"'])"),
    ("wandb login ", rf"wandb login\s+(?:--\S{{1,80}}\s+){{0,3}}{VALUE}"),
    ("cloudflared ", rf"cloudflared (?:service install|tunnel run --token)\s+{VALUE}"),
]


def _rule(kind: str, pattern: re.Pattern[str], judge: Callable[[str], bool]) -> Rule:
    def rule(text: str, position: int) -> Iterator[Found]:
        match = pattern.match(text, position)
        if match and judge(match["secret"]):
            start, end = match.span("secret")
            yield Found(kind, start, whole_end(text, start, end, LONGEST, REST))

    return rule


def _is_password(value: str) -> bool:
    return is_password(value, literal=True)


def command_rules() -> Iterator[tuple[str, Rule]]:
    """A literal, and the rule to try where it stands."""
    for kind, rows, judge in (("password", PASSWORDS, _is_password), ("token", TOKENS, is_token)):
        for literals, form in rows:
            rule = _rule(kind, re.compile(form), judge)
            yield from ((literal, rule) for literal in literals.split(", "))
