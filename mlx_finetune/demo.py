"""The whole road on the embedded sample and SmolLM2-135M-Instruct: collect, prepare, train, evaluate, report, fuse, export."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from mlx_finetune.config import RunConfig, make_config
from mlx_finetune.data.collect import collect
from mlx_finetune.data.found import Sources
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.refine import Settings
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import choose_engine
from mlx_finetune.evaluation.compare import Comparison, compare
from mlx_finetune.evaluation.plot import draw_loss
from mlx_finetune.evaluation.token_kinds import IN_CALL, KINDS
from mlx_finetune.evaluation.wanted import Wanted
from mlx_finetune.export.facts import read_facts
from mlx_finetune.export.fuse import Fused
from mlx_finetune.export.gguf_write import write_gguf
from mlx_finetune.export.verify import PROBE_TEXTS, Verified, fuse_and_verify
from mlx_finetune.files import refuse_existing, write_json
from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face
from mlx_finetune.models.weights import fingerprint
from mlx_finetune.reporting import write_report
from mlx_finetune.terminal import finish, progress, say, table
from mlx_finetune.training.checkpoint import trained_template
from mlx_finetune.training.loop import Trained
from mlx_finetune.training.progress import training_progress
from mlx_finetune.training.run import execute, plan_run

SETTINGS = {
    "max_length": 768,
    "valid_fraction": 0.3,
    "rank": 8,
    "alpha": 16,
    "learning_rate": 1e-3,
    "batch_size": 1,
    "gradient_accumulation": 2,
    "epochs": 1,
    "eval_every": 1000,
    "save_every": 1000,
    "sample_prompts": 1,
    "sample_tokens": 64,
}
ANSWERS, ANSWER_TOKENS = 12, 128
PAGE = "report.html"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the model card calls it
GGUF = "tuned-q8_0.gguf"
CALL = "valid call"  # of the rates
TITLES = {
    "question": "held-out prompt: the first whose answer became a call, where one did",
    "logged": "answer in the log",
    "base": "base model",
    "tuned": "tuned model",
}


def run_demo(out: Path, engine: str, as_json: bool) -> None:
    """`mlx-finetune demo`: leaves every artefact in the new folder `out` and ends with a table."""
    engine = choose_engine(engine)
    refuse_existing(out)
    sample = Path(str(files("mlx_finetune") / "sample"))
    gguf = find_smollm2()
    say(f"1/8 model: {gguf.name} -> {out / 'model'}, a Hugging Face folder in float32")
    gguf_to_hugging_face(gguf, out / "model")
    say(f"2/8 collect: the sample's gptme logs and OpenAssistant trees -> {out / 'collected'}")
    sources = Sources(sample / "gptme-logs", (str(sample / "openassistant.trees.jsonl"),))
    collect(sources, Settings(), out / "collected")
    places = {"model": str(out / "model"), "data": str(out / "dataset"), "out": str(out / "run")}
    config = make_config(SETTINGS | places | {"engine": engine}, "demo")
    _prepare(config, out)
    say(f"4/8 train: LoRA of rank {config.rank} on {engine} -> {out / 'run'}")
    with training_progress() as advance:
        trained, opened = execute(plan_run(config), advance)
    memory = opened.peak_memory()
    picture = draw_loss(out / "run")
    say(f"5/8 evaluate: losses and {ANSWERS} answers of base and tuned model on the held-out conversations")
    del opened
    comparison = compare(out / "run", "best", engine, Wanted(generate=ANSWERS, limit=ANSWER_TOKENS), progress)[0]
    say(f"6/8 report: all of that on one page -> {out / PAGE}")
    page = out / PAGE if picture else None
    if page:
        write_report(out / "run", page)
    else:
        say("not made: pip install matplotlib")
    say(f"7/8 fuse: adapter into the original weights -> {out / 'tuned'}, then compared with base + adapter")
    checkpoint = (out / "run" / "best").resolve()
    facts = read_facts(out / "run", checkpoint, out / "model", config, BASE)
    with progress("fuse") as advance:
        fused, verified = fuse_and_verify(
            out / "model", checkpoint, out / "tuned", PROBE_TEXTS, advance, trained_template(out / "run"), facts, by_weights=False
        )
    say(f"8/8 export: the fused model for llama.cpp -> {out / GGUF}")
    with progress("gguf") as advance:
        write_gguf(out / "tuned", out / GGUF, "q8_0", advance)
    result = _result(comparison, trained, memory, fused, verified)
    write_json(out / "demo.json", result)

    def show() -> None:
        _show(result)
        for made in filter(None, (picture, page)):
            print(made)

    finish(result, as_json, show, out / "tuned", "mlx-finetune collect   (your own gptme logs)")


def _prepare(config: RunConfig, out: Path) -> None:
    say(f"3/8 prepare: windows of {config.max_length} tokens -> {config.data}")
    template = ChatTemplate.load(Path(config.model))
    origin = {"model": config.model, "model_fingerprint": fingerprint(Path(config.model))}
    with progress("prepare") as advance:
        prepare([out / "collected"], template, config, Path(config.data), origin, advance)


def _result(comparison: Comparison, trained: Trained, memory: int, fused: Fused, verified: Verified) -> dict[str, Any]:
    tuned, generation = comparison.tuned, comparison.generation
    assert tuned is not None and generation is not None  # of a run, asked for answers
    calls = next(rate for rate in generation["rates"] if rate["name"] == CALL)
    in_calls = next(row for row in comparison.rows if row.name == KINDS[IN_CALL])
    became = (one for one in generation["samples"] if one["judged"]["tuned"].get(CALL) and not one["judged"]["base"].get(CALL))
    sample = next(became, generation["samples"][0])
    return {
        "engine": comparison.engine,
        "held_out_loss_base": comparison.base.loss,
        "held_out_loss_tuned": tuned.loss,
        "loss_inside_calls_base": in_calls.base,
        "loss_inside_calls_tuned": in_calls.tuned,
        "valid_calls_base": calls["base"],
        "valid_calls_tuned": calls["tuned"],
        "valid_calls_of": calls["of"],
        "steps": trained.steps,
        "tokens_learned": trained.tokens_learned,
        "tokens_read_per_second": trained.tokens_seen / trained.seconds,
        "tokens_learned_per_second": trained.tokens_learned / trained.seconds,
        "peak_memory": memory,
        "tensors_fused": fused.tensors,
        "verified_by": verified.backend,
        "missing_keys": verified.missing,
        "unexpected_keys": verified.unexpected,
        "largest_logit_difference": verified.largest_difference,
        "answers": {name: sample[name] for name in TITLES},
    }


def _show(result: dict[str, Any]) -> None:
    keys = len(result["missing_keys"]) + len(result["unexpected_keys"])
    calls = (f"{result[f'valid_calls_{which}']:.0%}" for which in ("base", "tuned"))
    rows = [
        ("held-out loss, base -> tuned", _change(result, "held_out_loss")),
        ("of it inside tool calls", _change(result, "loss_inside_calls")),
        ("answers with a valid tool call", f"{' -> '.join(calls)} of {result['valid_calls_of']}"),
        ("tokens learned", f"{result['tokens_learned']:,} in {result['steps']} steps"),
        (
            "tokens a second",
            f"{result['tokens_read_per_second']:.0f} read, {result['tokens_learned_per_second']:.0f} of them learned",
        ),
        ("peak memory", f"{result['peak_memory'] / 1e9:.2f} GB"),
        (f"fused model in {result['verified_by']}", f"{keys} missing or unexpected keys"),
        ("largest logit difference", f"{result['largest_logit_difference']:.1e}"),
    ]
    table(f"demo on {result['engine']}", rows)
    for name, title in TITLES.items():
        print(f"--- {title}\n{result['answers'][name].strip()}\n")


def _change(result: dict[str, Any], name: str) -> str:
    base, tuned = result[f"{name}_base"], result[f"{name}_tuned"]
    return f"{base:.4f} -> {tuned:.4f}  ({tuned - base:+.4f})"
