"""Texts without a secret that look as if they held one, made from a seed: hashes, ids, placeholders, programs, lock files.

In a text, <sha1>, <sha256>, <uuid>, <base64>, <word> and the like are replaced by drawn values; each line of a list is one text,
with \\n for its line ends.
"""

import base64
import re

from secret_texts import ALNUM, BASE64, HEX, LOWER, Chance

DRAWN = {
    "sha1": lambda chance: chance.chars(HEX, 40),
    "short": lambda chance: chance.chars(HEX, 7),
    "md5": lambda chance: chance.chars(HEX, 32),
    "sha256": lambda chance: chance.chars(HEX, 64),
    "sha512": lambda chance: base64.b64encode(chance.chars(ALNUM, 64).encode()).decode(),
    "uuid": lambda chance: "-".join(chance.chars(HEX, count) for count in (8, 4, 4, 4, 12)),
    "base64": lambda chance: chance.chars(BASE64, 76),
    "id": lambda chance: chance.chars(ALNUM, 22),
    "name": lambda chance: chance.word("client settings config request self response user session"),
    "word": lambda chance: chance.word("parser total invoice window message folder branch release"),
    "letters": lambda chance: chance.chars(LOWER, 9),
    "number": lambda chance: chance.chars("123456789", 6),
}
HASHES = r"""
commit <sha1>\nAuthor: Ann <ann@example.org>\n\n    Fix the <word>\n
<short> (HEAD -> main) Fix the <word>\n<short> Add tokens to the <word>\n
diff --git a/x.py b/x.py\nindex <short>..<short> 100644\n--- a/x.py\n+++ b/x.py\n
git checkout <sha1>
rev = "<sha1>"
{"lfs": {"oid": "sha256:<sha256>", "size": <number>}}
FROM python:3.11@sha256:<sha256>
<sha256>  dist/<word>-1.0.tar.gz
"integrity": "sha512-<sha512>",
"resolved": "https://registry.npmjs.org/<word>/-/<word>-1.2.3.tgz#<sha1>",
certifi==2024.2.2 \\\n    --hash=sha256:<sha256> \\\n    --hash=sha256:<sha256>
checksum = "<sha256>"
{ url = "https://files.pythonhosted.org/packages/aa/bb/<sha256>/<word>.whl", hash = "sha256:<sha256>" }
github.com/a/b v1.2.3 h1:<base64>=
ETag: "<md5>"
md5(<word>) = <md5>
id: <uuid>
request_id=<uuid> status=200
{"session": "<uuid>", "turn": 4}
trace_id=<md5> span_id=<short>
@shell(call_<id>): {"command": "ls"}
toolu_<id>
chatcmpl-<id>
data:image/png;base64,<base64><base64>
<img src="data:image/png;base64,<base64>">
-----BEGIN CERTIFICATE-----\n<base64>\n<base64>\n-----END CERTIFICATE-----\n
-----BEGIN PUBLIC KEY-----\n<base64>\n-----END PUBLIC KEY-----\n
-----BEGIN PGP PUBLIC KEY BLOCK-----\n<base64>\n-----END PGP PUBLIC KEY BLOCK-----\n
ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI<base64> ann@host
SHA256:<base64> ann@host (ED25519)
nonce: <md5>\ncache: <sha256>
container <sha256> started
file <word>.<short>.js 12 kB
"node_modules/<word>": {"version": "1.0.<number>", "integrity": "sha512-<sha512>"}
cache-key: linux-<sha256>
cache_key=<sha256>
public_key: <base64>
next_page_token: <id>
pagination_token = "<id><id>"
sort_key = "<word>#<number>"
partition_key: <uuid>
primary_key: <uuid>
csrf_token=<id><id>
0x<sha1>
W/"<short>-<id>"
"""
PLACEHOLDERS = r"""
API_KEY=your-api-key-here
OPENAI_API_KEY=sk-...
export ANTHROPIC_API_KEY=<your key>
GITHUB_TOKEN=ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
aws_access_key_id = AKIAIOSFODNN7EXAMPLE
password: changeme
password = "********"
PASSWORD=<password>
DB_PASSWORD=${DB_PASSWORD}
DB_PASSWORD=$DB_PASSWORD
- POSTGRES_PASSWORD=${POSTGRES_PASSWORD:-postgres}
token: ${{ secrets.GITHUB_TOKEN }}
password: {{ vault_password }}
password = "%s"
"password": null
"token": ""
api_key = None
secret: !vault |
secret_key: REPLACE_ME
curl -H "Authorization: Bearer $TOKEN" https://a.test
curl -H "Authorization: Bearer <token>" https://a.test
curl -u "$USER:$PASS" https://a.test
https://user:password@example.com/x
postgres://postgres:postgres@localhost/test
https://${USER}:${TOKEN}@git.test/a.git
mysql -u root -p shop < dump.sql
docker login -u ann --password-stdin
PGPASSWORD=secret
the api key is [REDACTED:api_key:1]
password: [REDACTED:password:12]
ARG NPM_TOKEN
Authorization: Bearer YOUR_ACCESS_TOKEN
token=dummy-token
x-api-key: test
-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----
-----BEGIN RSA PRIVATE KEY-----\nyour key\n-----END RSA PRIVATE KEY-----
"""
PROGRAMS = r"""
api_key = os.environ["OPENAI_API_KEY"]
password = getpass.getpass("Password: ")
token = <name>.headers.get("Authorization")
self.password = password
self.token: str = <name>.token
def login(user: str, password: str) -> Token:\n    return Token(user)\n
if token != self.current_token:\n    raise InvalidTokenError(token)\n
const { token, secretKey } = <name>;
secret = secrets.token_hex(32)
SECRET_KEY = env("SECRET_KEY", default="")
headers = {"Authorization": f"Bearer {token}"}
headers["X-Api-Key"] = <name>.api_key
tokens = tokenizer.encode(text)\nmax_tokens=4096
eos_token = "<|im_end|>"\npad_token_id: 2
token_count: <number>
"pad_token": "</s>", "unk_token": "<unk>"
for key, value in <name>.items():\n    result[key] = value\n
primary_key = models.BigAutoField(primary_key=True)
key = lambda item: (item.<word>, item.name)
@pytest.mark.parametrize("token", ["a", "b"])
parser.add_argument("--password", help="of the account")
parser.add_argument("--api-key", required=True)
password: Optional[str] = Field(default=None, exclude=True)
password_field = driver.find_element(By.ID, "password")
<label for="password">Password</label>
<input type="password" name="password" autocomplete="current-password">
ALTER TABLE users ADD COLUMN password_hash VARCHAR(255) NOT NULL;
password_hash = "$2b$12$<id><id>"
hashed_password = bcrypt.hash(password)
KEY `idx_<word>` (`<word>_id`, `created_at`)
export const TOKEN_TYPES = ["access", "refresh"];
keyboard: <letters>\nmonkey: <letters>
pass
passed: 12, failed: 0
assert client.get(url, auth=(user, password)).status == 200
git remote add origin git@github.com:ann/<word>.git
origin\tgit@github.com:ann/<word>.git (fetch)
origin\thttps://github.com/ann/<word>.git (push)
ssh://git@git.test:2222/a/b.git
npm install react@18.2.0 @scope/<word>@1.0.0
scp <word>.txt ann@host:/srv/<word>
http://localhost:8080/<word>?page=2
rsync -p src/ dst/ && mkdir -p out/<word>
python -m pytest -p no:cacheprovider tests/<word>
Set-Cookie: theme=dark; Path=/
secretName: <word>-tls
kind: SecretStore\nmetadata:\n  name: <word>
existingSecret: <word>-credentials
passwordSecretRef:\n  name: <word>\n  key: password
AWS_SECRET_ACCESS_KEY: arn:aws:secretsmanager:eu-west-1:1:secret:<word>
ssh_key: ~/.ssh/id_ed25519
key_file = "/etc/ssl/private/<word>.pem"
tls.key: certs/<word>.key
contract token 0x<sha1>
def generate(password: str, method: str = "scrypt", salt_length: int = 16) -> str:
redis://cache:6379/0,redis://user@other:6379/1
{"kty": "RSA", "kid": "<md5>", "n": "<id><id><id>", "e": "AQAB"}
The password is what the <word> asks for.
page.login("<word>", "button")
a mnemonic is easier to keep in mind than a number
xoxo-love-letters
"all 8 cases pass": check_3s_all_pass
ALPHABET_PAT = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
UNRESERVED_PAT = r"(?:[^\\[\\]%:/?#]|%[a-fA-F0-9]{2})*"
let token: &str = <name>.token();
const key = process.env.API_KEY || "";
TOKENS = ["access", "refresh", "<word>"]
special_tokens = ["<|im_start|>", "<|im_end|>"]
public_keys = ["<base64>", "<base64>"]
{"name": "<word>", "value": "<sha256>"}
{"name": "TOKEN_URL", "value": "https://a.test/oauth2/v2.0/token"}
- name: API_KEY\n  valueFrom:\n    secretKeyRef:\n      name: <word>\n      key: api-key
grep -n "END RSA PRIVATE KEY" <word>.pem
-----BEGIN CERTIFICATE-----\n<base64>\n-----END CERTIFICATE-----\n-----END\n
client-certificate-data: LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCk1JSUM<base64>
LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCk1JSUM<base64>
curl -b cookies.txt -c cookies.txt https://a.test
curl -sSfL -o out.txt https://a.test/<word>
curl -u "$USER:$PASS" -b "session=$SESSION" https://a.test
mongo -u admin -p --authenticationDatabase admin
unzip -p <word>.zip data.csv
mysql -h db -P 3306 -u root -p
7z a -p <word>.7z
ssh-keygen -t ed25519 -N "" -f "<word>"
openssl enc -d -aes-256-cbc -k "$KEY"
echo done | tee <word>.txt
setenv DB_PASSWORD $PASSWORD
http -a "$USER:$PASS" GET https://a.test
dsn := user + ":" + password + "@tcp(" + host + ")/" + name
jdbc:oracle:thin:@//db:1521/x
task-sk-<letters> risk-free-<letters>-<number>
sk-learn pipeline with desk-<letters>
"""
SENTENCES = r"""
The password is wrong, please try again.
Your token has expired; log in to get a new one.
Enter passphrase for key '/root/.ssh/id_ed25519':
[sudo] password for root:
ann@host's password:
The secret to good tests is a <word> that fails.
Basic authentication is enough for the <word>.
Is the bearer of bad news welcome?
What is the difference between an access token and a refresh token?
The API key goes in the header, never in the URL.
A token is about four characters; this prompt has <number> tokens.
Set `API_KEY` to your key, then run `make <word>`.
Rotate credentials every 90 days. Credentials: see the vault.
Key: value pairs are separated by commas.
key takeaway: <word> first
ERROR: authentication failed for user "app"
Permission denied (publickey,password).
fatal: Authentication failed for 'https://git.test/a/<word>.git/'
The primary key: <word>_id. The foreign key: <word>.
Authorization: required
pass the <word> to the <word>, then compare <sha1>
Das Passwort ist falsch. 密码错误。
"""


def harmless_texts(seed: int) -> list[str]:
    """More than a hundred and fifty texts, bare, in a code block, a longer log, indented or quoted."""
    chance = Chance(seed)
    texts = []
    for line in (HASHES + PLACEHOLDERS + PROGRAMS + SENTENCES).strip("\n").split("\n"):
        if line:
            plain = line.replace("\\n", "\n").replace("\\t", "\t").replace("\\\\", "\\")
            texts.append(re.sub(r"<(\w+)>", lambda match: DRAWN[match[1]](chance) if match[1] in DRAWN else match[0], plain))
    around = ("{}", "```\n{}\n```", "$ cat it\n{}\n$ ls\nREADME.md  src\n", "    {}", "He wrote:\n\n> {}\n")
    return [around[(index + seed) % len(around)].replace("{}", text) for index, text in enumerate(texts)]
