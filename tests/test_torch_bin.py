"""Torch checkpoints become safetensors bit by bit, without torch, and whatever is not tensors is refused by name."""

import io
import json
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_finetune.errors import UserError
from mlx_finetune.models import torch_bin, torch_legacy
from mlx_finetune.models.torch_bin import bin_files, bin_to_safetensors

torch = pytest.importorskip("torch")


def everything() -> dict[str, Any]:
    """Each kind of number, and each way in which a tensor can lie in its storage."""
    random = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 8, generator=random)
    names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    kinds = {f"kind.{name}": (wide * 9).to(getattr(torch, name)) for name in names}
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, -1e-40])
    views = {
        "transposed": wide.T,
        "stepped": wide[1::2, ::3],
        "permuted": torch.randn(3, 4, 5, generator=random).permute(2, 0, 1),
        "slice": wide[2:4],
        "one, far apart": wide.reshape(-1)[::47][:1],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "empty.transposed": torch.zeros(0, 4).T,
        "shared": wide,
        "parameter": torch.nn.Parameter(wide[:2].clone()),
    }
    return kinds | {"special": special, "special.half": special.half()} | views


def saved(folder: Path, value: Any, name: str = "pytorch_model.bin", **how: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(value, folder / name, **how)
    return folder


def converted(folder: Path, out: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    out.mkdir()
    bin_to_safetensors(folder, out)
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        whole = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        assert (found[name].dtype, found[name].shape) == (whole.dtype, whole.shape), name
        ours, theirs = (each.reshape(-1).view(torch.uint8).numpy().tobytes() for each in (found[name], whole))
        assert ours == theirs, name


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_kind_of_tensor_is_written_bit_by_bit(protocol: int, tmp_path: Path) -> None:
    check_same(converted(saved(tmp_path / "in", everything(), pickle_protocol=protocol), tmp_path / "out"), everything())


def test_blocks_smaller_than_a_row_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torch_bin, torch_legacy):
        monkeypatch.setattr(module, "BLOCK", 8)
    check_same(converted(saved(tmp_path / "in", everything()), tmp_path / "out"), everything())


def test_the_weights_of_a_model_and_of_a_trainer_are_found(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    state = model.state_dict()
    assert isinstance(state, OrderedDict) and state._metadata
    check_same(converted(saved(tmp_path / "a", state), tmp_path / "out-a"), dict(state))
    check_same(converted(saved(tmp_path / "b", {"state_dict": state, "epoch": 3}), tmp_path / "out-b"), dict(state))


def test_a_file_of_torch_before_1_6_is_read_by_torch(tmp_path: Path) -> None:
    old = saved(tmp_path / "in", everything(), _use_new_zipfile_serialization=False)
    check_same(converted(old, tmp_path / "out"), everything())


def test_without_torch_a_file_of_torch_before_1_6_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = saved(tmp_path / "in", everything(), _use_new_zipfile_serialization=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(old, tmp_path / "out", r"before 1\.6")


def test_torch_is_not_imported_for_a_zip_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path / "in", everything())
    (tmp_path / "out").mkdir()
    code = (
        "import sys; from pathlib import Path; from mlx_finetune.models.torch_bin import bin_to_safetensors\n"
        f"bin_to_safetensors(Path({str(tmp_path / 'in')!r}), Path({str(tmp_path / 'out')!r}))\n"
        "print([name for name in ('torch', 'mlx', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def shards(folder: Path) -> Path:
    tensors = everything()
    parts = {"pytorch_model-00001-of-00002.bin": list(tensors)[:9], "pytorch_model-00002-of-00002.bin": list(tensors)[9:]}
    for file, names in parts.items():
        saved(folder, {name: tensors[name] for name in names}, file)
    weights = {name: file for file, names in parts.items() for name in names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return folder


def test_shards_keep_their_number_and_get_an_index(tmp_path: Path) -> None:
    from mlx_finetune.models.weights import tensor_headers

    seen: list[tuple[int, int]] = []
    (tmp_path / "out").mkdir()
    bin_to_safetensors(shards(tmp_path / "in"), tmp_path / "out", lambda done, total: seen.append((done, total)))
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    headers = tensor_headers(tmp_path / "out")  # which checks the index, and that offsets fill the files
    assert headers.keys() == everything().keys()
    total = sum(tensor.end - tensor.start for tensor in headers.values())
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def refused(folder: Path, out: Path, said: str) -> None:
    """In one line, and nothing is left."""
    out.mkdir(exist_ok=True)
    before = sorted(out.iterdir())
    with pytest.raises(UserError, match=said) as caught:
        bin_to_safetensors(folder, out)
    assert "\n" not in caught.value.message and len(caught.value.message) < 400
    assert sorted(out.iterdir()) == before


class Attack:
    """Runs a command where a pickle of it is loaded."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def test_a_checkpoint_that_would_run_something_is_refused_by_name(tmp_path: Path) -> None:
    import os

    victim = tmp_path / "victim"
    for number, (call, said) in enumerate(
        ((os.system, "(posix|nt).system"), (eval, "__builtin__.eval"), (getattr, "__builtin__.getattr"))
    ):
        folder = saved(tmp_path / str(number), {"w": torch.ones(2), "x": Attack(call, f"touch {victim}")})
        refused(folder, tmp_path / "out", f"wants to import {said}")
        refused(saved(tmp_path / f"{number}-old", {"x": Attack(call, "touch")}, _use_new_zipfile_serialization=False),
                tmp_path / "out", "torch cannot load it")  # fmt: skip
    assert not victim.exists()


def rewritten(folder: Path, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> Path:
    """The checkpoint with its records changed."""
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return folder


def with_pickle(folder: Path, data: bytes) -> Path:
    def change(records: dict[str, bytes]) -> None:
        records["pytorch_model/data.pkl"] = data

    return rewritten(saved(folder, {"w": torch.arange(4.0)}), change)


def tensor_pickle(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, numbers: int = 4, key: str = "0") -> bytes:
    """{"w": a tensor}, as torch writes it."""
    parts = [
        b"\x80\x02}X\x01\x00\x00\x00w",
        b"ctorch._utils\n_rebuild_tensor_v2\n(",
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n",
    ]
    parts += [b"X" + struct.pack("<I", len(key)) + key.encode(), b"X\x03\x00\x00\x00cpu", number(numbers), b"tQ", number(offset)]
    for counts in (shape, strides):
        parts += [b"(", *map(number, counts), b"t"]
    return b"".join(parts) + b"\x89}tRs."


def number(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + data


def test_a_tensor_written_by_hand_is_read(tmp_path: Path) -> None:
    found = converted(with_pickle(tmp_path / "in", tensor_pickle((2, 2), (1, 2))), tmp_path / "out")
    assert found["w"].tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (tensor_pickle((5,), (1,)), "reaches beyond the 4 numbers"),
        (tensor_pickle((2,), (4,)), "reaches beyond"),
        (tensor_pickle((1,), (1,), offset=4), "reaches beyond"),
        (tensor_pickle((2**40,), (0,)), "repeats the 4 numbers"),
        (tensor_pickle((2**40, 2**40, 0), (0, 0, 0), offset=-1), "otherwise than torch"),
        (tensor_pickle((-4,), (1,)), "otherwise than torch"),
        (tensor_pickle((4,), (-1,), offset=3), "otherwise than torch"),
        (tensor_pickle((1,) * 65, (1,) * 65), "otherwise than torch"),
        (tensor_pickle((2**60,), (1,), numbers=2**60), "record data/0 has 16 bytes"),
        (tensor_pickle((4,), (1,), key="7"), "record data/7 is not there"),
        (tensor_pickle((4,), (1,), key="../../0"), r"record data/\.\./\.\./0 is not there"),
        (tensor_pickle((4,), (1,))[:-1], "no whole pickle|has no end"),
        (tensor_pickle((4,), (1,))[:40], "no whole pickle"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "no whole pickle"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "no whole pickle"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "no dictionary of tensors"),  # a place in the memo that would take 64 GB
        (b"\x80\x02j\xff\xff\xff\xff.", "has not made"),
        (b"\x80\x02a.", "more than it has made"),
        (b"\x80\x02R.", "more than it has made"),
        (b"\x80\x02)t.", "more than it has made"),
        (b"\x80\x02N)R.", "cannot be called"),
        (b"\x80\x02]]s.", "no dictionary|more than"),
        (b"\x80\x02}]Ns.", "neither text nor number"),
        (b"\x80\x04))\x93.", "without a name"),
        (b"\x80\x02cx\x1b[31m\nsys\rtem\n.", r"wants to import x\\x1b\[31m\.sys\\rtem,"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", r"torch\.storage\._load_from_bytes"),
        (b"\x80\x02ctorch\nQInt8Storage\n.", r"torch\.QInt8Storage"),
        (b"\x80\x02(ios\nsystem\n.", "uses INST|no whole pickle"),
        (b"\x80\x02\x82\x01.", "uses EXT1"),
        (b"\x80\x02}X\x01\x00\x00\x00wK\x01s.", "'w' is no tensor"),
        (b"\x80\x02}.", "no dictionary of tensors"),
        (b"", "no whole pickle|has no end"),
        (b"\x80\x02" + b"]" * 17 * 2**20 + b".", "a pickle of 178"),
    ],
)
def test_a_pickle_that_makes_no_sense_is_refused_before_anything_is_made(data: bytes, said: str, tmp_path: Path) -> None:
    refused(with_pickle(tmp_path / "in", data), tmp_path / "out", said)


def test_many_views_of_the_same_numbers_are_refused(tmp_path: Path) -> None:
    one = torch.arange(64.0)
    refused(saved(tmp_path / "in", {str(i): one for i in range(9)}), tmp_path / "out", "many views of the same")


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "in", {"w": torch.arange(300.0)})
    path = tmp_path / "in" / "pytorch_model.bin"
    whole = path.read_bytes()
    for end in [0, 3, *range(10, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:end])
        refused(tmp_path / "in", tmp_path / "out", "cut|not a torch checkpoint")


def test_bytes_that_are_changed_at_random_give_a_refusal_or_a_whole_file(tmp_path: Path) -> None:
    from mlx_finetune.models.weights import tensor_headers

    saved(tmp_path / "in", {"a": torch.arange(12.0).reshape(3, 4).T, "b": torch.ones(3, dtype=torch.bool)})
    path = tmp_path / "in" / "pytorch_model.bin"
    whole, random = path.read_bytes(), np.random.default_rng(0)
    read = 0
    for attempt in range(300):
        broken = bytearray(whole)
        for place in random.integers(len(whole), size=3):
            broken[place] = random.integers(256)
        path.write_bytes(broken)
        out = tmp_path / str(attempt)
        out.mkdir()
        try:
            bin_to_safetensors(tmp_path / "in", out)
        except UserError:
            assert not list(out.iterdir())
        else:
            read += 1
            assert tensor_headers(out)
    assert 0 < read < 300


def test_an_archive_that_torch_would_not_write_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "in", {"w": torch.zeros(5000)})
    refused(rewritten(folder, lambda records: None, zipfile.ZIP_DEFLATED), tmp_path / "out", "compressed or encrypted")
    order = saved(tmp_path / "order", {"w": torch.zeros(5)})
    refused(rewritten(order, lambda r: r.update({"pytorch_model/byteorder": b"big"})), tmp_path / "out", "little-endian")
    none = saved(tmp_path / "none", {"w": torch.zeros(5)})
    refused(rewritten(none, lambda r: r.pop("pytorch_model/data.pkl")), tmp_path / "out", "0 records data.pkl")
    two = saved(tmp_path / "two", {"w": torch.zeros(5)})
    refused(rewritten(two, lambda r: r.update({"b/data.pkl": b"."})), tmp_path / "out", "2 records data.pkl")


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "out", "neither pytorch_model.bin nor")
    path = tmp_path / "pytorch_model.bin"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(tmp_path, tmp_path / "out", "a pointer of git-lfs")
    path.write_text("<html>")
    refused(tmp_path, tmp_path / "out", "not a torch checkpoint")
    path.write_bytes(io.BytesIO(pickle.dumps({"w": 1})).getvalue())
    refused(tmp_path, tmp_path / "out", "not a torch checkpoint")
    refused(saved(tmp_path / "whole", torch.ones(2)), tmp_path / "out", "no dictionary of tensors")
    refused(saved(tmp_path / "meta", {"__metadata__": torch.ones(2)}), tmp_path / "out", "__metadata__")


@pytest.mark.parametrize("named", ["../secret.bin", "/etc/secret.bin", "sub/x.bin", "x.safetensors", "", "..", 3])
def test_an_index_that_names_a_file_elsewhere_is_refused(named: Any, tmp_path: Path) -> None:
    folder = shards(tmp_path / "in")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": named}}))
    refused(folder, tmp_path / "out", "is not the name of a .bin file")


def test_an_index_and_its_files_must_agree(tmp_path: Path) -> None:
    folder = shards(tmp_path / "in")
    index = folder / "pytorch_model.bin.index.json"
    told = json.loads(index.read_text())
    assert [path.name for path in bin_files(folder)] == sorted(set(told["weight_map"].values()))
    index.write_text(json.dumps({"weight_map": told["weight_map"] | {"more": "pytorch_model-00001-of-00002.bin"}}))
    refused(folder, tmp_path / "out", "tensor more is not in")
    index.write_text(json.dumps({"weight_map": {}}))
    refused(folder, tmp_path / "out", 'no "weight_map"')
    index.write_text(json.dumps(told))
    saved(folder, {"w": torch.ones(2)})
    refused(folder, tmp_path / "out", "which is the model")
    (folder / "pytorch_model.bin").unlink()
    saved(folder, {"shared": torch.ones(2)}, "pytorch_model-00001-of-00002.bin")
    refused(folder, tmp_path / "out", "tensor shared is both in")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    refused(folder, tmp_path / "out", "00002-of-00002.bin, which is not there")


def test_nothing_is_overwritten_and_a_full_disk_is_seen_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "in", {"w": torch.ones(2)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("mine")
    refused(folder, tmp_path / "out", "exists already")
    assert (tmp_path / "out" / "model.safetensors").read_text() == "mine"
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 7}))
    refused(folder, tmp_path / "empty", "are free")


def test_memory_is_bounded_by_a_block_and_not_by_a_tensor(tmp_path: Path) -> None:
    big = torch.zeros(2**24)  # 64 MiB
    saved(tmp_path / "in", {"plain": big, "transposed": big.view(2**11, 2**13).T})
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    bin_to_safetensors(tmp_path / "in", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 2**27
    assert peak < 3 * torch_legacy.BLOCK  # one as it is read, one as it is written, and what describes the tensors
