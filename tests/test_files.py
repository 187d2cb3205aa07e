"""A file or folder appears whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file, atomic_folder, half_made, leftovers, read_json, refuse_existing, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(error), atomic_file(path) as file:
        file.write("half")
        raise error("stop")
    assert names(tmp_path) == ["a.txt"]
    assert path.read_text(encoding="utf-8") == "old"


def test_a_text_that_is_not_utf_8_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError), atomic_file(tmp_path / "a.txt") as file:
        file.write("\ud83d")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
def test_an_error_leaves_no_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "out") as folder:
        write_json(folder / "a.json", 1)
        raise error("stop")
    assert names(tmp_path) == []


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        write_json(folder / "inner" / "a.json", {"ü": [1, None]})
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert read_json(tmp_path / "deep" / "out" / "inner" / "a.json") == {"ü": [1, None]}


def test_what_came_into_being_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"), atomic_folder(tmp_path / "out") as folder:
        (tmp_path / "out").mkdir()
        (folder / "a").touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == []


def test_a_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already") as error:
        refuse_existing(tmp_path / "out", hint="use --resume")
    assert error.value.hint == "use --resume"


def test_only_what_bears_the_mark_of_a_half_made_file_is_a_leftover(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with atomic_file(path):
        (begun,) = tmp_path.iterdir()
        assert leftovers(path) == [begun] and begun.name.startswith(half_made(path))
    for name in (".config.yaml.original", ".config.yaml.abcd1234", ".config.yaml.part-original-1", "config.yaml.part-abcd1234"):
        (tmp_path / name).touch()
    assert leftovers(path) == []


def test_line_ends_are_written_as_they_are(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.txt") as file:
        file.write("a\r\nb\rc\n\u2028")
    assert (tmp_path / "a.txt").read_bytes() == "a\r\nb\rc\n\u2028".encode()


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_private_logs_stay_as_private_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with atomic_folder(tmp_path / "out") as folder:
            write_json(folder / "a.json", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "out" / "a.json").stat().st_mode) == 0o600
    with atomic_file(tmp_path / "b") as file:
        file.write("b")
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o666 & ~before


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(UserError) as error, atomic_folder(path):
            pass
        assert str(path) in error.value.message and error.value.hint
        with pytest.raises(UserError) as error, atomic_file(path):
            pass
        assert str(path) in error.value.message and error.value.hint
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file"), (b'{"a": ', "not JSON"), (b"\xff\xfe{}", "not JSON"), (b"[" * 100_000, "not JSON")],
)
def test_what_is_not_json_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        read_json(path)
    assert error.value.message.startswith(f"{path}: ")


def test_a_folder_in_place_of_a_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="directory"):
        read_json(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_what_is_private_is_so_whatever_the_umask_and_stays_as_a_person_opened_it(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for replaces, opened in ((False, 0o700), (True, 0o750)):
            with atomic_folder(tmp_path / "out", replace_old=replaces, private=True) as folder:
                (folder / "a").touch(0o600)
            assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == opened
            (tmp_path / "out").chmod(0o750)
        with atomic_folder(tmp_path / "shared") as folder:
            (folder / "a").touch(0o600)
        with atomic_file(tmp_path / "page", private=True) as file:
            file.write("a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "page").stat().st_mode) == 0o600
    assert [stat.S_IMODE((tmp_path / "shared" / name).stat().st_mode) for name in ("", "a")] == [0o755, 0o644]
