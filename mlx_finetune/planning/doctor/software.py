"""What is installed beside Python, what is missing and what that would be for; nothing is started, no network is used."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

from mlx_finetune.data.sources.gptme import default_logs_folder, find_logs
from mlx_finetune.errors import UserError
from mlx_finetune.installed import versions
from mlx_finetune.planning.doctor.findings import Finding

PACKAGE = "mlx-finetune"
# Optional packages: what they are for, and what installs them. Those in CUDA are named only where there is an NVIDIA GPU.
EXTRAS: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "torch": (("torch", "peft"), "the torch engine: CUDA, and the proof of what is handed back", "'mlx-finetune[torch]'"),
    "matplotlib": (("matplotlib",), "loss.png beside a run", "matplotlib"),
    "gguf": (("gguf",), "export --to gguf and --to ollama, and models in .gguf", "'mlx-finetune[gguf]'"),
    "serve": (("starlette", "uvicorn"), "mlx-finetune serve", "'mlx-finetune[serve]'"),
    "qlora": (("bitsandbytes", "accelerate"), "4-bit weights while training on CUDA", "'mlx-finetune[qlora]'"),
    "liger": (("liger-kernel",), "less memory on CUDA (use_liger_kernel)", "'mlx-finetune[liger]'"),
    "flash": (("flash-attn",), "long windows on CUDA (attention=flash)", "'mlx-finetune[flash]'"),
}
CUDA = ("qlora", "liger", "flash")
SHOWN = ("mlx", "mlx-lm", "transformers", "datasets")
TRACKERS = ("tensorboard", "trackio", "wandb")


def software_findings(has_nvidia: bool) -> Iterator[Finding]:
    """What is found here, in order."""
    yield from packages(needs(), versions(needs()))
    wanted = {name: row for name, row in EXTRAS.items() if has_nvidia or name not in CUDA}
    yield from extras(wanted, set(versions(each for row in wanted.values() for each in row[0])))
    yield trackers(set(versions(TRACKERS)))
    yield hub_token(os.environ)
    yield from gptme(default_logs_folder(os.environ, Path.home(), sys.platform), shutil.which("gptme"))
    yield others({name: shutil.which(name) for name in ("ollama", "llama-server")})


def needs() -> dict[str, str]:
    """What this version asks for without any extra, on this system: package -> versions such as `>=5`."""
    from packaging.requirements import Requirement

    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        return {}
    found = [Requirement(line) for line in lines]
    return {each.name: str(each.specifier) for each in found if not each.marker or each.marker.evaluate({"extra": ""})}


def packages(wanted: Mapping[str, str], installed: Mapping[str, str]) -> Iterator[Finding]:
    """A line for each that is missing or too old, and one where there is none."""
    from packaging.specifiers import SpecifierSet

    wrong = False
    for name, versions_needed in wanted.items():
        version = installed.get(name)
        if version is None or not SpecifierSet(versions_needed).contains(version, prereleases=True):
            wrong = True
            found = f"{name} {version or 'is not installed'}, and {versions_needed} is needed"
            yield Finding("packages", "fails", found, f"pip install -U '{name}{versions_needed}'")
    if not wanted:
        yield Finding("packages", "note", f"{PACKAGE} is not installed, only its files are here", "pip install . in its folder")
    elif not wrong:
        shown = ", ".join(f"{name} {installed[name]}" for name in SHOWN if name in installed)
        yield Finding("packages", "ok", f"all {len(wanted)} that are needed: {shown} …")


def extras(wanted: Mapping[str, tuple[tuple[str, ...], str, str]], installed: Iterable[str]) -> Iterator[Finding]:
    """A line for each: there, or what it would be for."""
    there = set(installed)
    for name, (parts, purpose, line) in wanted.items():
        missing = [part for part in parts if part not in there]
        if missing:
            yield Finding(
                f"extra {name}", "optional", f"not installed ({', '.join(missing)}), for {purpose}", f"pip install {line}"
            )
        else:
            yield Finding(f"extra {name}", "ok", f"installed, for {purpose}")


def trackers(installed: Iterable[str]) -> Finding:
    """Any of them does."""
    found = [name for name in TRACKERS if name in installed]
    if found:
        return Finding("trackers", "ok", f"{', '.join(found)}: train --report-to {found[0]}")
    return Finding(
        "trackers", "optional", "none installed: losses in TensorBoard, Trackio or wandb", "pip install 'mlx-finetune[tensorboard]'"
    )


def hub_token(environment: Mapping[str, str]) -> Finding:
    """Whether there is one; never what it says."""
    from huggingface_hub import get_token

    offline = " (HF_HUB_OFFLINE: only models that are here already)" if environment.get("HF_HUB_OFFLINE") in ("1", "true") else ""
    if get_token():
        return Finding("Hub token", "ok", f"there is one; it was not tried: no network was used{offline}")
    found = f"none: public models need none{offline}"
    return Finding("Hub token", "optional", found, "for gated or private models, and for push: hf auth login")


def gptme(logs: Path, program: str | None) -> Iterator[Finding]:
    """The program and its logs: either can be there without the other."""
    version = version_beside(Path(program)) if program else None
    if program:
        yield Finding("gptme", "ok", f"{version or 'version not known'}, {program}")
    else:
        yield Finding("gptme", "optional", "not found on the PATH: to drive a tuned model", "pipx install gptme")
    try:
        found, skipped = find_logs(logs)
    except UserError as error:
        advice = "name another folder: mlx-finetune collect LOGS; or try mlx-finetune demo, which has conversations of its own"
        yield Finding("gptme's logs", "note", error.message, advice)
        return
    size = sum(log.size for log in found) / 1e6
    beside = f", {len(skipped)} cannot be read" if skipped else ""
    yield Finding("gptme's logs", "ok", f"{len(found):,} conversations, {size:.1f} MB{beside}, in {logs}")


def version_beside(program: Path) -> str | None:
    """Of the gptme in the environment that a program lies in; it is not started, which would take seconds."""
    places = program.resolve().parents[1].glob("lib/python*/site-packages")
    found = (one.version for one in distributions(name="gptme", path=[str(place) for place in places]))
    return next(found, None)


def others(found: Mapping[str, str | None]) -> Finding:
    """Programs that can serve what is exported."""
    there = [name for name, place in found.items() if place]
    if there:
        return Finding("other servers", "ok", f"{' and '.join(there)} found: for what export makes")
    return Finding("other servers", "optional", "neither Ollama nor llama.cpp found: mlx-finetune serve needs none of them")
