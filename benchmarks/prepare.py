"""How fast `prepare` is, in how much memory, whether ten times the data takes ten times the time, and what masks cost:

    .venv/bin/python benchmarks/prepare.py [--megabytes 100] [--vary-prompts]

The conversations are those of benchmarks/collect.py, collected first; the model is SmolLM2-135M-Instruct; windows of 8,192 tokens.
Beside it, on a part of the same conversations, what mlx-lm's own ChatDataset takes to render and tokenize each of them once
(without masks for all turns, windows or a look at what is served).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collect import make_history, measured

from mlx_finetune.data.conversation import Conversation, read_conversations
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face

PART = 200  # conversations that are looked at in this process


def prepared(collected: Path, model: Path, out: Path) -> dict[str, Any]:
    """Speed and memory of one run of the verb, and what it counted."""
    verb = [sys.executable, "-m", "mlx_finetune.cli", "prepare", str(collected), "--model", str(model), "--out", str(out), "--json"]
    seconds, memory = measured(verb)
    size = sum(path.stat().st_size for path in collected.glob("*.jsonl") if path.name != "rejected.jsonl") / 1e6
    train = json.loads((out / "dataset.json").read_text(encoding="utf-8"))["train"]
    return {
        "megabytes": size,
        "seconds": seconds,
        "megabytes_a_second": size / seconds,
        "peak_memory_mb": memory / 1e6,
        "tokens": train["tokens"],
        "share_of_assistant_tokens_learned": train["turn_tokens_learned"] / train["turn_tokens"],
        "share_by_plain_truncation": train["turn_tokens_by_truncation"] / train["turn_tokens"],
        "exact_turns": train["exact_turns"] / train["learned_turns"],
        "served_with_all_that_came_before": train["served_as_trained"] / train["learned_turns"],
    }


def parts(conversations: Sequence[Conversation], model: Path) -> dict[str, float]:
    """Seconds of one process for the same whole conversations: tokenizers alone, ours with masks, mlx-lm's without."""
    from mlx_lm.tokenizer_utils import load
    from mlx_lm.tuner.datasets import ChatDataset

    template = ChatTemplate.load(model)
    rendered = [template.render(one.messages) for one in conversations]
    start = time.perf_counter()
    for text in rendered:
        template.special.encode(text, add_special_tokens=False)
    plain = time.perf_counter() - start
    start = time.perf_counter()
    for text in rendered:
        template.prompt_tokens(text)
    words = time.perf_counter() - start
    start = time.perf_counter()
    for one in conversations:
        template.encode(one.messages)
    whole = time.perf_counter() - start
    rows = [{"messages": [{"role": m.role, "content": m.content} for m in one.messages]} for one in conversations]
    theirs = ChatDataset(rows, load(model))
    start = time.perf_counter()
    for row in rows:
        theirs.process(row)
    peer = time.perf_counter() - start
    return {
        "tokenizers_alone": plain,
        "our_tokens_known_words": words,
        "our_rendering_masks_and_exactness": whole - words,
        "masks_to_tokenizers": (whole - words) / plain,
        "mlx_lm_render_and_tokenize": peer,
        "ours_to_mlx_lm": whole / peer,
    }


def main() -> None:
    """Prints and stores the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="of conversations, once they are collected, about")
    parser.add_argument("--vary-prompts", action="store_true", help="no two system prompts are equal")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prepare.json")
    arguments = parser.parse_args()
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    result: dict[str, Any] = {"machine": machine, "every_prompt_differs": arguments.vary_prompts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "SmolLM2-135M-Instruct"
        gguf_to_hugging_face(find_smollm2(), model)
        for title, megabytes in {"a tenth": arguments.megabytes / 10, "all": arguments.megabytes}.items():
            logs, collected = folder / f"logs {title}", folder / f"collected {title}"
            make_history(logs, int(megabytes * 1.4e6), arguments.vary_prompts)
            collect = ["collect", str(logs), "--out", str(collected), "--no-near-duplicate-search"]
            subprocess.run([sys.executable, "-m", "mlx_finetune.cli", *collect], check=True, capture_output=True)
            result[title] = prepared(collected, model, folder / f"dataset {title}")
        result["seconds_of_ten_times_the_data"] = result["all"]["seconds"] / result["a tenth"]["seconds"]
        some = list(read_conversations(folder / "collected a tenth" / "gptme.jsonl"))[:PART]
        result["one process, the same conversations whole"] = parts(some, model)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
