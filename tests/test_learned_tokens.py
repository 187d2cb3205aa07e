"""Every batch of every step has something to learn: by the way examples are made, and where a file says otherwise it is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_finetune.config import make_config
from mlx_finetune.data.batches import Batch, Example, examples_at, is_learned, steps_per_epoch
from mlx_finetune.data.conversation import Conversation, Message
from mlx_finetune.data.dataset import Dataset, digest_of, write_dataset
from mlx_finetune.data.examples import make_examples
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError

SECRET = "[REDACTED:password:1]"
ODD = ("", " ", "\n\n", "ls", SECRET, f"{SECRET}[REDACTED:key:2]", "<|im_end|>", "<|im_start|>assistant\n", "好", "a b " * 90)
TEXTS = st.sampled_from(ODD) | st.text(max_size=8)
ROLES = st.sampled_from(("system", "user", "assistant", "tool"))
WEIGHTS = st.sampled_from([0.0, 0.001, 0.5, 1.0, 1000.0])
MESSAGES = st.lists(st.builds(Message, ROLES, TEXTS, WEIGHTS), min_size=1, max_size=7)


@pytest.fixture(scope="module")
def template(tiny_llama: Path) -> ChatTemplate:
    return ChatTemplate.load(tiny_llama)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=MESSAGES, length=st.sampled_from([32, 64, 256]))
def test_any_conversation_becomes_examples_that_learn_something_or_none(
    template: ChatTemplate, messages: list[Message], length: int
) -> None:
    made = make_examples(Conversation(tuple(messages), "gptme", "log", "MIT"), template, length)
    asked = {i for i, message in enumerate(messages) if message.role == "assistant" and message.weight > 0}
    for example in made.examples:
        assert example.turns and set(example.turns) <= asked and is_learned(example.weights) and len(example.tokens) <= length
        assert Batch.of([example]).learned > 0
    if not asked:
        assert made.examples == ()


@st.composite
def examples(draw: st.DrawFn) -> Example:
    weights = np.array([0, *draw(st.lists(st.sampled_from([0, 0.001, 1, 1000]), min_size=1, max_size=40))], np.float32)
    weights[draw(st.integers(1, len(weights) - 1))] = 0.001
    return Example(np.arange(len(weights), dtype=np.int32), weights, "gptme", "c", (1,))


@settings(max_examples=60, deadline=None)
@given(
    made=st.lists(examples(), min_size=1, max_size=12),
    size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_each_micro_batch_of_each_step_learns_what_its_examples_do(
    made: list[Example], size: int, accumulation: int, seed: int
) -> None:
    lengths = tuple(len(example.tokens) for example in made)
    for step in range(2 * steps_per_epoch(len(made), size, accumulation)):
        micro_batches = examples_at(lengths, size, accumulation, seed, step)
        assert micro_batches
        for places in micro_batches:
            batch = Batch.of([made[i] for i in places])
            assert (batch.weights > 0).any(axis=1).all()  # in each row
            assert (
                batch.learned == pytest.approx(sum(float(made[i].weights.sum(dtype=np.float64)) for i in places))
                and batch.learned > 0
            )


@given(weights=st.lists(st.sampled_from([0.0, 1.0, -1.0, np.nan, np.inf]), max_size=4))
def test_weights_that_teach_nothing_or_no_number_are_no_example(weights: list[float]) -> None:
    teaches = weights[:1] == [0.0] and any(weight == 1 for weight in weights) and all(weight in (0, 1) for weight in weights)
    array = np.array(weights, np.float32)
    assert is_learned(array) == teaches
    if not teaches:
        with pytest.raises(AssertionError):
            Example(np.zeros(len(weights), np.int32), array, "gptme", "c", (1,))


@pytest.mark.parametrize(
    "change", [{"weights": [0.0, 0.0, 0.0]}, {"weights": [0.0, float("nan"), 1.0]}, {"weights": [1.0]}, {"length": 2}]
)
def test_a_row_on_the_disk_that_teaches_nothing_is_refused_by_its_number(tmp_path: Path, change: dict[str, Any]) -> None:
    made = [Example(np.arange(3, dtype=np.int32), np.array([0, 1, 1], np.float32), "gptme", "c", (1,)) for _ in range(3)]
    write_dataset(tmp_path, {"train": made, "valid": [], "test": []}, dict)
    from datasets import Dataset as ArrowDataset

    path = tmp_path / "train.arrow"
    table = ArrowDataset.from_file(str(path)).data.table
    rows = table.to_pylist()
    rows[1] |= change
    with pa.OSFile(str(tmp_path / "new"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, table.schema))
    (tmp_path / "new").replace(path)
    info = json.loads((tmp_path / "dataset.json").read_text())
    info["bytes"]["train"], info["digests"]["train"] = path.stat().st_size, digest_of([path])
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    dataset, config = Dataset.open(tmp_path), make_config({"batch_size": 3}, "test")
    with pytest.raises(UserError, match=r"train\.arrow: row 1 is no example with a learned token"):
        dataset.batches_at(0, config)
