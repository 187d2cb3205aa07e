"""Every architecture is exact on its whole road, or refused with a reason. `benchmarks/architectures.py` prints the table."""

from pathlib import Path

import pytest
from architecture_row import Row, row_of
from tiny_models import SEEING, make_seeing, make_tiny

from mlx_finetune.models.mlx_proven import PROVEN

EXACT = 1e-4  # float32; mlx-lm's recurrences sum in another order: 5e-5 to 2e-4
RECURRENT = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")


def check(row: Row, model_type: str) -> None:
    close = 4 * EXACT if model_type in RECURRENT else EXACT
    for name in ("load", "loss", "norm", "fuse", "peft", "mlx_lm"):
        value = getattr(row, name)
        assert isinstance(value, float) and value < close, f"{name}: {value}"


@pytest.mark.parametrize("model_type", sorted(PROVEN.keys() - {"gpt_neox"}))
def test_what_mlx_trained_is_fused_and_opened_by_peft(model_type: str, tmp_path: Path) -> None:
    check(row_of(make_tiny(model_type, tmp_path / "model", tokenizer=False), tmp_path, exported=True), model_type)


@pytest.mark.parametrize(("model_type", "text"), SEEING)
def test_what_mlx_trained_of_a_model_that_sees_is_fused_and_opened_by_peft(model_type: str, text: str, tmp_path: Path) -> None:
    check(row_of(make_seeing(model_type, text, tmp_path / "model"), tmp_path, exported=True), text)
