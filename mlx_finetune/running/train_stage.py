"""The stage `train` of a road: the run of just these inputs is found and gone on with, else a new one begins beside the others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_finetune.commands import announce, trained_run
from mlx_finetune.config import FIELDS, RunConfig, load_config
from mlx_finetune.data.prepare import SETTINGS
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.hub import model_folder
from mlx_finetune.models.weights import fingerprint
from mlx_finetune.running.stage import Stage, Verdict, Work, free
from mlx_finetune.terminal import Done
from mlx_finetune.training.checkpoint import Origin
from mlx_finetune.training.checkpoints import last_checkpoint
from mlx_finetune.training.checks import MAY_CHANGE, layers_of, may_change
from mlx_finetune.training.folder import refuse_run
from mlx_finetune.training.made_from import FILE
from mlx_finetune.training.manifest import read_progress
from mlx_finetune.training.metrics import read_metrics
from mlx_finetune.training.patience import out_of_patience
from mlx_finetune.training.run import Plan, plan_resume, plan_run
from mlx_finetune.training.start import adapter_id, started

PLACES = ("model", "data", "out")


@dataclass(frozen=True)
class Candidate:
    """A run that is there, and why it is not the one that is wanted; None where it is."""

    run: Path
    differs: str | None


class TrainStage(Stage):
    """One run folder for each set of inputs."""

    name, after = "train", ("prepare",)

    def look(self) -> Verdict:
        """Looks at every run of the road, the newest first."""
        there = self._compared()
        fitting = next((one.run for one in there if one.differs is None), None)
        if fitting is None:
            if not there:
                return Verdict("do", f"a new run in {new_place(self.first).name}")
            name = new_place(self.first).name
            return Verdict("do", f"a new run in {name}: {there[0].run.name} was made with {there[0].differs}, and stays")
        self.work.found[self.name] = fitting
        plan = self._resumed(fitting)
        if finished(plan):
            return Verdict("skip", f"{fitting.name}, {done_steps(plan)} of {plan.steps} steps{self._noticed(fitting)}")
        return Verdict("go on", f"{fitting.name} goes on at step {done_steps(plan)} of {plan.steps}")

    def do(self) -> Done:
        """Begins, or goes on."""
        fitting = next((one.run for one in self._compared() if one.differs is None), None)
        if fitting:
            plan = self._resumed(fitting)
        else:
            told = {"out": str(new_place(self.first)), "data": str(self.work.data)}
            plan = plan_run(self.work.road.config.model_copy(update=told))
        announce(plan)
        with self.work.state.writing(plan.run):
            done = trained_run(plan, self.work.command)
            self.work.found[self.name] = plan.run
            self._keep(plan.run)
        return done

    def adopt(self) -> None:
        """Keeps the record of the run that is there."""
        run, record = self.work.found[self.name], self.record
        if record is None or record.inputs != self._inputs(run) or self.work.state.place(record) != run:
            self._keep(run)

    @property
    def first(self) -> Path:
        """Where the first run is made; later ones are called so with a number behind."""
        return first_run(self.work)

    def _resumed(self, run: Path) -> Plan:
        config = self.work.road.config
        told = {name: config.to_dict()[name] for name in MAY_CHANGE & config.model_fields_set if name not in PLACES}
        told |= {"adapter_path": config.adapter_path} if config.adapter_path else {}
        return plan_resume(run, told | {"data": str(self.work.data), "model": config.model})

    def _compared(self) -> list[Candidate]:
        """Every run of the road, the newest first."""
        runs = runs_of(self.first)
        if not runs:
            return []
        wanted = self._wanted()
        model = fingerprint(model_folder(self.work.road.config.model))
        origin = Origin(data=self.work.dataset.id, model=model, adapter=adapter_id(wanted.adapter_path))
        return [self._compare(run, wanted, origin) for run in runs]

    def _compare(self, run: Path, wanted: RunConfig, wanted_origin: Origin) -> Candidate:
        """Settings and origin of a run against what is wanted now."""
        before = load_config(run / "config.yaml", {})
        for name in FIELDS:
            then, now = before.to_dict()[name], wanted.to_dict()[name]
            if then != now and not may_change(name, then, now):
                return Candidate(run, f"{name} {then}")
        origin, now_of = made_of(run), vars(wanted_origin)
        words = {"data": "another data set", "model": "other weights of the model", "adapter": "another adapter to start from"}
        different = (words[name] for name, value in vars(origin).items() if value != now_of[name])
        return Candidate(run, next(different, None))

    def _wanted(self) -> RunConfig:
        config = self.work.road.config
        if config.adapter_path:
            config = started(config, layers_of(model_folder(config.model)))
        info = self.work.dataset.info
        return config.model_copy(update={name: info[name] for name in SETTINGS})

    def _keep(self, run: Path) -> None:
        names = "config.yaml", "metrics.jsonl", FILE, "best/manifest.json", "latest/manifest.json"
        self.work.state.keep(self.name, self._inputs(run), run, [run / name for name in names if (run / name).is_file()])

    def _inputs(self, run: Path) -> dict[str, Any]:
        config = load_config(run / "config.yaml", {}).to_dict()
        return {**vars(made_of(run)), "settings": {name: config[name] for name in FIELDS if name not in MAY_CHANGE}}

    def _noticed(self, run: Path) -> str:
        record = self.record
        if record is None or self.work.state.place(record) != run:
            return ""
        difference = self.work.state.difference(record)
        return f"; {difference} since" if difference else ""


def first_run(work: Work) -> Path:
    """Where the first run of a road is made."""
    return Path(work.road.config.out or work.road.folder / "run")


def runs_of(first: Path) -> list[Path]:
    """The runs that are there, the newest first."""
    numbered = [path for path in first.parent.glob(f"{first.name}-*") if path.name.removeprefix(f"{first.name}-").isdecimal()]
    numbered.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return [run for run in (*numbered, first) if (run / "config.yaml").is_file()]


def new_place(first: Path) -> Path:
    """The first name that is free; what a start left that was killed before there was a run does not take one."""
    try:
        refuse_run(first)
    except UserError:
        return free(first)
    return first


def made_of(run: Path) -> Origin:
    """What a run learns from, by its own word."""
    checkpoint = last_checkpoint(run)
    found = read_json(run / FILE) if (run / FILE).is_file() else read_progress(checkpoint) if checkpoint else {}
    if not isinstance(found, dict):
        raise UserError(f"{run / FILE}: not what train writes", hint=f"bring the file back, or move {run} away")
    return Origin(*(str(found.get(name) or "") for name in ("data", "model", "adapter")))


def done_steps(plan: Plan) -> int:
    """How far the run is."""
    return int(plan.checkpoint.name.removeprefix("step-")) if plan.checkpoint else 0


def finished(plan: Plan) -> bool:
    """Whether it came to its last step and was measured there, or its patience to an end."""
    done, path = done_steps(plan), plan.run / "metrics.jsonl"
    rows = [row for row in read_metrics(path) if row["step"] <= done] if done and path.is_file() else []
    measured = [(row["step"], row["loss"]) for row in rows if row["split"] == "valid" and row["step"]]
    if done >= plan.steps:
        return not plan.dataset.valid.lengths or any(step == done for step, _ in measured)
    return out_of_patience(measured, plan.config.patience) is not None
