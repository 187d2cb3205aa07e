"""What `fuse` does, from its arguments to the lines that a person reads."""

from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_finetune.config import RunConfig
from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.compare import open_run
from mlx_finetune.export.changes import read_changes
from mlx_finetune.export.facts import Facts, read_facts
from mlx_finetune.export.fuse import Fused
from mlx_finetune.export.quantised_base import changes_from_packed
from mlx_finetune.export.report import told
from mlx_finetune.export.verify import PROBE_TEXTS, Verified, fuse_and_verify
from mlx_finetune.files import read_json, refuse_existing
from mlx_finetune.models.hub import check_hub_id, check_model_folder, model_folder
from mlx_finetune.originals import is_quantised, original_of, was_awq
from mlx_finetune.terminal import Done, progress, say
from mlx_finetune.training.checkpoint import trained_template

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class FuseOptions:
    """As cli.py has them."""

    run: Path
    out: Path
    checkpoint: str
    model: str
    original: str
    quantised_base: bool
    base: str
    by_weights: bool
    as_json: bool


@dataclass(frozen=True)
class Opened:
    """What is to be fused. model: what it was trained on; into: the weights that it goes into, the same unless that is packed."""

    model: Path
    into: Path
    checkpoint: Path
    template: str = ""
    config: RunConfig | None = None
    facts: Facts | None = None

    @property
    def is_packed(self) -> bool:
        """Whether it was trained on weights that were quantised, stored so or as they were loaded."""
        return is_quantised(self.model) or bool(self.config and self.config.quantization != "none")


def fuse_command(options: FuseOptions) -> None:
    """`mlx-finetune fuse`."""
    fused_model(options).finish(options.as_json)


def fused_model(options: FuseOptions) -> Done:
    """Makes the folder `options.out`."""
    refuse_existing(options.out)
    opened = _open(options)
    say(f"adding {opened.checkpoint} to the weights of {opened.into}, into {options.out}")
    if options.quantised_base:
        say(f"they become those that it was trained on: the quantised ones of {opened.model}, unpacked")
    elif is_quantised(opened.model):
        say(f"it was trained on the quantised weights of {opened.model}; these are the original ones")
    fused, verified = fuse_opened(opened, options.out, options.quantised_base, options.by_weights)

    def show() -> None:
        print(*told(fused.tensors, asdict(verified)), sep="\n")
        if verified.trained_on:
            apart = verified.trained_on
            print(f"from the model as it was trained, on quantised weights: KL {apart['kl']:.4f} nats a token,")
            advice = "" if options.quantised_base or not is_quantised(opened.model) else "; --quantised-base keeps that model"
            print(f"largest logit difference {apart['largest']:.2f}{advice}")

    result = {"fused": asdict(fused), "verified": asdict(verified), "out": str(options.out)}
    return Done(result, show, options.out, "use the folder like any Hugging Face model")


def fuse_opened(opened: Opened, out: Path, quantised_base: bool, by_weights: bool = False) -> tuple[Fused, Verified]:
    """`fuse_and_verify` with a progress bar; `quantised_base`: into the weights that were trained on, unpacked."""
    changes = (
        changes_from_packed(opened.into, opened.model, opened.checkpoint)
        if quantised_base
        else read_changes(opened.into, opened.checkpoint)
    )
    with progress("fuse") as advance:
        return fuse_and_verify(
            opened.into, opened.checkpoint, out, PROBE_TEXTS, advance, opened.template, opened.facts,
            packed=opened.model if opened.is_packed else None, from_packed=quantised_base, changes=changes,
            by_weights=by_weights or None,
        )  # fmt: skip


def open_trained(run: Path, checkpoint: str, original: str, base: str, into_awq: bool = False) -> Opened:
    """A run that `train` made; `into_awq`: what was trained on weights of AWQ is for them alone.

    Raises:
        UserError: no such run or checkpoint, a model that is not the one that was trained on, or no original weights.
    """
    config, model, folder = open_run(run, checkpoint or "best")
    keeps = into_awq and was_awq(model)
    if keeps and original:
        raise UserError(f"--original {original}: what was trained on {model} is for its own weights, of AWQ", hint="leave it out")
    into = model if keeps else original_of(model, original)
    return Opened(model, into, folder, trained_template(run), config, read_facts(run, folder, into, config, base))


def check_quantised(opened: Opened) -> None:
    """Raises UserError where --quantised-base is given and there are no quantised weights on the disk."""
    if not is_quantised(opened.model):
        what = "was trained on weights that are quantised only while they are loaded" if opened.is_packed else "is not quantised"
        raise UserError(f"--quantised-base: {opened.model} {what}", hint="leave it out")


def _open(options: FuseOptions) -> Opened:
    """A run, or the folder of an adapter.

    Raises:
        UserError: neither; a model that is not there or that is not what it was trained on; options that do not go together.
    """
    check_hub_id(options.base, "--base")
    is_run = (options.run / "config.yaml").is_file()
    if not is_run and not (options.run / ADAPTER_CONFIG).is_file():
        raise UserError(f"{options.run}: neither a run nor the folder of an adapter", hint="mlx-finetune train makes a run")
    opened = _open_run(options) if is_run else _open_adapter(options)
    if options.quantised_base:
        check_quantised(opened)
    return opened


def _open_run(options: FuseOptions) -> Opened:
    if options.model:
        raise UserError(f"--model {options.model}: a run knows its model", hint="--original names the weights to fuse into")
    return open_trained(options.run, options.checkpoint, options.original, options.base)


def _open_adapter(options: FuseOptions) -> Opened:
    if options.checkpoint:
        raise UserError(f"--checkpoint {options.checkpoint}: {options.run} is an adapter, not a run", hint="leave it out")
    if options.base:
        raise UserError(f"--base {options.base}: a card is written for runs", hint="leave it out")
    config = read_json(options.run / ADAPTER_CONFIG)
    named = config.get("base_model_name_or_path") or config.get("model") if isinstance(config, dict) else None
    if not (options.model or named):
        raise UserError(f"{options.run}: it does not say what model it is for", hint="--model FOLDER or org/name")
    model = model_folder(options.model or str(named))
    check_model_folder(model, with_template=False)
    return Opened(model, original_of(model, options.original), options.run)
