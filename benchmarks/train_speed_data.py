"""What train_speed.py trains on, and what `mlx_lm.lora` would learn of it.

(a) gptme logs with their system prompts, (b) the same mixed with OpenAssistant, (c) agent chats from a seeded generator: one
system prompt for the whole collection, lengths with a long tail. Each is collected and prepared as a person's own data is, once
whole (the rows that mlx_lm.lora reads) and once for each length as windows.
"""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from collect import varied
from safetensors.numpy import load_file, save_file

from mlx_finetune.config import make_config
from mlx_finetune.data.batches import WIDTHS, Example
from mlx_finetune.data.collect import collect
from mlx_finetune.data.conversation import Conversation, Message, Role, read_conversations, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.found import Sources
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.refine import Settings
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines.adapter import LAYER

SHARED = Path(__file__).parents[2] / "shared" / "data"
SAMPLE = Path(str(files("mlx_finetune") / "sample" / "gptme-logs"))  # without the long prompts: where there is no shared folder
LOGS = SHARED / "gptme-logs" if (SHARED / "gptme-logs").is_dir() else SAMPLE
TREES = SHARED / "openassistant" / "oasst1_ready.trees.jsonl.gz"
NAMES = {"a": "gptme logs" if LOGS != SAMPLE else "gptme sample", "b": "with OpenAssistant", "c": "generated agent chats"}
WHOLE = 2**20  # a window that holds any of the conversations
CONVERSATIONS = 40
PROMPT_SHARE = 0.77  # of all tokens, measured on logs of the real gptme
ASSISTANT_SHARE = (0.20, 0.36)  # of the other tokens
MEDIAN, SPREAD = 650, 0.8  # of the tokens beside the prompt: log-normal, so one in a hundred is six times the median
USER_SHARE, ROUND = 0.1, 300  # what the person writes; tokens in a round of question or output, and answer
Count = Callable[[str], int]  # tokens of a text
Pools = dict[str, list[str]]  # lines by who wrote them


def make_collections(folder: Path, template: ChatTemplate) -> tuple[dict[str, Path], dict[str, str]]:
    """The collected folders by letter, and why one is missing."""
    collected, missing = {letter: folder / f"collected-{letter}" for letter in NAMES}, {}
    collect(Sources(LOGS, ()), Settings(), collected["a"])
    if TREES.is_file():
        collect(Sources(LOGS, (str(TREES),)), Settings(), collected["b"])
    else:
        missing["b"] = f"no {TREES}"
        del collected["b"]
    sample = list(read_conversations(collected["a"] / "gptme.jsonl"))
    made = generate(pools_of(sample), lambda text: len(template.prompt_tokens(text)))
    collected["c"].mkdir()
    write_conversations(collected["c"] / "chat.jsonl", made)
    return collected, missing


def windows(collected: Path, template: ChatTemplate, out: Path, max_length: int) -> Dataset:
    """Prepared for training alone, nothing held out."""
    values = {"max_length": max_length, "valid_fraction": 0, "openassistant_valid_fraction": 0}
    prepare([collected], template, make_config(values, "train_speed"), out, {})
    return Dataset.open(out)


def pools_of(conversations: Iterable[Conversation]) -> Pools:
    """The lines of real chats by role; a system message behind the first is a tool's output, as gptme writes it."""
    pools: Pools = {"prompt": [], "user": [], "assistant": [], "output": []}
    for conversation in conversations:
        for place, message in enumerate(conversation.messages):
            kind = message.role if message.role in pools else "output" if place else "prompt"
            pools[kind] += [line for line in message.content.splitlines() if line.strip()]
    return pools


def generate(
    pools: Pools, count: Count, conversations: int = CONVERSATIONS, median: float = MEDIAN, seed: int = 0
) -> list[Conversation]:
    """Agent chats: the same for the same arguments. The prompt is as long as `PROMPT_SHARE` of all tokens asks for."""
    rng = random.Random(seed)
    sizes = {line: count(line) + 1 for lines in pools.values() for line in lines}
    bodies = [_body(pools, sizes, rng, median * rng.lognormvariate(0, SPREAD)) for _ in range(conversations)]
    read = sum(count(message.content) for body in bodies for message in body)
    tokens = read / conversations * PROMPT_SHARE / (1 - PROMPT_SHARE)
    prompt = Message("system", _text(pools["prompt"], sizes, rng, tokens))
    return [Conversation((prompt, *body), "chat", f"generated-{i}", "ours") for i, body in enumerate(bodies)]


def _body(pools: Pools, sizes: dict[str, int], rng: random.Random, tokens: float) -> list[Message]:
    """A question, then answers with a tool's output between them, of about so many tokens."""
    rounds, share = max(1, round(tokens / ROUND)), rng.uniform(*ASSISTANT_SHARE)
    user = tokens * (USER_SHARE if rounds > 1 else 1 - share)
    output = tokens * (1 - share - USER_SHARE) / max(rounds - 1, 1)
    parts: list[tuple[Role, str, float]] = [("user", "user", user)]
    for place in range(rounds):
        parts += [("assistant", "assistant", tokens * share / rounds)]
        parts += [("system", "output", output)] if place < rounds - 1 else []
    return [Message(role, _text(pools[pool], sizes, rng, size)) for role, pool, size in parts]


def _text(lines: Sequence[str], sizes: dict[str, int], rng: random.Random, tokens: float) -> str:
    """Lines at random, with other words in them, until there are about so many tokens; half a line where that is nearer."""
    chosen: list[str] = []
    while tokens > 0:
        line = rng.choice(lines)
        words = line.split(" ")
        kept = words if sizes[line] <= tokens else words[: max(1, round(len(words) * tokens / sizes[line]))]
        chosen.append(varied(" ".join(kept), rng, 0.15))
        tokens -= max(1.0, sizes[line] * len(kept) / len(words))
    return "\n".join(chosen).strip()  # as messages are served


def row_of(dataset: Dataset, width: int) -> Example:
    """One example that fills `width` inputs with real conversations one behind the other.

    As much of it is learned as of all, and it ends on a learned token, as every window does.
    """
    examples = list(dataset.train) * (1 + 2 * width // sum(dataset.train.lengths))
    tokens, weights = (np.concatenate([getattr(e, name) for e in examples]) for name in ("tokens", "weights"))
    learned = np.convolve(weights > 0, np.ones(width), "valid") / width
    far = np.abs(learned - np.mean(weights > 0))[: len(weights) - width] + (weights[width:] == 0)
    start = int(np.argmin(far))
    tokens, weights = tokens[start : start + width + 1], weights[start : start + width + 1].copy()
    weights[0] = 0
    return Example(tokens, weights, "rows", "row", ())


def cut_model(model: Path, out: Path, layers: int) -> Path:
    """A copy of a Hugging Face folder with its first layers alone."""
    out.mkdir()
    for path in model.glob("*.json"):
        shutil.copy(path, out)
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": layers}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    kept = {n: a for n, a in load_file(model / "model.safetensors").items() if not (m := LAYER.search(n)) or int(m[1]) < layers}
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    return out


def width_of(length: int) -> int:
    """Inputs of a row, padded, that holds an example of so many tokens."""
    return -(-(length - 1) // WIDTHS) * WIDTHS


@dataclass(frozen=True)
class Shipped:
    """What `mlx_lm.lora` makes of a collection at one `--max-seq-length`, counted on its own batches."""

    shapes: tuple[tuple[int, int], ...]  # rows and inputs of each batch
    total: int  # assistant tokens of the collection
    learned: int  # of them, where the loss is on everything
    learned_masked: int  # with --mask-prompt
    nan_batches: int  # with --mask-prompt: no token left to learn, so the loss is 0/0 and the adapter is lost


def shipped(whole: Dataset, model: Path, max_length: int, batch_size: int) -> Shipped:
    """Runs mlx-lm's own ChatDataset and `iterate_batches`, and applies the mask of its `default_loss`.

    The tokens of a row tell which example it is of; both sides render the same messages.
    """
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import iterate_batches

    dataset = CacheDataset(chat_rows(whole, model))
    examples = list(whole.train)
    total = sum(int((e.weights > 0).sum()) for e in examples)
    shapes, learned, masked, nan = [], 0, 0, 0
    np.random.seed(0)  # noqa: NPY002  (mlx-lm shuffles with the global generator)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):  # a warning for each long batch
        batches = list(iterate_batches(dataset, min(batch_size, len(dataset)), max_length))
    for tokens, places in batches:
        batch, (offsets, lengths) = np.array(tokens), np.array(places).T
        steps = np.arange(1, batch.shape[1])
        of_turns = np.zeros((len(batch), len(steps)), bool)
        for row, length in enumerate(lengths):
            weights = _example_of(batch[row, :length], examples).weights[1:length]
            of_turns[row, : len(weights)] = weights > 0
        seen = steps <= lengths[:, None]
        in_loss = seen & (steps >= offsets[:, None])
        shapes.append((len(batch), len(steps)))
        learned, masked, nan = (
            learned + int((of_turns & seen).sum()),
            masked + int((of_turns & in_loss).sum()),
            nan + (not in_loss.any()),
        )
    return Shipped(tuple(shapes), total, learned, masked, nan)


def chat_rows(whole: Dataset, model: Path, mask_prompt: bool = True) -> Any:
    """mlx-lm's dataset of the file that `prepare` wrote beside the examples."""
    from mlx_lm.tokenizer_utils import load
    from mlx_lm.tuner.datasets import ChatDataset

    lines = (whole.folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return ChatDataset([json.loads(line) for line in lines], load(model), mask_prompt=mask_prompt)


def _example_of(tokens: np.ndarray, examples: Sequence[Example]) -> Example:
    """The example that these tokens are of, by the start that they share: ours ends with what is learned last, and an answer of
    which nothing is left in front of a native call has no line break there.
    """

    def common(example: Example) -> int:
        length = min(len(tokens), len(example.tokens))
        return int(np.argmin([*(tokens[:length] == example.tokens[:length]), False]))

    return max(examples, key=common)
