"""Whether a value that stands where secrets stand is one: placeholders, names, words, paths and references are not.

There is no rule on entropy alone: a value is only judged once its place (a name, a header, a URL) says that it may be secret.
"""

import re
from itertools import pairwise

SHORTEST_TOKEN = 16  # characters; shorter values of a token or key are mostly names
SHORTEST_PASSWORD = 4

# What a placeholder consists of: my-secret-token, api_key, "password"; also what forms and documentation put in its place.
PLACEHOLDER_WORDS = frozenset(
    """a abc access account admin aes an any anon api apikey app argon auth base basic bcrypt bearer blank bool boolean bytes
    client clear code config cookie credential credentials database db default demo dev disabled docker dummy empty enabled
    encrypted env false field file filled foo bar baz function generated get guest hash hashed hidden http https id if input int
    integer is jwt key keyring keys list local login manual md me mongo my mysql name new no none not null nullable number object
    of old on one optional or pass passphrase passwd password passwords plain plaintext post postgres postgresql private prod
    prompt public pw pwd random raw redis ref required root salt sasl scram secret secrets self service sha shared simple some
    something store str string strong super sys test testing text the this to token tokens true type unchanged undefined unset
    user username value var variable vault verify with world xxx yes yet""".split()
)
# What makes a placeholder of whatever stands around it.
MARKS = (
    "example placeholder changeme change-me change_me changethis changeit replaceme replace-me replace_me replace-with replace_with"
    " your- your_ insert- insert_ redacted dummy xxxxx *** ... … notasecret not-a-real not_a_real to-be- to_be_"
).split()
BRACKETS = re.compile(r"^<.*>$|<[A-Za-z_ -]+>|^\[[A-Z_]")
# A value that a program or a shell fills in: $HOME, ${HOME}, $(cat x), `cat x`, {{ x }}, {x}, %(x)s, %s, %HOME%, !vault, @file.
TEMPLATE = re.compile(
    r"\$\{|\$\([a-z]|`|\{\{|\{[A-Za-z_!.\[\]()'\"]*\}|%\(\w+\)|^\$\w+$|^\$[A-Z_]+\b"
    r"|^%[sdrv]$|^%\w+%$|^@[\w./-]+$|^!\w+(?: |$)|^&?\w+->"
)
TEMPLATE_SIGNS = "$`{%@!>"
REFERENCE = re.compile(  # where a secret is kept or what it hashes to, not what it is
    r"^(?:[a-z][a-z0-9+.-]*://|arn:|op:|ssm:|vault:|env:|file:|sha\d+[:-]|md5:|secret[s:/]|keychain:|ENC\[|data:|urn:|ssh-"
    r"|\$argon|\$2[aby]\$|[A-Za-z]:\\|\*[0-9A-F]{40}$|0x[0-9A-Fa-f]{40}$)"
)
# A program's alphabet or regular expression: BASE62 = "ABC...", NAME_PAT = "[a-zA-Z]\w*".
PATTERN = re.compile(r"\(\?[:=!<]|\[\^|\[a-z|a-zA-Z|ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef|abcdefghijklmnopqrstuvwxyzABCDEF")
PATH = re.compile(r"^(?:~|\.{1,2})?/|^[\w.-][\w./-]*\.(?:pem|key|crt|txt|json|ya?ml|toml|ini|py|js|ts|env|md|html?)$")
DOTTED = re.compile(r"[A-Za-z_$][\w$]*\??(?:(?:\.|::|->|\?\.)[A-Za-z_$][\w$]*[?!]?)+")  # settings.api_key
NUMBER = re.compile(r"[-+]?[\d._,]+(?:e[-+]?\d+)?[KMGkmgsh]?b?")
DATE = re.compile(r"\d{4}-\d\d-\d\d(?:[T ].*)?")
LETTERS = re.compile(r"[a-z]+")
PHRASE = re.compile(r"[a-z]+(?: [a-z]+){3,}")  # four words: correct horse battery staple
FUNCTION_WORDS = frozenset(
    "a an and are as at be by can enter for from has in is it must no not of on or please that the this to with your".split()
)
# The 220 pairs of letters that make up 86 % of the pairs in English words and in the names of programs, measured on Python's
# library and Debian's copyright files: a first letter and those behind it.
FOLLOWERS = (
    "abcdgiklmnprstuvy baeilorsu cacehiklorstu dadeilorsu eacdefgilmnprstvx faefilor gaehinorsu haeio iabcdefglmnoprstvz kaei"
    " ladeilostuy mabeimopsu nacdefgiknostu obcdglmnoprstuvw paehiloprstu qu racdegilmnorstuy sacehilopstu tacehiloprstuy"
    " uabceilmnprst vaei waei xt yp ze"
)
PAIRS = [(letters[0], follower) for letters in FOLLOWERS.split() for follower in letters[1:]]
NEIGHBOURS = frozenset(pair for a, b in PAIRS for pair in ((a, b), (a.upper(), b), (a.upper(), b.upper())))

REST = re.compile(r"[A-Za-z0-9+/_=-]*+(?:[.~:%][A-Za-z0-9+/_=-]++)*+")  # of a secret whose beginning is known


def is_marked(value: str) -> bool:
    """Says of itself that it is none: AKIA...EXAMPLE, ghp_xxxx, sk-0000."""
    lower = value.lower()
    return len(set(value[-16:])) < 4 or any(mark in lower for mark in MARKS) or BRACKETS.search(value) is not None


def is_placeholder(value: str) -> bool:
    """Also ${KEY}, <KEY>, your-api-key, my-secret: nothing that was ever anyone's secret."""
    if is_marked(value) or (any(sign in value for sign in TEMPLATE_SIGNS) and TEMPLATE.search(value)):
        return True
    return not any(map(str.isdigit, value)) and _is_made_of_known_words(value)


def is_password(value: str, literal: bool) -> bool:
    """Whether the value of a name such as `password` is one.

    `literal`: it stands in quotes, or in a file of settings, so that it is no name of a program's variable. Then sunshine is
    one; Password (a label), PASSWORD (what to put there) and new_password (a name) are none.
    """
    if len(value) < SHORTEST_PASSWORD or is_placeholder(value) or REFERENCE.match(value) or (PATH.match(value) and is_wordy(value)):
        return False
    if any(map(str.isspace, value)):
        return literal and PHRASE.fullmatch(value) is not None and not FUNCTION_WORDS & set(value.split())
    if not literal and (len(value) < 6 or DOTTED.fullmatch(value) or NUMBER.fullmatch(value) or _is_made_of_known_words(value)):
        return False
    if NUMBER.fullmatch(value):
        return len(value) >= 6 and value.isdigit()
    if value.isalpha():
        return (literal and len(value) >= 6 and value.islower()) or (len(value) >= (6 if literal else 10) and not is_wordy(value))
    return any(map(str.isdigit, value)) or _has_signs(value) or value.count("-") >= 3


def is_token(value: str) -> bool:
    """Whether the value of a name such as `api_key` looks drawn by chance: 16 characters or more that form no words."""
    if len(value) < SHORTEST_TOKEN or not value.isascii() or not value.isprintable() or " " in value or is_placeholder(value):
        return False
    if REFERENCE.match(value) or DATE.fullmatch(value) or NUMBER.fullmatch(value) or PATTERN.search(value):
        return False
    if DOTTED.fullmatch(value) and any(map(is_wordy, parts := value.split("."))):
        longest = max(parts, key=len)  # s.<24 letters and digits> is a token, settings.api_key is none
        if len(longest) < SHORTEST_TOKEN or is_wordy(longest):
            return False
    mixed = any(map(str.isdigit, value)) and any(map(str.isalpha, value))
    return (mixed or sum(map(str.isalpha, value)) >= SHORTEST_TOKEN) and not is_wordy(value)


def whole_end(text: str, start: int, end: int, limit: int, rest: re.Pattern[str] = REST) -> int:
    """The end of a secret of which `start` to `end` were read to judge it.

    One that fills the `limit` of what is read goes on as far as its alphabet does, so that no limit cuts a secret.
    """
    more = rest.match(text, end) if end - start >= limit else None
    return more.end() if more else end


def is_opaque(value: str) -> bool:
    """Whether a secret is so unlike a word that it can be taken out wherever it stands."""
    if len(value) < 8 or NUMBER.fullmatch(value) or (PATH.match(value) and is_wordy(value)):
        return False
    mixed = any(map(str.isdigit, value)) and any(map(str.isalpha, value))
    return mixed or _has_signs(value) or not is_wordy(value) or len(value) >= 24


def is_wordy(value: str) -> bool:
    """Whether most neighbours in it are neighbours in words; a digit beside a letter, or a capital behind a small one, is not."""
    value = value[:64]
    alike = sum(pair in NEIGHBOURS for pair in pairwise(value))
    return alike >= 0.5 * sum(a.isalnum() and b.isalnum() and not (a.isdigit() and b.isdigit()) for a, b in pairwise(value))


def _has_signs(value: str) -> bool:
    """Signs that no name holds, as in p@ss!word."""
    return any(sign in value for sign in "!@#$%^&*+?~=;")


def _is_made_of_known_words(value: str) -> bool:
    words = LETTERS.findall(value.lower())
    return bool(words) and all(word in PLACEHOLDER_WORDS for word in words)
