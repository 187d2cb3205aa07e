"""Each verb that opens a trained adapter refuses one that does not belong there, in one line that says what and where."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Answer
from finished_runs import as_of_old, make_base, make_run
from safetensors.numpy import load_file, save_file
from test_properties_paths import answers_at_once
from tiny_models import make_tiny

ADAPTER = "adapter_model.safetensors"
VERBS: dict[str, list[str]] = {
    "resume": ["train", "--resume", "--out", "{run}"],
    "adapter_path": ["train", "--model", "{base}", "--data", "{data}", "--out", "out", "--set=adapter_path={run}/latest"],
    "evaluate": ["evaluate", "{run}"],
    "fuse": ["fuse", "{run}", "--out", "out"],
    "peft": ["export", "{run}", "--to", "peft", "--out", "out"],
    "gguf": ["export", "{run}", "--to", "gguf", "--out", "out"],
    "serve": ["serve", "{run}", "--port", "0"],
    "chat": ["chat", "{run}"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, dataset/, run/ of it, another/ run of the same shapes, narrow/, a model of others, same/, one of the same."""
    root = tmp_path_factory.mktemp("made")
    make_base(root)
    make_run(root, "mlx", steps=2)
    make_run(root, "mlx", "another", steps=2, seed=1)
    make_tiny("llama", root / "narrow", tokenizer=True, changes={"hidden_size": 32})
    make_tiny("llama", root / "same", tokenizer=True)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Iterator[Path]:
    """That, to be spoilt, in the place that the run's settings name; put back afterwards."""
    shutil.copytree(made, kept := tmp_path / "kept", symlinks=True)
    yield made
    shutil.rmtree(made)
    shutil.copytree(kept, made, symlinks=True)


def checkpoint(root: Path) -> Path:
    return (root / "run" / "latest").resolve()


def other_model(root: Path) -> None:
    weights = load_file(root / "same" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, root / "base" / "model.safetensors", metadata={"format": "pt"})


def other_shapes(root: Path) -> None:
    shutil.rmtree(root / "base")
    (root / "narrow").rename(root / "base")


def swapped(root: Path) -> None:
    shutil.copy((root / "another" / "latest").resolve() / ADAPTER, checkpoint(root) / ADAPTER)


def missing(root: Path) -> None:
    (checkpoint(root) / ADAPTER).unlink()


def later(root: Path) -> None:
    path = checkpoint(root) / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


def old_and_wide(root: Path) -> None:
    """Of a version that wrote no checksums, with a matrix of another width."""
    path = as_of_old(checkpoint(root)) / ADAPTER
    arrays = load_file(path)
    name = next(name for name in sorted(arrays) if name.endswith("lora_A.weight"))
    save_file(arrays | {name: np.zeros((4, 7), np.float32)}, path, metadata={"format": "pt"})


def old_and_cut(root: Path) -> None:
    path = as_of_old(checkpoint(root)) / ADAPTER
    path.write_bytes(path.read_bytes()[:-9])


# What is done, the words of the line, and the verbs for which it is no mistake.
DAMAGES: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "another model of the same shapes": (other_model, "trained with model ", ("adapter_path",)),
    "a model of other shapes": (other_shapes, "trained with model |, the model takes ", ()),
    "the adapter of another run": (swapped, f"{ADAPTER} holds other bytes than were saved", ()),
    "no adapter": (missing, f"{ADAPTER} is missing", ()),
    "a later version": (later, "a checkpoint of format 99; this version reads formats 1 to ", ()),
    "an earlier version of other shapes": (old_and_wide, "other shapes|the model takes |the adapter changes ", ()),
    "an earlier version cut": (old_and_cut, f"not a whole checkpoint: {ADAPTER}", ()),
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("damage", "verb"),
    [(damage, verb) for damage, (_, _, allowed) in DAMAGES.items() for verb in VERBS if verb not in allowed],
)
def test_an_adapter_that_does_not_belong_there_is_refused(
    damage: str, verb: str, root: Path, cli: Callable[..., Answer], tmp_path: Path
) -> None:
    spoil, words, _ = DAMAGES[damage]
    spoil(root)
    before = sorted(root.rglob("*"))
    told = [each.format(run=root / "run", base=root / "base", data=root / "dataset") for each in VERBS[verb]]
    with answers_at_once():
        status, out, err = cli(*told)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and out == "" and "Traceback" not in err and any(word in line for word in words.split("|")), err
    assert not (tmp_path / "out").exists() and sorted(root.rglob("*")) == before
