"""What a report is made of, written by hand: an evaluation, answers while it learned, and the losses of a long run."""

import json
from pathlib import Path
from typing import Any

import numpy as np

HOSTILE = "<script>document.title = 'owned'</script> &amp; \u202eevil </div></article><b>bold</b> <img src=x onerror=alert(1)>"
PLACEHOLDER = "[REDACTED:api-key-1]"
LOGGED = "I look first.\n\n```shell\ngit status --short\n```"
TUNED = "I look.\n\n```shell\ngit status\n```"


def row(group: str, name: str, base: float, tuned: float, spread: float | None, conversations: int = 12) -> dict[str, Any]:
    """A group of tokens; `spread`: from the difference to each end of its interval."""
    difference = tuned - base
    ends = {"low": None, "high": None} if spread is None else {"low": difference - spread, "high": difference + spread}
    counts = {"tokens": int(1000 * base), "conversations": conversations}
    return {"group": group, "name": name, **counts, "base": base, "tuned": tuned, "difference": difference, **ends}


def evaluation(checkpoint: str) -> dict[str, Any]:
    """As `evaluate` writes it."""
    rows = [row("all", "all", 3.5, 2.25, 0.125), row("source", "gptme", 3.5, 2.25, 0.125), row("source", HOSTILE, 2.0, 2.0, 0.25)]
    rows += [
        row("kind", "inside a call", 10.5, 2.0, 0.5),
        row("kind", "stop", 3.0, 3.75, 0.25),
        row("turn", "first", 2.5, 2.0, None, 1),
    ]
    losses = {"tokens": 3500, "tokens_by_source": {"gptme": 3500}}
    rates = [{"name": "valid call", "of": 40, "base": 0.125, "tuned": 0.5, "difference": 0.375, "low": 0.25, "high": 0.5}]
    rates += [
        {
            "name": "patch applies",
            "of": 1,
            "of_base": 0,
            "of_tuned": 1,
            "base": None,
            "tuned": 1.0,
            "difference": None,
            "low": None,
            "high": None,
        }
    ]
    return {
        "checkpoint": checkpoint,
        "step": 4,
        "engine": "torch",
        "split": "valid",
        "note": "",
        "base": {"loss": 3.5, "by_source": {"gptme": 3.5}, **losses},
        "tuned": {"loss": 2.25, "by_source": {"gptme": 2.25}, **losses},
        "rows": rows,
        "bootstrap": {"samples": 2000, "seed": 0, "unit": "conversation"},
        "generation": {
            "turns": 40, "conversations": 12, "limit": 256, "format": "markdown", "rates": rates,
            "samples": [sample(i) for i in range(6)],
        },
        "gptme_eval": {
            "suite": "basic", "format": "markdown", "tests": 2, "base": {"passed": 0}, "tuned": {"passed": 1},
            "rows": [{"test": "hello", "base": "fail", "tuned": "pass"}, {"test": "patch", "base": "timeout", "tuned": "fail"}],
        },
    }  # fmt: skip


def sample(number: int) -> dict[str, Any]:
    """One turn, answered by both; what the base says would do harm."""
    judged = {"base": {"valid call": False, "patch applies": None}, "tuned": {"valid call": True}}
    texts = {"question": f"the key is {PLACEHOLDER} {HOSTILE}", "logged": LOGGED, "base": f"You could. {HOSTILE}", "tuned": TUNED}
    return {"conversation": f"{number:016x}", "turn": 2, "after": "after an error", **texts, "judged": judged}


def write_evaluation(run: Path, **changes: Any) -> None:
    """evaluation.json of the best checkpoint."""
    found = evaluation((run / "best").resolve().name) | changes
    (run / "evaluation.json").write_text(json.dumps(found), encoding="utf-8")


def write_answers(run: Path) -> None:
    """samples.jsonl: two prompts at three looks; the last step was answered twice, as where a run was resumed."""
    answers = ["", "I look", "no longer so", TUNED]
    rows = [
        {"step": step, "prompt": prompt, "conversation": "c", "question": f"q {HOSTILE}", "logged": LOGGED, "answer": answer}
        for step, answer in zip((0, 2, 4, 4), answers, strict=True)
        for prompt in (0, 1)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def name_model(root: Path) -> None:
    """As where `prepare` was called on the command line: root/dataset says which model it is for."""
    path = root / "dataset" / "dataset.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(info | {"model": str(root / "base")}), encoding="utf-8")


def long_metrics(steps: int = 300, spikes: tuple[int, ...] = (143,)) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl with everything that training measures."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [held_out(0)]
    for step in range(1, steps + 1):
        loss = 2 + 2 * np.exp(-step / 60) + 0.2 * random.normal() + (3 if step in spikes else 0)
        counts = {"tokens": int(random.integers(200, 600)), "computed": 1500, "memory": 2_000_000_000 + step}
        rates = {"grad_norm": float(random.uniform(0.5, 1.5)), "learning_rate": 2e-4, "seconds": 0.5}
        rows.append({"step": step, "split": "train", "loss": float(loss), **counts, **rates})
        rows += [held_out(step)] if step % 50 == 0 else []
    return rows


def held_out(step: int) -> dict[str, Any]:
    """One look at the held-out loss."""
    loss = float(2.25 + 1.5 * np.exp(-step / 70))
    return {"step": step, "split": "valid", "loss": loss, "by_source": {"gptme": loss, "openassistant": loss + 0.3}}


def write_metrics(run: Path, rows: list[dict[str, Any]]) -> None:
    """metrics.jsonl."""
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
