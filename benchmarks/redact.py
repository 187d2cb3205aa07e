"""How fast redaction reads text, clean and full of secrets, in one run:

    .venv/bin/python benchmarks/redact.py [--megabytes 8] [--out benchmarks/results/redact.json]

Conversations: the genuine logs of ../shared (or the embedded sample), with numbers varied so that none is read twice. Texts with
secrets and harmless ones that look alike are those of the tests; of them is also said how many secrets are gone and how many
harmless texts changed. detect-secrets (a line at a time, as its `scan_line` reads) is the peer where it is installed.
"""

import argparse
import json
import os
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from harmless_texts import harmless_texts  # noqa: E402
from secret_texts import secret_samples  # noqa: E402

from mlx_finetune.data.conversation import Conversation, Message  # noqa: E402
from mlx_finetune.data.redact import Ledger, Rules, redact_conversation, redact_text  # noqa: E402
from mlx_finetune.data.sources import gptme  # noqa: E402

LOGS = ROOT.parent / "shared" / "data" / "gptme-logs"
NUMBER = re.compile(r"\d+")


def genuine(megabytes: float, seed: int) -> list[Conversation]:
    """Genuine conversations, repeated with other numbers; without ../shared, the tests' harmless texts as messages."""
    rng = random.Random(seed)
    logs, _ = gptme.find_logs(LOGS) if LOGS.is_dir() else ([], None)
    originals = [one for log in logs for one in gptme.read_log(log) if isinstance(one, Conversation)]
    originals = originals or [Conversation(tuple(Message("user", text) for text in harmless_texts(0)), "own", "g", "own")]
    varied: list[Conversation] = []
    size = 0
    while size < megabytes * 1e6:
        one = originals[len(varied) % len(originals)]
        messages = [replace(m, content=NUMBER.sub(lambda _: str(rng.randrange(10**6)), m.content)) for m in one.messages]
        varied.append(replace(one, messages=tuple(messages)))
        size += size_of(varied[-1])
    return varied


def size_of(*conversations: Conversation) -> int:
    """Bytes of their texts."""
    return sum(len(message.content.encode()) for one in conversations for message in one.messages)


def cleaned(text: str) -> str:
    """Without secrets."""
    return redact_text(text, Rules(), Ledger().name)


def rate(work: Callable[[Any], object], items: Iterable[Any], size: float) -> float:
    """MB/s of processor time."""
    start = time.process_time()
    for item in items:
        work(item)
    return round(size / 1e6 / (time.process_time() - start), 3)


def main() -> None:
    """Prints the figures and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--out", type=Path, help="also write them as JSON, with the machine")
    arguments = parser.parse_args()
    cleaned("the table of literals is made once, before the clock runs")
    clean, more = genuine(arguments.megabytes, seed=0), genuine(arguments.megabytes, seed=1)  # no text is read twice
    samples = [sample for seed in range(8) for sample in secret_samples(seed)]
    harmless = [text for seed in range(8) for text in harmless_texts(seed)]
    home = Rules.for_person(Path("/home/dev"), "kim")
    secret_size = sum(len(sample.text.encode()) for sample in samples)
    figures: dict[str, Any] = {
        "conversations_mb_s": {
            "secrets only": rate(lambda c: redact_conversation(c, Rules(), Ledger().name), clean, size_of(*clean)),
            "and the person": rate(lambda c: redact_conversation(c, home, Ledger().name), more, size_of(*more)),
        },
        "texts_of_secrets_mb_s": rate(lambda sample: cleaned(sample.text), samples, secret_size),
        "secrets_left": f"{sum(any(map(cleaned(sample.text).count, sample.secrets)) for sample in samples)} of {len(samples)}",
        "harmless_changed": f"{sum(cleaned(text) != text for text in harmless)} of {len(harmless)}",
    }
    if find_spec("detect_secrets"):
        figures["detect_secrets"] = detect_secrets(clean[:2], [sample.text for sample in samples])
    report = {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version()}
    print(json.dumps(figures, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(report | figures, indent=2) + "\n", encoding="utf-8")


def detect_secrets(conversations: list[Conversation], texts: list[str]) -> dict[str, float]:
    """Its rates on a part of the same texts: it takes seconds a megabyte."""
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import default_settings

    lines = [line for one in conversations for message in one.messages for line in message.content.splitlines()]
    of_secrets = [line for text in texts[:300] for line in text.splitlines()]
    with default_settings():
        return {
            "conversations_mb_s": rate(lambda line: list(scan_line(line)), lines, sum(len(line.encode()) for line in lines)),
            "texts_of_secrets_mb_s": rate(lambda line: list(scan_line(line)), of_secrets, sum(map(len, of_secrets))),
        }


if __name__ == "__main__":
    main()
