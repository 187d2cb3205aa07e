"""What a model card says of a run: counts, settings and losses. No text, name or path of a person's conversations is read."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_finetune.config import RunConfig
from mlx_finetune.data.sources import gptme, openassistant
from mlx_finetune.errors import UserError
from mlx_finetune.files import DAMAGED, read_json
from mlx_finetune.models.hub import HUB_ID
from mlx_finetune.models.origin import read_origin
from mlx_finetune.training.manifest import is_of, made_from, read_progress
from mlx_finetune.training.metrics import read_metrics

CACHED = re.compile(r"models--([A-Za-z0-9][\w.-]*)--([A-Za-z0-9][\w.-]*)/snapshots/")  # as the Hub's cache names folders
LICENSES = {openassistant.SOURCE: openassistant.LICENSE, gptme.SOURCE: "private"}
COUNTS = ("examples", "tokens", "learned_tokens", "learned_turns")
# Of the settings, those that say how it was trained; none of them is a place on a disk.
METHOD = (
    "fine_tune_type rank alpha use_rslora dropout num_layers learning_rate lr_schedule warmup_ratio weight_decay optimizer "
    "batch_size gradient_accumulation max_length epochs seed dtype quantization neftune_noise_alpha loraplus_lr_ratio"
).split()
OF_ADAPTERS = {"rank", "alpha", "use_rslora", "dropout", "loraplus_lr_ratio"}
ALWAYS = {"dropout", "seed"}  # said also where they are 0


@dataclass(frozen=True)
class Compared:
    """Base, tuned, and the difference with its 95 % interval, of tokens (nats) or of answers (shares); None: not known."""

    group: str  # all, source, kind, turn, rate
    name: str
    of: int
    base: float | None
    tuned: float | None
    difference: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class HeldOut:
    """Mean nats a learned token of the base and of the tuned model; `by_source`: (base, tuned); tokens: None where not known.

    `compared`: what `evaluate` found, by kinds of tokens and of answers; none where it has not looked. `split`: at which part.
    """

    base: float
    tuned: float
    by_source: dict[str, tuple[float, float]]
    tokens: int | None = None
    compared: tuple[Compared, ...] = ()
    split: str = "valid"


@dataclass(frozen=True)
class Facts:
    """base: the id on the Hub, or, where `on_hub` is false, the name of the model's folder.

    sources: of the training data, conversations and learned tokens by source. counts: of all of it.
    method: settings by name. targets: names of the adapted modules; none where the weights were trained.
    """

    base: str
    on_hub: bool
    base_card: str
    sources: dict[str, tuple[int, int]]
    counts: dict[str, int]
    method: dict[str, Any]
    targets: list[str]
    step: int
    engine: str
    trained_with: dict[str, str]
    held_out: HeldOut | None
    role_policy: str


def base_name(name: str, model: Path, said: str = "") -> tuple[str, bool]:
    """What a base is called and whether that is its id on the Hub: `said` by the person, the name it was given, or its cache's.

    Else the name of its folder: never a path, which would tell of a person's machine.
    """
    origin = read_origin(model)
    if not said and origin:  # converted, such as from .bin
        return (origin.model, True) if origin.revision else (Path(origin.model).name, False)
    if said or (HUB_ID.fullmatch(name) and not Path(name).expanduser().is_dir()):
        return said or name, True
    if found := CACHED.search(f"{model.resolve().as_posix()}/"):
        return f"{found[1]}/{found[2]}", True
    return model.resolve().name, False


def read_facts(run: Path, checkpoint: Path, model: Path, config: RunConfig, base: str = "") -> Facts:
    """What is known of the checkpoint of a run; what the prepared data said is left out where it is no longer there."""
    progress, info = read_progress(checkpoint), _dataset(Path(config.data), config)
    train = info.get("train", {})
    name, on_hub = base_name(config.model, model, base)
    readme = model / "README.md"
    return Facts(
        base=name,
        on_hub=on_hub,
        base_card=readme.read_bytes().decode("utf-8", "replace") if readme.is_file() else "",
        sources={
            source: (int(count), int(train.get("learned_tokens_by_source", {}).get(source, 0)))
            for source, count in train.get("conversations", {}).items()
        },
        counts={key: int(train[key]) for key in COUNTS if key in train},
        method=_method(config),
        targets=_targets(checkpoint),
        step=int(progress["step"]),
        engine=str(progress.get("engine", config.engine)),
        trained_with={str(key): str(value) for key, value in (progress.get("versions") or {}).items()},
        held_out=_held_out(run, made_from(checkpoint), int(progress["step"])),
        role_policy=str((info.get("role_policy") or {}).get("what", "")),
    )


def _dataset(folder: Path, config: RunConfig) -> dict[str, Any]:
    path = folder / "dataset.json"
    info = read_json(path) if config.data and path.is_file() else {}
    info = info if isinstance(info, dict) else {}
    train, policy = info.get("train", {}), info.get("role_policy") or {}
    sound = isinstance(train, dict) and isinstance(policy, dict)
    maps = [train.get(name, {}) for name in ("conversations", "learned_tokens_by_source")] if sound else [None]
    sound = sound and all(isinstance(one, dict) and all(type(count) is int for count in one.values()) for one in maps)
    if not sound or not all(type(train[key]) is int for key in COUNTS if key in train):
        raise UserError(f"{path}: not what prepare writes", hint="run mlx-finetune prepare again")
    return info


def _method(config: RunConfig) -> dict[str, Any]:
    full, values = config.fine_tune_type == "full", config.to_dict()
    names = [name for name in METHOD if not (full and name in OF_ADAPTERS)]
    method = {name: values[name] for name in names if values[name] not in (None, "none", 0) or name in ALWAYS}
    if config.steps:
        method.pop("epochs")
    if config.loraplus_lr_ratio == 1:
        method.pop("loraplus_lr_ratio", None)
    return method


def _targets(checkpoint: Path) -> list[str]:
    path = checkpoint / "adapter_config.json"
    if not path.is_file():
        return []
    found = read_json(path)
    modules = found.get("target_modules") if isinstance(found, dict) else None
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise UserError(f"{path}: target_modules is no list of names", hint=DAMAGED)
    return sorted({module.rpartition(".")[2] for module in modules})


def _held_out(run: Path, made: Mapping[str, str], step: int) -> HeldOut | None:
    """Of `evaluate` where it looked at this checkpoint, else of the run's own looks before the first step and at this one."""
    path = run / "evaluation.json"
    found = read_json(path) if path.is_file() else {}
    if isinstance(found, Mapping) and is_of(found, made):
        try:
            losses = _losses(found["base"], found["tuned"], found["tuned"].get("tokens"))
            return replace(losses, compared=tuple(_compared(found)), split=str(found.get("split", "valid")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not what evaluate writes: {error}", hint=f"mlx-finetune evaluate {run}") from error
    if not (run / "metrics.jsonl").is_file():
        return None
    rows = {row["step"]: row for row in read_metrics(run / "metrics.jsonl") if row["split"] == "valid"}
    found = [rows[at] for at in (0, step) if at in rows and math.isfinite(rows[at]["loss"])]
    return _losses(found[0], found[-1], None) if len(found) == 2 else None


def _compared(found: Mapping[str, Any]) -> Iterator[Compared]:
    """What `evaluate` wrote with intervals; an older one wrote none."""
    numbers = ("base", "tuned", "difference", "low", "high")
    for row in found.get("rows", ()):
        yield Compared(row["group"], row["name"], int(row["tokens"]), *(row[key] for key in numbers))
    for rate in (found.get("generation") or {}).get("rates", ()):
        yield Compared("rate", rate["name"], int(rate["of"]), *(rate[key] for key in numbers))


def _losses(base: Mapping[str, Any], tuned: Mapping[str, Any], tokens: int | None) -> HeldOut:
    pairs = {source: (loss, tuned["by_source"].get(source, math.nan)) for source, loss in base["by_source"].items()}
    both = {source: pair for source, pair in pairs.items() if all(map(math.isfinite, pair))}
    return HeldOut(float(base["loss"]), float(tuned["loss"]), both, tokens)
