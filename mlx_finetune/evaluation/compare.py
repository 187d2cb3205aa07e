"""Base against tuned on the same held-out batches, by one engine: the base is the model with its adapter at zero."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_finetune.config import RunConfig, load_config, make_config
from mlx_finetune.data.batches import Batch
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import Engine, choose_engine, open_engine
from mlx_finetune.engines.supported import for_a_look
from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.bootstrap import SAMPLES, UNIT
from mlx_finetune.evaluation.generation import Answer, Question, answer_all, generation_json, questions
from mlx_finetune.evaluation.losses import Row, Tokens, held_out, measure, rows_of, tokens_of
from mlx_finetune.evaluation.token_kinds import told_examples
from mlx_finetune.evaluation.wanted import LOSSES, Wanted
from mlx_finetune.files import read_json, write_json
from mlx_finetune.installed import PACKAGES, versions
from mlx_finetune.models.hub import check_model_folder, model_folder
from mlx_finetune.models.weights import fingerprint
from mlx_finetune.nearest import did_you_mean
from mlx_finetune.terminal import waiting
from mlx_finetune.training.checkpoint import Origin, check_origin, resume
from mlx_finetune.training.checks import check_mlx, check_names, check_settings
from mlx_finetune.training.held_out import HeldOut
from mlx_finetune.training.manifest import check_whole, is_of, made_from, read_progress
from mlx_finetune.training.memory_watch import loading

WHERE = {"valid": "", "test": " for a test"}
HOLD_OUT = {
    "valid": "prepare two or more conversations, with a valid_fraction",
    "test": "prepare with --test-fraction 0.1, or leave --test out",
}
NO_ANSWERS = "no answers were asked for: of {} turns each is longer than the limit in the log, or has calls that cannot be read"
PREPARE = "run mlx-finetune prepare again, with this model"
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]  # a title -> (done, of how many)


@dataclass(frozen=True)
class Comparison:
    """Before and after, on what was held out: losses in nats a learned token, and what was answered (see evaluation.json).

    `tuned` is None where a model was measured alone.
    """

    checkpoint: str
    step: int
    engine: str
    base: HeldOut
    tuned: HeldOut | None
    note: str = ""  # how the base was read otherwise than in training
    split: str = "valid"
    rows: tuple[Row, ...] = ()
    bootstrap: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] | None = None
    gptme_eval: dict[str, Any] | None = None
    made_from: dict[str, str] = field(default_factory=dict)  # see training/manifest.py
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@contextmanager
def no_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Says nothing."""
    yield lambda done, total: None


def find_checkpoint(run: Path, name: str) -> Path:
    """`best`, `latest` or `step-000100` of a run.

    Raises:
        UserError: no such run or checkpoint.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run (no config.yaml)", hint="mlx-finetune train makes one")
    for folder in (run / name, run / "checkpoints" / name):
        if (folder / "progress.json").is_file():
            return folder.resolve()
    if damaged := [folder for folder in (run / name, run / "checkpoints" / name) if folder.exists() and name]:
        hint = "bring the file back, remove that folder, or name another --checkpoint"
        raise UserError(f"{damaged[0].resolve()}: no progress.json: not a whole checkpoint", hint)
    there = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    found = f"there are {', '.join(there)}" if there else "train has not saved one yet"
    links = [link for link in ("best", "latest") if (run / link).exists()]
    raise UserError(f"{run}: no checkpoint {name!r}", hint=did_you_mean(name, [*there, *links], found))


def open_run(run: Path, checkpoint: str, engine: str = "") -> tuple[RunConfig, Path, Path]:
    """Config (with `engine` put in where given), model folder and checkpoint folder of a run.

    Raises:
        UserError: no such checkpoint, it is not whole, or the model is not the one that it was trained on.
    """
    folder = find_checkpoint(run, checkpoint)
    progress = check_whole(folder, moments=False)
    config = load_config(run / "config.yaml", {})
    check_settings(folder, config)
    if engine:
        config = make_config(config.to_dict() | {"engine": engine}, "--engine")
    model = model_folder(config.model)
    check_model_folder(model)
    check_origin(folder, progress, Origin(data=str(progress.get("data")), model=fingerprint(model)))
    return config, model, folder


def open_tuned(config: RunConfig, model: Path, dataset: Dataset, checkpoint: Path) -> Engine:
    """An engine with the checkpoint in it; raises UserError where model or data are not those it was trained on."""
    if (name := choose_engine(config.engine)) == "mlx":
        check_mlx(model, dataset)
    config = for_a_look(config, name)
    with loading(model), waiting(f"loading {checkpoint}"):
        engine = open_engine(config, model)
        check_names(engine, model)
        resume(checkpoint, engine, config, Origin(data=dataset.id, model=fingerprint(model)))
    return engine


def _note(config: RunConfig, engine: str) -> str:
    if for_a_look(config, engine).quantization == config.quantization:
        return ""
    return f"both on the base as it is stored; training had it in {config.quantization}"


def _before(path: Path, made: Mapping[str, str]) -> dict[str, Any] | None:
    """What gptme-eval said of the same checkpoint in an earlier evaluation: it took long; raises UserError where it is damaged."""
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict) or not isinstance(kept := found.get("gptme_eval"), dict | None):
        raise UserError(f"{path}: not what evaluate writes", hint="remove it: evaluate writes it anew")
    return kept if is_of(found, made) else None


def compare(
    run: Path, checkpoint: str = "best", engine: str = "", wanted: Wanted = LOSSES, progress: Progress = no_progress
) -> tuple[Comparison, Engine]:
    """Writes `evaluation.json` into the run, by the run's own engine unless another is named; it is given back tuned.

    Raises:
        UserError: the run has no such checkpoint, or nothing was held out.
    """
    config, model, folder = open_run(run, checkpoint, engine)
    made = made_from(folder)
    of_gptme = _before(run / "evaluation.json", made)
    material = Material.of(Dataset.open(Path(config.data)), model, config.batch_size, wanted)
    opened = open_tuned(config, model, material.dataset, folder)
    tuned, state = material.measure(opened, "tuned", progress), opened.state()
    opened.load_state(opened.initial(), updates=0)
    base = material.measure(opened, "base", progress)
    step = int(read_progress(folder)["step"])
    opened.load_state(state, step)
    comparison = replace(material.compared(base, tuned), checkpoint=folder.name, step=step, engine=opened.name)
    note = "; ".join(filter(None, (_note(config, opened.name), comparison.note)))
    comparison = replace(comparison, note=note, gptme_eval=of_gptme, made_from=made, versions=versions(PACKAGES))
    write_json(run / "evaluation.json", comparison.to_json())
    return comparison, opened


def measure_model(
    model: Path, data: Path, engine: str = "", wanted: Wanted = LOSSES, progress: Progress = no_progress
) -> Comparison:
    """A model as it is, alone, on what a prepared folder holds out.

    Raises:
        UserError: it has another tokenizer or chat template than the folder was prepared with, or nothing was held out.
    """
    model = model_folder(str(model))
    config = make_config({"model": str(model), "data": str(data)} | ({"engine": engine} if engine else {}), "evaluate")
    check_model_folder(model)
    material = Material.of(Dataset.open(data), model, config.batch_size, wanted)
    name = choose_engine(config.engine)
    if name == "mlx":
        check_mlx(model, material.dataset)
    with loading(model), waiting(f"loading {model}"):
        opened = open_engine(for_a_look(config, name), model, adapted=False)
    base = material.measure(opened, "model", progress)
    made = {"model": fingerprint(model), "data": material.dataset.id}
    return replace(material.compared(base, None), engine=opened.name, made_from=made, versions=versions(PACKAGES))


@dataclass(frozen=True)
class Measured:
    """What one model made of it: the loss of each token, and its answers."""

    losses: np.ndarray  # float64 [tokens]
    answers: list[Answer]


@dataclass(frozen=True)
class Material:
    """What two models are measured by."""

    dataset: Dataset
    wanted: Wanted
    batches: dict[str, list[Batch]]
    tokens: Tokens
    template: ChatTemplate
    asked: list[Question]
    left_out: int  # turns that could not be asked

    @classmethod
    def of(cls, dataset: Dataset, model: Path, batch_size: int, wanted: Wanted) -> "Material":
        """Raises UserError where nothing was held out, or the model is not the one that the data is for."""
        if not len(getattr(dataset, wanted.split)):
            raise UserError(f"{dataset.folder}: nothing was held out" + WHERE[wanted.split], hint=HOLD_OUT[wanted.split])
        template = ChatTemplate.load(model, str(dataset.info.get("chat_template") or ""))
        if template.fingerprint != dataset.info.get("tokenizer"):
            raise UserError(f"{model}: another tokenizer than the one that {dataset.folder} was prepared with", hint=PREPARE)
        told = told_examples(dataset, wanted.split, template)
        places = dataset.held_out_places(batch_size, wanted.split)
        asked, left_out = questions(told, template, wanted.generate, wanted.limit) if wanted.generate else ([], 0)
        batches = dataset.held_out(batch_size, wanted.split)
        return cls(dataset, wanted, batches, tokens_of(told, places), template, asked, left_out)

    def measure(self, engine: Engine, who: str, progress: Progress) -> Measured:
        """One pass over the tokens, and an answer to each question."""
        with progress(f"{who}: losses") as advance:
            losses = measure(engine, self.batches, advance)
        if not self.asked:
            return Measured(losses, [])
        with progress(f"{who}: answers") as advance:
            return Measured(losses, answer_all(engine, self.template, self.asked, self.wanted.limit, advance))

    def compared(self, base: Measured, tuned: Measured | None) -> Comparison:
        """Base beside tuned, with intervals; `tuned` None: the one model alone."""
        seed, after = self.wanted.seed, tuned.losses if tuned else None
        generation = None
        if self.asked:
            answers = base.answers, tuned.answers if tuned else None
            generation = generation_json(self.asked, self.left_out, self.wanted.limit, *answers, seed)
        return Comparison(
            checkpoint="",
            step=0,
            engine="",
            base=held_out(self.tokens, base.losses),
            tuned=None if after is None else held_out(self.tokens, after),
            split=self.wanted.split,
            rows=tuple(rows_of(self.tokens, base.losses, after, seed)),
            bootstrap={"samples": SAMPLES, "seed": seed, "unit": UNIT},
            generation=generation,
            note=NO_ANSWERS.format(self.left_out) if self.wanted.generate and not self.asked else "",
        )
