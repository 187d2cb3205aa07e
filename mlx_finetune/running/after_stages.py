"""The stages of a road that follow the training: `evaluate`, `report`, `fuse` and an `export` for each tool."""

import importlib.util
from pathlib import Path
from typing import Any

from mlx_finetune.evaluating import EvaluateOptions, evaluated
from mlx_finetune.evaluation.compare import find_checkpoint
from mlx_finetune.export.gguf_kinds import check_kind
from mlx_finetune.export.gguf_write import need_gguf
from mlx_finetune.exporting import MODELS, ExportOptions, exported
from mlx_finetune.fusing import FuseOptions, fused_model
from mlx_finetune.models.hub import check_hub_id
from mlx_finetune.reporting import PAGE, ReportOptions, reported
from mlx_finetune.road import Road
from mlx_finetune.running.stage import Made, MadeInRun, Work
from mlx_finetune.running.train_stage import made_of
from mlx_finetune.terminal import Done
from mlx_finetune.training.checkpoint import TEMPLATE
from mlx_finetune.training.manifest import made_from, sha256

OF_REPORT = ("metrics.jsonl", "samples.jsonl", "evaluation.json", "config.yaml")  # files of a run that its page shows


def checkpoint_of(work: Work) -> dict[str, Any]:
    """What is handed back of the run: its name and what tells its bytes from others."""
    folder = find_checkpoint(work.found["train"], work.road.hand_back.checkpoint)
    return {"checkpoint": f"{work.found['train'].name}/{folder.name} {made_from(folder)['sha256'][:16]}"}


def check_hand_back(road: Road) -> None:
    """What would be refused only behind the training.

    Raises:
        UserError: an export cannot be made: its quantisation, a package, or the name of its base.
    """
    h = road.hand_back
    if any(to in MODELS for to in h.export):
        need_gguf()
        check_kind(h.quantisation)
    check_hub_id(h.base, "hand_back.base =")


class EvaluateStage(MadeInRun):
    """evaluation.json in the run."""

    name, after = "evaluate", ("train",)

    def off(self) -> str | None:
        """Where nothing was held out."""
        split = "test" if self.work.road.evaluate.test else "valid"
        return None if len(getattr(self.work.dataset, split)) else "nothing was held out"

    def inputs(self) -> dict[str, Any]:
        """The checkpoint, the data, and what is asked."""
        return checkpoint_of(self.work) | {"data": self.work.dataset.id} | self.work.road.evaluate.model_dump(mode="json")

    def wanted_place(self) -> Path:
        """As the verb has it."""
        return self.work.found["train"] / "evaluation.json"

    def make(self, out: Path) -> Done:
        """As the verb does."""
        e, checkpoint = self.work.road.evaluate, self.work.road.hand_back.checkpoint
        run = self.work.found["train"]
        return evaluated(EvaluateOptions(run, checkpoint, test=e.test, generate=e.answers, limit=e.tokens))


class ReportStage(MadeInRun):
    """report.html in the run."""

    name, after = "report", ("train", "evaluate")

    def off(self) -> str | None:
        """Without what draws its figures."""
        return None if importlib.util.find_spec("matplotlib") else "its figures need matplotlib: pip install matplotlib"

    def inputs(self) -> dict[str, Any]:
        """The files that it shows, and the data."""
        run = self.work.found["train"]
        files = {name: sha256(run / name) for name in OF_REPORT if (run / name).is_file()}
        return checkpoint_of(self.work) | {"data": self.work.dataset.id} | files

    def wanted_place(self) -> Path:
        """As the verb has it."""
        return self.work.found["train"] / PAGE

    def make(self, out: Path) -> Done:
        """As the verb does."""
        return reported(ReportOptions(self.work.found["train"]))


class HandedBack(Made):
    """A folder made of a checkpoint and the weights of its base."""

    after: tuple[str, ...] = ("train",)

    def inputs(self) -> dict[str, Any]:
        """The checkpoint, the base, and how."""
        h, run = self.work.road.hand_back, self.work.found["train"]
        how = {"base": h.base, "original": h.original, "quantised_base": h.quantised_base}
        template = {"chat template": sha256(run / TEMPLATE)} if (run / TEMPLATE).is_file() else {}
        return checkpoint_of(self.work) | {"model": made_of(run).model} | template | how


class FuseStage(HandedBack):
    """A Hugging Face folder."""

    name = "fuse"

    def off(self) -> str | None:
        """Where it was not asked for."""
        return None if self.work.road.hand_back.fuse else "hand_back.fuse is false"

    def wanted_place(self) -> Path:
        """Beside the run."""
        return self.work.road.folder / "tuned"

    def make(self, out: Path) -> Done:
        """As the verb does."""
        h, run = self.work.road.hand_back, self.work.found["train"]
        return fused_model(
            FuseOptions(
                run, out, h.checkpoint, model="", original=h.original, quantised_base=h.quantised_base, base=h.base,
                by_weights=False, as_json=False,
            )
        )  # fmt: skip


class ExportStage(HandedBack):
    """A folder for one tool."""

    def __init__(self, work: Work, to: str) -> None:
        super().__init__(work)
        self.to, self.name = to, f"export {to}"
        self.after = ("train", "fuse") if to in MODELS else ("train",)

    def inputs(self) -> dict[str, Any]:
        """Those of every folder, and how it is quantised."""
        how = {"quantisation": self.work.road.hand_back.quantisation} if self.to in MODELS else {}
        return super().inputs() | how

    def wanted_place(self) -> Path:
        """Called after the tool."""
        return self.work.road.folder / self.to

    def make(self, out: Path) -> Done:
        """As the verb does; what was fused is not fused again."""
        h, is_model = self.work.road.hand_back, self.to in MODELS
        options = ExportOptions(
            self.work.found["train"], self.to, out, h.checkpoint, h.quantisation if is_model else "", adapter_only=False,
            base=h.base, original=h.original, quantised_base=h.quantised_base and is_model, as_json=False,
        )  # fmt: skip
        return exported(options, self.work.found.get("fuse") if is_model else None)
