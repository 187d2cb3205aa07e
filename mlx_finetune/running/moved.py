"""A road that was moved or copied: what its files say of their own places is put right before anything is compared."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_finetune.config import load_config, save_config
from mlx_finetune.files import read_json, write_json
from mlx_finetune.running.stage import Work
from mlx_finetune.running.state import Record, State
from mlx_finetune.running.train_stage import runs_of
from mlx_finetune.terminal import say

OF_RUN = ("model", "data", "out", "adapter_path")
NAMES_PLACES = {"collect": "collect.json", "prepare": "dataset.json", "train": "config.yaml"}  # the file of each stage that does


def moved_from(state: State) -> str | None:
    """Where the road was when it was gone the last time, if that is another place."""
    then = state.written.folder
    return then if then and then != str(state.folder) else None


def settle(work: Work, first_run: Path) -> None:
    """Puts right what names the old place; what a person altered since is left as it is, for its stage to say so.

    first_run: see `runs_of`. A copy gives new times to files: those that are as they were made get theirs back.
    Killed on the way it does the same again: the file that it was writing counts as its own.
    """
    then, state = moved_from(work.state), work.state
    if then is None:
        return
    say(f"this road was moved or copied here from {then}: what names its old place is put right")
    runs = runs_of(first_run)
    move = Move(then, work, runs)
    own = {state.written.moving: NAMES_PLACES.get(state.written.moving, "")}
    whole = {name: record for name, record in state.written.stages.items() if state.difference(record, own.get(name, "")) is None}
    for record in whole.values():
        _give_times_back(state, record)
    with state.moving(whole, "collect") as is_whole:
        if is_whole:
            _rewrite(work.collected / NAMES_PLACES["collect"], "sources", move)
    with state.moving(whole, "prepare") as is_whole:
        if is_whole:
            _rewrite(work.data / NAMES_PLACES["prepare"], "model", move)
    with state.moving(whole, "train"):
        for run in runs:
            config = load_config(run / "config.yaml", {})
            changed = {name: new for name in OF_RUN if (new := move.of(getattr(config, name))) != getattr(config, name)}
            if changed:
                save_config(run / "config.yaml", config.model_copy(update=changed))
    state.moved()


class Move:
    """From an old place to the new one. Only what is asked for now is taken for moved: the old one may be there too."""

    def __init__(self, then: str, work: Work, runs: Iterable[Path]) -> None:
        before, now = list(Path(then).parts), list(work.road.folder.parts)
        while len(before) > 1 and len(now) > 1 and before[-1] == now[-1]:
            before.pop()
            now.pop()
        self.before, self.now = Path(*before), Path(*now)
        collect = work.road.collect
        named = work.road.config.model, work.road.config.adapter_path, collect.logs or "", *collect.openassistant, *collect.chat
        self.asked = {path.resolve() for path in (*(Path(name) for name in named if name), work.data, *runs)}

    def of(self, value: Any) -> Any:
        """A place, or a list of them; anything else as it is."""
        if isinstance(value, list):
            return [self.of(one) for one in value]
        if not isinstance(value, str) or not Path(value).is_relative_to(self.before):
            return value
        new = self.now / Path(value).relative_to(self.before)
        return str(new) if new.resolve() in self.asked else value


def _rewrite(path: Path, name: str, move: Move) -> None:
    found = read_json(path)
    told = found[name]
    new = {key: move.of(value) for key, value in told.items()} if isinstance(told, dict) else move.of(told)
    if new != told:
        write_json(path, found | {name: new})


def _give_times_back(state: State, record: Record) -> None:
    made = state.place(record)
    for name, said in record.files.items():
        path = made / name if name else made
        status = path.stat()
        if status.st_mtime_ns != said.time:
            os.utime(path, ns=(status.st_atime_ns, said.time))
