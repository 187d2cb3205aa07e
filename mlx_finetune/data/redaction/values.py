"""Whether a value that stands where secrets stand is one: placeholders, names, paths and words are not.

There is no rule on entropy alone: a value is only judged once its place (a name, a header, a URL) says that it may be secret.
"""

import re

SHORTEST_TOKEN = 16  # characters; shorter values of a token or key are mostly names
SHORTEST_PASSWORD = 4

# What a placeholder says, alone or joined: my-secret-token, your_api_key_here, "password".
PLACEHOLDER_WORDS = frozenset(
    """a abc access account admin aes an any anon api apikey app argon auth base basic bcrypt bearer blank bool boolean bytes
    client clear code config cookie credential credentials database db default demo dev disabled docker dummy empty enabled
    encrypted env file filled foo bar baz field function generated get guest hash hashed hidden http https id if input int integer
    is jwt key keys keyring
    list local login manual md me mongo my mysql name new no none not null nullable number object of old on one optional or
    pass passphrase passwd password passwords plain plaintext post postgres postgresql private prod prompt public pw pwd random raw
    redis ref required root salt sasl scram secret secrets self service sha shared simple some something store str string strong
    super swordfish sys test testing text the this to token tokens true type unchanged undefined unset user username value var
    variable vault verify with world xxx yes yet""".split()
)
# What makes a placeholder of whatever stands around it.
MARKS = re.compile(
    r"example|placeholder|change[-_]?(?:me|this|it)\b|replace[-_]?(?:me|with|this)|\byour(?![a-z])|insert[-_]|redacted|dummy|<[^>]*>"
    r"|x{5,}|\*{3}|\.\.\.|…|\[[A-Z_]|0123456789abcdef0123|notasecret|not[-_]a[-_]real|to[-_]?be[-_]?",
    re.IGNORECASE,
)
# A value that the program or the shell fills in: $HOME, ${HOME}, $(cat x), {{ x }}, {x}, %(x)s, %s, %HOME%, !vault, @file.
TEMPLATE = re.compile(
    r"\$\{|\$\(|`|\{\{|\$\{\{|\{[A-Za-z_!.\[\]()'\"]*\}|%\(|^\$\w+$|^\$[A-Z_]+\b|^%[sdrv]$|^%\w+%$|^@[\w./-]+$|^!\w+(?: |$)|^&?\w+->"
)
REFERENCE = re.compile(  # where a secret is kept, not what it is
    r"^(?:[a-z][a-z0-9+.-]*://|arn:|op:|ssm:|vault:|env:|file:|sha\d+[:-]|md5:|secret[s:/]|keychain:|ENC\[|data:|urn:|ssh-|\$argon|\$2[aby]\$|[A-Za-z]:\\)"
)
PATH = re.compile(r"^(?:~|\.{1,2})?/|^[\w.-]+(?:/[\w.-]+)*/?\.?[\w-]+\.(?:pem|key|crt|txt|json|ya?ml|toml|ini|py|js|ts|env|md|html?)$")
DOTTED = re.compile(r"[A-Za-z_$][\w$]*\??(?:(?:\.|::|->|\?\.)[A-Za-z_$][\w$]*[?!]?)+")  # settings.api_key
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
NUMBER = re.compile(r"[-+]?[\d._,]+(?:e[-+]?\d+)?[KMGkmgsh]?b?")
DATE = re.compile(r"\d{4}-\d\d-\d\d(?:[T ].*)?")
WORDS = re.compile(r"[A-Za-z]?[a-z]{2,}|[A-Z]{3,}")
LETTERS = re.compile(r"[a-z]+")
DIGITS = re.compile(r"\d+")
FUNCTION_WORDS = frozenset("a an and are as at be by can enter for from has in is it must no not of on or please that the this to with your".split())


def is_placeholder(value: str) -> bool:
    """xxxx, <KEY>, ${KEY}, your-api-key, my-secret, AKIA...EXAMPLE: nothing that was ever anyone's secret."""
    if is_marked(value) or TEMPLATE.search(value):
        return True
    return not any(map(str.isdigit, value)) and _is_made_of_known_words(value)


def _is_made_of_known_words(value: str) -> bool:
    words = LETTERS.findall(value.lower())
    return bool(words) and all(word in PLACEHOLDER_WORDS for word in words)


def is_marked(value: str) -> bool:
    """Says of itself that it is none: AKIA...EXAMPLE, ghp_xxxx, sk-0000."""
    return len(set(value[-16:])) < 4 or MARKS.search(value) is not None


def is_password(value: str, literal: bool) -> bool:
    """Whether the value of a name such as `password` is one.

    `literal`: it stands in quotes, or in a file of settings, so that it is no name of a program's variable.
    """
    if len(value) < SHORTEST_PASSWORD or is_placeholder(value) or REFERENCE.match(value):
        return False
    if PATH.match(value) and _wordy(value):
        return False
    if any(map(str.isspace, value)):
        words = value.split()
        return literal and len(words) >= 4 and value.islower() and value.replace(" ", "").isalpha() and not FUNCTION_WORDS & set(words)
    if not literal and (DOTTED.fullmatch(value) or len(value) < 6 or NUMBER.fullmatch(value) or _is_made_of_known_words(value)):
        return False
    if value.isalpha() or IDENTIFIER.fullmatch(value) and not any(map(str.isdigit, value)):
        return literal and len(value) >= 6 and value.isalpha() and (value.islower() or not _wordy(value))
    if NUMBER.fullmatch(value):
        return len(value) >= 6 and value.isdigit()
    return any(map(str.isdigit, value)) or _strange(value) or value.count("-") >= 3


def is_token(value: str) -> bool:
    """Whether the value of a name such as `api_key` looks drawn by chance: letters mixed with digits, at least 16."""
    if len(value) < SHORTEST_TOKEN or is_placeholder(value) or any(map(str.isspace, value)) or not value.isprintable():
        return False
    if REFERENCE.match(value) or DATE.fullmatch(value) or NUMBER.fullmatch(value) or not value.isascii():
        return False
    if (PATH.match(value) and _wordy(value)) or (DOTTED.fullmatch(value) and any(map(_wordy, value.split(".")))):
        return False
    digits, letters = sum(map(str.isdigit, value)), sum(map(str.isalpha, value))
    if digits and letters:
        return (digits >= 0.15 * len(value) and len(DIGITS.findall(value)) > 1) or not _wordy(value)
    return letters >= 20 and not _wordy(value)


def is_opaque(value: str) -> bool:
    """Whether a secret is so unlike a word that it can be taken out wherever it stands."""
    if len(value) < 8 or NUMBER.fullmatch(value) or PATH.match(value):
        return False
    return any(map(str.isdigit, value)) and any(map(str.isalpha, value)) or _strange(value) or not _wordy(value) or len(value) >= 24


def _strange(value: str) -> bool:
    """Signs that no name holds, such as p@ss!word."""
    return any(sign in value for sign in "!@#$%^&*+?~=;") and not value.isidentifier()


def _wordy(value: str) -> bool:
    """Mostly runs of letters that could be words: three small letters or more, or three capitals."""
    runs = sum(len(run) for run in WORDS.findall(value))
    return runs > 0.5 * sum(map(str.isalnum, value))
