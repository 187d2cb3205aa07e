"""Redaction takes time in proportion to size, whatever the text; texts together give what each alone gives."""

import re
import time

import numpy as np
import pytest
from harmless_texts import harmless_texts
from secret_texts import secret_samples

from mlx_finetune.data.conversation import Conversation, Message, ToolCall
from mlx_finetune.data.redact import Ledger, Rules, find, find_all, redact_text
from mlx_finetune.data.redaction.literals import Literals
from mlx_finetune.data.redaction.strings import rewritten, texts_of

MEGABYTE = 1_000_000
HARD = {
    "letters": "a",
    "equals signs": "password=",
    "colons": "password: ",
    "quotes": 'password="',
    "backslashes": 'token\\\\"',
    "names": "pass_",
    "URLs": "://",
    "URLs with users": "://a:b",
    "at signs": "a@",
    "addresses": "a.b@c.d.",
    "blank lines": "\n",
    "blanks": "token ",
    "headers": "authorization: ",
    "bearers": "bearer ",
    "cookies": "cookie: a=b; ",
    "curl": "curl -u a ",
    "mysql": "mysql -x ",
    "echo": "echo a:b ",
    "logins": "docker login -p ",
    "machines": "machine a ",
    "quoted curl": "curl -u 'a:b",
    "BEGIN lines": "-----BEGIN RSA PRIVATE " + "KEY-----\n",
    "BEGIN lines and body": "-----BEGIN PRIVATE " + "KEY-----\n" + "QUJD" * 10 + "\n",
    "manifests": "kind: Secret\ndata:\n  a: QUJDREVG\n",
    "Putty": "Private-Lines: 4\n",
    "JWT": "eyJ" + "a" * 10 + ".",
    "long parts": "eyJaaaaaaaaaaaaaaa",
    "sk-": "sk-a",
    "bot ids": "MTAwMTAw.",
    "pgpass": "a:5432:b:",
    "keys": "KEY_" * 3,
    "homes": "/home/",
    "names of the person": "kim",
    "homes of the person": "/home/kim",
    "windows homes": "\\\\\\\\Users\\\\\\\\kim",
    "placeholders": "[REDACTED:a:1]",
    "open placeholders": "[REDACTED:",
    "tags": "<password>",
    "tables": "| token ",
    "name and value": "name: token\nvalue: ",
    "secrets": "password='tr0ub4dor&3'\n",
    "backslashes in quotes": 'token="' + "\\" * 100 + "\n",
    "JWT and dashes": "-eyJ" + "a" * 10,
    "END lines": "-----END PRIVATE " + "KEY-----\n",
    "body and END lines": "QUJD" * 10 + "\n-----END PRIVATE " + "KEY-----\n",
    "base64 of BEGIN": "LS0tLS1CRUdJTi",
    "cookies of cookies": "cookie=",
    "lists": 'tokens = ["',
    "lists of values": 'tokens = ["a", ',
    "Go DSN": "a:b@tcp(",
    "values before names": '"value": "a", ',
    "kinds of manifests": 'kind: Secret\nkind: "Secret\nkind": "Secret\n',
    "curl in a word": "curl/",
    "curl in lines": "curl \\\n",
    "placeholders behind tokens": "token=!..",
    "headers of any scheme": "authorization=",
    "types": "key: a",
    "JSON keys": '{"kty"',
}  # fmt: skip


def seconds(text: str, rules: Rules) -> float:
    start = time.process_time()
    redact_text(text, rules, Ledger().name)
    return time.process_time() - start


@pytest.mark.parametrize("name", HARD)
def test_a_hard_text_takes_time_in_proportion_to_its_size(name: str) -> None:
    rules = Rules(emails=True, homes=("/home/kim",), user="kim")
    small, large = (HARD[name] * (size // len(HARD[name])) for size in (MEGABYTE // 32, MEGABYTE // 8))
    spent = min(seconds(small, rules) for _ in range(3))  # the least: other programs only ever add
    assert min(seconds(large, rules) for _ in range(3)) < 4 * 2 * spent + 0.1  # quadratic would be 16 times
    assert spent < 1


def test_the_texts_as_one_take_no_longer_than_a_second_a_megabyte() -> None:
    text = "\n\n".join([*harmless_texts(1), *(sample.text for sample in secret_samples(1))])
    assert seconds(text, Rules()) < 2 + len(text) / MEGABYTE


@pytest.mark.parametrize("seed", range(3))
def test_texts_searched_together_give_what_each_gives_alone(seed: int) -> None:
    texts = [
        *harmless_texts(seed),
        *(sample.text for sample in secret_samples(seed)),
        "",
        "é日本\x00ghp",
        "sk-",
        "pass",
        "PASSWORD",
    ]
    order = np.random.default_rng(seed).permutation(len(texts))
    texts = [texts[index] for index in order]
    assert find_all([(text, "") for text in texts], Rules(emails=True)) == [find(text, Rules(emails=True)) for text in texts]


def test_literals_are_found_as_a_search_for_each_finds_them() -> None:
    rng = np.random.default_rng(0)
    words = sorted({"".join(rng.choice(list("abcd_-:"), size=int(rng.integers(4, 8)))) for _ in range(60)})
    texts = ["".join(rng.choice(list("abcdABCD_-:é日"), size=int(size))) for size in (0, 3, 4, 70_000, 1, 65_533, 200)]
    expected = {
        (index, match.start(), word)
        for index, text in enumerate(texts)
        for word in words
        for match in re.finditer(f"(?={re.escape(word)})", text, re.IGNORECASE)
    }
    found = list(Literals({word: word for word in words}).hits(texts))
    assert len(expected) > 100
    assert set(found) == expected and len(found) == len(expected)
    assert [hit[:2] for hit in found] == sorted(hit[:2] for hit in found)


def test_the_texts_gathered_are_those_that_are_rewritten() -> None:
    calls = (
        ToolCall("1", "f", '{"a": {"password": [1, "x"], "b": "\\u00e9"}, "a": [{}, "y", null], "c": ""} '),
        ToolCall("2", "f", '["z", '),
        ToolCall("3", "f", '"only a string"'),
    )
    messages = (
        Message("user", "mail me@x\n@no call"),
        Message(
            "assistant", '@shell(call_1): {"command": "ls\\n", "n": [true, {"k": "v"}]}\nthen\n@f(2): {\'a\': 1}', tool_calls=calls
        ),
    )
    meta = {"name": "n", "a": [{"token": ("t", 1, None)}, "s"], "b": {}, "c": "é\ud800", "d": {"e": {"f": "g"}, "h": 2.5}}
    conversation = Conversation(messages, "gptme", "g", "own", meta, ({"type": "function", "x": ["y", {"z": "é"}]},))
    seen: list[tuple[str, str]] = []

    def rewrite(text: str, field: str) -> str:
        seen.append((text, field))
        return text.upper()

    new = rewritten(conversation, rewrite)
    gathered = list(texts_of(conversation))
    assert set(seen) == set(gathered)
    assert {"ls\n", "é", "v", "y", "only a string", '["z", '} <= {text for text, _ in gathered}
    assert [text for text, _ in texts_of(new)] == [text.upper() for text, _ in gathered]
