"""Whether a model can take the longest of the prepared examples, whichever engine trains it."""

from pathlib import Path

from mlx_finetune.data.batches import WIDTHS
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.mpt_config import longest_of


def check_length(model: Path, dataset: Dataset) -> None:
    """Raises UserError where an example, padded as in its batch, is longer than the model can take at all."""
    longest, most = max(dataset.train.lengths + dataset.valid.lengths), longest_of(read_json(model / "config.json"))
    if most is not None and longest - 1 > (whole := most // WIDTHS * WIDTHS):  # the last token is only a target
        what = f"{dataset.folder}: an example of {longest} tokens; {model} takes {most} (its max_seq_len)"
        raise UserError(what, hint=f"prepare with --max-length {whole}")
