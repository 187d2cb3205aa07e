"""TRL and mlx-lm read `train.jsonl` as `prepare` writes it, and render from it the very tokens that are trained here."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from alternating import GEMMA, GEMMA2
from chats import LLAMA3, RAISES, chat, conversation_of, template_of
from shipped_templates import Shipped, model_folder
from tiny_models import CHATML
from tool_chats import TOOLS, session

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.export.fuse import write_template

GPTME_LIKE = [
    *(Message("system", text) for text in ("You are gptme.", "# System Prompt Cache Boundary\n", "It is Tuesday.\n\n")),
    *chat("list the files", "I look.\n```shell\nls\n```\n\n"),
    *(Message("system", "Ran command: `ls`\n\n`é.txt`\n"), Message("assistant", "One file: é.txt"), *chat("thanks", "Any time.")),
]
PLAIN = [conversation_of(GPTME_LIKE, "a"), conversation_of(chat("1 < 2?", 'Yes, "1 < 2".'), "b")]
NATIVE = [Conversation(tuple(session("Let me look.\n")), "gptme", "c", "private", {}, TOOLS)]  # a file's name is not ASCII
OWN = {"chatml": CHATML, "llama3": LLAMA3, "raises": RAISES, "gemma": GEMMA, "gemma 2": GEMMA2}
TRL = ("qwen2_5", "qwen3_instruct_2507", "gemma3", "llama3_2")


class Prepared:
    """A data set, and the tokenizer of the model that is exported after training on it."""

    def __init__(self, folder: Path, name: str, conversations: Sequence[Conversation]) -> None:
        from transformers import AutoTokenizer

        template = _template(folder / "model", name)
        write_conversations(folder / "all.jsonl", conversations)
        config = make_config({"valid_fraction": 0, "max_length": 10_000}, "test")
        prepare([folder / "all.jsonl"], template, config, folder / "dataset", {})
        self.dataset = Dataset.open(folder / "dataset")
        assert self.dataset.info["train"]["turns_of_own_context"] == 0  # one rendering serves each of these
        write_template(folder / "model", template.source)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")

    @property
    def trained(self) -> list[list[int]]:
        return [example.tokens.tolist() for example in self.dataset.train]


def _template(folder: Path, name: str) -> ChatTemplate:
    import trl

    if name in OWN:
        return template_of(folder, OWN[name])
    text = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    one = Shipped(name, text)
    return ChatTemplate.load(model_folder(folder, one.jinja, one.control, one.stops))


def by_trl(prepared: Prepared, cache: Path) -> list[list[int]]:
    """As TRL 1.16's SFT renders and tokenizes a data set of messages."""
    from datasets import load_dataset
    from trl.data_utils import apply_chat_template, is_conversational

    rows = load_dataset("json", data_files=str(prepared.dataset.folder / "train.jsonl"), split="train", cache_dir=str(cache))
    assert all(is_conversational(row) for row in rows)
    texts = [apply_chat_template({"messages": row["messages"]}, prepared.tokenizer, row.get("tools"))["text"] for row in rows]
    return [prepared.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def by_mlx_lm(prepared: Prepared, folder: Path, **settings: Any) -> list[tuple[list[int], int]]:
    """As mlx-lm 0.32.2's trainer tokenizes the training file of a data folder; beside each, where what it learns begins."""
    from mlx_lm.tuner.datasets import load_local_dataset

    folder.mkdir()
    shutil.copy(prepared.dataset.folder / "train.jsonl", folder)
    train, _, _ = load_local_dataset(folder, prepared.tokenizer, SimpleNamespace(**settings))
    return [train.process(train[i]) for i in range(len(train))]


@pytest.mark.parametrize("name", [*OWN, *TRL])
def test_trl_and_mlx_lm_render_plain_chats_to_the_tokens_that_are_trained(tmp_path: Path, name: str) -> None:
    prepared = Prepared(tmp_path, name, PLAIN)
    assert len(prepared.trained) == 2
    assert by_trl(prepared, tmp_path / "cache") == prepared.trained
    assert [tokens for tokens, _ in by_mlx_lm(prepared, tmp_path / "data")] == prepared.trained


@pytest.mark.parametrize("conversations", [NATIVE, [*PLAIN, *NATIVE], [*NATIVE, *PLAIN]])
def test_trl_and_mlx_lm_render_calls_and_schemas_to_the_tokens_that_are_trained(
    tmp_path: Path, conversations: list[Conversation]
) -> None:
    """With a template that takes arguments as the text that OpenAI's format has; some take them decoded only."""
    prepared = Prepared(tmp_path, "qwen3_instruct_2507", conversations)
    assert len(prepared.trained) == len(conversations)
    assert by_trl(prepared, tmp_path / "cache") == prepared.trained
    assert [tokens for tokens, _ in by_mlx_lm(prepared, tmp_path / "data")] == prepared.trained


def test_what_mlx_lm_masks_before_the_last_turn_is_what_is_read_here(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path, "chatml", PLAIN)
    for (tokens, begin), example in zip(
        by_mlx_lm(prepared, tmp_path / "data", mask_prompt=True), prepared.dataset.train, strict=True
    ):
        starts = np.flatnonzero(np.diff(np.concatenate([[0], example.weights > 0])) > 0)
        assert tokens == example.tokens.tolist() and begin == starts[-1]


def test_mlx_lm_reads_the_folder_as_it_is(tmp_path: Path) -> None:
    from mlx_lm.tuner.datasets import load_local_dataset

    prepared = Prepared(tmp_path, "chatml", PLAIN)
    train, valid, test = load_local_dataset(prepared.dataset.folder, prepared.tokenizer, SimpleNamespace())
    assert (len(train), len(valid), len(test)) == (2, 0, 0)
