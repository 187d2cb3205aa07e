"""The prepared folder: what is read is what was written, in an order that is a pure function, and what is damaged is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from mlx_finetune.config import make_config
from mlx_finetune.data.batches import Batch, Example
from mlx_finetune.data.dataset import Dataset, write_dataset
from mlx_finetune.errors import UserError


def random_examples(seed: int, count: int, length: int = 40) -> list[Example]:
    random, examples = np.random.default_rng(seed), []
    for i in range(count):
        tokens = random.integers(0, 50_000, random.integers(2, length)).astype(np.int32)
        weights = random.choice((0.0, 1.0, 0.1), len(tokens)).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        examples.append(
            Example(tokens, weights, str(random.choice(("gptme", "openassistant"))), f"c{i}", (1, 2 * i), i % 3, i % 2 == 0)
        )
    return examples


def write(folder: Path, train: Sequence[Example], valid: Sequence[Example] = (), test: Sequence[Example] = ()) -> Dataset:
    folder.mkdir(parents=True)
    write_dataset(folder, {"train": train, "valid": valid, "test": test}, lambda: {"max_length": 40})
    return Dataset.open(folder)


def assert_equal(one: Example, other: Example) -> None:
    assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.weights, other.weights)
    assert (one.tokens.dtype, one.weights.dtype) == (np.int32, np.float32)
    assert (one.source, one.conversation, one.turns) == (other.source, other.conversation, other.turns)
    assert (one.exact_turns, one.own_context) == (other.exact_turns, other.own_context)


def test_the_id_is_of_tokens_and_weights_in_order(tmp_path: Path) -> None:
    examples = random_examples(0, 3)
    weights = examples[1].weights.copy()
    weights[-1] = 0.5
    changed = Example(examples[1].tokens, weights, *(getattr(examples[1], name) for name in ("source", "conversation", "turns")))
    splits: Mapping[str, tuple[list[Example], list[Example]]] = {
        "same": (examples, []),
        "weight": ([examples[0], changed, examples[2]], []),
        "order": (examples[::-1], []),
        "split": (examples[:2], examples[2:]),
    }
    ids = {name: write(tmp_path / name, *split).id for name, split in splits.items()}
    assert len(set(ids.values())) == 4
    assert ids["same"] == "dc79e524992c2c50"


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    train, valid = random_examples(1, 30), random_examples(2, 7)
    dataset = write(tmp_path / "d", train, valid)
    for store, written in ((dataset.train, train), (dataset.valid, valid)):
        assert len(store) == len(written)
        for one, other in zip(store, written, strict=True):
            assert_equal(one, other)
        assert store.lengths == tuple(len(example.tokens) for example in written)
        assert store.sources == tuple(example.source for example in written)
    assert_equal(dataset.train[29], train[29])


def test_a_split_may_be_empty(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", random_examples(1, 3))
    assert (len(dataset.valid), dataset.valid.lengths, dataset.held_out(2), list(dataset.valid)) == (0, (), {}, [])


def test_held_out_batches_have_each_example_once_and_by_source(tmp_path: Path) -> None:
    valid = random_examples(4, 23)
    batches = write(tmp_path / "d", random_examples(3, 1), valid).held_out(4)
    assert list(batches) == ["gptme", "openassistant"]
    for source, group in batches.items():
        expected = [Batch.of([example]) for example in valid if example.source == source]
        rows = [row[weights > 0].tolist() for batch in group for row, weights in zip(batch.targets, batch.weights, strict=True)]
        assert sorted(rows) == sorted(batch.targets[batch.weights > 0].tolist() for batch in expected)
        assert sum(batch.learned for batch in group) == pytest.approx(sum(batch.learned for batch in expected), rel=1e-12)


def test_a_step_is_a_pure_function_of_data_seed_and_step(tmp_path: Path) -> None:
    examples, config = random_examples(5, 11), make_config({"batch_size": 2, "gradient_accumulation": 2}, "test")
    one, other = write(tmp_path / "a", examples), write(tmp_path / "b", examples)
    assert one.steps_per_epoch(config) == 3
    late = one.batches_at(5, config)
    for step in range(6):
        for mine, same in zip(one.batches_at(step, config), other.batches_at(step, config), strict=True):
            assert np.array_equal(mine.inputs, same.inputs) and np.array_equal(mine.weights, same.weights)
    assert all(np.array_equal(a.targets, b.targets) for a, b in zip(late, one.batches_at(5, config), strict=True))
    learned = [sum(b.learned for step in range(3) for b in one.batches_at(3 * epoch + step, config)) for epoch in range(2)]
    assert learned == pytest.approx([sum(float(e.weights.sum(dtype=np.float64)) for e in examples)] * 2, rel=1e-12)


READ = """
import sys
from pathlib import Path
import pyarrow
from mlx_finetune.data.dataset import Dataset
dataset = Dataset.open(Path(sys.argv[1]))
total = sum(int(example.tokens.sum()) for example in dataset.train)
print(total, pyarrow.total_allocated_bytes())
"""


def test_the_data_stay_on_the_disk_and_no_cache_appears_in_the_home(tmp_path: Path) -> None:
    examples = random_examples(6, 400, length=8000)
    dataset = write(tmp_path / "d", examples)
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(dataset.folder)],
        env=kept | {"HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    total, allocated = map(int, done.stdout.split())
    assert total == sum(int(example.tokens.sum()) for example in examples)
    assert (dataset.folder / "train.arrow").stat().st_size > 10_000_000 > 20 * allocated
    assert list(home.rglob("*")) == []
    assert {path.name for path in dataset.folder.iterdir()} == {"train.arrow", "valid.arrow", "test.arrow", "dataset.json"}


def cut_off(folder: Path) -> None:
    path = folder / "train.arrow"
    path.write_bytes(path.read_bytes()[:-1])


def other_version(folder: Path) -> None:
    info = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    (folder / "dataset.json").write_text(json.dumps(info | {"version": 1}), encoding="utf-8")


def no_sizes(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"version": 7, "id": "a"}', encoding="utf-8")


def garbled(folder: Path) -> None:
    path = folder / "train.arrow"
    path.write_bytes(b"x" * path.stat().st_size)


def one_bit(folder: Path) -> None:
    path = folder / "train.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swapped(folder: Path) -> None:
    """As long as the right one."""
    size = (folder / "valid.arrow").stat().st_size
    (folder / "valid.arrow").write_bytes((folder / "train.arrow").read_bytes().ljust(size, b"\0")[:size])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_off, "train.arrow: missing or not whole"),
        (lambda folder: (folder / "valid.arrow").unlink(), "valid.arrow: missing or not whole"),
        (garbled, "train.arrow: not what prepare wrote"),
        (swapped, "valid.arrow: not what prepare wrote"),
        (one_bit, "train.arrow: not what prepare wrote"),
        (other_version, "version 1, not 7"),
        (no_sizes, "not whole"),
        (lambda folder: (folder / "dataset.json").write_text("[]"), "version None, not 7"),
        (lambda folder: (folder / "dataset.json").write_text("5"), "version None, not 7"),
        (lambda folder: (folder / "dataset.json").write_text('{"version": 7, "id": "a", "bytes": [1]}'), "not whole"),
        (lambda folder: (folder / "dataset.json").write_text('{"version": 7, "bytes": {}}'), "not whole"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "dataset.json").unlink(), "not a prepared data set"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    write(tmp_path / "d", random_examples(7, 3), random_examples(8, 2))
    damage(tmp_path / "d")
    with pytest.raises(UserError, match=reason) as error:
        Dataset.open(tmp_path / "d")
    assert error.value.message.startswith(str(tmp_path / "d"))


def test_what_is_said_of_the_data_is_asked_when_all_examples_are_through(tmp_path: Path) -> None:
    def stream(read: list[Example]) -> Iterator[Example]:
        for example in random_examples(9, 5):
            read.append(example)
            yield example

    (tmp_path / "d").mkdir()
    read: list[Example] = []
    info = write_dataset(tmp_path / "d", {"train": stream(read), "valid": stream(read), "test": []}, lambda: {"read": len(read)})
    assert info["read"] == 10 and info["examples"] == {"train": 5, "valid": 5, "test": 0}
