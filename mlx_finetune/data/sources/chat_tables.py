"""The rows of parquet files, of datasets that `datasets` saved, and of datasets on the Hugging Face Hub."""

import re
from collections.abc import Iterator, Mapping
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_finetune.data.sources import without_pairs
from mlx_finetune.data.sources.chat_files import Row
from mlx_finetune.data.sources.chat_values import NotJson
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
                    yield Row(number, number, plain_row(value))
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: broken parquet file: {_one_line(error)}", hint="download or write it again") from error


def saved_rows(folder: Path) -> Iterator[Row]:
    """The rows of a folder that `save_to_disk` of `datasets` wrote, all its splits one after the other; each says of which it is.

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
    for name, split in found.items() if isinstance(found, dict) else [("", found)]:
        for value in split.with_format(None):  # whoever saved it may have asked for arrays
            number += 1
            yield Row(number, number, plain_row({"split": name, **value} if name else value))


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Each value as `plain` has it; here nulls stay, so that what a row lacks can be named."""
    return {key: None if _is_null(value) else plain(value) for key, value in row.items()}


def plain(value: Any) -> Any:
    """As JSON would hold it: binary text as text, a map as an object, and NotJson for what JSON has not.

    Nulls in objects go: a table has every key in every row, and fills in what a row has not.
    """
    value = without_pairs(value)
    if isinstance(value, Mapping):
        return {_key(key): plain(one) for key, one in value.items() if not _is_null(one)}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return _text(value)
    return value.isoformat() if isinstance(value, date) else NotJson(f"a value of type {type(value).__name__}")


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # NaN is not itself


def _key(key: Any) -> str:
    text = plain(key)
    return text if isinstance(text, str) else str(key)


def _text(raw: bytes) -> str | NotJson:
    """Text, which some writers store as binary; but no picture."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return NotJson("binary data")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
