"""The stages `collect` and `prepare` of a road: each takes up what is new, in the folder that it made before."""

from pathlib import Path
from typing import Any

from mlx_finetune.collecting import CollectOptions, collected, settings_of, sources_of
from mlx_finetune.commands import prepared
from mlx_finetune.data.collection import INDEX, TAGS, digest_of
from mlx_finetune.data.dataset import SPLITS
from mlx_finetune.data.found import what_is_new
from mlx_finetune.data.prepare import SETTINGS, what_changed
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.hub import check_model_folder, model_folder
from mlx_finetune.models.weights import fingerprint
from mlx_finetune.running.stage import Stage, Verdict, bring_back
from mlx_finetune.running.state import files_in
from mlx_finetune.terminal import Done

COLLECTED = frozenset({f"{name}.jsonl" for name in ("gptme", "openassistant", "chat", "rejected", "train")}) | {
    TAGS, INDEX, "collect.json", "train.csv",
}  # fmt: skip
PREPARED = frozenset({f"{split}.{kind}" for split in SPLITS for kind in ("arrow", "jsonl")}) | {"dataset.json"}
OF_THE_SYSTEM = ".DS_Store"  # which macOS puts into every folder that is looked at
HELD = "new conversations wait until this is gone through; --newest takes them up now"


class OnData(Stage):
    """What both have in common. `writes`: names of the files that the verb writes."""

    writes: frozenset[str]

    def refuse_altered(self, out: Path) -> None:
        """Raises UserError where a person changed what was made: to make it anew would lose that."""
        if self.record is None or not out.exists() or self.work.state.was_making(out):
            return
        if difference := self.work.state.difference(self.record):
            hint = f"put it back, or move {out} away: run makes it anew"
            raise UserError(f"{difference} since run made it", hint=hint)

    def refuse_foreign(self, out: Path, why: str) -> None:
        """Raises UserError where something is to be replaced that this road did not make."""
        if self.record is None and out.exists() and not self.work.state.was_making(out):
            verb = f"mlx-finetune {self.name} --update brings it up to date"
            raise UserError(f"{out} was not made by run, and is of something else ({why})", hint=f"{verb}; or move it away")

    def refuse_added(self, out: Path) -> None:
        """Raises UserError where a person put a file in: the folder is replaced as a whole."""
        known = self.writes
        if self.record is not None and not self.work.state.was_making(out):
            known = known & set(self.record.files)
        names = (path.relative_to(out).as_posix() for path in files_in(out) if path.name != OF_THE_SYSTEM)
        if added := sorted(name for name in names if name not in known):
            hint = "move it away: run makes that folder anew, with all that is in it"
            raise UserError(f"{out / added[0]} was not made by run", hint=hint)

    def kept(self, out: Path, inputs: dict[str, Any]) -> None:
        """Writes the record, where that says something else."""
        state, record = self.work.state, self.record
        self.work.found[self.name] = out
        if record is None or record.inputs != inputs or state.difference(record) or state.place(record) != out:
            state.keep(self.name, inputs, out, [path for name in self.writes if (path := out / name).is_file()])


class CollectStage(OnData):
    """Conversations of all sources."""

    name, writes = "collect", COLLECTED

    def look(self) -> Verdict:
        """Reads names, sizes and times of the sources; no conversation."""
        out, section = self.work.collected, self.work.road.collect.model_dump(mode="json")
        self.refuse_altered(out)
        self._refuse_tags_inside(out)
        self._refuse_edited_tags(out)
        options = self._options()
        why = what_is_new(sources_of(options), settings_of(options), out)
        if why is None:
            return Verdict("skip", "nothing is new")
        begun = not self.work.state.written.ended and not self.work.newest
        if begun and self.record and self.record.inputs == section and out.exists():
            return Verdict("skip", HELD)
        self.refuse_foreign(out, why)
        self.refuse_added(out)
        return Verdict("do", why)

    def do(self) -> Done:
        """As `collect --update`."""
        options, out = self._options(), self.work.collected
        bring_back(out)
        self.refuse_altered(out)
        self.refuse_added(out)
        with self.work.state.writing(out):
            done = collected(options, sources_of(options), settings_of(options))
            self.adopt()
        return done

    def adopt(self) -> None:
        """Keeps the record of what is there."""
        self.kept(self.work.collected, self.work.road.collect.model_dump(mode="json"))

    def _refuse_tags_inside(self, out: Path) -> None:
        tags = self.work.road.collect.tags
        if tags and (path := Path(tags).expanduser().resolve()).is_relative_to(out.resolve()) and path != (out / TAGS).resolve():
            hint = f"move it out of {out}, which run makes anew, and put its new place into {self.work.road.file}"
            raise UserError(f"collect.tags: {tags} lies in what is collected", hint=hint)

    def _refuse_edited_tags(self, out: Path) -> None:
        path, told = out / TAGS, out / "collect.json"
        if self.work.road.collect.tags or not path.is_file() or not told.is_file():
            return
        if read_json(told).get("tags") != digest_of(path):
            hint = f"copy it elsewhere, put `tags: THE_COPY` below `collect:` in {self.work.road.file}, and remove {path}"
            raise UserError(f"{path} was edited, which says nothing by itself", hint=hint)

    def _options(self) -> CollectOptions:
        c = self.work.road.collect
        return CollectOptions(
            logs=Path(c.logs) if c.logs else None, openassistant=list(c.openassistant), chat=list(c.chat), gptme=c.gptme,
            out=self.work.collected, update=True, since=c.since, until=c.until, tool=list(c.tool), formats=list(c.format),
            from_model=list(c.from_model), title=list(c.title), exclude=list(c.exclude), tags=Path(c.tags) if c.tags else None,
            near_duplicates=c.near_duplicates, near_duplicate_search=c.near_duplicate_search, system=c.system,
            tool_calls=c.tool_calls, modernise=c.modernise, recovery_weight=c.recovery_weight, relevant=c.relevant,
            language=list(c.language), min_quality=c.min_quality, filters=c.openassistant_filters, redact=c.redact,
            personal=c.personal, home=list(c.home), emails=c.emails, allow=list(c.allow), scan_only=False, model="", show=False,
            as_json=False,
        )  # fmt: skip


class PrepareStage(OnData):
    """The data set for one model."""

    name, after, writes = "prepare", ("collect",), PREPARED

    def look(self) -> Verdict:
        """Compares what it was made of."""
        model, out = self.work.model_here(), self.work.data
        self.refuse_altered(out)
        if model is None:
            return Verdict("do", f"{self.work.road.config.model} is downloaded first")
        check_model_folder(model)
        template = ChatTemplate.load(model)
        why = what_changed([self.work.collected], template, self.work.road.config, out, self._origin(model))
        if why is None:
            return Verdict("skip", f"{out.name} is of these conversations, model and settings")
        self.refuse_foreign(out, why)
        self.refuse_added(out)
        return Verdict("do", why)

    def do(self) -> Done:
        """As `prepare --update`."""
        config, out = self.work.road.config, self.work.data
        bring_back(out)
        if self.work.model_here() is None:
            check_model_folder(model_folder(config.model))
            self.look()  # once more: what is there can be compared with the model only now
        self.refuse_altered(out)
        self.refuse_added(out)
        settings = {name: getattr(config, name) for name in SETTINGS}
        with self.work.state.writing(out):
            done = prepared([self.work.collected], config.model, out, settings, update=True)
            self.adopt()
        return done

    def adopt(self) -> None:
        """Keeps the record of what is there."""
        info = read_json(self.work.data / "dataset.json")
        self.kept(self.work.data, {"conversations": info["conversations"], "model": info["model_fingerprint"], "id": info["id"]})

    def _origin(self, model: Path) -> dict[str, Any]:
        return {"model": self.work.road.config.model, "model_fingerprint": fingerprint(model)}
