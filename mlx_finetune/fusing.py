"""What `fuse` does, from its arguments to the lines that a person reads."""

from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_finetune.config import RunConfig
from mlx_finetune.errors import UserError
from mlx_finetune.export.facts import Facts, read_facts
from mlx_finetune.files import read_json, refuse_existing
from mlx_finetune.models.hub import HUB_ID, check_model_folder, model_folder
from mlx_finetune.models.origin import original_folder, read_origin
from mlx_finetune.models.weights import fingerprint
from mlx_finetune.terminal import finish, progress, say

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
        return self.model != self.into or bool(self.config and self.config.quantization != "none")


def fuse_command(options: FuseOptions) -> None:
    """`mlx-finetune fuse`."""
    from mlx_finetune.export.changes import read_changes
    from mlx_finetune.export.quantised_base import changes_from_packed
    from mlx_finetune.export.report import told
    from mlx_finetune.export.verify import PROBE_TEXTS, fuse_and_verify

    refuse_existing(options.out)
    opened = _open(options)
    say(f"adding {opened.checkpoint} to the weights of {opened.into}, into {options.out}")
    if opened.model != opened.into:
        which = "unpacked from those of" if options.quantised_base else "the original ones of"
        say(f"it was trained on quantised weights; it goes into {which} {opened.model}")
    changes = (
        changes_from_packed(opened.into, opened.model, opened.checkpoint)
        if options.quantised_base
        else read_changes(opened.into, opened.checkpoint)
    )
    with progress("fuse") as advance:
        fused, verified = fuse_and_verify(
            opened.into, opened.checkpoint, options.out, PROBE_TEXTS, advance, opened.template, opened.facts,
            packed=opened.model if opened.is_packed else None, from_packed=options.quantised_base, changes=changes,
        )  # fmt: skip

    def show() -> None:
        print(*told(fused.tensors, asdict(verified)), sep="\n")
        if verified.trained_on:
            apart = verified.trained_on
            print(f"from the model as it was trained, on quantised weights: KL {apart['kl']:.4f} nats a token,")
            print(f"largest logit difference {apart['largest']:.2f}; --quantised-base keeps what quantising lost")

    result = {"fused": asdict(fused), "verified": asdict(verified), "out": str(options.out)}
    finish(result, options.as_json, show, options.out, "use the folder like any Hugging Face model")


def _open(options: FuseOptions) -> Opened:
    """A run, or the folder of an adapter.

    Raises:
        UserError: neither; a model that is not there or that is not what it was trained on; options that do not go together.
    """
    if options.base and not HUB_ID.fullmatch(options.base):
        raise UserError(f"--base {options.base}: no id of the Hub", hint="write it as org/name, or leave it out")
    is_run = (options.run / "config.yaml").is_file()
    if not is_run and not (options.run / ADAPTER_CONFIG).is_file():
        raise UserError(f"{options.run}: neither a run nor the folder of an adapter", hint="mlx-finetune train makes a run")
    opened = _open_run(options) if is_run else _open_adapter(options)
    if options.quantised_base and opened.model == opened.into:
        what = "was trained on weights that are quantised only while they are loaded" if opened.is_packed else "is not quantised"
        raise UserError(f"--quantised-base: {opened.model} {what}", hint="leave it out")
    return opened


def _open_run(options: FuseOptions) -> Opened:
    from mlx_finetune.evaluation.compare import open_run
    from mlx_finetune.training.checkpoint import trained_template

    if options.model:
        raise UserError(f"--model {options.model}: a run knows its model", hint="--original names the weights to fuse into")
    config, model, checkpoint = open_run(options.run, options.checkpoint or "best")
    facts = read_facts(options.run, checkpoint, model, config, options.base)
    return Opened(model, _into(options, model), checkpoint, trained_template(options.run), config, facts)


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
    check_model_folder(model)
    return Opened(model, _into(options, model), options.run)


def _into(options: FuseOptions, model: Path) -> Path:
    """The unquantised weights: those that `model` was converted from, as it says itself or as --original says."""
    origin = read_origin(model)
    if options.original:
        found = model_folder(options.original)
        check_model_folder(found)
        if origin and origin.format == "huggingface" and fingerprint(found) != origin.fingerprint:
            what = f"--original {options.original}: not what {model} was converted from ({origin.model})"
            raise UserError(what, hint="give that one")
        return found
    if origin is None and read_json(model / "config.json").get("quantization"):
        hint = "--original FOLDER or org/name: the unquantised model"
        raise UserError(f"{model}: quantised, and no origin.json says from what", hint=hint)
    found = original_folder(model)
    return model if found == model else found
