"""Several processes agree on what is not applied, and end together."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from short_runs import STEPS, settings
from test_numbers import broken, data, rows_of  # noqa: F401
from test_ranks import command, finished, start


@pytest.mark.long
@pytest.mark.parametrize("engine", ["mlx", "torch", "fsdp"])
def test_two_processes_agree_on_what_is_not_applied(engine: str, broken: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    cut = {"fsdp": "true"} if engine == "fsdp" else {}
    engine = "torch" if cut else engine
    for name, launcher in (("one", False), ("two", True)):
        more = {"gradient_accumulation": 3, "batch_size": 1} | (cut if launcher else {})
        process = start(command(settings(broken, data, tmp_path / name, engine, **more)), engine, launcher)
        _, err = finished(process)
        assert process.returncode == 0, err
        assert err.count("was not applied") == sum(not row.get("applied", True) for row in rows_of(tmp_path / name)) > 0
    one, two = (rows_of(tmp_path / name) for name in ("one", "two"))
    assert [row.get("offending") for row in one] == [row.get("offending") for row in two]
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], atol=1e-5)
    progress = [json.loads((tmp_path / name / "latest" / "progress.json").read_text())["updates"] for name in ("one", "two")]
    assert progress[0] == progress[1] < STEPS


@pytest.mark.long
@pytest.mark.parametrize("engine", ["mlx", "torch"])
def test_two_processes_stop_together_with_one_line_each(engine: str, broken: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    process = start(command(settings(broken, data, tmp_path / "run", engine, gradient_accumulation=99)), engine, True)
    _, err = finished(process)
    assert process.returncode or engine == "mlx"  # mlx.launch gives 0 whatever became of its processes
    assert err.count("error: steps 1 to 3 were not applied") >= 1
    assert engine == "torch" or "Traceback" not in err
    assert not re.search(r'File ".*/mlx_finetune/', err)  # torchrun itself ends with a traceback, of its own
    assert (tmp_path / "run" / "latest").resolve().name == "step-000003"
