"""The whole road on the embedded sample and SmolLM2-135M-Instruct: collect, prepare, train, evaluate, fuse, export."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlx_finetune.config import RunConfig, make_config
from mlx_finetune.data.collect import Sources, collect
from mlx_finetune.data.conversation import Conversation, read_conversations
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.refine import Settings
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import Engine, choose_engine
from mlx_finetune.evaluation.compare import Comparison, compare
from mlx_finetune.evaluation.plot import draw_loss
from mlx_finetune.export.facts import read_facts
from mlx_finetune.export.fuse import Fused
from mlx_finetune.export.gguf_write import write_gguf
from mlx_finetune.export.verify import PROBE_TEXTS, Verified, fuse_and_verify
from mlx_finetune.files import refuse_existing, write_json
from mlx_finetune.models.gguf import find_smollm2, gguf_to_hugging_face
from mlx_finetune.models.weights import fingerprint
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
}
ANSWER_TOKENS = 80
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the model card calls it
GGUF = "tuned-q8_0.gguf"
TITLES = {"prompt": "held-out prompt", "logged": "answer in the log", "base": "base model", "tuned": "tuned model"}


@dataclass(frozen=True)
class Answers:
    """One answer of each model to the same held-out prompt."""

    prompt: str
    logged: str
    base: str
    tuned: str


def run_demo(out: Path, engine: str, as_json: bool) -> None:
    """`mlx-finetune demo`: leaves every artefact in the new folder `out` and ends with a table."""
    engine = choose_engine(engine)
    refuse_existing(out)
    sample = Path(str(files("mlx_finetune") / "sample"))
    gguf = find_smollm2()
    say(f"1/7 model: {gguf.name} -> {out / 'model'}, a Hugging Face folder in float32")
    gguf_to_hugging_face(gguf, out / "model")
    say(f"2/7 collect: the sample's gptme logs and OpenAssistant trees -> {out / 'collected'}")
    sources = Sources(sample / "gptme-logs", (str(sample / "openassistant.trees.jsonl"),))
    collect(sources, Settings(), out / "collected")
    places = {"model": str(out / "model"), "data": str(out / "dataset"), "out": str(out / "run")}
    config = make_config(SETTINGS | places | {"engine": engine}, "demo")
    info, template = _prepare(config, out)
    say(f"4/7 train: LoRA of rank {config.rank} on {engine} -> {out / 'run'}")
    with training_progress() as advance:
        trained, opened = execute(plan_run(config), advance)
    memory = opened.peak_memory()
    picture = draw_loss(out / "run")
    say("5/7 evaluate: base and tuned model on the held-out conversations")
    del opened
    comparison, opened = compare(out / "run", "best", engine)
    answers = _answers(opened, template, config, info)
    del opened
    say(f"6/7 fuse: adapter into the original weights -> {out / 'tuned'}, then compared with base + adapter")
    checkpoint = (out / "run" / "best").resolve()
    facts = read_facts(out / "run", checkpoint, out / "model", config, BASE)
    with progress("fuse") as advance:
        fused, verified = fuse_and_verify(
            out / "model", checkpoint, out / "tuned", PROBE_TEXTS, advance, trained_template(out / "run"), facts, by_weights=False
        )
    say(f"7/7 export: the fused model for llama.cpp -> {out / GGUF}")
    with progress("gguf") as advance:
        write_gguf(out / "tuned", out / GGUF, "q8_0", advance)
    result = _result(comparison, trained, memory, fused, verified, answers)
    write_json(out / "demo.json", result)

    def show() -> None:
        _show(result, answers)
        if picture:
            print(picture)

    finish(result, as_json, show, out / "tuned", "mlx-finetune collect   (your own gptme logs)")


def _prepare(config: RunConfig, out: Path) -> tuple[dict[str, Any], ChatTemplate]:
    say(f"3/7 prepare: windows of {config.max_length} tokens -> {config.data}")
    template = ChatTemplate.load(Path(config.model))
    origin = {"model": config.model, "model_fingerprint": fingerprint(Path(config.model))}
    with progress("prepare") as advance:
        return prepare([out / "collected"], template, config, Path(config.data), origin, advance), template


def _answers(engine: Engine, template: ChatTemplate, config: RunConfig, info: dict[str, Any]) -> Answers:
    """Greedy answers to the first user message of a held-out conversation."""
    conversation = _held_out_conversation(Path(config.data), info)
    question = next(i for i, m in enumerate(conversation.messages) if m.role == "user")
    messages = conversation.messages[: question + 1]
    prompt = template.prompt(messages).tolist()
    tuned = template.decode(list(engine.generate(prompt, ANSWER_TOKENS, template.stop_ids)))
    engine.load_state(engine.initial(), step=0)
    base = template.decode(list(engine.generate(prompt, ANSWER_TOKENS, template.stop_ids)))
    logged = next(m.content for m in conversation.messages[question:] if m.role == "assistant")
    return Answers(messages[-1].content, logged, base, tuned)


def _held_out_conversation(data: Path, info: dict[str, Any]) -> Conversation:
    collected = read_conversations(data.parent / "collected" / "gptme.jsonl")
    return min((c for c in collected if c.group in info["held_out_groups"]), key=lambda c: c.group)


def _result(
    comparison: Comparison, trained: Trained, memory: int, fused: Fused, verified: Verified, answers: Answers
) -> dict[str, Any]:
    assert comparison.tuned
    return {
        "engine": comparison.engine,
        "held_out_loss_base": comparison.base.loss,
        "held_out_loss_tuned": comparison.tuned.loss,
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
        "answers": vars(answers),
    }


def _show(result: dict[str, Any], answers: Answers) -> None:
    base, tuned = result["held_out_loss_base"], result["held_out_loss_tuned"]
    keys = len(result["missing_keys"]) + len(result["unexpected_keys"])
    rows = [
        ("held-out loss, base", f"{base:.4f}"),
        ("held-out loss, tuned", f"{tuned:.4f}  ({tuned - base:+.4f})"),
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
    for title, text in vars(answers).items():
        print(f"--- {TITLES[title]}\n{text.strip()}\n")
