"""Every architecture on its whole road: read by MLX, trained a step by both engines, fused, opened by peft and by mlx-lm.

    .venv/bin/python benchmarks/architectures.py [--out FOLDER]

Tiny random models of transformers' own classes, with config.json as versions 4 and 5 write it, and with experts one by one and
joined. Takes 5 minutes of two cores; writes architectures.md and architectures.json; exit status 1 where a row is neither exact
nor refused.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from architecture_row import Row, row_of
from tables import Table, run
from test_architectures import OF_EXPERTS, rope
from tiny_models import SEEING, make_joined, make_seeing, make_tiny

from mlx_finetune.models.mlx_proven import PROVEN

TEXT = """\
Largest difference over the largest logit, float32: `load` of MLX from transformers; `loss` and `norm` of a training step, MLX's
from torch's, relative; `fuse` of the fused folder in transformers, `peft` of the adapter opened by peft, and `mlx-lm` of the
exported folder opened by mlx-lm, each from the model as MLX trained it, whose adapters (on all linear layers, and on experts where
both libraries have them alike) change its logits by more than 1e-2. A text instead of a figure is the reason for which it is
refused, which counts as exact only for a kind that is known to be refused."""
EXACT = 1e-4
REFUSED = ("falcon_h1", "glm", "ernie4_5_moe", "arcee")
NOT_TRAINED = "gpt_neox"  # by MLX
COLUMNS = ("load", "loss", "norm", "fuse", "peft", "mlx_lm")


def measure(folder: Path) -> list[Table]:
    """One row a model, and one of each that is refused."""
    rows = []
    for name, model in models(folder):
        row = row_of(model, folder / f"{model.name} road", exported=True)
        print(name, row, file=sys.stderr)
        figures = {column.replace("_", "-"): shown(getattr(row, column), folder) for column in COLUMNS}
        rows.append({"model": name, **figures, "exact or refused": judged(name.split()[0], row)})
    return [Table(f"{len(rows)} models", TEXT, rows, promised=("exact or refused",))]


def models(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and folder; made when it is asked for."""
    for model_type in sorted(PROVEN):
        for style in ("v5", "v4") if model_type != "mpt" else ("v5",):
            name = f"{model_type} {style}"
            changes = rope(model_type) if style == "v5" or model_type != "olmo3" else {}
            yield name, make_tiny(model_type, folder / name, tokenizer=True, style=style, changes=changes)
    for model_type in (*OF_EXPERTS.split(), "qwen3_5_moe_text"):
        yield f"{model_type} joined", make_joined(model_type, folder / f"{model_type} joined", rope(model_type))
    for model_type, text in SEEING:
        yield f"{model_type} ({text})", make_seeing(model_type, text, folder / f"{model_type} {text}", tokenizer=True)
    for model_type in REFUSED:
        yield f"{model_type} v5", make_tiny(model_type, folder / f"{model_type} v5", tokenizer=True)


def shown(value: float | str, folder: Path) -> float | str:
    """Without the place where it was measured."""
    return value.replace(f"{folder}/", "") if isinstance(value, str) else value


def judged(model_type: str, row: Row) -> bool:
    """Whether each figure is small enough; a reason stands for it only where that kind is known to be refused."""
    values = [getattr(row, column) for column in COLUMNS]
    numbers = [value for value in values if isinstance(value, float)]
    has_reason = any(value and isinstance(value, str) for value in values)
    whole = has_reason if model_type in (*REFUSED, NOT_TRAINED) else len(numbers) == len(values)
    return whole and all(value < EXACT for value in numbers)


if __name__ == "__main__":
    run("architectures", str(__doc__), measure)
