"""Dataset: the folder that `prepare` makes. Tokens lie in Arrow files, opened memory-mapped through `datasets`."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Batch, Example, examples_at, is_learned, steps_per_epoch
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json, refuse_existing, write_json

# 7: the end of a turn that a template leaves open; 6: digests of the Arrow files; 5: families; 4: of each example, how much is as
# served; 3: role policies; 2: a test split
VERSION = 7
SPLITS = ("train", "valid", "test")
AGAIN = "run mlx-finetune prepare again"
EXAMPLES_IN_MEMORY = 100  # before they are written: windows may be long
# What the inputs are called where they are another than before.
WORDS = {
    "conversations": "other conversations",
    "tokenizer": "another tokenizer or chat template",
    "chat_template": "another chat template",
    "role_policy": "another role policy",
    "template_oddities": "another chat template",
    "model_fingerprint": "other weights of the model",
}


class ExampleStore:
    """The examples of one split, read from the disk as they are asked for."""

    def __init__(self, path: Path) -> None:
        """`path`: an Arrow file that `write_dataset` wrote; raises UserError where it is none."""
        from datasets import Dataset as ArrowDataset

        self._path = path
        try:
            self._rows = ArrowDataset.from_file(str(path)).with_format("numpy")
            self.lengths: tuple[int, ...] = tuple(int(n) for n in self._rows["length"][:])
            self.sources: tuple[str, ...] = tuple(str(source) for source in self._rows["source"][:])
            numbers: dict[str, int] = {}
            self.families: tuple[int, ...] = tuple(numbers.setdefault(str(name), len(numbers)) for name in self._rows["family"][:])
        except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:  # whatever datasets and pyarrow stumble on
            raise UserError(f"{path}: not an Arrow file that prepare wrote", hint=AGAIN) from error

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        turns = tuple(int(turn) for turn in row["turns"])
        tokens, weights = np.asarray(row["tokens"], np.int32), np.asarray(row["weights"], np.float32)
        if tokens.shape != weights.shape or len(tokens) != self.lengths[index] or not is_learned(weights):
            raise UserError(f"{self._path}: row {index} is no example with a learned token", hint=AGAIN)
        names = str(row["source"]), str(row["conversation"])
        return Example(tokens, weights, *names, turns, int(row["exact_turns"]), bool(row["own_context"]), str(row["family"]))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class Dataset:
    """A prepared folder. `info` is `dataset.json`: model, template, counts and the `id` of the content."""

    folder: Path
    info: dict[str, Any]
    train: ExampleStore
    valid: ExampleStore
    test: ExampleStore  # frozen by name: nothing here trains on it or chooses by it

    @classmethod
    def open(cls, folder: Path) -> "Dataset":
        """Raises UserError where the folder is not one that `prepare` made."""
        if not (folder / "dataset.json").is_file():
            raise UserError(f"{folder}: not a prepared data set (no dataset.json)", hint="mlx-finetune prepare makes one")
        info = read_json(folder / "dataset.json")
        if not isinstance(info, dict) or info.get("version") != VERSION:
            found = info.get("version") if isinstance(info, dict) else None
            raise UserError(f"{folder}/dataset.json: version {found!r}, not {VERSION}", hint=AGAIN)
        stores, sizes, digests = [], info.get("bytes"), info.get("digests")
        if not isinstance(sizes, dict) or not isinstance(digests, dict) or not isinstance(info.get("id"), str):
            raise UserError(f"{folder}/dataset.json: not whole", hint=AGAIN)
        for split in SPLITS:
            path = folder / f"{split}.arrow"
            if not path.is_file() or path.stat().st_size != sizes.get(split):
                raise UserError(f"{path}: missing or not whole", hint=AGAIN)
            if digest_of([path]) != digests.get(split):
                raise UserError(f"{path}: not what prepare wrote: its bytes are others", hint=AGAIN)
            stores.append(ExampleStore(path))
        return cls(folder, info, *stores)

    @property
    def id(self) -> str:
        """Tells one content from another: tokens and weights of all splits, in order."""
        return str(self.info["id"])

    def steps_per_epoch(self, config: RunConfig) -> int:
        """Optimizer steps in one pass over the training examples."""
        return steps_per_epoch(len(self.train), config.batch_size, config.gradient_accumulation)

    def batches_at(self, step: int, config: RunConfig) -> list[Batch]:
        """The micro-batches of step `step` (from 0): a pure function of data, seed and step."""
        return [Batch.of([self.train[i] for i in indices]) for indices in self.examples_at(step, config)]

    def tokens_at(self, step: int, config: RunConfig) -> int:
        """How many tokens step `step` reads, padding not counted."""
        return sum(self.train.lengths[i] - 1 for indices in self.examples_at(step, config) for i in indices)

    def examples_at(self, step: int, config: RunConfig) -> list[list[int]]:
        """Which training examples are in the micro-batches of step `step` (from 0)."""
        shape = config.batch_size, config.gradient_accumulation, config.seed
        return examples_at(self.train.lengths, *shape, step, self.train.families)

    def held_out(self, batch_size: int, split: str = "valid") -> dict[str, list[Batch]]:
        """Batches of a split that is not learned, by source, neighbours in length together."""
        store = getattr(self, split)
        groups = self.held_out_places(batch_size, split)
        return {source: [Batch.of([store[i] for i in group]) for group in each] for source, each in groups.items()}

    def held_out_places(self, batch_size: int, split: str = "valid") -> dict[str, list[list[int]]]:
        """Which examples of the split are in each of those batches, row by row."""
        store, groups = getattr(self, split), {}
        for source in sorted(set(store.sources)):
            places = [i for i in np.argsort(store.lengths, kind="stable").tolist() if store.sources[i] == source]
            groups[source] = [places[i : i + batch_size] for i in range(0, len(places), batch_size)]
        return groups


def digest_of(files: Sequence[Path]) -> str:
    """32 hexadecimal digits: equal where the files hold the same bytes in the same order."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}", hint="mlx-finetune collect makes such files") from error
    return digest.hexdigest()


def prepared_before(folder: Path) -> dict[str, Any] | None:
    """`dataset.json` of a folder that `prepare` made, of whatever version; None where nothing is there.

    Raises:
        UserError: something else is there.
    """
    if not (folder / "dataset.json").is_file():
        refuse_existing(folder)
        return None
    info = read_json(folder / "dataset.json")
    if not isinstance(info, dict) or "version" not in info or not all(isinstance(info.get(k), dict) for k in ("bytes", "examples")):
        refuse_existing(folder)
    return dict(info)


def changed_inputs(folder: Path, info: Mapping[str, Any], inputs: Mapping[str, Any]) -> str | None:
    """What the data was prepared with that is another now, in words; None where all is the same and the files are whole."""
    if info["version"] != VERSION:
        return "another version of mlx-finetune"
    arrows = [folder / f"{split}.arrow" for split in SPLITS]
    sizes = [path.stat().st_size if path.is_file() else None for path in arrows]
    beside = [folder / f"{split}.jsonl" for split in SPLITS if info["examples"].get(split)]
    if sizes != [info["bytes"].get(split) for split in SPLITS] or not all(path.is_file() for path in beside):
        return "files that are no longer whole"
    asked = json.loads(json.dumps(dict(inputs)))
    for name, value in asked.items():
        if info.get(name) != value:
            plain = isinstance(value, str | int | float | bool) and name not in WORDS
            return WORDS.get(name) or (f"{name} {info.get(name)}" if plain else f"another {name}")
    return None


def write_dataset(folder: Path, splits: Mapping[str, Iterable[Example]], info: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Writes the Arrow files and `dataset.json` into `folder`; `info` is asked once the examples are through."""
    digest, sizes, digests, counts = hashlib.sha256(), {}, {}, {}
    for split in SPLITS:
        path = folder / f"{split}.arrow"
        counts[split] = _write_examples(path, splits[split], digest)
        sizes[split], digests[split] = path.stat().st_size, digest_of([path])
    whole = {"version": VERSION, "id": digest.hexdigest()[:16], "bytes": sizes, "digests": digests, "examples": counts} | info()
    write_json(folder / "dataset.json", whole)
    return whole


def _write_examples(path: Path, examples: Iterable[Example], digest: Any) -> int:
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    columns = {"length": Value("int32"), "learned": Value("float64"), "source": Value("string"), "conversation": Value("string")}
    columns["family"] = Value("string")
    columns |= {"exact_turns": Value("int32"), "own_context": Value("bool")}
    lists = {"turns": List(Value("int32")), "tokens": List(Value("int32")), "weights": List(Value("float32"))}
    count = 0  # stays 0 where there are none
    with ArrowWriter(features=Features(columns | lists), path=str(path), writer_batch_size=EXAMPLES_IN_MEMORY) as writer:
        for e in examples:
            count += 1
            digest.update(path.name.encode() + e.tokens.tobytes() + e.weights.tobytes())
            learned = float(e.weights.sum(dtype=np.float64))
            row = {"length": len(e.tokens), "learned": learned, "source": e.source, "conversation": e.conversation}
            row |= {"exact_turns": e.exact_turns, "own_context": e.own_context, "family": e.family}
            writer.write(row | {"turns": list(e.turns), "tokens": e.tokens, "weights": e.weights})
        writer.finalize()
    return count
