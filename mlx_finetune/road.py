"""Settings of `run CONFIG` beside those of RunConfig, each with the only home of its default; YAML with comments."""

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mlx_finetune.config import FIELDS, Place, RunConfig, checked, make_config, read_yaml, unknown
from mlx_finetune.errors import UserError

WIDTH = 118  # of a comment


def _listed(value: Any) -> Any:
    """One name stands for a list of it, and nothing for an empty one."""
    return () if value is None else (value,) if isinstance(value, str) else value


def _text(value: Any) -> Any:
    """YAML reads 2026-06-01 as a day."""
    return value.isoformat() if isinstance(value, date) else value


Listed = BeforeValidator(_listed)
Names = Annotated[tuple[str, ...], Listed]
Places = Annotated[tuple[Place, ...], Listed]
Moment = Annotated[str, BeforeValidator(_text)]


class Section(BaseModel):
    """A part of the file, strict as RunConfig is."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @classmethod
    def default(cls, name: str) -> Any:
        """The default of a field."""
        return cls.model_fields[name].get_default()

    @classmethod
    def describe(cls, name: str) -> str:
        """What the field says of itself."""
        return cls.model_fields[name].description or ""


class Collect(Section):
    """What `collect` reads and takes; named as its options are."""

    logs: Place | None = Field(default=None, description="folder of gptme logs; null: gptme's own")
    gptme: bool = Field(default=True, description="read gptme logs at all")
    openassistant: Places = Field(default=(), description="OpenAssistant: hub ids, folders or files of any layout")
    chat: Places = Field(default=(), description="chat files, folders or hub ids: OpenAI, ShareGPT, Alpaca, prompt/completion")
    since: Moment = Field(default="", description="only conversations since then: 2026-06-01, or 30d")
    until: Moment = Field(default="", description="only conversations before the end of that day")
    tool: Names = Field(default=(), description="only where one of these tools is called")
    format: Annotated[tuple[Literal["markdown", "tool", "xml"], ...], Listed] = Field(
        default=(), description="only these tool formats: markdown, tool, xml"
    )
    from_model: Names = Field(default=(), description="only what these models wrote: a part of a name")
    title: Names = Field(default=(), description="only these titles or names: a part, or a pattern")
    exclude: Names = Field(default=(), description="not these names, ids or patterns of them")
    tags: Place | None = Field(default=None, description="YAML file of NAME: keep, drop or a weight; collect writes one to edit")
    near_duplicates: float | None = Field(
        default=None, ge=0, le=1, description="drop what is at least so similar; 0 keeps all, together in one split; null: 0.7"
    )
    near_duplicate_search: bool = Field(
        default=True, description="false: faster, but near-duplicates may stand in training and validation both"
    )
    system: Literal["keep", "short", "none"] = Field(
        default="keep", description="gptme's system prompt: keep, short (as gptme --system short), none"
    )
    tool_calls: Literal["text", "native"] = Field(
        default="text", description="calls of gptme's tool format: text as in the log, or native tool_calls"
    )
    modernise: bool = Field(default=False, description="rewrite old conventions (```bash) to today's, and learn them")
    recovery_weight: float = Field(default=1.0, description="weight of the first success after a failure")
    relevant: Literal["code", "any"] = Field(
        default="code", description="of OpenAssistant: code (programming, shell, developer tools) or any"
    )
    language: Names = Field(default=("en",), description="of OpenAssistant: language of every message; any: all of them")
    min_quality: float = Field(default=0.5, ge=0, le=1, description="of OpenAssistant: least quality of an answer, as rated")
    openassistant_filters: bool = Field(default=True, description="use its labels, and leave out other assistants' names")
    redact: bool = Field(default=True, description="replace secrets by placeholders")
    personal: bool = Field(default=True, description="replace your home folder and user name by /home/user and user")
    home: Names = Field(default=(), description="other home folders of yours in the logs")
    emails: bool = Field(default=False, description="replace e-mail addresses too")
    allow: Names = Field(default=(), description="never redact these texts, or re:PATTERN")


class Evaluate(Section):
    """What `evaluate` measures."""

    answers: int = Field(default=32, ge=0, description="held-out turns that both models answer; 0: none")
    tokens: int = Field(default=384, ge=1, description="most tokens of such an answer")
    test: bool = Field(default=False, description="measure on the test split, which no choice was made by")


class HandBack(Section):
    """What is made of the run for other tools."""

    checkpoint: Literal["best", "latest"] = Field(default="best", description="which one is evaluated and handed back")
    fuse: bool = Field(default=True, description="add the adapter to the original weights: an ordinary Hugging Face folder")
    export: Annotated[tuple[Literal["peft", "mlx-lm", "gguf", "ollama"], ...], Listed] = Field(
        default=(), description="for other tools, each in a folder of its own: peft, mlx-lm, gguf, ollama"
    )
    quantisation: str = Field(default="q8_0", description="of gguf and ollama: f16, bf16, q8_0, q4_k_m and others")
    base: str = Field(default="", description="what the model card calls the base: its hub id, org/name")
    original: Place = Field(default="", description="the unquantised weights, where a quantised model does not name them")
    quantised_base: bool = Field(
        default=False, description="add to the quantised weights that were trained on, unpacked; for fuse, gguf and ollama"
    )


SECTIONS: Mapping[str, tuple[type[Section], str]] = {
    "collect": (Collect, "Which conversations are read, and what is taken of them. Needs nothing: your gptme logs are found."),
    "evaluate": (Evaluate, "Measured once it is trained."),
    "hand_back": (HandBack, "Made of it for other tools."),
}
KEYS = ("folder", *SECTIONS)  # those of the road: `run` alone reads them
TO_MAKE = ("data", "out")
PLACES = (
    *TO_MAKE,
    "model",
    "adapter_path",
    "hand_back.original",
    *(f"collect.{each}" for each in ("logs", "openassistant", "chat", "tags")),
)
FOLDER = "folder in which all of it is kept, as seen from this file"


@dataclass(frozen=True)
class Road:
    """Everything that `run` is told. `config`: without `data` and `out` where the file does not name them."""

    file: Path
    folder: Path
    config: RunConfig
    collect: Collect
    evaluate: Evaluate
    hand_back: HandBack


def load_road(file: Path, overrides: Mapping[str, Any]) -> Road:
    """Command line beats file beats default; `overrides` may name `collect.system` and the like.

    A relative place in the file is seen from the file, so that it means the same wherever the command is given.

    Raises:
        UserError: a key that is not known (the nearest known one named), or a value that it does not take.
    """
    values, base = read_yaml(file), file.absolute().parent
    _split(values, str(file))
    told = _nested(overrides)
    _split(told, "the command line")
    merged = _merged(placed(values, base), placed(told, Path.cwd()))
    flat, sections, folder = _split(merged, "the command line" if told else str(file))
    return Road(file, (base / Path(folder).expanduser()).resolve(), make_config(flat, str(file)), **sections)


def load_settings(file: Path | None, overrides: Mapping[str, Any]) -> tuple[RunConfig, tuple[str, ...]]:
    """The settings of `train`, and which keys of the file are for `run` alone; with those, places are seen as `load_road` does."""
    if file is None:
        return make_config(overrides, "the command line"), ()
    values = read_yaml(file)
    flat, _, _ = _split(values, str(file))
    of_road = tuple(key for key in values if key in KEYS)
    if of_road:
        flat = placed(flat, file.absolute().parent)
    return make_config(flat | dict(overrides), "the command line"), of_road


def _split(values: Mapping[str, Any], place: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Flat settings, sections and the folder, all checked."""
    for key in values:
        if key not in FIELDS and key not in KEYS:
            raise unknown(place, str(key), (*KEYS, *FIELDS))
    flat = {name: value for name, value in values.items() if name in FIELDS}
    make_config(flat, place)
    folder = values.get("folder", ".")
    if not isinstance(folder, str) or not folder:
        raise UserError(f"{place}: folder = {folder!r}: not a place", hint=f"folder: {FOLDER}")
    sections = {}
    for name, (kind, _) in SECTIONS.items():
        told = values.get(name)
        if not isinstance(told, Mapping | None):
            first = next(iter(kind.model_fields))
            raise UserError(f"{place}: {name} = {told!r}: not settings", hint=f"it holds lines such as {first}: ...")
        sections[name] = checked(kind, told or {}, place, f"{name}.")
    return flat, sections, folder


def _nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """SECTION.NAME as a section with that name in it."""
    result: dict[str, Any] = {}
    for key, value in overrides.items():
        section, dot, name = key.partition(".")
        if dot and section in SECTIONS:
            result.setdefault(section, {})[name] = value
        else:
            result[key] = value
    return result


def _merged(values: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    sections = {name: dict(values.get(name) or {}) | told[name] for name in SECTIONS if isinstance(told.get(name), Mapping)}
    return {**values, **told, **sections}


def placed(values: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """With relative places seen from `base`; a name of the Hub stays one unless such a folder stands there."""

    def place(value: Any, to_make: bool) -> Any:
        if isinstance(value, list | tuple):
            return [place(one, to_make) for one in value]
        if not isinstance(value, str) or not value or value.startswith("~"):
            return value
        there = Path(os.path.normpath(base / value))
        return str(there) if to_make or value.startswith(".") or there.exists() else value

    result = {name: place(value, name in TO_MAKE) if name in PLACES else value for name, value in values.items()}
    for name in SECTIONS:
        if isinstance(told := values.get(name), Mapping):
            result[name] = {key: place(value, False) if f"{name}.{key}" in PLACES else value for key, value in told.items()}
    return result


def seen_from(values: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """The same with places in `base` as ./PLACE, so that the folder can be moved with what is in it; see `placed`."""

    def place(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [place(one) for one in value]
        inside = isinstance(value, str) and Path(value).is_absolute() and Path(value).is_relative_to(base)
        return f"./{Path(value).relative_to(base).as_posix()}" if inside else value

    result = {name: place(value) if name in PLACES else value for name, value in values.items()}
    for name in SECTIONS:
        if isinstance(told := values.get(name), Mapping):
            result[name] = {key: place(value) if f"{name}.{key}" in PLACES else value for key, value in told.items()}
    return result


def commented(values: Mapping[str, Any], remarks: Sequence[str] = ()) -> str:
    """A file for `run` that says what each setting means; what is not in `values` stands there as a comment with its default.

    values: as the file holds them, flat settings and sections. remarks: lines above all.

    Raises:
        UserError: see `load_road`.
    """
    _split(values, "config")
    lines = [f"# {line}" for line in (*remarks, "mlx-finetune run THIS_FILE does all of it, and again only what has changed.")]
    lines += ["", f"# {FOLDER}", _line("", "folder", values.get("folder", "."), "folder" not in values), ""]
    lines += _of(RunConfig, values, "", [name for name in FIELDS if name in values])
    for name, (kind, what) in SECTIONS.items():
        told = values.get(name) or {}
        lines += ["", f"# {what}", f"{name}:" if told else f"# {name}:", *_of(kind, told, "  ", list(kind.model_fields))]
    lines += ["", "# The other settings, each with its default."]
    lines += _of(RunConfig, values, "", [name for name in FIELDS if name not in values])
    return "\n".join(lines) + "\n"


def _of(kind: type[BaseModel], values: Mapping[str, Any], indent: str, names: Sequence[str]) -> list[str]:
    """A line a setting with what it means behind it, or above it where that is long."""
    lines: list[str] = []
    for name in names:
        told, said = values.get(name, kind.model_fields[name].get_default()), kind.model_fields[name].description or ""
        line = _line(indent, name, told, name not in values)
        if len(line) + len(said) + 4 <= WIDTH:
            lines.append(f"{line}  # {said}")
        else:
            lines += [*(f"{indent}## {part}" for part in textwrap.wrap(said, WIDTH)), line]
    return lines


def _line(indent: str, name: str, value: Any, is_comment: bool) -> str:
    """JSON is YAML, on one line."""
    plain = list(value) if isinstance(value, tuple) else _text(value)
    return f"{'# ' if is_comment else ''}{indent}{name}: {json.dumps(plain, ensure_ascii=False)}"
