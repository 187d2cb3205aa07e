"""Collected conversations become a prepared data set: split, cut into windows, rendered, tokenized, counted."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Example
from mlx_finetune.data.dataset import SPLITS, changed_inputs, digest_of, prepared_before, write_dataset
from mlx_finetune.data.entries import entries
from mlx_finetune.data.examples import Asked, is_little, make_all
from mlx_finetune.data.mixture import Mixture, in_order
from mlx_finetune.data.overlap import AGAIN, once
from mlx_finetune.data.sources import openassistant
from mlx_finetune.data.split import Split, split
from mlx_finetune.data.tally import Tally
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file, atomic_folder

NOT_CONVERSATIONS = ("rejected.jsonl", *(f"{name}.jsonl" for name in SPLITS))
SETTINGS = (
    "max_length", "valid_fraction", "validation_by", "openassistant_valid_fraction", "openassistant_share", "test_fraction",
    "allow_inexact",
)  # fmt: skip  # those of RunConfig that prepare obeys
Advance = Callable[[int, int], None]  # conversations done, conversations in all


def collected_files(paths: Sequence[Path]) -> list[Path]:
    """The conversation files among `paths`; a folder stands for those that `collect` put into it.

    Raises:
        UserError: one of them is not there, holds none, or is named twice.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.glob("*.jsonl") if p.name not in NOT_CONVERSATIONS)
            if not inside:
                raise UserError(f"{path}: no conversations in this folder", hint="mlx-finetune collect makes them")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder", hint="mlx-finetune collect makes one")
    known: set[tuple[int, int]] = set()
    for file in files:
        status = file.stat()
        if (status.st_dev, status.st_ino) in known:
            raise UserError(f"{file}: named twice", hint="name each folder or file once: its conversations are learned once")
        known.add((status.st_dev, status.st_ino))
    return files


def _inputs(files: Sequence[Path], template: ChatTemplate, config: RunConfig, origin: dict[str, Any]) -> dict[str, Any]:
    told = {name: getattr(config, name) for name in SETTINGS} | {"tokenizer": template.fingerprint, **template.to_json(), **origin}
    return {"conversations": digest_of(files), **told}


def what_changed(paths: Sequence[Path], template: ChatTemplate, config: RunConfig, out: Path, origin: dict[str, Any]) -> str | None:
    """Why `prepare` with `update` would do something, in words; None where `out` is prepared from just this.

    Raises:
        UserError: `out` is something else, or a path is not there.
    """
    earlier = prepared_before(out)
    if earlier is None:
        return "not prepared yet"
    changed = changed_inputs(out, earlier, _inputs(collected_files(paths), template, config, origin))
    return f"prepared with {changed}" if changed else None


def prepare(
    paths: Sequence[Path],
    template: ChatTemplate,
    config: RunConfig,
    out: Path,
    origin: dict[str, Any],
    advance: Advance = lambda done, total: None,
    update: bool = False,
) -> dict[str, Any]:
    """Makes the folder `out` whole or not at all; gives back its `dataset.json`, where `origin` (the model) stands too.

    Where `out` was prepared from the same conversations, template, tokenizer and settings, nothing is done, and "unchanged" is in
    the result; where something is another, `update` prepares anew and replaces it. The files are read twice: once for what
    decides the split, then conversation by conversation.

    Raises:
        UserError: a bad line, a path named twice, `out` is something else, or there is nothing to learn.
    """
    files = collected_files(paths)
    inputs = _inputs(files, template, config, origin)
    earlier = prepared_before(out)
    if earlier is not None and (changed := changed_inputs(out, earlier, inputs)) is None:
        return earlier | {"unchanged": True}
    if earlier is not None and not update:
        raise UserError(f"{out} exists already, prepared with {changed}", hint="--update prepares it anew; or choose another --out")
    found, again = once([entry for path in files for entry in entries(path)])
    members = split(found, config)
    members = replace(members, left_out=members.left_out + Counter({AGAIN: again}))
    with atomic_folder(out, replace_old=earlier is not None, private=True) as folder:
        with ExitStack() as opened:
            work = _Work(template, config, members, advance)
            opened.callback(work.made.close)
            beside = {name: opened.enter_context(atomic_file(folder / f"{name}.jsonl")) for name in SPLITS}
            examples = {name: work.examples(name, beside[name]) for name in SPLITS}
            made = write_dataset(folder, examples, lambda: inputs | work.result())
        for name in SPLITS:
            if not made["examples"][name]:
                (folder / f"{name}.jsonl").unlink()  # mlx-lm takes an empty file for a broken one
        return made


class _Work:
    """Encodes one conversation after the other and counts what becomes of it."""

    def __init__(self, template: ChatTemplate, config: RunConfig, members: Split, advance: Advance) -> None:
        self.template, self.config, self.members, self.advance = template, config, members, advance
        self.tallies = {name: Tally() for name in SPLITS}
        self.mixture = Mixture.of(members.train, config.openassistant_share)
        self.beyond_share = 0
        everyone = [entry for name in SPLITS for entry in getattr(members, name)]
        self.done, self.total = 0, len(everyone)
        self.made = make_all(self._asked(), template, config.max_length, is_little(everyone))
        self._next = next(self.made, None)

    def examples(self, name: str, beside: IO[str]) -> Iterator[Example]:
        """The examples of one split; the messages of each go into the file `beside`. Splits are asked for in their order."""
        while self._next and self._next[0][0] == name:
            (_, entry), made = self._next
            if name == "train" and (self.mixture.full or not self.mixture.takes(entry.source, made.tally.learned_tokens)):
                self.beyond_share += 1
            else:
                self.tallies[name].add(made.tally)
                beside.writelines(line + "\n" for line in made.lines)
                yield from made.examples
            self._next = next(self.made, None)
            self.done += 1
            self.advance(self.done, self.total)

    def _asked(self) -> Iterator[Asked]:
        for name in SPLITS:
            for entry in in_order(getattr(self.members, name)):
                if name == "train" and self.mixture.full:
                    self.beyond_share += 1
                    self.done += 1
                else:
                    yield name, entry

    def result(self) -> dict[str, Any]:
        """The counts, once all splits are through; raises UserError where there is nothing to learn."""
        members, left_out = self.members, self.members.left_out.copy()
        if self.beyond_share:
            left_out[f"beyond the share of OpenAssistant, {self.config.openassistant_share:g} of the learned tokens"] = (
                self.beyond_share
            )
        if not self.tallies["train"].examples:
            _refuse_nothing(self.tallies["train"], left_out)
        if not self.config.allow_inexact:
            _refuse_inexact(sum((tally.turns_inexact for tally in self.tallies.values()), Counter()))
        return {name: tally.to_json() for name, tally in self.tallies.items()} | {
            "openassistant_share_reached": self.mixture.reached,
            "openassistant_all_taken": not self.beyond_share and any(e.source == openassistant.SOURCE for e in members.train),
            "left_out": dict(left_out),
            "held_out_groups": sorted(members.held_out_groups),
            "held_out_trees": sorted(members.held_out_trees),
            "held_out": sorted({entry.name for entry in members.valid if entry.group in members.held_out_groups}),
            "test_conversations": sorted({entry.name for entry in members.test}),
        }


def _refuse_nothing(train: Tally, left_out: Counter[str]) -> None:
    lost = [f"{reason} ({count})" for reason, count in (train.turns_refused + left_out).items()]
    lost += [f"turn longer than a window ({train.turns_too_long})"] if train.turns_too_long else []
    reasons = "; ".join(lost) or "no assistant turn"
    raise UserError(f"no conversation left to learn from: {reasons}", hint="collect more, or a larger max_length")


def _refuse_inexact(turns: Counter[str]) -> None:
    if turns:
        reason, count = turns.most_common(1)[0]
        raise UserError(
            f"{sum(turns.values())} turns would be learned in another context than is served, {count} of them: {reason}",
            hint="--allow-inexact learns them all the same",
        )
