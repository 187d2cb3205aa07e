"""metrics.jsonl as it is read: of every version, and refused by line where no step writes such a row."""

from pathlib import Path

import numpy as np
import pytest

from mlx_finetune.errors import UserError
from mlx_finetune.training.metrics import Metrics, read_metrics


def test_rows_of_every_version_are_read_and_what_no_step_writes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    skipped = '{"step": 2, "split": "train", "loss": null, "tokens": 7, "grad_norm": null, "applied": false, "offending": []}'
    good = (
        '{"step": 1, "split": "train", "loss": 2.0, "tokens": 7}',
        skipped,
        skipped.replace("null", "NaN", 1),
        '{"step": 2, "split": "valid", "loss": null, "by_source": {"gptme": null}}',
    )
    path.write_text("\n".join(good) + "\n")
    rows = read_metrics(path)
    assert [np.isnan(row["loss"]) for row in rows] == [False, True, True, True] and np.isnan(rows[3]["by_source"]["gptme"])
    bad = (
        skipped.replace("false", "true"),
        skipped.replace("false", '"no"'),
        skipped.replace("[]", "[1]"),
        skipped.replace("[]", '[{"row": "x", "conversation": "c"}]'),
        skipped.replace('"tokens": 7', '"tokens": 0'),
        good[0].replace("2.0", "1" + "0" * 400),
        good[3].replace("null}", '"x"}'),
        good[3].replace("2", "-2", 1),
    )
    for line in bad:
        path.write_text(f"{good[0]}\n{line}\n{good[0]}\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a line of metrics"):
            read_metrics(path)


def test_metrics_drop_what_a_crash_wrote_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = '{"step": 1, "split": "train", "loss": 2.0, "tokens": 7}\n'
    path.write_text(f'{row}{{"step": 2, "split": "train", "loss": 1.5, "tokens": 7}}\n{{"step": 3, "spl')
    Metrics(path, start=1)
    assert [row["step"] for row in read_metrics(path)] == [1]
    no_rows = ("5", '{"step": 1}', row.replace("1", '"x"', 1), row.replace("2.0", "null"), row.replace(', "tokens": 7', ""))
    for bad, reason in (("not json", "not JSON"), *((line.strip(), "not a line of metrics") for line in no_rows)):
        path.write_text(f"{row}{bad}\n{row}")
        with pytest.raises(UserError, match=f"metrics.jsonl:2: {reason}"):
            read_metrics(path)
