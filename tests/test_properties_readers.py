"""Whatever is done to a genuine file, a reader gives a value that makes sense or says in one line why not."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from genuine_models import CONFIG, PEFT
from hostile import ALIKE, damaged
from hostile_model_readers import READERS as OF_MODELS
from hostile_readers import READERS as OF_DATA
from hostile_readers import Reader, check_message, fresh
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_finetune.config import load_config, make_config, save_config
from mlx_finetune.errors import LONGEST, UserError
from mlx_finetune.reading import plain_yaml

READERS = OF_DATA | OF_MODELS
EACH = [pytest.param(name, marks=pytest.mark.long if reader.slow else ()) for name, reader in READERS.items()]
SECONDS = 10  # for one file; most take some milliseconds
ALWAYS = settings(ALIKE, max_examples=6)


def check_damage(reader: Reader, folder: Path, examples: int, mutation: st.SearchStrategy[int]) -> None:
    """So many damaged files, and the genuine one."""
    genuine = fresh(reader, folder)
    assert reader.check(folder, genuine) == "read"

    @settings(ALWAYS, max_examples=examples)
    @given(seed=mutation)
    def never_crashes(seed: int) -> None:
        began = time.thread_time()
        reader.check(folder, damaged(genuine, seed))
        assert time.thread_time() - began < SECONDS

    never_crashes()


@pytest.mark.parametrize("name", EACH)
def test_a_damaged_file_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    check_damage(READERS[name], tmp_path / "x", 6, st.integers(0, 2**32))


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    check_damage(READERS[name], tmp_path / "x", 40 if READERS[name].slow else 400, st.integers(0, 2**32))


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize(
    "data", [b"", b"\0", b"\xff\xfe\x00", b"null", b"[" * 30_000, b"-" * 3000, b"\n" * 3000, b'{"a":' * 20_000]
)
def test_a_file_of_something_else_is_refused_in_one_line(name: str, data: bytes, tmp_path: Path) -> None:
    reader = READERS[name]
    fresh(reader, tmp_path / "x")
    reader.check(tmp_path / "x", data)


ORIGIN_OF_NO_PLACE = json.dumps(
    {"format": "huggingface", "model": "/" + "x" * 300, "revision": None, "fingerprint": "", "quantization": {"bits": 4}}
    | {"dtype": None, "versions": {}, "verified": None}
).encode()
# Found by damage, and kept: the reader, the file as it is then, and words of the reason.
FOUND = {
    "aliases": ("config", b"a: &a [x, x]\nb: &b [*a, *a]\nmodel: [*b, *b]\n", r"line 2, column \d+: an alias, \*a"),
    "a name twice": ("config", b"rank: 8\nalpha: 16\nrank: 16\n", "one name stands there twice"),
    "brackets": ("config", b"rank: " + b"[" * 20_000, "nested more than 50 deep"),
    "empty number": ("config", b"rank: !!int ''\n", "not YAML: IndexError"),
    "a place that cannot be": ("config", b"data: /" + b"x" * 300 + b"\n", "data = .*no place that a file system can have"),
    "no time": ("config", b"rank: !!timestamp x\n", "not YAML: AttributeError"),
    "a number without end": ("config", b"rank: 0x" + b"f" * 5000, "a number of 5002 digits"),
    "brackets in tags": ("tags", b"[" * 20_000, "nested more than 50 deep"),
    "a thread of texts": (
        "oasst threads",
        b'{"thread": [{"message_id": "a", "text": "x", "role": "prompter", "message_tree_id": "t"}, "x"]}',
        "that is not an object",
    ),
    "an index of brackets": ("collection index", b"[" * 50_000, "cannot be used"),
    "a name too long": (
        "torch index",
        json.dumps({"weight_map": {"a": "x" * 300 + ".bin"}}).encode(),
        "is not the name of a .bin file",
    ),
    "a name elsewhere": (
        "index of shards",
        json.dumps({"weight_map": {"a": "../x.safetensors"}}).encode(),
        "is not the name of a .safetensors file",
    ),
    "a name with a line break": (
        "index of shards",
        json.dumps({"weight_map": {"a": "x\n.safetensors"}}).encode(),
        "is not the name of a .safetensors file",
    ),
    "settings of nothing": ("mlx-lm settings", b"null", "is no adapter of mlx-lm"),
    "a rank without end": ("peft settings", json.dumps(PEFT | {"r": 10**12}).encode(), "read"),
    "a rank of no number": ("peft settings", json.dumps(PEFT).replace('"r": 2', '"r": 1e999').encode(), "OverflowError"),
    "no loss": ("metrics", b'{"step": 0, "split": "valid"}\n', "not a line of metrics"),
    "a message of no kind": ("training messages", b'{"messages": [3], "conversation": []}\n', "not a line that prepare wrote"),
    "an unknown scaling": (
        "config.json",
        json.dumps(CONFIG | {"rope_parameters": {"rope_type": "def`ult"}}).encode(),
        "RoPE scaling 'def`ult'",
    ),
    "a size that is a list": ("config.json", json.dumps(CONFIG | {"num_key_value_heads": [2]}).encode(), "num_key_value_heads"),
    "a kind with a line separator": (
        "chat openai",
        '{"messages": [{"role": "user", "content": [{"type": "text\u2028", "text": "a"}]}]}'.encode(),
        "read",
    ),
    "a model in a place that cannot be": ("origin.json", ORIGIN_OF_NO_PLACE, "no place that a file system can have"),
    "a huge id": ("tokenizer.json", b'{"model": {"vocab": {"a": 2147483648}}}', "has the id 2147483648"),
    "no ids": ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}, "added_tokens": [3]}', "token 3 has the id None"),
}


def test_sources_of_another_kind_than_asked_for_are_said_not_to_be_read_now(tmp_path: Path) -> None:
    reader, folder = READERS["collect.json"], tmp_path / "x"
    found = json.loads(fresh(reader, folder))
    assert reader.check(folder, json.dumps(found).encode()) == "read"
    found["sources"]["logs"] = [["a"]]
    assert "holds ['a'], which is not read now" in reader.check(folder, json.dumps(found).encode())


@pytest.mark.long
def test_prepared_data_without_its_counts_is_refused_in_one_line(tmp_path: Path) -> None:
    reader, folder = READERS["run dataset.json"], tmp_path / "x"
    found = json.loads(fresh(reader, folder))
    del found["train"]["learned_tokens_by_source"]
    assert reader.check(folder, json.dumps(found).encode())


@pytest.mark.parametrize("what", [pytest.param(w, marks=pytest.mark.long if READERS[f[0]].slow else ()) for w, f in FOUND.items()])
def test_what_was_found_once_is_refused_by_name(what: str, tmp_path: Path) -> None:
    name, data, reason = FOUND[what]
    fresh(READERS[name], tmp_path / "x")
    began = time.thread_time()
    said = READERS[name].check(tmp_path / "x", data)
    assert re.search(reason, said), said
    assert time.thread_time() - began < 3


def test_a_message_is_one_line_however_strange_the_name_in_it() -> None:
    error = UserError("a\nb\u2028c\x1b[2J\ud800" + "x" * 5000 + ": the reason", hint="d\r\ne")
    check_message(error)
    assert error.message.startswith("a b c") and error.message.endswith(": the reason") and len(error.message) <= LONGEST
    assert error.hint == "d  e"


@settings(ALWAYS, max_examples=60)
@given(text=st.text(st.sampled_from("ab:&*!{}[]-?|>'\"%@`#,\n \t0x~<=.\u2028é"), max_size=40))
def test_any_text_is_plain_yaml_or_no_yaml(text: str) -> None:
    try:
        plain_yaml(text)
    except ValueError as error:
        assert len(str(error).splitlines()) <= 1 and len(str(error)) < 300


def test_settings_that_are_saved_are_read_back_equal(tmp_path: Path) -> None:
    given_values = {
        "rank": 8,
        "target_modules": ["q_proj", "v_proj"],
        "learning_rate": 3e-5,
        "model": "a: b # ~é",
        "report_to": "none",
    }
    config = make_config(given_values, "test")
    save_config(tmp_path / "config.yaml", config)
    once = load_config(tmp_path / "config.yaml", {})
    save_config(tmp_path / "again.yaml", once)
    assert once == config
    assert (tmp_path / "again.yaml").read_bytes() == (tmp_path / "config.yaml").read_bytes()


@pytest.mark.parametrize("name", [one for one in EACH if one.values[0] not in ("setting", "pickle", "model card")])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to itself", "device"])
def test_what_is_no_file_is_refused_at_once(name: str, kind: str, tmp_path: Path) -> None:
    reader, folder = READERS[name], tmp_path / "x"
    fresh(reader, folder)
    place = folder / reader.target
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(place.name if kind == "link to itself" else "/dev/zero")
    try:
        reader.read(folder)
    except UserError as error:
        check_message(error, str(folder))
