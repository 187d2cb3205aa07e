"""The tokens on which models are compared."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mlx_finetune.engines.adapter import EMBEDDING_A
from mlx_finetune.export.adapter import TENSORS
from mlx_finetune.files import read_json
from mlx_finetune.models.quiet import quietly
from mlx_finetune.models.weights import file_headers

# What a tuned model is compared on: prose, a gptme turn, code.
PROBE_TEXTS = (
    "The capital of France is Paris, and the river that runs through it is called the Seine.",
    "Let me see what fails first.\n\n```shell\npytest -q 2>&1 | tail -40\n```",
    "def add(a: int, b: int) -> int:\n    return a + b\n\nassert add(2, 3) == 5\n",
)
LONGEST = 256  # tokens of a text that are compared
ANSWER = 24  # greedy tokens that follow each text
MOST_LOGITS = 1 << 26  # kept at once of one model: 256 MiB of float32


def tokens_of(model: Path, texts: Iterable[str]) -> list[list[int]]:
    """The first LONGEST tokens of each text that has any."""
    from transformers import AutoTokenizer

    with quietly():
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    tokens = [list(tokenizer(text)["input_ids"])[:LONGEST] for text in texts]
    assert any(tokens), "nothing to compare"
    return [row for row in tokens if row]


def spread(rows: Iterable[int]) -> list[list[int]]:
    """Tokens from the whole of vocabularies of so many rows: a wrong row of embeddings shows only when it is read."""
    return [np.linspace(0, count - 1, LONGEST, dtype=int).tolist() for count in rows]


def spread_of(model: Path, checkpoint: Path) -> list[list[int]]:
    """As `spread`, where an adapter is on embeddings."""
    return spread(at.shape[1] for name, at in file_headers(checkpoint / TENSORS).items() if name.endswith(EMBEDDING_A))


def bounded(model: Path, tokens: list[list[int]], spread: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Rows cut so that no more than MOST_LOGITS logits are kept of a model; of a spread row every so many-th token stays."""
    most = max(8, min(LONGEST, MOST_LOGITS // vocabulary_of(model) // (len(tokens) + len(spread)) - ANSWER))
    thinned = [[row[int(i)] for i in np.linspace(0, len(row) - 1, min(most, len(row)))] for row in spread]
    return [row[:most] for row in tokens], thinned


def vocabulary_of(model: Path, otherwise: int = 1 << 18) -> int:
    """How many tokens a model's config says that there are."""
    config = read_json(model / "config.json")
    said: Sequence[object] = (config.get("vocab_size"), (config.get("text_config") or {}).get("vocab_size"))
    return next((size for size in said if isinstance(size, int) and size > 0), otherwise)
