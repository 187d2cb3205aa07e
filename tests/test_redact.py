"""Secrets and the person go, everything else stays as it is."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from harmless_texts import harmless_texts
from secret_texts import ALNUM, FORMS, LONG, Chance, Sample, secret_samples

from mlx_finetune.data.conversation import Conversation, Message, ToolCall
from mlx_finetune.data.redact import PLACEHOLDER, Ledger, Rules, find, redact_conversation, redact_text
from mlx_finetune.errors import UserError

KIM = Rules.for_person(Path("/home/kim"), "kim")
SEEDS = range(8)


def redacted(text: str, rules: Rules | None = None) -> str:
    return redact_text(text, rules or Rules(), Ledger().name)


def talk(*contents: str, **more: object) -> Conversation:
    messages = tuple(Message("assistant" if index % 2 else "user", content) for index, content in enumerate(contents))
    return Conversation(messages, "gptme", "log", "own", **more)  # type: ignore[arg-type]


def cleaned(conversation: Conversation, rules: Rules | None = None) -> Conversation:
    return redact_conversation(conversation, rules or Rules(), Ledger().name)


def only_the_secret_differs(sample: Sample, text: str) -> bool:
    return re.fullmatch(PLACEHOLDER.pattern.join(map(re.escape, sample.around)), text) is not None


def secret(seed: int = 1, kind: str = "github_token") -> str:
    return FORMS[kind](Chance(seed))


def hard_password(seed: int = 1) -> str:
    return Chance(seed).chars(ALNUM, 18)


def test_there_are_hundreds_of_texts_of_many_kinds() -> None:
    samples = secret_samples(0)
    assert len(samples) >= 250
    assert len({sample.kind for sample in samples}) >= 70
    assert len(set(harmless_texts(0))) >= 150


@pytest.mark.parametrize("seed", SEEDS)
def test_every_secret_is_gone_and_what_stands_around_it_is_unchanged(seed: int) -> None:
    wrong = [s for s in secret_samples(seed) if not only_the_secret_differs(s, redacted(s.text))]
    assert not wrong, [(sample.kind, sample.around) for sample in wrong]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_harmless_text_stays_as_it_is(seed: int) -> None:
    changed = [(text, redacted(text)) for text in harmless_texts(seed) if redacted(text) != text]
    assert not changed, changed


@pytest.mark.parametrize("seed", SEEDS)
def test_texts_in_a_row_fare_as_each_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    harmless, samples = harmless_texts(seed), secret_samples(seed)
    for _ in range(40):
        sample = samples[int(rng.integers(len(samples)))]
        if sample.around[-1].endswith("\n") and (sample.around[0].endswith("\n") or not sample.around[0]):
            before, after = (harmless[int(index)] for index in rng.integers(len(harmless), size=2))
            framed = Sample(sample.kind, (f"{before}\n\n{sample.around[0]}", f"{sample.around[1]}\n\n{after}"), sample.secrets)
            assert only_the_secret_differs(framed, redacted(framed.text)), framed.around


def test_redacting_twice_changes_nothing_more() -> None:
    for sample in secret_samples(3):
        once = redacted(sample.text)
        assert redacted(once) == once, sample.kind


def test_json_escapes_around_a_secret_do_not_hide_it() -> None:
    for sample in secret_samples(4):
        if sample.kind in FORMS:
            assert sample.secrets[0] not in redacted(json.dumps(json.dumps({"text": sample.text}))), sample.kind


def test_the_same_secret_has_one_placeholder_and_another_has_another() -> None:
    one, other = secret(1), secret(2)
    assert redacted(f"{one} {other} {one}") == "[REDACTED:github_token:1] [REDACTED:github_token:2] [REDACTED:github_token:1]"


def test_find_tells_place_and_kind_in_order() -> None:
    text = f"a {secret()} b {secret(2, 'jwt')} c"
    found = find(text, Rules())
    assert [one.kind for one in found] == ["github_token", "jwt"]
    assert [text[one.start : one.end] for one in found] == [secret(), secret(2, "jwt")]


def test_a_ledger_counts_and_never_shows_a_value() -> None:
    ledger, value = Ledger(), secret()
    redact_text(f"{value} {value} {secret(2)}", Rules(), ledger.name)
    assert ledger.counts() == {"github_token": (3, 2)}
    assert value not in repr(ledger) + str(vars(ledger))


def test_a_password_of_a_url_is_removed_where_it_stands_bare_in_another_message() -> None:
    value = hard_password()
    new = cleaned(talk(f"is it {value}?", f"git clone https://ann:{value}@git.test/a.git", f"'{value}'\n", f"not{value}er"))
    assert [m.content for m in new.messages] == [
        "is it [REDACTED:url_password:1]?",
        "git clone https://ann:[REDACTED:url_password:1]@git.test/a.git",
        "'[REDACTED:url_password:1]'\n",
        f"not{value}er",
    ]


def test_a_password_is_removed_as_a_url_writes_it_too() -> None:
    new = cleaned(talk("DB_PASSWORD='a7/b9Xq4:kW2z'", "postgres host a7%2Fb9Xq4%3AkW2z at 5432"))
    assert "a7%2F" not in new.messages[1].content


def test_a_password_that_is_a_word_is_not_removed_elsewhere() -> None:
    new = cleaned(talk('password: "sunshine"', "what a sunshine today"))
    assert new.messages[0].content == 'password: "[REDACTED:password:1]"'
    assert new.messages[1].content == "what a sunshine today"


def test_a_line_of_a_private_key_is_removed_where_it_stands_alone() -> None:
    block = next(s for s in secret_samples(5) if s.kind == "private key whole").secrets[0]
    line = block.split("\n")[2]
    assert line not in cleaned(talk(block, f"the second line is {line}, right?")).messages[1].content


def test_arguments_of_calls_are_decoded_and_written_anew_only_where_they_change() -> None:
    changed = '{"command":  "export T=SECRET\\nprintf \'caf\\u00e9\'", "n": 1.50}'.replace("SECRET", secret())
    same = '{"b": 1,"a":"\\u00e9 \\/ x"}'
    calls = (ToolCall("1", "shell", changed), ToolCall("2", "shell", same), ToolCall("3", "shell", f"not JSON {secret()}"))
    new = cleaned(Conversation((Message("assistant", "ok", tool_calls=calls),), "own", "g", "own")).messages[0].tool_calls
    assert new[0].arguments == '{"command":  "export T=[REDACTED:github_token:1]\\nprintf \'caf\\u00e9\'", "n": 1.50}'
    assert new[1].arguments == same
    assert new[2].arguments == "not JSON [REDACTED:github_token:1]"


def test_native_calls_of_gptme_are_decoded_too() -> None:
    password = 'x7"q&P4z!k'  # in JSON it is written with escapes
    text = "Now.\n@shell(call_1): " + json.dumps({"command": f"sshpass -p '{password}' ssh a@b"}) + f"\nand {secret()}"
    assert cleaned(talk("go", text)).messages[1].content == (
        'Now.\n@shell(call_1): {"command": "sshpass -p \'[REDACTED:password:1]\' ssh a@b"}\nand [REDACTED:github_token:1]'
    )
    same = '@shell(call_1): {"command":"ls \\u00e9",  "x": [1]}'
    assert cleaned(talk("go", same)).messages[1].content == same


def test_the_key_of_a_dictionary_tells_what_its_value_is() -> None:
    value = hard_password()
    call = ToolCall("1", "login", json.dumps({"user": "ann", "api_key": value, "note": "hello"}))
    new = cleaned(Conversation((Message("assistant", "", tool_calls=(call,)),), "own", "g", "own")).messages[0].tool_calls[0]
    assert json.loads(new.arguments) == {"user": "ann", "api_key": "[REDACTED:api_key:1]", "note": "hello"}
    meta = cleaned(talk("hi", meta={"db": [{"password": value, "n": [1, None, True]}], "name": "log"})).meta
    assert meta == {"db": [{"password": "[REDACTED:password:1]", "n": [1, None, True]}], "name": "log"}


def test_meta_schemas_names_and_ids_are_redacted() -> None:
    value = secret()
    tools = ({"type": "function", "function": {"name": "f", "description": f"use {value}", value: {"default": [value]}}},)
    old = talk("hi", meta={"title": f"about {value}", "name": value, "id": value, "depth": {"a": (1, 2.5)}}, tools=tools)
    called = Message("assistant", "", reason=f"see {value}", tool_calls=(ToolCall(value, "f", "{}"),), tool_call_id=value)
    old = replace(old, group=value, license=value, messages=(*old.messages, called))
    new = cleaned(old)
    assert new.meta["title"] == "about [REDACTED:github_token:1]"
    assert value not in repr(new)
    assert new.messages[-1].tool_calls[0].id == new.messages[-1].tool_call_id == new.group == "[REDACTED:github_token:1]"
    assert value not in json.dumps(new.tools)


def test_deep_meta_is_no_trouble() -> None:
    deep: object = secret()
    for _ in range(400):
        deep = {"a": [deep]}
    assert secret() not in str(cleaned(talk("hi", meta={"deep": deep})).meta)


def test_a_clean_conversation_is_returned_as_it_is() -> None:
    old = talk("hi", "```shell\nls /home/ann\n```", meta={"title": "x", "n": [1]}, tools=({"type": "function"},))
    assert cleaned(old) == old
    assert cleaned(old, KIM) == old


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/kim/dev/x.py", "/home/user/dev/x.py"),
        ("cd /home/kim && ls", "cd /home/user && ls"),
        ("/Users/kim/Library", "/Users/user/Library"),
        ("C:\\Users\\kim\\x", "C:\\Users\\user\\x"),
        ('"C:\\\\Users\\\\kim\\\\x"', '"C:\\\\Users\\\\user\\\\x"'),
        ("file%3A%2Fhome%2Fkim%2Fa", "file%3A%2Fhome%2Fuser%2Fa"),
        ("kim@laptop:~$ whoami\nkim\n", "user@laptop:~$ whoami\nuser\n"),
        ("-rw-r--r-- 1 kim kim 12 x.py", "-rw-r--r-- 1 user user 12 x.py"),
        ("github.com/kim/repo", "github.com/user/repo"),
        ("kimono, Kimi, akim, /home/kimberly, kim_2", "kimono, Kimi, akim, /home/kimberly, kim_2"),
        ("/home/ann and /home/user", "/home/ann and /home/user"),
    ],
)
def test_home_and_name_of_the_person_become_neutral(text: str, expected: str) -> None:
    assert redacted(text, KIM) in (expected, expected.replace("/Users/user", "/home/user"))


def test_a_name_that_is_a_word_is_replaced_only_where_it_can_be_nothing_else() -> None:
    rules = Rules.for_person(Path("/home/mark"), "mark")
    assert redacted("mark the line in /home/mark/x as mark@host does", rules) == "mark the line in /home/user/x as user@host does"
    assert redacted("user=mark mark=1 # mark", rules) == "user=user mark=1 # mark"


@pytest.mark.parametrize(
    ("home", "user"), [("/root", "root"), ("/home/ubuntu", "ubuntu"), ("/home/user", "user"), ("/", "nobody"), ("/tmp/x", "ci")]
)
def test_accounts_that_say_nothing_hide_nothing(home: str, user: str) -> None:
    rules = Rules.for_person(Path(home), user)
    assert (rules.homes, rules.user) == ((), "")


def test_the_person_can_stay() -> None:
    assert redacted("/home/kim", Rules.for_person(Path("/home/kim"), "kim", personal=False)) == "/home/kim"


def test_other_homes_of_the_person_go_too() -> None:
    assert (
        redacted("ls /data/people/kk/x", Rules.for_person(Path("/home/kim"), "kim", more_homes=["/data/people/kk"]))
        == "ls /home/user/x"
    )


@pytest.mark.parametrize("named", ["/home/dev", "/home/dev/", "/root", "/Users/admin", "/data/test"])
def test_a_home_that_a_person_names_goes_whatever_it_is_called(named: str) -> None:
    rules = Rules.for_person(Path("/home/kim"), "kim", more_homes=[named])
    assert redacted(f"ls {named.rstrip('/')}/x", rules).replace("/Users/user", "/home/user") == "ls /home/user/x"


@pytest.mark.parametrize("named", ["", "/", "kim", "~/x", "~kim"])
def test_a_home_is_an_absolute_path(named: str) -> None:
    with pytest.raises(UserError, match="absolute"):
        Rules.for_person(Path("/home/kim"), "kim", more_homes=[named])


def test_home_and_name_go_in_every_place_of_a_conversation() -> None:
    call = ToolCall("1", "shell", '{"command": "cd /home/kim"}')
    old = Conversation((Message("assistant", "in /home/kim", tool_calls=(call,)),), "own", "g", "own", {"workspace": "/home/kim/x"})
    new = cleaned(old, KIM)
    assert "kim" not in json.dumps(new.to_json())


def test_what_is_allowed_stays() -> None:
    one, other = secret(1), secret(2)
    assert redacted(f"{one} {other}", Rules(allow=(one,))) == f"{one} [REDACTED:github_token:1]"
    assert redacted(f"{one} {other}", Rules(allow=(f"re:^{one[:9]}",))) == f"{one} [REDACTED:github_token:1]"
    assert redacted("password: 'tr0ub4dor&3'", Rules(allow=("password: 'tr0ub4dor&3'",))) == "password: 'tr0ub4dor&3'"
    assert (
        redacted("/home/kim by kim", Rules.for_person(Path("/home/kim"), "kim", allow=["kim", "/home/kim"])) == "/home/kim by kim"
    )


@pytest.mark.parametrize("pattern", ["re:", "re:x*", "re:(", "re:[a", "re:a{99999999999}", "re:*"])
def test_a_bad_expression_is_the_users_mistake(pattern: str) -> None:
    with pytest.raises(UserError, match="allow"):
        Rules(allow=(pattern,))


def test_emails_go_where_asked_for_and_machines_addresses_stay() -> None:
    text = "ann.lee@mail.org, git@github.com:a/b, react@18.2.0, me@example.com, noreply@github.com, a@b.py"
    assert redacted(text) == text
    assert redacted(text, Rules(emails=True)) == text.replace("ann.lee@mail.org", "[REDACTED:email:1]")


def test_what_is_stored_of_the_rules_does_not_name_the_person() -> None:
    stored = KIM.to_json()
    assert "kim" not in json.dumps(stored)
    assert stored["personal"] and stored != Rules().to_json()


def test_a_home_without_a_name_ends_the_search() -> None:
    assert redacted("a /home/kim", Rules(homes=("/srv/",), user="kim")) == "a /home/user"
    assert redacted("no path", Rules(homes=("/",))) == "no path"


def test_a_secret_as_a_key_of_meta_is_redacted_too() -> None:
    assert cleaned(talk("hi", meta={secret(): 1, "kim": 2}), KIM).meta == {"[REDACTED:github_token:1]": 1, "user": 2}


@pytest.mark.parametrize("size", [199, 200, 201, 399, 400, 401, 1999, 2000, 2001, 4001, 15_000])
def test_no_limit_cuts_a_secret(size: int) -> None:
    value = Chance(size).chars(ALNUM, size)
    for context in LONG["long token"][1]:
        before, after = context.split("§")
        assert only_the_secret_differs(Sample("", (before, after), (value,)), redacted(before + value + after)), context


def test_a_long_value_of_a_field_is_a_secret_and_a_long_text_is_none() -> None:
    value, prose = Chance(1).chars(ALNUM, 30_000), "the token is not here " * 2000
    call = ToolCall("1", "login", json.dumps({"access_token": value, "token": prose}))
    new = cleaned(Conversation((Message("assistant", "", tool_calls=(call,)),), "own", "g", "own")).messages[0].tool_calls[0]
    assert json.loads(new.arguments) == {"access_token": "[REDACTED:token:1]", "token": prose}


def test_backslashes_in_quotes_are_read_once() -> None:
    assert redacted('token="' + "\\" * 60 + "\n").startswith('token="')  # took a year when each could be read in two ways


def test_a_chapter_between_begin_and_end_stays() -> None:
    begin, end, line = ("-----BEGIN RSA PRIVATE " + "KEY-----", "-----END RSA PRIVATE " + "KEY-----", Chance(1).chars(ALNUM, 64))
    text = f'grep "{begin}" *.pem\n' + "What follows is about something else.\n" * 40 + f"sha512 {line}\n{end}"
    assert "about something else" in redacted(text)


def test_a_bundle_of_keys_and_certificates_keeps_the_certificates() -> None:
    key = next(s for s in secret_samples(6) if s.kind == "private key whole").secrets[0]
    certificate = "-----BEGIN CERTIFICATE-----\n" + Chance(2).chars(ALNUM, 64) + "\n-----END CERTIFICATE-----"
    assert redacted(f"{certificate}\n{key}\n{certificate}") == f"{certificate}\n[REDACTED:private_key:1]\n{certificate}"


def test_a_vendors_key_keeps_its_kind_behind_a_name() -> None:
    assert redacted(f"GH_PAT={secret()}") == "GH_PAT=[REDACTED:github_token:1]"
