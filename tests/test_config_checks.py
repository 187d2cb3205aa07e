"""config.json with settings of the wrong type or sign: one line that names key and value, from wherever it is read."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_seeing, make_tiny
from tiny_replit import convert_replit, make_replit

from mlx_finetune.errors import UserError
from mlx_finetune.models.config_checks import check_config
from mlx_finetune.models.hub import check_model_folder
from mlx_finetune.models.mlx_config import check_supported, max_exact_length, mlx_overlay
from mlx_finetune.models.mlx_proven import PROVEN, SEEING
from mlx_finetune.models.plain_config import plain_config
from mlx_finetune.models.quantised_sources import check_not_packed
from mlx_finetune.planning.model_shape import shape_of

BAD = (None, "x", 0, -1, [], {}, {"a": 1}, 1e9, True, [1, "a"])
ADDED = ("quantization", "quantization_config", "text_config", "rope_scaling", "rope_parameters", "layer_types", "sliding_window")
KINDS = ("llama", "mpt", "qwen3_5_text", "gemma3")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([], "place: not a JSON object"),
        ({"model_type": []}, "place: model_type is [], not a name"),
        ({"hidden_size": 0}, "place: hidden_size is 0, not a positive whole number"),
        ({"vocab_size": 1e9}, "place: vocab_size is 1000000000.0, not a positive whole number"),
        ({"num_hidden_layers": 10**9}, "place: num_hidden_layers is 1000000000, not a whole number from 1 to 10,000"),
        ({"layer_types": [1, "a"]}, "place: layer_types is [1, 'a'], not a list of names"),
        ({"attention_bias": 1}, "place: attention_bias is 1, not true or false"),
        ({"rope_scaling": "x"}, "place: rope_scaling is 'x', not an object"),
        ({"rope_parameters": {"rope_theta": -1}}, "place: rope_parameters: rope_theta is -1, not a positive number"),
        ({"text_config": {"head_dim": -1}}, "place: text_config: head_dim is -1, not a whole number, 0 or more"),
        ({"quantization": {}}, "place: quantization has no bits"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused_with_its_key_and_value(config: Any, said: str) -> None:
    with pytest.raises(UserError) as refused:
        check_config(config, "place")
    assert refused.value.message == said and refused.value.hint


def test_what_transformers_itself_writes_for_every_model_that_mlx_reads_is_accepted() -> None:
    from transformers import CONFIG_MAPPING

    for kind in (*PROVEN, *SEEING):
        check_config(CONFIG_MAPPING[kind]().to_dict(), kind)


def test_nulls_and_sizes_of_each_layer_are_accepted() -> None:
    check_config({"sliding_window": None, "head_dim": None, "layer_types": None, "num_key_value_heads": [2, 4]}, "place")


def make(kind: str, folder: Path) -> Path:
    if kind == "mpt":
        return convert_replit(make_replit(folder / "replit"), folder / "model")
    if kind == "gemma3":
        return make_seeing("gemma3", "gemma3_text", folder / "model", tokenizer=True)
    return make_tiny(kind, folder / "model", tokenizer=True)


def damaged(config: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each key, and each of the text model and of RoPE, with each bad value."""
    for value in BAD:
        for key in {*ADDED, *config}:
            yield key, value, {**config, key: value}
        for home in ("text_config", "rope_parameters", "attn_config"):
            inner = config.get(home)
            for key in inner if isinstance(inner, dict) else ():
                yield f"{home}.{key}", value, {**config, home: {**inner, key: value}}


def read_everywhere(folder: Path, config: dict[str, Any]) -> None:
    """As prepare, train and convert read it, whatever the one before said of it."""
    from mlx_finetune.engines.mlx.load import empty_model, open_model

    (folder / "config.json").write_text(json.dumps(config))
    steps = (
        lambda: check_model_folder(folder, with_template=False),
        lambda: shape_of(config, "model", ()),
        lambda: check_not_packed(folder, config, None, None),
        lambda: (check_supported(config), mlx_overlay(config), max_exact_length(config), plain_config(config)),
        lambda: open_model(folder),
        lambda: empty_model(folder),
    )
    for step in steps:
        try:
            step()
        except UserError as error:
            assert "\n" not in error.message and error.message, config


def check_kind(kind: str, tmp_path: Path, share: float) -> None:
    folder = make(kind, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    cases = sorted(damaged(config), key=lambda case: (case[0], str(case[1])))
    chosen = random.Random(7).sample(cases, round(len(cases) * share))
    assert len(chosen) > 20
    for key, value, changed in chosen:
        try:
            read_everywhere(folder, changed)
        except Exception as error:
            raise AssertionError(f"{kind} with {key} = {value!r}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("kind", KINDS)
def test_a_tenth_of_all_bad_settings_of_config_json_give_no_traceback(kind: str, tmp_path: Path) -> None:
    check_kind(kind, tmp_path, 0.1)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_no_bad_setting_of_config_json_gives_a_traceback(kind: str, tmp_path: Path) -> None:
    check_kind(kind, tmp_path, 1.0)
