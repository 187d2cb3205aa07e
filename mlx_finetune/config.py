"""RunConfig: every setting and the only home of its default. YAML in and out; unknown keys are refused."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mlx_finetune.errors import UserError
from mlx_finetune.files import atomic_file
from mlx_finetune.nearest import did_you_mean
from mlx_finetune.reading import LARGEST_SETTINGS, can_be_a_place, plain_yaml, read_whole

UNITS = {"": 1, "k": 1024, "m": 1024**2}


def _size(value: Any) -> Any:
    """`8k` is 8192: sizes may be written as people say them."""
    match = re.fullmatch(r"\s*(\d+)\s*([km]?)\s*", str(value).lower())
    return int(match[1]) * UNITS[match[2]] if match else value


def _pattern(text: str) -> str:
    """A regular expression, or a word such as all-linear."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    return text


def _place(path: str) -> str:
    if not can_be_a_place(path):
        raise ValueError("no place that a file system can have")
    return str(Path(path).expanduser()) if path.startswith("~") else path


Size = Annotated[int, BeforeValidator(_size)]
Place = Annotated[str, AfterValidator(_place)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Settings = TypeVar("Settings", bound=BaseModel)


class RunConfig(BaseModel):
    """Settings of `prepare` and `train`, named as peft and mlx-lm name them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    model: Place = Field(default="", description="Hugging Face folder or hub id of the base model")
    data: Place = Field(default="", description="folder that `prepare` made")
    out: Place = Field(default="", description="folder of the run")
    engine: Literal["auto", "mlx", "torch"] = Field(
        default="auto", description="auto: MLX on Apple silicon, torch on CUDA, else what is installed"
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = Field(
        default="auto", description="of the torch engine; auto: CUDA where it is found, else the CPU. MLX takes its own"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="of the frozen weights; auto: as stored on Metal, bfloat16 on CUDA, float32 on a CPU and on mps",
    )
    quantization: Literal["none", "4bit", "8bit"] = Field(
        default="none",
        description="of the frozen weights, by bitsandbytes (torch): 4bit is NF4, quantised twice. MLX: convert first",
    )

    max_length: Size = Field(default=8192, ge=64, description="tokens in one window; longer conversations become several windows")
    valid_fraction: Fraction = Field(default=0.1, description="share of the gptme conversations held out for validation")
    validation_by: Literal["time", "hash"] = Field(
        default="time", description="time: the newest are held out; hash: the same ones as the collection grows"
    )
    openassistant_valid_fraction: Fraction = Field(
        default=0.05, description="share of the OpenAssistant trees held out, 50 at most; their loss is shown apart"
    )
    openassistant_share: Fraction = Field(
        default=0.3, description="most that OpenAssistant makes up of the learned tokens, where there are other conversations"
    )
    test_fraction: Fraction = Field(
        default=0.0,
        description="share of gptme's conversations set aside by their group, for ever: neither trained on nor looked at",
    )

    allow_inexact: bool = Field(default=False, description="also learn turns whose context cannot be made that which is served")

    fine_tune_type: Literal["lora", "dora", "full"] = Field(
        default="lora", description="lora, dora (magnitudes of rows are learned too), or full (the weights themselves, in float32)"
    )
    adapter_path: Place = Field(
        default="", description="folder of an adapter to start from, of peft or of mlx-lm; its rank and targets are taken over"
    )
    rank: int = Field(default=16, ge=1, description="width of the adapter")
    alpha: float = Field(default=32.0, gt=0, description="the adapter is scaled by alpha / rank")
    use_rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) instead")
    dropout: Fraction = Field(default=0.0, description="on the input of adapters of linear layers, and of experts, while training")
    target_modules: Pattern | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default="all-linear",
        description="all-linear, names such as q_proj,v_proj (embed_tokens and lm_head too), a regular expression for whole paths; "
        "experts of a mixture only where it says experts, or experts.down_proj and the like: all-linear,experts",
    )
    num_layers: int | None = Field(default=None, ge=1, description="adapt the last so many layers only; none: all")
    neftune_noise_alpha: float = Field(
        default=0.0, ge=0, description="noise on the embeddings while training (NEFTune; 5 is usual); 0: none"
    )

    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "muon"] = Field(
        default="adamw", description="adamw_8bit: moments in 8 bits, by bitsandbytes (torch)"
    )
    learning_rate: float = Field(default=2e-4, gt=0, description="at the end of the warmup")
    loraplus_lr_ratio: float = Field(default=1.0, gt=0, description="B of a linear layer learns faster than A by this (LoRA+)")
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine", description="after the warmup; cosine and linear: to 0; wsd: constant, then linearly to 0"
    )
    warmup_ratio: Fraction = Field(default=0.05, description="share of the steps in which the rate rises linearly")
    decay_ratio: Fraction = Field(default=0.2, description="share of the steps in which the rate falls, with wsd")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled, of matrices")
    max_grad_norm: float = Field(default=1.0, gt=0, description="the gradient of a step is clipped to this norm")
    batch_size: int = Field(default=1, ge=1, description="examples in a micro-batch: what memory holds at once")
    gradient_accumulation: int = Field(default=8, ge=1, description="micro-batches in a step")
    grad_checkpoint: int = Field(
        default=0, ge=0, description="compute the activations of every so many-th layer again in the backward pass; 0: keep all"
    )
    attention: Literal["auto", "fused", "blocks", "flash"] = Field(
        default="auto",
        description="blocks: in bounded memory (MLX); flash: the package flash-attn (CUDA); fused: the framework's own; "
        "auto: blocks with MLX on a CPU, else fused",
    )
    torch_compile: bool = Field(default=False, description="compile the layers (torch); the first step takes a minute or more")
    use_liger_kernel: bool = Field(default=False, description="kernels of the package liger-kernel for norms and gates (CUDA)")
    fsdp: bool = Field(default=False, description="under torchrun: frozen weights cut over the GPUs, for a model larger than one")
    share_prefixes: Literal["auto", "always", "never"] = Field(
        default="auto", description="compute once what several examples of a step begin with; auto: where engine and model can"
    )
    pack_length: Size | None = Field(
        default=None, ge=64, description="tokens folded together at most; none: as many as the largest micro-batch has"
    )
    cache_trunk: bool = Field(
        default=False, description="with num_layers: keep on the disk what enters the first of them, for the second epoch on"
    )
    epochs: float = Field(default=1.0, gt=0, description="passes over the data")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps; wins over epochs where given")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the adapter, the order and the dropout")

    eval_every: int = Field(default=50, ge=1, description="steps between two held-out losses")
    save_every: int = Field(default=50, ge=1, description="steps between two checkpoints")
    keep: int | None = Field(
        default=None, ge=1, description="newest checkpoints to keep; those of the links best and latest stay too; none: all"
    )
    patience: int = Field(
        default=0,
        ge=0,
        description="stop after so many held-out losses in a row that are not below the lowest; 0: never",
    )
    sample_prompts: int = Field(default=3, ge=0, description="held-out turns answered with each held-out loss; 0: none")
    sample_tokens: int = Field(default=128, ge=1, description="most tokens of such an answer")
    report_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] | None = Field(
        default=None,
        description="tensorboard, trackio, wandb or several of them: told the losses too, never a conversation",
    )

    @model_validator(mode="before")
    @classmethod
    def _split_names(cls, values: Any) -> Any:
        targets = values.get("target_modules") if isinstance(values, dict) else None
        if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"(experts\.|all-linear|[\w\s,])*", targets):
            values = values | {"target_modules": tuple(name.strip() for name in targets.split(",") if name.strip())}
        return values

    @field_validator("report_to", mode="before")
    @classmethod
    def _split_trackers(cls, value: Any) -> Any:
        if not isinstance(value, str | list | tuple):
            return value
        texts = [value] if isinstance(value, str) else value
        names = [name.strip() for text in texts for name in str(text).split(",") if name.strip() not in ("", "none")]
        return tuple(dict.fromkeys(names)) or None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them."""
        return self.model_dump(mode="json")


FIELDS: tuple[str, ...] = tuple(RunConfig.model_fields)


def default(name: str) -> Any:
    """The default of a field, for help texts."""
    return RunConfig.model_fields[name].get_default()


def make_config(values: Mapping[str, Any], place: str) -> RunConfig:
    """Checks `values`; `place` says where they come from.

    Raises:
        UserError: an unknown key (the nearest known one named) or a value out of range.
    """
    return checked(RunConfig, values, place)


def checked(kind: type[Settings], values: Mapping[str, Any], place: str, within: str = "") -> Settings:
    """The values as that class of settings; `within`: what is written before their names in an error.

    Raises:
        UserError: see `make_config`.
    """
    fields = kind.model_fields
    for key, value in values.items():
        if key not in fields:
            cutoff = 0.5 if isinstance(key, str) else 1.0  # YAML has keys that are no names: null, 1
            raise unknown(place, f"{within}{key}", [f"{within}{name}" for name in fields], cutoff)
        if isinstance(value, bool) and fields[key].annotation is not bool:  # pydantic would read `yes` as 1
            description = fields[key].description
            raise UserError(f"{place}: {within}{key} = {value}: yes or no is no value for it", hint=f"{key}: {description}")
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        message = f"{place}: {within}{name} = {values.get(name)!r:.120}: {first['msg'].lower()}"
        allowed = re.findall(r"'([^']*)'", first.get("ctx", {}).get("expected", ""))  # of a choice
        meant = did_you_mean(str(first["input"]), allowed)
        raise UserError(message, hint=meant or f"{name}: {fields[name].description}") from error


def unknown(place: str, key: str, known: Sequence[str], cutoff: float = 0.5) -> UserError:
    """That nothing is called so, with what is called nearly so."""
    hint = did_you_mean(key, known, f"known settings: {', '.join(known)}", cutoff)
    return UserError(f"{place}: unknown setting {key!r:.80}", hint=hint)


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> RunConfig:
    """Command line beats file beats default."""
    values = read_yaml(path) if path else {}
    make_config(values, str(path))
    return make_config(values | dict(overrides), "the command line")


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`key=value` as `--set` takes it, the value read as YAML."""
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: no '=' in it", hint="write --set rank=8")
        try:
            values[key.strip()] = plain_yaml(text)
        except ValueError as error:
            raise UserError(f"--set {assignment:.80}: not a YAML value: {error}", hint="write --set rank=8") from error
    return values


def save_config(path: Path, config: RunConfig) -> None:
    """The resolved settings as YAML."""
    with atomic_file(path) as file:
        yaml.safe_dump(config.to_dict(), file, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a file as they stand there; raises UserError where there are none."""
    text = read_whole(path, "name a YAML file, or use options", LARGEST_SETTINGS)
    try:
        values = plain_yaml(text.decode())
    except ValueError as error:  # or not UTF-8
        raise UserError(f"{path}: not YAML: {error}", hint="settings are lines of `name: value`") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: no settings in it", hint="settings are lines of `name: value`")
    return values
