"""The layouts of OpenAssistant's files, how their rows are joined, and whatever else can stand in a file."""

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oasst_rows import GOOD, flat, node, paths_of, read_all, tree, write

from mlx_finetune.data.conversation import Conversation
from mlx_finetune.data.sources import BadLine, gather, oasst_files, openassistant
from mlx_finetune.data.sources.openassistant import EVERYTHING, Options
from mlx_finetune.errors import UserError
from mlx_finetune.terminal import printable


def test_missing_keys_mean_null(tmp_path: Path) -> None:
    root = {"message_id": "p1", "text": "hi", "role": "prompter", "review_result": True}
    answer = {"message_id": "a1", "parent_id": "p1", "text": "hi", "role": "assistant", "review_result": True}
    for rows in (
        [root | {"replies": [answer]}],
        [{"message_tree_id": "p1", "prompt": root | {"replies": [answer]}}],
        [answer, root],
    ):
        read = read_all(write(tmp_path / "t.jsonl", *rows))
        assert [(one.name, one.meta) for one in read.conversations] == [("p1", {"name": "p1", "message_ids": ["p1", "a1"]})]


def test_tables_that_were_in_pandas_are_read(tmp_path: Path) -> None:
    nan = float("nan")
    odd = {"synthetic": nan, "deleted": 0.0, "review_result": 1.0, "labels": None, "lang": nan}
    rows = [flat("p1", **odd) | {"parent_id": nan}, flat("a-second", "p1", rank=1.0, **odd), flat("a-best", "p1", rank=0.0, **odd)]
    assert paths_of(read_all(write(tmp_path / "t.jsonl", *rows))) == [["p1", "a-best"]]


def test_threads_that_share_their_beginning_are_one_tree(tmp_path: Path) -> None:
    def thread(*names: str) -> dict[str, Any]:
        return {"thread_id": names[-1], "thread": [flat(name, tree=None, rank={"a1": 1, "a2": 0}.get(name)) for name in names]}

    path = write(tmp_path / "t.jsonl", thread("p1", "a1"), thread("p1", "a2", "p2", "a3"), thread("p1", "a2"))
    read = read_all(path)
    assert [(one.name, one.meta["message_ids"]) for one in read.conversations] == [("p1", ["p1", "a2", "p2", "a3"])]
    assert not read.rejected and not read.bad_lines


def test_several_layouts_in_one_file_are_read_line_by_line(tmp_path: Path) -> None:
    rows = [flat("p1"), tree(node("p2", node("a2"))), node("p3", node("a3")), flat("a1", "p1")]
    assert paths_of(read_all(write(tmp_path / "t.jsonl", *rows))) == [["p2", "a2"], ["p3", "a3"], ["p1", "a1"]]


def test_parquet_and_gzip_are_known_by_their_content(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist([flat("p1"), flat("a1", "p1")]), tmp_path / "rows.jsonl")
    (tmp_path / "packed").write_bytes(gzip.compress(json.dumps(tree(node("p1", node("a1")))).encode()))
    for name in ("rows.jsonl", "packed"):
        assert paths_of(read_all(tmp_path / name)) == [["p1", "a1"]]


def test_labels_of_parquet_may_be_a_map(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [flat("p1", labels=[]), flat("a1", "p1", labels=[("spam", 1.0)]), flat("a2", "p1", labels=[("spam", 0.0)])]
    table = pyarrow.Table.from_pylist([{key: one for key, one in row.items() if key != "labels"} for row in rows])
    labels = pyarrow.array([row["labels"] for row in rows], pyarrow.map_(pyarrow.string(), pyarrow.float64()))
    parquet.write_table(table.append_column("labels", labels), tmp_path / "rows.parquet")
    assert paths_of(read_all(tmp_path / "rows.parquet", Options(relevant="any"))) == [["p1", "a2"]]


def test_a_folder_gives_its_parquet_files_train_first_or_else_its_json_lines(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "data").mkdir()
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".git" / "x.jsonl", tree(node("p0", node("a0"))))
    write(tmp_path / "ready.trees.jsonl", tree(node("p1", node("a1"))))
    (tmp_path / "README.md").write_text("---\nconfigs: [{data_files: https://example.invalid/x.parquet}]\n---\n")
    assert paths_of(read_all(tmp_path)) == [["p1", "a1"]]
    for split, rows in {"train": [flat("p1"), flat("p2", tree="u")], "a": [flat("a1", "p1"), flat("a2", "p2", "u")]}.items():
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert paths_of(read_all(tmp_path)) == [["p1", "a1"], ["p2", "a2"]]
    before = sorted(path for path in tmp_path.rglob("*"))
    read_all(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_link_out_of_a_folder_is_not_followed_and_a_loop_ends(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside.jsonl", tree(node("p1", node("a1"))))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out.jsonl").symlink_to(outside)
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    (folder / "round").symlink_to(folder)
    write(folder / "own.jsonl", tree(node("p2", node("a2"))))
    (folder / "inner.jsonl").symlink_to("own.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    read = read_all(folder)
    assert paths_of(read) == [["p2", "a2"]]
    assert {bad.path.name: bad.line for bad in read.bad_lines} == {"loop.jsonl": 0, "out.jsonl": 0, "pipe.jsonl": 0}
    assert [one.reason for one in read.rejected] == ["another tree has the same id"]


def test_the_cache_of_the_hub_links_to_its_blobs(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "0123" / "data"
    snapshot.mkdir(parents=True)
    write(tmp_path / "blobs" / "abc", tree(node("p1", node("a1"))))
    (snapshot / "train.jsonl").symlink_to(Path("..", "..", "..", "blobs", "abc"))
    assert paths_of(read_all(tmp_path / "snapshots" / "0123")) == [["p1", "a1"]]


def test_orphans_are_dropped_with_their_replies_and_counted_once_a_tree(tmp_path: Path) -> None:
    rows = [
        *(flat("a3", "p2"), flat("p2", "a1"), flat("a1", "p1"), flat("p1")),  # any order
        *(flat("a-late", "gone"), flat("p-late", "a-late")),  # a part of a tree that is there
        *(flat("a5", "p5", "lost"), flat("p6", "a5", "lost"), flat("a6", "p6", "lost")),
        *(flat("a7", "p7", None), flat("p8", "a7", None), flat("a9", "p9", None)),
    ]
    read = read_all(write(tmp_path / "t.jsonl", *rows))
    assert paths_of(read) == [["p1", "a1", "p2", "a3"]]
    reason = "the first message is not in the file"
    assert [(one.id, one.reason) for one in read.rejected] == [("lost", reason), ("a7", reason), ("a9", reason)]


def test_rings_duplicates_and_a_parent_in_another_tree_do_no_harm(tmp_path: Path) -> None:
    rows = [
        *(flat("p1"), flat("a1", "p1"), flat("a1", "p1", text="again"), flat("p1", "a1")),
        *(flat("a2", "p2", "ring"), flat("p2", "a2", "ring"), flat("a3", "a3", "self")),
        *(flat("a4", "p4", None), flat("p4", "a4", None)),
        *(flat("p5", tree="u"), flat("a5", "p5", "elsewhere"), flat("a6", "p5", "u")),
    ]
    read = read_all(write(tmp_path / "t.jsonl", *rows))
    assert paths_of(read) == [["p1", "a1"], ["p5", "a6"]]
    assert read.conversations[0].messages[1].content == "text of a1"
    assert [one.id for one in read.rejected] == ["ring", "self", "a4", "elsewhere"]
    assert [(bad.line, bad.reason) for bad in read.bad_lines] == [(n, "a message whose id an earlier one has") for n in (3, 4)]


def test_random_forests_account_for_every_tree_once(tmp_path: Path) -> None:
    """Rows with random parents (missing ones, rings, other trees) and random trees: always one item a tree id."""
    for seed in range(30):
        random = np.random.default_rng(seed)
        count = int(random.integers(1, 40))
        names = [f"{'pa'[int(random.integers(2))]}{i}" for i in range(count)]
        parents = [None if random.random() < 0.2 else str(random.choice([*names, "gone"])) for _ in names]
        trees = [f"t{random.integers(4)}" for _ in names]
        rows = [flat(name, parent, at) for name, parent, at in zip(names, parents, trees, strict=True)]
        read = read_all(write(tmp_path / "t.jsonl", *rows))
        met = [one.group for one in read.conversations] + [one.id for one in read.rejected]
        again = sum(one.reason == "another tree has the same id" for one in read.rejected)
        assert set(met) == set(trees) and len(met) == len(set(trees)) + again


def test_a_chain_of_30_000_messages_is_joined_without_recursion(tmp_path: Path) -> None:
    rows = [flat("p0")] + [flat(f"{'pa'[i % 2]}{i}", f"{'pa'[(i - 1) % 2]}{i - 1}", None) for i in range(1, 30_000)]
    (one,) = read_all(write(tmp_path / "t.jsonl", *reversed(rows))).conversations
    assert len(one.messages) == 30_000


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not a JSON object"),
        ("text", "not a JSON object"),
        ({}, "neither a message nor a tree of OpenAssistant's"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "neither a message nor a tree of OpenAssistant's"),
        ({"prompt": "hi", "completion": "ho"}, "neither a message nor a tree of OpenAssistant's"),
        ({"message_tree_id": "t", "prompt": None}, "a tree without its first message"),
        ({"thread_id": "1", "thread": [1]}, "a message that is not an object"),
        (tree(node("p2", node("a2", role="bot"))), "a role that is neither prompter nor assistant"),
        (tree(node("p2", node("a2", role=["assistant"]))), "a role that is neither prompter nor assistant"),
        (tree(node("p2", node("a2", text=None))), "a message without text"),
        (tree(node("p2", node("a2", text=7))), "a message without text"),
        (tree(node("p2", node("a2", message_id=None))), "a message without an id"),
        (tree(node("p2", node("a2", message_id=7))), "message_id is not text"),
        (tree(node("p2", node("a2", rank="0"))), "rank is not a number"),
        (tree(node("p2", node("a2", rank=True))), "rank is not a number"),
        (tree(node("p2", node("a2", deleted="no"))), "deleted is neither true nor false"),
        (tree(node("p2", node("a2", review_result=2))), "review_result is neither true nor false"),
        (tree(node("p2", node("a2", synthetic={}))), "synthetic is neither true nor false"),
        (tree(node("p2", node("a2", lang=1))), "lang is not text"),
        (tree(node("p2", node("a2", labels=1))), "labels are neither an object nor lists of names and values"),
        (tree(node("p2", node("a2", labels=[1]))), "labels are neither an object nor lists of names and values"),
        (tree(node("p2", node("a2", replies={"0": 1}))), "a message whose replies are not a list"),
        (tree(node("p2", node("a2", replies=[None]))), "a message that is not an object"),
        (tree(node("p2", node("a2", node("p2")))), "two messages of one id in a tree"),
        (tree(node("p2")) | {"message_tree_id": 3}, "message_tree_id is not text"),
        (tree(node("p2"), state=4), "tree_state is not text"),  # type: ignore[arg-type]
        (flat("a2", parent=5), "parent_id is not text"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_tree_is_a_bad_line_and_reading_goes_on(tmp_path: Path, row: Any, reason: str) -> None:
    path = write(tmp_path / "t.jsonl", row, GOOD)
    read = read_all(path)
    assert [(bad.path, bad.line, bad.reason) for bad in read.bad_lines] == [(path, 1, reason)]
    assert paths_of(read) == [["p1", "a1"]]
    with pytest.raises(UserError, match=re.escape(f"t.jsonl: no message or tree of OpenAssistant's in it (line 1: {reason})")):
        read_all(write(path, row))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"message_tree_id": ', "not JSON, or cut off"),
        (b'{"message_id": "p", "rank": ' + b"9" * 10_000 + b"}", "not JSON: a number of thousands of digits"),
        (b'{"message_id": "\xff\xfe"}', "not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"message_id":"p","role":"prompter","text":"","replies":[' * 100_000 + b"]}" * 100_000, "nested too deeply"),
        (b'{"message_id": "' + b"x" * 50_000_000 + b'"}', "longer than 16 MB"),
        (bytes(1000), "not JSON, or cut off"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_line_that_is_not_json_is_passed_over(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n" + raw + b"\n" + json.dumps(tree(node("p2", node("a2")))).encode()
    )
    read = read_all(path)
    assert [(bad.line, bad.reason) for bad in read.bad_lines] == [(3, reason)]
    assert paths_of(read) == [["p1", "a1"], ["p2", "a2"]]


@pytest.mark.parametrize("depth", [99, 150])
def test_replies_are_read_to_a_depth_that_is_the_same_everywhere(tmp_path: Path, depth: int) -> None:
    root = node(f"a{depth}")
    for i in reversed(range(depth)):
        root = node(f"{'pa'[i % 2]}{i}", root)
    read = read_all(write(tmp_path / "t.jsonl", GOOD, root | {"message_id": "p-root"}))
    assert [bad.reason for bad in read.bad_lines] == ([] if depth < 100 else ["nested too deeply"])


def test_half_characters_and_nul_are_read(tmp_path: Path) -> None:
    root = node("p\ud83d", node("a1", text="a\0b\udc00"), lang="e\ud800")
    (one,) = read_all(write(tmp_path / "t.jsonl", tree(root))).conversations
    assert one.messages[1].content == "a\0b?"
    json.dumps(one.to_json(), ensure_ascii=False).encode()


def test_gzip_that_is_cut_off_gives_what_stands_before_the_cut(tmp_path: Path) -> None:
    rows = [tree(node(f"p{i}", node(f"a{i}", text=np.random.default_rng(i).bytes(3000).hex()))) for i in range(40)]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    path = tmp_path / "cut"
    path.write_bytes(packed[: len(packed) // 2])
    read = read_all(path)
    assert 10 < len(read.conversations) < 30
    assert [bad.reason for bad in read.bad_lines] == ["broken gzip: the file ends here; download it again"]
    path.write_bytes(packed[:15])
    with pytest.raises(UserError, match="broken gzip"):
        read_all(path)


@pytest.mark.parametrize("magic", [b"", b"PAR1", b"\x1f\x8b", b"\x1f\x8b\x08\x00", b"\xff\xfe", b"[", b"{"])
def test_random_bytes_are_refused_in_one_line(tmp_path: Path, magic: bytes) -> None:
    for seed in range(20):
        path = tmp_path / "noise.jsonl"
        path.write_bytes(magic + np.random.default_rng(seed).bytes(5000))
        with pytest.raises(UserError, match="no message or tree") as error:
            read_all(path)
        assert "\n" not in error.value.message and error.value.hint


def test_a_damaged_parquet_file_is_one_bad_line(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [flat(f"p{i}") for i in range(300)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "whole.parquet")
    whole = bytearray((tmp_path / "whole.parquet").read_bytes())
    write(tmp_path / "good.jsonl", GOOD)
    for seed in range(40):
        random = np.random.default_rng(seed)
        damaged = bytearray(whole)
        for at in random.integers(4, len(whole) - 8, 20):
            damaged[at] = int(random.integers(256))
        (tmp_path / "damaged.parquet").write_bytes(damaged if seed % 2 else damaged[: int(random.integers(4, len(whole)))])
        try:
            gather(openassistant.read(tmp_path / "damaged.parquet", EVERYTHING))
        except UserError as error:
            assert "\n" not in error.message


def test_every_single_damage_to_a_row_is_a_bad_line_or_no_harm(tmp_path: Path) -> None:
    """Each value of a tree replaced by each odd one: never anything but items, or the UserError that nothing was found."""
    odd: list[Any] = [None, True, -1, 10**30, 1e308, float("nan"), "", "\0", "\ud800", [], [[]], {}, {"": None}]
    full = tree(node("p1", node("a1", labels={"spam": {"value": 0, "count": 1}}, rank=0, created_date="2023-01-01")))
    for path_of_keys in _places(full):
        for value in odd:
            row = json.loads(json.dumps(full))
            at = row
            for key in path_of_keys[:-1]:
                at = at[key]
            at[path_of_keys[-1]] = value
            try:
                for one in read_all(write(tmp_path / "t.jsonl", row), Options(relevant="any")).conversations:
                    json.dumps(one.to_json(), ensure_ascii=False).encode()
            except UserError as error:
                assert "(line 1: " in error.message


def _places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(*before, key), *_places(inner, (*before, key))]]


@pytest.mark.parametrize("name", ["nothing.jsonl", "data/nothing.trees.jsonl.gz", "/no/such/folder", "a\0b", "a/b/c", "x" * 5000])
def test_a_file_that_is_not_there_is_named_and_never_sought_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oasst_files, "hub_rows", lambda name: pytest.fail(f"{name} was sought on the Hub"))
    with pytest.raises(UserError, match=re.escape(printable(name[:40]))) as error:
        read_all(name)
    assert "OpenAssistant/oasst1" in error.value.hint


def test_the_hub_out_of_reach_is_one_line_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("nobody/no-such-dataset", Path("nobody/no-such-dataset")):
        with pytest.raises(UserError, match="the Hub does not give it") as error:
            read_all(name)
        assert "\n" not in error.value.message and "download it and pass its folder" in error.value.hint


def test_an_empty_file_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    for path in (tmp_path / "empty.txt", tmp_path):
        with pytest.raises(UserError, match=r"no message or tree of OpenAssistant's in it$"):
            read_all(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", GOOD)
    path.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        read_all(path)


def test_a_tree_is_given_as_soon_as_it_is_read(tmp_path: Path) -> None:
    items = openassistant.read(write(tmp_path / "t.jsonl", GOOD, [], GOOD), EVERYTHING)
    assert isinstance(next(items), Conversation)
    assert isinstance(next(items), BadLine)
