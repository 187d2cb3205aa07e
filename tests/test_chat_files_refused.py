"""No chat file: refused in one line; spoiled bytes give items or one error; wide rows take no longer than long ones."""

import gzip
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_chats import LINES, PACKED, text_table

from mlx_finetune.data.sources import BadLine, gather
from mlx_finetune.data.sources.chat_formats import read
from mlx_finetune.errors import UserError


def zipped() -> bytes:
    """A zip archive with a chat file in it."""
    import zipfile

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("chats.jsonl", LINES)
    return packed.getvalue()


WHOLE = gzip.compress(LINES.encode() * 50)
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "no row in it"),
    "blank.txt": (b" \n\n", "no row in it"),
    "empty_list.json": (b"[]", "no row in it"),
    "free.txt": (b"The sky is blue.\n", "free text without speakers"),
    "table.csv": (b"text,label\nHi,1\n", "free text without speakers"),
    "latin1.txt": (b"User: caf\xe9\nAssistant: Yes.", "not UTF-8: byte 0xe9 at place 10 of the file"),
    "latin1.jsonl": (b'{"text": "caf\xe9"}', ":1: not UTF-8: byte 0xe9 in column 14"),
    "latin1.json": (b'[\n{"text": "caf\xe9"}\n]', "not UTF-8: byte 0xe9 at place 16 of the file"),
    "utf16.jsonl": (LINES.encode("utf-16"), "UTF-16 text, not a chat file"),
    "a.zip": (zipped(), "a zip archive, not a chat file"),
    "cut.jsonl.gz": (WHOLE[:-20], "broken gzip file: Compressed file ended"),
    "head.gz": (WHOLE[:5], "broken gzip file"),
    "changed.gz": (WHOLE[:12] + b"\xff" * 8 + WHOLE[20:], "broken gzip file"),
    "twice.gz": (gzip.compress(WHOLE), "packed twice"),
    "a.parquet": (b"PAR1" + b"\0" * 50 + b"PAR1", "broken parquet file"),
    "not.parquet": (b"Hello", "free text without speakers"),
    "numbers.json": (b"[1, 2, 3]", "a number is no chat"),
    "broken.json": (b'{"messages": [\n{"role": }', ":2: not JSON, or cut off: Expecting value"),
}


@pytest.mark.parametrize("name, raw, message", [(name, *rest) for name, rest in REFUSED.items()], ids=REFUSED)
def test_a_file_that_is_no_chat_file_is_refused_in_one_line(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(UserError) as refused:
        gather(read(path))
    assert message in refused.value.message and refused.value.message.startswith(f"{path}")
    assert "\n" not in refused.value.message and refused.value.hint


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for source, message in [
        (tmp_path / "pipe.jsonl", "not an ordinary file"),
        (tmp_path / "loop", "a link, not followed"),
        (tmp_path / "nowhere", "No such file"),
        (tmp_path / "gone.jsonl", "no such file"),
        ("data/gone.jsonl.gz", "no such file"),
        ("gone", "no such file"),
        ("a\0b", "a?b: no such file"),
        ("x" * 5000, "no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            gather(read(source))


def mutations(random: np.random.Generator) -> list[Callable[[bytes], bytes]]:
    """Ways to spoil a file."""
    return [
        lambda raw: raw[: random.integers(len(raw) + 1)],
        lambda raw: raw[random.integers(len(raw) + 1) :],
        lambda raw: bytes(random.integers(256) if random.random() < 0.01 else byte for byte in raw),
        lambda raw: raw.replace(
            *[(b'"', b""), (b",", b""), (b"}", b"]"), (b"\n", b""), (b":", b"\0"), (b"[", b"{")][random.integers(6)]
        ),
    ]


def test_random_and_spoiled_bytes_give_items_or_one_error(tmp_path: Path) -> None:
    random, outcomes = np.random.default_rng(11), {"items": 0, "error": 0}
    whole = [text.encode() for name, text in PACKED.items() if name != "far_away.json"]
    whole += [gzip.compress(raw) for raw in whole] + [text_table(tmp_path, "t.parquet").read_bytes()]
    starts = [b"", b"{", b"[", b"PAR1", b"\x1f\x8b\x08", b'[{"', b"\xef\xbb\xbf", b"<|im_start|>user\n", b"\n"]
    for i in range(1500):
        raw = starts[i % len(starts)] + random.bytes(random.integers(200)) if i % 3 == 0 else whole[i % len(whole)]
        if i % 3:
            spoil = mutations(random)
            raw = spoil[random.integers(len(spoil))](raw)
        path = tmp_path / ["a.jsonl", "a.json", "a.txt", "a"][i % 4]
        path.write_bytes(raw)
        try:
            found = gather(read(path))
        except UserError as error:
            assert "\n" not in error.message
            outcomes["error"] += 1
        else:
            assert found.conversations or found.rejected or found.bad_lines
            assert all(isinstance(bad, BadLine) and bad.reason for bad in found.bad_lines)
            outcomes["items"] += 1
    assert min(outcomes.values()) > 100


def wide_rows(n: int) -> dict[str, dict[str, Any]]:
    """Rows that are slow where a reader looks at everything again for every message, sign or blank."""
    result: dict[str, Any] = {"role": "tool", "content": "x"}
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": f"f{i % 7}", "arguments": {}}} for i in range(n)]}
    named = [{**result, "name": f"f{i % 7}"} for i in range(n)]
    return {
        "results": {"messages": [calls, *[result] * n]},
        "too few results": {"messages": [calls, *[result] * (n - 1)]},
        "named results": {"messages": [calls, *named]},
        "headers": {"text": "<|im_start|>user\n" * n},
        "ends": {"text": "<|im_start|>user\nHi<|im_start|>assistant\nHo" + "<|im_end|> " * n},
        "blanks": {"text": "### Human:" + " " * n + "### Assistant:" + "\n" * n + "x"},
        "system marks": {"text": "[INST]" + "<<SYS>>" * n},
        "starts": {"text": " " * n + "<s>" * n},
        "speakers": {"prompt": "User:\n" * n, "completion": "User:\n" * n},
        "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * n}]},
    }


@pytest.mark.parametrize("kind", wide_rows(1))
def test_wide_rows_take_time_in_proportion_to_their_size(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jsonl"

    def seconds(n: int) -> float:
        path.write_text(json.dumps(wide_rows(n)[kind]))
        times = []
        for _ in range(3):
            start = time.thread_time()
            assert len(list(read(path))) == 1
            times.append(time.thread_time() - start)
        return max(min(times), 0.005)

    assert seconds(16_000) / seconds(1_000) < 64  # 16 in proportion, 256 if it were its square
