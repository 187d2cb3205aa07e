"""What `export` and `push` do, from their arguments to the lines that a person reads."""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from mlx_finetune.errors import UserError
from mlx_finetune.export.facts import Facts
from mlx_finetune.files import atomic_folder, half_made, read_json, refuse_existing
from mlx_finetune.fusing import Opened, check_quantised, fuse_opened, open_trained
from mlx_finetune.installed import versions
from mlx_finetune.models.hub import check_hub_id, check_model_folder
from mlx_finetune.nearest import did_you_mean
from mlx_finetune.road import HandBack
from mlx_finetune.terminal import Done, finish, printable, progress, say, table, waiting
from mlx_finetune.training.manifest import made_from

ADAPTERS, MODELS = ("peft", "mlx-lm"), ("gguf", "ollama")
QUANTISATION: str = HandBack.default("quantisation")  # where none is named


@dataclass(frozen=True)
class ExportOptions:
    """As cli_export.py has them."""

    run: Path
    to: str
    out: Path
    checkpoint: str
    quantisation: str
    adapter_only: bool
    base: str
    original: str
    quantised_base: bool
    as_json: bool


@dataclass(frozen=True)
class PushOptions:
    """As cli_export.py has them."""

    folder: Path
    repo: str
    public: bool
    allow: list[str] | None
    yes: bool
    dry_run: bool
    as_json: bool


def export_command(options: ExportOptions) -> None:
    """`mlx-finetune export`."""
    exported(options).finish(options.as_json)


def exported(options: ExportOptions, fused: Path | None = None) -> Done:
    """Makes the folder `options.out`. `fused`: what `fuse` made of the same checkpoint, so that it is not made again."""
    _check(options)
    if options.to in ADAPTERS:
        return _export_adapter(options)
    return _export_gguf_adapter(options) if options.adapter_only else _export_model(options, fused)


def _check(options: ExportOptions) -> None:
    if options.to not in ADAPTERS + MODELS:
        hint = did_you_mean(options.to, ADAPTERS + MODELS, f"it is one of {', '.join(ADAPTERS + MODELS)}")
        raise UserError(f"--to {options.to}: not a format that is known", hint=hint)
    if options.adapter_only and options.to != "gguf":
        raise UserError(
            f"--adapter-only is for --to gguf, not {options.to}", hint="peft and mlx-lm take adapters alone; Ollama takes models"
        )
    check_hub_id(options.base, "--base")
    is_file = options.to in MODELS and not options.adapter_only
    if options.quantisation and not is_file:
        raise UserError(f"--quantisation {options.quantisation}: an adapter is not quantised", hint="leave it out")
    is_run = (options.run / "config.yaml").is_file()
    if options.quantised_base and not is_file:
        raise UserError(f"--quantised-base: an adapter for {options.to} has no base in it", hint="leave it out")
    of_runs = {
        f"--checkpoint {options.checkpoint}": options.checkpoint,
        f"--base {options.base}": options.base,
        f"--original {options.original}": options.original,
        "--quantised-base": options.quantised_base,
    }
    for option, given in of_runs.items():
        if given and is_file and not is_run:
            raise UserError(f"{option}: {options.run} is no run", hint="leave it out for a model folder")
    refuse_existing(options.out)


def _open(options: ExportOptions) -> tuple[Opened, Facts]:
    opened = open_trained(options.run, options.checkpoint, options.original, options.base, into_awq=options.to == "mlx-lm")
    if options.quantised_base:
        check_quantised(opened)
    assert opened.facts is not None
    return opened, opened.facts


def _export_adapter(options: ExportOptions) -> Done:
    from mlx_finetune.export.adapter_folder import FORMATS, export_adapter

    trained, facts = _open(options)
    checkpoint = trained.checkpoint
    (to,) = (name for name in FORMATS if name == options.to)
    say(f"writing the adapter of {checkpoint} for {to} into {options.out}")
    with waiting("comparing it with the engine that trained it"):
        made, opened = export_adapter(trained.into, checkpoint, options.out, to, trained.template, facts)
    for remark in made.remarks:
        say(remark)
    if not facts.on_hub:
        say(f"it names its base {facts.base}, a folder of this machine; --base org/name names one on the Hub")

    def show() -> None:
        print(f"{made.modules} modules, {made.bytes / 1e6:.1f} MB, for {' and '.join(made.formats)}")
        for name, reading in opened.readers.items():
            difference = f"{reading.largest_difference:.1e}, allowed {reading.tolerance:.1e}"
            print(f"opened by {name}: largest logit difference from the {opened.engine} engine {difference}")
        for name in opened.not_asked:
            print(f"not opened by {name}, which is not installed")

    result = {"exported": asdict(made), "verified": asdict(opened), "out": str(options.out)}
    return Done(result, show, options.out, f"mlx-finetune push {options.out} owner/name")


def _export_gguf_adapter(options: ExportOptions) -> Done:
    from mlx_finetune.export.card import write_card
    from mlx_finetune.export.gguf_adapter import write_gguf_adapter
    from mlx_finetune.export.report import RAN

    opened, facts = _open(options)
    checkpoint = opened.checkpoint
    say(f"writing the adapter of {checkpoint} as GGUF into {options.out}")
    with atomic_folder(options.out) as folder:
        name = f"{facts.base.rpartition('/')[2]}-lora.gguf"
        write_gguf_adapter(checkpoint, opened.into, folder / name)
        write_card(folder, facts, {"made_from": made_from(checkpoint), "verified": {}, "versions": versions(RAN)}, "gguf adapter")
    say("what llama.cpp makes of it was not compared with the engine that trained it")
    following = f"llama-server -m BASE.gguf --lora {options.out / name}"
    return Done({"file": str(options.out / name), "out": str(options.out)}, lambda: None, options.out, following)


def _export_model(options: ExportOptions, made: Path | None = None) -> Done:
    """A run is fused and verified into a folder beside the new one, which goes when the GGUF is written; not where it is `made`."""
    write = {"gguf": _write_gguf, "ollama": _write_ollama}[options.to]
    is_run = (options.run / "config.yaml").is_file()
    if not is_run:
        if not (options.run / "config.json").is_file():
            raise UserError(f"{options.run}: neither a run nor a model folder", hint="mlx-finetune train or fuse makes one")
        check_model_folder(options.run)
    from mlx_finetune.export.gguf_kinds import check_kind
    from mlx_finetune.export.gguf_write import need_gguf

    kind = options.quantisation or QUANTISATION
    check_kind(kind)
    need_gguf()
    say(f"writing {options.run} as {options.to} ({kind}) into {options.out}")
    with (
        atomic_folder(options.out) as folder,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=half_made(options.out)) as beside,
    ):
        fused, report, facts = made or (Path(beside) / "fused" if is_run else options.run), None, None
        if is_run:
            report, facts = _fuse(options, fused)
        with progress(options.to) as advance:
            file = write(options, fused, folder, facts.base if facts else fused.resolve().name, advance)
        if report is not None and facts is not None:
            _describe(folder, fused, facts, report)
    size = (options.out / file.name).stat().st_size
    following = (
        f"ollama create NAME -f {options.out / 'Modelfile'}"
        if options.to == "ollama"
        else f"llama-server -m {options.out / file.name}"
    )
    result = {"file": str(options.out / file.name), "bytes": size, "verified": report, "out": str(options.out)}
    return Done(result, lambda: print(f"{file.name}, {size / 1e6:.1f} MB"), options.out, following)


def _fuse(options: ExportOptions, fused: Path) -> tuple[dict[str, Any], Facts]:
    from mlx_finetune.export.gguf_metadata import read_config
    from mlx_finetune.export.ollama import translated
    from mlx_finetune.export.report import FILE

    opened, facts = _open(options)
    read_config(opened.into)  # refuses what llama.cpp does not have, before anything is fused
    if options.to == "ollama":
        translated(opened.into, opened.template)  # and a template that cannot be translated
    if not fused.exists():
        _, verified = fuse_opened(opened, fused, options.quantised_base)
        if verified.not_run:
            say(verified.not_run)
    return read_json(fused / FILE), facts


def _describe(folder: Path, fused: Path, facts: Facts, report: dict[str, Any]) -> None:
    """The card and the licence beside the GGUF file; verification.json speaks of the weights before they were quantised."""
    import shutil

    from mlx_finetune.export.card import write_card
    from mlx_finetune.export.report import FILE

    write_card(folder, facts, report, "gguf")
    for path in (fused / FILE, *fused.glob("LICENSE*"), *fused.glob("NOTICE*")):
        shutil.copyfile(path, folder / path.name)


def _write_gguf(options: ExportOptions, model: Path, folder: Path, base: str, advance: Callable[..., None]) -> Path:
    from mlx_finetune.export.gguf_write import write_gguf

    kind = options.quantisation or QUANTISATION
    file = folder / f"{base.rpartition('/')[2].removesuffix('.gguf')}-{kind}.gguf"
    write_gguf(model, file, kind, advance)
    return file


def _write_ollama(options: ExportOptions, model: Path, folder: Path, base: str, advance: Callable[..., None]) -> Path:
    from mlx_finetune.export.ollama import OllamaSettings, write_ollama
    from mlx_finetune.training.checkpoint import trained_template

    file = _write_gguf(options, model, folder, base, advance)
    for remark in write_ollama(folder, model, OllamaSettings(gguf=file.name, template=trained_template(options.run))):
        say(remark)
    return file


def push_command(options: PushOptions) -> None:
    """`mlx-finetune push`."""
    from mlx_finetune.data.redact import Rules
    from mlx_finetune.export.push import check_repo, choose_files, find_private, open_api, push

    check_repo(options.repo)
    allow = tuple(options.allow or ())
    Rules(allow=allow)  # refuses a pattern that is none
    upload = choose_files(options.folder)
    names = list(upload.files)
    found = find_private(options.folder, names, Path.home(), allow)
    if found:
        for one in found:
            say(f"{one.file}{f':{one.line}' if one.line else ''}: {one.kind}")
        hint = "take it out, or --allow TEXT where it may be seen"
        raise UserError(f"{options.folder}: {len(found)} places look private; nothing was uploaded", hint=hint)
    _announce(options, upload.files, upload.left_out)
    result: dict[str, Any] = {"repo": options.repo, "public": options.public, "files": upload.files, "left_out": upload.left_out}
    if options.dry_run:
        finish(result, options.as_json, lambda: None, None, "the same without --dry-run")
        return
    _ask(options)
    url = push(open_api(), options.folder, options.repo, names, options.public)
    finish(result | {"url": url}, options.as_json, lambda: print(url), None, "")


def _announce(options: PushOptions, files: dict[str, int], left_out: list[str]) -> None:
    say(
        f"to https://huggingface.co/{options.repo}, {'PUBLIC' if options.public else 'private'}: {sum(files.values()) / 1e6:.1f} MB"
    )
    if left_out:
        say(f"left out: {', '.join(left_out)}")
    if not options.as_json:
        table("files", [(printable(name), f"{size:,}") for name, size in files.items()], ("name", "bytes"))


def _ask(options: PushOptions) -> None:
    if options.yes:
        return
    if not sys.stdin.isatty():
        raise UserError(
            "push asks before it uploads, and there is no terminal to ask on", hint="--yes, once --dry-run shows the right files"
        )
    typer.confirm("upload?", abort=True, err=True)
