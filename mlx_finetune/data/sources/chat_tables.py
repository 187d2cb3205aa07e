"""The rows of parquet files, of datasets that `datasets` saved, and of datasets on the Hugging Face Hub."""

import re
from collections.abc import Iterator, Mapping
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_finetune.data.sources.chat_files import Row
from mlx_finetune.errors import UserError

ROWS_AT_A_TIME = 64
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w.-]+))?")
HUB_HINT = "a dataset is named org/name, org/name:config, org/name@split or org/name:config@split"


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a parquet file, some of them held at a time.

    Raises:
        UserError: it is no parquet file, or a broken one.
    """
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")  # it has no types, and datasets needs it anyway
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, number, plain(value))
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: broken parquet file: {_one_line(error)}", hint="download or write it again") from error


def saved_rows(folder: Path) -> Iterator[Row]:
    """The rows of a folder that `save_to_disk` of `datasets` wrote, all its splits one after the other.

    Raises:
        UserError: it is none, or a broken one.
    """
    yield from _dataset_rows(str(folder), lambda datasets: datasets.load_from_disk(str(folder)), "save the dataset again")


def hub_rows(name: str) -> Iterator[Row]:
    """The rows of a dataset on the Hub, of the split `train` where `name` says none.

    Raises:
        UserError: it is not there, or has no such config or split, or there is no network.
    """
    match = HUB_ID.fullmatch(name)
    assert match, name
    repository, config, split = match.groups()
    yield from _dataset_rows(name, lambda datasets: datasets.load_dataset(repository, config, split=split or "train"), HUB_HINT)


def _dataset_rows(name: str, load: Any, hint: str) -> Iterator[Row]:
    datasets = import_module("datasets")
    try:
        found = load(datasets)
    except (OSError, ValueError, RuntimeError, ImportError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{name}: cannot be loaded as a dataset: {_one_line(error)}", hint=hint) from error
    number = 0
    for split in found.values() if isinstance(found, dict) else [found]:
        for value in split:
            number += 1
            yield Row(number, number, plain(value))


def plain(value: Any) -> Any:
    """As JSON would hold it. Nulls in objects go: a table has every key in every row, and fills in what a row has not."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items() if one is not None and one == one}  # NaN is not itself
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.isoformat() if isinstance(value, date) else f"({type(value).__name__})"  # bytes of an image: no text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
