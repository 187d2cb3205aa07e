"""The verb `run`: every stage of the road in order, each only where what it is made of has changed."""

import gc
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from mlx_finetune.config import parse_assignments
from mlx_finetune.errors import UserError
from mlx_finetune.launched import launched
from mlx_finetune.nearest import did_you_mean
from mlx_finetune.road import load_road
from mlx_finetune.running.after_stages import EvaluateStage, ExportStage, FuseStage, ReportStage, check_hand_back
from mlx_finetune.running.data_stages import CollectStage, PrepareStage
from mlx_finetune.running.moved import moved_from, settle
from mlx_finetune.running.stage import DOES, Stage, Verdict, Work, bring_back
from mlx_finetune.running.state import FILE, State
from mlx_finetune.running.train_stage import TrainStage, first_run
from mlx_finetune.running.words import in_words_of_run
from mlx_finetune.terminal import finish, say, table
from mlx_finetune.training.lock import locked

STAGES = ("collect", "prepare", "train", "evaluate", "report", "fuse", "export")
ELSEWHERE = "name another `folder:` in the file"


@dataclass(frozen=True)
class RoadOptions:
    """As cli_run.py has them."""

    config: Path
    assignments: Sequence[str] = ()
    until: str = ""
    newest: bool = False
    dry_run: bool = False
    as_json: bool = False

    @property
    def command(self) -> str:
        """The same again, as it is typed."""
        words = ["mlx-finetune", "run", str(self.config), *(f"--set={one}" for one in self.assignments)]
        words += [f"--until={self.until}"] if self.until else []
        return shlex.join([*words, *(["--newest"] if self.newest else [])])


@dataclass
class Passed:
    """A stage that was gone through."""

    stage: Stage
    verdict: Verdict
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As --json gives it."""
        made, record = self.stage.work.found.get(self.stage.name), self.stage.record
        verdict = self.verdict
        row = {"stage": self.stage.name, "does": DOES[verdict.action], "why": verdict.why, "did": bool(self.result)}
        path = str(made) if made else None
        return row | {"made": path, "seconds": round(self.seconds, 1), "inputs": record.inputs if record else None}


def run_command(options: RoadOptions) -> None:
    """`mlx-finetune run`."""
    if options.until and options.until not in STAGES:
        hint = did_you_mean(options.until, STAGES, f"it is one of {', '.join(STAGES)}")
        raise UserError(f"--until {options.until}: no stage", hint=hint)
    if launched():
        raise UserError("run is one process", hint=f"torchrun ... -m mlx_finetune train {options.config}; then run does the rest")
    road = load_road(options.config, parse_assignments(list(options.assignments)))
    if not options.until or options.until == STAGES[-1]:
        check_hand_back(road)
    if options.dry_run:
        work = Work(road, State.open(road.folder), options.command, options.newest)
        with _in_its_words(options):
            _dry_run(stages_of(work, options.until), options)
        return
    road.folder.mkdir(parents=True, exist_ok=True)
    with locked(road.folder, ELSEWHERE):
        bring_back(road.folder / FILE)
        work = Work(road, State.open(road.folder), options.command, options.newest)
        settle(work, first_run(work))
        try:
            with _in_its_words(options):
                _go(stages_of(work, options.until), work, options)
        except KeyboardInterrupt:  # between two stages, or while one looks
            say(f"next: {options.command}")
            raise


@contextmanager
def _in_its_words(options: RoadOptions) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        error.hint = in_words_of_run(error.hint, options.config, options.command)
        raise


def stages_of(work: Work, until: str) -> list[Stage]:
    """In order, up to `until`."""
    stages: list[Stage] = [CollectStage(work), PrepareStage(work), TrainStage(work), EvaluateStage(work), ReportStage(work)]
    stages += [FuseStage(work), *(ExportStage(work, to) for to in dict.fromkeys(work.road.hand_back.export))]
    names = STAGES[: STAGES.index(until) + 1] if until else STAGES
    return [stage for stage in stages if stage.name.split()[0] in names]


def look_ahead(stages: Sequence[Stage]) -> list[Verdict]:
    """What each would do; of one that needs what another has still to do nothing more is known."""
    verdicts: dict[str, Verdict] = {}
    for stage in stages:
        before = [name for name in stage.after if name in verdicts and (verdicts[name].acts or verdicts[name].action == "wait")]
        verdicts[stage.name] = Verdict("wait", f"for {before[-1]}") if before else stage.look()
    return list(verdicts.values())


def announce(stages: Sequence[Stage], verdicts: Sequence[Verdict], folder: Path) -> None:
    """What will be done, a line each, before anything is."""
    say(f"the road in {folder}:")
    width = max(len(stage.name) for stage in stages)
    for stage, verdict in zip(stages, verdicts, strict=True):
        say(f"  {stage.name:<{width}}  {DOES[verdict.action]:<8}  {verdict.why}")


def _dry_run(stages: Sequence[Stage], options: RoadOptions) -> None:
    then, folder = moved_from(stages[0].work.state), stages[0].work.road.folder
    if then:  # to look would be to compare with the old place
        first = Verdict("do", f"moved or copied here from {then}: what names the old place is put right first")
        verdicts = [first, *(Verdict("wait", "for that") for _ in stages[1:])]
    else:
        verdicts = look_ahead(stages)
    announce(stages, verdicts, folder)
    rows = [Passed(stage, verdict).to_json() for stage, verdict in zip(stages, verdicts, strict=True)]
    finish({"folder": str(folder), "stages": rows}, options.as_json, lambda: None, None, "the same without --dry-run")


def _go(stages: Sequence[Stage], work: Work, options: RoadOptions) -> None:
    announce(stages, look_ahead(stages), work.road.folder)
    passed = []
    for number, stage in enumerate(stages, 1):
        verdict = stage.look()
        one = Passed(stage, verdict)
        if verdict.acts:
            say(f"\n{number}/{len(stages)} {stage.name}: {verdict.why}")
            _do(one, options)
            if one.result.pop("asked_to_end", False) and stage is not stages[-1]:
                say(f"interrupted: {stage.name} is done, and saved")
                say(f"next: {options.command}")
                raise typer.Exit(130)
        elif verdict.action == "skip":
            stage.adopt()
        passed.append(one)
    work.state.end()
    run = work.found.get("train")
    following = f"mlx-finetune serve {shlex.quote(str(run))}" if run else "the same without --until"
    result = {"folder": str(work.road.folder), "stages": [one.to_json() for one in passed], "next": following}
    finish(result, options.as_json, lambda: _show(passed), work.road.folder / FILE, following)


def _do(one: Passed, options: RoadOptions) -> None:
    began = time.perf_counter()
    try:
        done = one.stage.do()
    except (KeyboardInterrupt, SystemExit) as error:
        if one.stage.name != "train":  # which says so itself
            say(f"{one.stage.name} was broken off; all before it stays")
            say(f"next: {options.command}")
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(130) from error
        raise
    one.seconds, one.result = time.perf_counter() - began, dict(done.result)
    if not options.as_json:
        done.show()
    del done
    gc.collect()  # an engine: the next stage opens its own


def _show(passed: Sequence[Passed]) -> None:
    rows = []
    for one in passed:
        row = one.to_json()
        did = f"made in {_time(one.seconds)}" if row["did"] else "as it was" if one.verdict.action == "skip" else "left out"
        rows.append((one.stage.name, did, row["made"] or one.verdict.why))
    table("\nthe road", rows)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
