"""The person's home folder and account name, which stand in nearly every log: /home/user and user take their place."""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import PurePosixPath, PureWindowsPath

from mlx_finetune.errors import UserError

NEUTRAL_HOME, NEUTRAL_USER = "/home/user", "user"

# Accounts that say nothing of a person: what a system, an image or a service calls itself.
GENERIC = frozenset(
    """admin administrator agent alpine ansible app arch azureuser bitnami bot build builder centos ci circleci cloud code coder
    codespace daemon debian default demo deploy dev developer devuser docker ec2-user fedora git github gitlab gitpod go guest
    home host jenkins jovyan kali linux local localhost mac macos me mysql nginx nobody node none oracle owner pi podman
    postgres public python rocky root ruby runner runneradmin rust sandbox server service share shared ssh student sudo system
    systemd temp test tester tmp travis ubuntu unknown user username vagrant visitor vscode windows worker workspace www
    www-data""".split()
)
# Names that are words as well: replaced only where they can be nothing else.
WORDS = frozenset(
    """abbey alpha amber angel april ash art arthur august autumn basil bay beau bill blue bob brook brown bud carol case chance
    charity chase chat chip christian chuck clay cliff crystal dale dan data daisy dash dawn dean diamond don doc docs drew duke
    earl eve faith file fox frank gene ginger glen grace grant gray green guy hank harmony harry heath heather holly honey hope
    hunter iris ivy jack jade jasmine jay jean jewel job john joy june junior justice king lance lane law lee liberty lily link
    log long love luna main marina mark mars master matt maven max may mercy merry mike miles min model mod name nick noble norm
    nova oak olive opal page paris park parker pat pearl peg penny pepper perl phoenix piper pool porter precious price prince
    rain ralph ray red reed rex rich river rob robin rocky rod rose rosemary ruby run rusty sage sandy scout shell sierra silver
    sky skip sky sol sonny spike star sterling stone story strong sue summer sunny tab taylor terry tim tom tony train trip troy
    true van victor vim violet ward warren wave web west will willow win wing wood work young zen token secret password key
    email cookie""".split()
)
SHORTEST = 3
TEMPORARY = re.compile(r"(?:/private)?/(?:tmp|var/(?:tmp|folders))(?:/|$)")

# The folder of homes before the name, with whatever stands for a slash there: /, \/ (JSON), %2F, \ or \\ (Windows), - (in a name).
FOLDER = re.compile(r"(?P<drive>[A-Za-z]:)?(?P<slash>\\?/|%2[Ff]|\\{1,8}|-)(?:home|[Uu]sers)(?P=slash)$")
# Before or behind a name that is a word too: user=, User:, "user": ", login, chown, sudo -u, and @host.
BEFORE = re.compile(
    r"(?:(?:^|[^A-Za-z0-9])(?:user|username|user_name|logname|login|owner|sudo_user|account|author|uid)[\\\"']{0,4}\s{0,3}[:=]\s{0,3}[\\\"'(]{0,4}\d{0,6}\(?"
    r"|\b(?:chown|sudo -u|su -|su|--user|-l|whoami\n|login) {0,3}"
    r"|(?:^|\n)[-bcdlsp][-rwxsStT]{9}[.+@]? +\d+ +(?:\S+ +)?"
    r"|/(?:var/(?:spool/)?mail|run/media|media)/)$",
    re.IGNORECASE,
)
BEHIND = re.compile(r"@[A-Za-z0-9]|:~|@\[")
PASSWD = re.compile(r":x?:\d+:\d+:")


def homes_to_hide(homes: Iterable[str]) -> tuple[str, ...]:
    """Those that say who the person is, without a slash at the end; not /root, /, /home/user or a temporary folder."""
    kept = []
    for home in homes:
        path = home.rstrip("/\\")
        name = name_of(path)
        if len(name) > 1 and name.lower() not in GENERIC and not TEMPORARY.match(path) and path.count("/") + path.count("\\") > 1:
            kept.append(path)
    return tuple(dict.fromkeys(kept))


def named_homes(homes: Iterable[str]) -> tuple[str, ...]:
    """Those that a person named, as they are: also /root and /home/dev.

    Raises:
        UserError: it is no absolute path to a folder.
    """
    kept = []
    for home in homes:
        path = home.rstrip("/\\")
        if not (PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()) or not name_of(path):
            raise UserError(f"--home {home!r:.200}: no absolute path", hint="write it as it stands in the logs: --home /Users/kim")
        kept.append(path)
    return tuple(dict.fromkeys(kept))


def user_to_hide(user: str) -> str:
    """The account name, or nothing where it says nothing."""
    return "" if len(user) < 2 or user.lower() in GENERIC else user


def name_of(home: str) -> str:
    """The last part of a path of either kind."""
    return (PureWindowsPath(home) if "\\" in home else PurePosixPath(home)).name


def identity_edits(text: str, homes: tuple[str, ...], user: str) -> list[tuple[int, int, str]]:
    """Where the person shows (start, end) and what to put there, from left to right."""
    names = [name for name in _names_of(homes, user) if name in text]
    if not names:  # a home ends with its name
        return []
    edits = [edit for home in homes for edit in _whole_homes(text, home)]
    for name in names:
        edits += _names(text, name, everywhere=name == user)
    kept: list[tuple[int, int, str]] = []
    for edit in sorted(edits, key=lambda one: (one[0], -one[1])):
        if not kept or edit[0] >= kept[-1][1]:
            kept.append(edit)
    return kept


@lru_cache(maxsize=64)
def _names_of(homes: tuple[str, ...], user: str) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys((*map(name_of, homes), user)) if name)


def _whole_homes(text: str, home: str) -> Iterator[tuple[int, int, str]]:
    """Homes anywhere: /data/people/erik."""
    at = text.find(home)
    while at >= 0:
        end = at + len(home)
        if _ends(text, end) and "\\" not in home:
            yield at, end, NEUTRAL_HOME
        at = text.find(home, end)


def _names(text: str, name: str, everywhere: bool) -> Iterator[tuple[int, int, str]]:
    at = text.find(name)
    while at >= 0:
        end = at + len(name)
        if _ends(text, end):
            head = text[max(0, at - 60) : at]
            folder = FOLDER.search(head)
            if folder:
                yield at - len(folder[0]), end, folder[0] + NEUTRAL_USER if folder["drive"] else _neutral(folder["slash"])
            elif everywhere and _begins(head) and (_is_no_word(name) or _is_account(text, head, end)):
                yield at, end, NEUTRAL_USER
        at = text.find(name, end)


def _neutral(slash: str) -> str:
    return f"{slash}home{slash}user" if not slash.startswith("\\\\") and slash != "\\" else f"{slash}Users{slash}user"


def _begins(head: str) -> bool:
    if head.endswith("[REDACTED:"):
        return False
    escaped = head[-2:-1] == "\\" and head[-1:] in "nrt" and head[-3:-2] != "\\"
    return not (head[-1:].isalnum() or head[-1:] == "_") or escaped


def _ends(text: str, end: int) -> bool:
    return not (text[end : end + 1].isalnum() or text[end : end + 1] == "_")


def _is_no_word(name: str) -> bool:
    return len(name) >= SHORTEST and name.lower() not in WORDS


def _is_account(text: str, head: str, end: int) -> bool:
    return bool(BEHIND.match(text, end) or BEFORE.search(head) or PASSWD.match(text, end))
