"""Texts with invented secrets, made from a seed: no key stands in this file. harmless_texts.py has those that look alike.

In a context, § is where the secret goes.
"""

import base64
import json
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

UPPER, LOWER, DIGITS, HEX = string.ascii_uppercase, string.ascii_lowercase, string.digits, "0123456789abcdef"
ALNUM = UPPER + LOWER + DIGITS
WORD = ALNUM + "-_"
BASE64 = ALNUM + "+/"
PRIVATE = "PRIVATE" + " KEY"

Maker = Callable[["Chance"], str]


@dataclass(frozen=True)
class Sample:
    """A text: what stands around its secrets (one more than there are secrets), and the secrets."""

    kind: str
    around: tuple[str, ...]
    secrets: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole text."""
        return self.around[0] + "".join(secret + after for secret, after in zip(self.secrets, self.around[1:], strict=True))


class Chance:
    """Draws from a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def chars(self, alphabet: str, count: int) -> str:
        """Characters, with a digit among the first eight where the alphabet has digits: as real keys nearly always have."""
        drawn = [alphabet[index] for index in self.rng.integers(len(alphabet), size=count)]
        digits = [character for character in alphabet if character.isdigit()]
        if digits and count >= 8:
            drawn[int(self.rng.integers(1, 8))] = digits[int(self.rng.integers(len(digits)))]
        return "".join(drawn)

    def word(self, words: str) -> str:
        """One of the words."""
        choices = words.split()
        return choices[int(self.rng.integers(len(choices)))]


def _form(prefix: str, alphabet: str, count: int) -> Maker:
    return lambda chance: prefix + chance.chars(alphabet, count)


def _jwt(chance: Chance) -> str:
    header = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').decode().rstrip("=")
    claims = base64.urlsafe_b64encode(json.dumps({"sub": chance.chars(DIGITS, 10)}).encode()).decode().rstrip("=")
    return f"{header}.{claims}.{chance.chars(WORD, 42)}q"


FORMS: dict[str, Maker] = {  # a maker's own form: found wherever it stands
    "anthropic_key": _form("sk-ant-api03-", WORD, 92),
    "openrouter_key": _form("sk-or-v1-", HEX, 64),
    "openai_key": _form("sk-proj-", ALNUM, 120),
    "openai_key, old": _form("sk-", ALNUM, 48),
    "huggingface_token": _form("hf_", UPPER + LOWER, 34),
    "groq_key": _form("gsk_", ALNUM, 52),
    "xai_key": _form("xai-", ALNUM, 80),
    "replicate_token": _form("r8_", ALNUM, 37),
    "perplexity_key": _form("pplx-", ALNUM, 48),
    "aws_access_key": lambda chance: chance.word("AKIA ASIA") + chance.chars(UPPER + "234567", 16),
    "google_api_key": lambda chance: "AIza" + chance.chars(ALNUM, 35),
    "google_oauth": _form("GOCSPX-", ALNUM, 28),
    "github_token": lambda chance: chance.word("ghp_ gho_ ghs_") + chance.chars(ALNUM, 36),
    "github_token, fine": lambda chance: f"github_pat_{chance.chars(ALNUM, 22)}_{chance.chars(ALNUM, 59)}",
    "gitlab_token": _form("glpat-", ALNUM, 20),
    "npm_token": _form("npm_", ALNUM, 36),
    "pypi_token": lambda chance: "pypi-AgEIcHlwaS5vcmc" + chance.chars(WORD, 120) + "a",
    "docker_token": _form("dckr_pat_", ALNUM, 27),
    "digitalocean_token": _form("dop_v1_", HEX, 64),
    "databricks_token": _form("dapi", HEX, 32),
    "slack_token, of a browser": lambda chance: (
        f"xoxc-{chance.chars(DIGITS, 12)}-{chance.chars(DIGITS, 12)}-{chance.chars(HEX, 64)}"
    ),
    "slack_token": lambda chance: f"xoxb-{chance.chars(DIGITS, 12)}-{chance.chars(DIGITS, 12)}-{chance.chars(ALNUM, 24)}",
    "stripe_key": lambda chance: chance.word("sk_live_ rk_live_") + chance.chars(ALNUM, 24),
    "sendgrid_key": lambda chance: f"SG.{chance.chars(ALNUM, 22)}.{chance.chars(ALNUM, 43)}",
    "telegram_token": lambda chance: f"{chance.chars('123456789', 10)}:AA{chance.chars(ALNUM, 33)}",
    "twilio_key": _form("SK", HEX, 32),
    "shopify_token": _form("shpat_", HEX, 32),
    "linear_key": _form("lin_api_", ALNUM, 40),
    "vault_token": _form("hvs.", ALNUM, 90),
    "tailscale_key": lambda chance: f"tskey-auth-{chance.chars(ALNUM, 12)}-{chance.chars(ALNUM, 32)}",
    "age_key": _form("AGE-SECRET-KEY-1", UPPER + "23456789", 58),
    "grafana_token": lambda chance: f"glsa_{chance.chars(ALNUM, 32)}_{chance.chars(HEX, 8)}",
    "jwt": _jwt,
}
ANYWHERE = [  # shell output, settings, programs, tracebacks, chat
    "$ env | sort\nHOME=/root\nLANG=C.UTF-8\nCI_JOB=§\nTERM=xterm\n",
    "# .env\nDEBUG=1\nSERVICE='§'\nPORT=8080\n",
    "services:\n  bot:\n    image: bot:1.4\n    environment:\n      - ACCOUNT=§\n      - LEVEL=info\n",
    '{"retries": 3, "value": "§", "url": "https://api.test/v1"}',
    "client = Client(\n    region='eu',\n    auth='§',\n)\n",
    'Traceback (most recent call last):\n  File "a.py", line 3, in <module>\nValueError: refused: §\n',
    "I pasted § into the chat by mistake, can you revoke it?",
    "Use this one (§), it expires tomorrow.",
    "```sh\nsetup --with §\n```\nDone.",
    'log: {\\"message\\": \\"sent §\\\\n\\", \\"ok\\": true}',
    "2026-07-01T10:00:00Z [build] step 4/9: using §\n2026-07-01T10:00:01Z [build] ok\n",
    "| name | value |\n|---|---|\n| bot | §|\n",
    "https://api.test/hook?v=§&mode=fast",
    "diff --git a/x b/x\n-old = 1\n+new = \"§\"\n context\n",
    "<setting>§</setting>",
    "one\\n§\\ntwo",
]  # fmt: skip


def _password(chance: Chance) -> str:
    return chance.chars(ALNUM, 8) + chance.word("! # + _ %") + chance.chars(ALNUM, 5)


def _plain(chance: Chance) -> str:
    return chance.chars(ALNUM, 12)


def _token(chance: Chance) -> str:
    return chance.chars(ALNUM, 32)


def _hex(chance: Chance) -> str:
    return chance.chars(HEX, 40)


def _basic(chance: Chance) -> str:
    return base64.b64encode(f"{chance.word('ann bob deploy')}:{chance.chars(ALNUM, 11)}".encode()).decode()


PLACES: dict[str, tuple[Maker, list[str]]] = {  # found by where it stands
    "password in settings": (
        _password,
        ["DB_PASSWORD=§\nDB_HOST=db\n", 'password: "§"\nport: 5432\n', "[db]\nuser = app\npassword = §\n", "export PGPASSWORD='§'"],
    ),
    "password in a program": (
        _password,
        ['connect(host="db", password="§")', "settings['password'] = '§'", 'const dbPassword = "§";', 'passwd: str = "§"'],
    ),
    "password in JSON": (_password, ['{"user": "app", "password": "§", "n": 1}', '"{\\"smtp_password\\": \\"§\\"}"']),
    "password said": (_password, ["the password is §, please log in", "Password: §\n"]),
    "password in compose": (
        _plain,
        ["  db:\n    environment:\n      POSTGRES_PASSWORD: §\n    ports: []\n", "- MYSQL_ROOT_PASSWORD=§\n"],
    ),
    "password in docker": (_plain, ["ENV ADMIN_PASSWORD §\nRUN true\n", "docker run -e ADMIN_PASSWORD=§ -p 80:80 img"]),
    "password of a database URL": (
        _plain,
        [
            "postgresql://app:§@db.internal:5432/main",
            "DATABASE_URL=mysql://root:§@127.0.0.1/x?ssl=1\n",
            "redis://:§@cache:6379/0",
            'url = "amqp://svc:§@mq//"',
            "mongodb+srv://u:§@c0.mongodb.test/x",
        ],
    ),
    "token in a remote": (
        _token,
        ["origin\thttps://ann:§@git.test/a/b.git (fetch)\n", "origin  https://§@git.test/a/b.git (push)\n"],
    ),
    "bearer": (
        _token,
        [
            'curl -H "Authorization: Bearer §" https://a.test',
            "> authorization: Bearer §\n> accept: */*\n",
            'headers = {"Authorization": "Bearer §"}',
            "'Authorization': f'Bearer §'",
            "Authorization: token §\r\nHost: a\r\n",
        ],
    ),
    "basic": (_basic, ["Authorization: Basic §\n", 'headers={"authorization": "Basic §"}']),
    "header of a key": (
        _token,
        ["curl -H 'X-Api-Key: §' https://a.test/v2", "x-auth-token: §\n", '-H "PRIVATE-TOKEN: §" https://g.test'],
    ),
    "cookie": (_token, ["Cookie: lang=en; sessionid=§; theme=dark\n", "Set-Cookie: auth_token=§; Path=/; HttpOnly\n"]),
    "curl -u": (
        _plain,
        [
            "$ curl -s -u ann:§ https://a.test/api\n{}",
            "wget -q --user ann:§ http://x.test",
            "curl -u 'ann:§' a.test",
            "curl -u ann:'§' a",
        ],
    ),
    "signs in quotes": (
        lambda chance: chance.chars(ALNUM, 8) + chance.word('$&; ;|x (>) "&'),
        ["sshpass -p '§' ssh a@b", "curl -u 'ann:§' https://a.test", "mysql -u root -p'§' shop"],
    ),
    "sshpass": (_password, ["sshpass -p '§' ssh ann@host uptime"]),
    "mysql -p": (_plain, ["mysql -u root -p§ shop < dump.sql", "mysqldump -h db -uapp -p§ shop > d.sql"]),
    "docker login": (_plain, ["docker login -u ann -p § registry.test", "echo § | docker login -u ann --password-stdin r.test"]),
    "flag": (_token, ["deploy --token § --force", "tool --api-key=§ run", "gh auth --with-token §\n", "x --password § --yes"]),
    "api key in settings": (
        _token,
        ["API_KEY=§\n", "WEATHER_API_KEY='§'\n", "api_key: §\nunits: metric\n", '{"apiKey": "§"}', 'api_key = "§"  # prod'],
    ),
    "hexadecimal key": (_hex, ["SECRET_KEY=§\n", "secret_key_base: §\n", '"client_secret": "§",', "export AUTH_TOKEN=§\n"]),
    "aws secret": (
        lambda chance: chance.chars(BASE64, 40),
        ["aws_secret_access_key = §\n", "AWS_SECRET_ACCESS_KEY=§\n", '"SecretAccessKey": "§",\n"SessionToken"'],
    ),
    "netrc": (_plain, ["machine git.test login ann password §\n", "machine a.test\n  login ann\n  password §\n"]),
    "pgpass": (_plain, ["db.internal:5432:main:app:§\n"]),
    "npmrc": (_token, ["//registry.test/:_authToken=§\nalways-auth=true\n"]),
    "sql": (_plain, ["CREATE USER app WITH PASSWORD '§';", "CREATE USER 'a'@'%' IDENTIFIED BY '§';"]),
    "xml": (_password, ["<server><password>§</password></server>"]),
    "job log": (_token, ["Run ./deploy\n  env:\n    DEPLOY_TOKEN: §\n    NODE: 20\n"]),
    "kubernetes": (
        lambda chance: base64.b64encode(chance.chars(ALNUM, 12).encode()).decode(),
        ["apiVersion: v1\nkind: Secret\nmetadata:\n  name: db\ndata:\n  value: §\n"],
    ),
    "terraform": (_password, ['variable "db" {}\nresource "x" "y" {\n  master_password = "§"\n}\n']),
    "slack hook": (
        lambda chance: f"hooks.slack.com/services/T{chance.chars(UPPER, 8)}/B{chance.chars(UPPER, 8)}/{chance.chars(ALNUM, 24)}",
        ["curl -X POST https://§ -d x", "SLACK=https://§\n"],
    ),
    "dotted token": (
        lambda chance: chance.word("s. id. user.") + chance.chars(ALNUM, 32),
        ["VAULT_TOKEN=§\n", 'access_token: "§"\n', "api_token = '§'"],
    ),
    "name before a tab or a line end": (
        _token,
        ["env:\n  - name: API_KEY\n    value: §\n", "API_KEY\t§\n", '#define API_KEY\t"§"\n', 'api_key\t= "§"\r\n'],
    ),
    "name and value": (
        _plain,
        ['{"name": "DB_PASSWORD", "value": "§"}', '{"value": "§", "name": "DB_PASSWORD"}', '{"Name":"DB_PASSWORD","Value":"§"}'],
    ),
    "other schemes": (
        _hex,
        [
            "Authorization: SSWS §\n",
            "authorization: GenieKey §\n",
            '-H "Authorization: OAuth §" https://a.test',
            "Authorization: AWS4-HMAC-SHA256 Credential=abc/eu, SignedHeaders=host, Signature=§\n",
        ],
    ),
    "telegram in a URL": (FORMS["telegram_token"], ["https://api.telegram.org/bot§/getMe", 'url = f"https://a.test/bot§/x"']),
    "curl": (
        _password,
        [
            "curl -sSu ann:§ https://a.test",
            'curl -fsSLu "ann:§" https://a.test',
            "curl -uann:§ https://a.test",
            "curl -X POST \\\n  -H 'A: b' \\\n  -u ann:§ \\\n  https://a.test",
        ],
    ),
    "curl's cookies": (_token, ['curl -b "session=§" https://a.test', "curl -s --cookie 'a=b; sessionid=§; c=d' https://a.test"]),
    "other command lines": (
        _password,
        [
            "mongodump -u admin -p §\n",
            "sqlcmd -S db -U sa -P '§'",
            "twine upload -u ann -p § dist/*",
            "http -a ann:§ GET https://a.test",
            "lftp -u ann,§ ftp.test",
            "zip -r -P § a.zip b",
            "7z x -p§ a.7z",
            "mc alias set m http://h:9000 ann §\n",
            "rabbitmqctl add_user ann §\n",
            "htpasswd -bc users ann §\n",
            "openssl enc -d -aes-256-cbc -k § -in x",
            "ssh-keygen -t rsa -N '§' -f k",
            'aws ssm put-parameter --name /a --type SecureString --value "§"',
            "sudo -S <<< '§' true",
            "sqlplus ann/§@db",
            "echo '§' | sudo passwd --stdin ann",
        ],
    ),
    "command lines with tokens": (_hex, ["wandb login §\n", 'gh secret set X --body "§"', "curl -u §: https://a.test"]),
    "settings by a word": (_plain, ["setenv DB_PASSWORD §\n", "  SetEnv DB_PASSWORD §\n"]),
    "token as a user": (_hex, ["https://§:x-oauth-basic@git.test/a.git", "git clone https://§:@git.test/a"]),
    "other connection strings": (
        _plain,
        ['dsn := "app:§@tcp(127.0.0.1:3306)/shop"', "DSN=app:§@unix(/x)/y\n", "jdbc:oracle:thin:app/§@//db:1521/x"],
    ),
    "aws configure": (lambda chance: chance.chars(BASE64, 40), ["AWS Secret Access Key [None]: §\n"]),
    "assignments": (
        _token,
        [
            'let api_key: &str = "§";',
            'static TOKEN: &\'static str = "§";',
            'let apiKey: String? = "§"',
            'let token = String::from("§");',
            "Config(api_key=SecretStr('§'))",
            'const key = process.env.API_KEY || "§";',
            'api_keys = ["§"]\n',
            'tokens: ["none", "§", "other"]',
            "GH_PAT=§\n",
            "AZURE_DEVOPS_EXT_PAT: §\n",
            'std::string token{"§"};',
            "Unseal Key 1: §\n",
        ],
    ),
    "password said, other ways": (_plain, ["Das Passwort lautet: §\n", "my wifi password is § don't tell"]),
    "login": (_plain, ['server.login("ann@mail.test", "§")']),
    "plist": (_token, ["<key>apiToken</key>\n\t<string>§</string>"]),
    "jwk": (_token, ['{"kty": "RSA", "n": "AQAB", "d": "§"}', '{"k":"§","kty":"oct"}']),
    "mnemonic": (
        lambda chance: " ".join(chance.word("abandon ability able about above absent") for _ in range(12)),
        ["seed phrase: §\n", 'mnemonic = "§"'],
    ),
    "slash in a URL's password": (lambda chance: f"{_plain(chance)}/{_plain(chance)}", ["postgres://ann:§@db.test:5432/x"]),
    "short names": (_plain, ['{"pw": "§"}', 'network={\n  psk="§"\n}', "SET PASSWORD FOR 'a'@'%' = PASSWORD('§');"]),
    "cut off": (_token, ['API_KEY="§', '{"access_token": "§']),
    "signed URL": (lambda chance: chance.chars(HEX, 64), ["https://b.s3.test/k?X-Amz-Date=1&X-Amz-Signature=§ ok"]),
}


def _long(alphabet: str) -> Maker:
    return lambda chance: chance.chars(alphabet, int(chance.rng.integers(401, 6000)))


LONG: dict[str, tuple[Maker, list[str]]] = {  # no limit cuts a secret
    "long token": (
        _long(ALNUM),
        [
            "aws_session_token = §\nregion = eu\n",
            'export AWS_SESSION_TOKEN="§"\n',
            '{"refresh_token": "§", "n": 1}',
            "GET /x?access_token=§&mode=1 HTTP/1.1",
            "GOOGLE_CREDENTIALS_BASE64=§\n",
            "Authorization: Bearer §\n",
            "Cookie: a=1; session=§; b=2\n",
            "apiVersion: v1\ndata:\n  a: §\nkind: Secret\n",
            "postgres://ann:§@db.test/x",
            "https://§@git.test/a.git",
            "docker login -u AWS -p § registry.test\n",
            "GH_TOKEN=§\n",
            "deploy --api-key § --now",
        ],
    ),
    "long key": (lambda chance: "sk-ant-api03-" + _long(WORD)(chance) + "a", ["use § now", '"§"']),
    "long jwt": (
        lambda chance: f"eyJhbGciOiJIUzI1NiJ9.eyJ{_long(WORD)(chance)}.{chance.chars(WORD, 342)}a",
        ["use § now", "id: §\n"],
    ),
}


def _key_lines(chance: Chance, kind: str, count: int = 8) -> tuple[str, list[str], str]:
    name = f"{kind} {PRIVATE}".strip()
    lines = [chance.chars(BASE64, 64) for _ in range(count)]
    return f"-----BEGIN {name}-----", [*lines, chance.chars(BASE64, 30) + "=="], f"-----END {name}-----"


def _blocks(chance: Chance) -> Iterator[Sample]:
    """Private keys: whole, escaped, quoted, indented, in a diff, cut off."""
    for kind in ("RSA", "EC", "OPENSSH", "", "ENCRYPTED"):
        begin, lines, end = _key_lines(chance, kind)
        for name, joint, before, after in (
            ("whole", "\n", "$ cat id\n", "\n$ ls\n"),
            ("CRLF", "\r\n", "", "\r\nend"),
            ("escaped", "\\n", '{"key": "', '\\n", "n": 1}'),
            ("twice escaped", "\\\\n", '"{\\"key\\": \\"', '\\\\n\\"}"'),
            ("indented", "\n    ", "tls:\n  key: |\n    ", "\n  crt: none\n"),
            ("quoted", "\n> ", "> ", "\n\nWhy does it fail?"),
            ("in a diff", "\n+", "@@ -0,0 +1 @@\n+", "\n context\n"),
        ):
            yield Sample(f"private key {name}", (before, after), (joint.join([begin, *lines, end]),))
        yield Sample("private key cut off", ("head -3 key\n", "\n$ echo done\n"), ("\n".join([begin, *lines[:3]]),))
        yield Sample("private key cut off, escaped", ('{"key": "', '"}'), ("\\n".join([begin, *lines[:3], lines[3][:20]]),))
        yield Sample("private key without its beginning", ("$ tail -4 key\n", "\n$ ls\n"), ("\n".join([*lines[-4:], end]),))
        yield Sample("private key without its beginning, quoted", ("> ", "\n\nIs it whole?\n"), ("\n> ".join([*lines[-4:], end]),))
        yield Sample("private key without its beginning, escaped", ('{"out": "', '"}'), ("\\n".join([*lines[-4:], end]),))
        yield Sample("private key numbered, with blanks", ("     1  ", "\n$ ls\n"), (_numbered([begin, *lines], "     {}  {}"),))
        yield Sample(
            "private key numbered, cut off at both ends", ("  4\t", "\n```\n"), (_numbered([*lines[-4:], end], "  {}\t{}"),)
        )
        yield Sample("private key numbered", ("```key\n 1\t", "\n```\n"), (_numbered([begin, *lines], " {}\t{}"),))
        yield Sample("private key numbered, whole", ("     1\t", "\n$ ls\n"), (_numbered([begin, *lines, end], "     {}\t{}"),))
        yield Sample("private key in grep", ("id_rsa:1:", "\n$ ls\n"), (_numbered([begin, *lines[:4]], "id_rsa:{}:{}"),))
        text = "\n".join([begin, *lines, end, ""]).encode()
        encoded = base64.b64encode(text).decode()
        yield Sample("private key in base64", ("user:\n    client-key-data: ", "\n    other: x\n"), (encoded,))
        wrapped = base64.encodebytes(text).decode().strip()
        yield Sample("private key in lines of base64", ("$ base64 key.pem\n", "\n$ ls\n"), (wrapped,))
        more = "\n".join(chance.chars(BASE64, 64) for _ in range(400))
        yield Sample("long private key", ("", "\nend\n"), (f"{begin}\n{more}\n{end}",))
        yield Sample("private key to the end", ("It says\n", ""), ("\n".join([begin, *lines[:4], lines[4][:9]]),))


def _numbered(lines: list[str], form: str) -> str:
    """Numbered lines; what stands before the first is no part of the secret."""
    text = "\n".join(form.format(number, line) for number, line in enumerate(lines, 1))
    return text[text.index(lines[0]) :]


def secret_samples(seed: int) -> list[Sample]:
    """Some 420 texts of a hundred kinds."""
    chance = Chance(seed)
    samples = []
    for number, (kind, make) in enumerate(FORMS.items()):
        for context in (ANYWHERE[(seed + number * 5 + step) % len(ANYWHERE)] for step in range(5)):
            before, after = context.split("§")
            samples.append(Sample(kind, (before, after), (make(chance),)))
    for kind, (make, contexts) in (PLACES | LONG).items():
        for context in contexts:
            before, after = context.split("§")
            samples.append(Sample(kind, (before, after), (make(chance),)))
    return [*samples, *_blocks(chance)]
