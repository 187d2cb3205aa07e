"""Replit's code models: read from torch shards, computed by both engines as by transformers, trained, and handed back."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architecture_row import relative
from peft_oracle import greedy, loss_and_norm, put
from short_runs import run, settings
from test_engines import config, random_batch, spread
from test_parity import SETTINGS, check_parity
from tiny_replit import CODE, CONFIG, LONGEST, PIECES, convert_replit, lines, make_replit, weights_of

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import open_engine
from mlx_finetune.errors import UserError
from mlx_finetune.export.verify import fuse_and_verify
from mlx_finetune.models.mpt_config import check_mpt, longest_of
from mlx_finetune.models.weights import read_float32, tensor_headers
from mlx_finetune.training.longest import check_length

CLOSE = 1e-5  # of the largest logit: two float32 sums in another order, over 500 tokens; 3e-6 was seen
ATTENTION = CONFIG["attn_config"]
VARIANTS: Mapping[str, dict[str, Any]] = {
    "as Replit": {},
    "six heads": {"n_heads": 6},  # no power of two: slopes in another order
    "clipped, scaled": {"n_heads": 6, "attn_config": {**ATTENTION, "clip_qkv": 1.0, "softmax_scale": 0.3}},
    "a head of its own": {"tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def replit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as it is published; beside it `converted`."""
    folder = tmp_path_factory.mktemp("replit") / "original"
    make_replit(folder)
    convert_replit(folder, folder.parent / "converted")
    return folder


@pytest.fixture(scope="module")
def converted(replit: Path) -> Path:
    return replit.parent / "converted"


def varied(replit: Path, folder: Path, changes: Mapping[str, Any]) -> Path:
    """The converted folder with another config; with a head of its own where that says so."""
    from safetensors.numpy import save_file

    shutil.copytree(replit.parent / "converted", folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    if changes.get("tie_word_embeddings") is False:
        for path in folder.glob("model*"):
            path.unlink()
        head = weights_of(CONFIG, seed=1)["transformer.wte.weight"]
        save_file(weights_of(CONFIG, 0) | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    return folder


def transformers_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(tokens)).logits.numpy()
    return logits


def loaded(folder: Path, dtype: str = "float32") -> Any:
    from mlx_finetune.engines.mlx.load import load_model

    return load_model(folder, dtype)


def mlx_logits(folder: Path, tokens: np.ndarray, dtype: str = "float32") -> np.ndarray:
    import mlx.core as mx

    return np.array(loaded(folder, dtype)(mx.array(tokens)).astype(mx.float32))


def tokens(length: int, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(3, PIECES, (rows, length))


def test_the_weights_are_those_of_the_shards_and_no_code_came_along(converted: Path) -> None:
    headers = tensor_headers(converted)
    assert {name: read_float32(header).tobytes() for name, header in headers.items()} == {
        name: array.tobytes() for name, array in weights_of(CONFIG, 0).items()
    }
    assert not [path.name for path in converted.iterdir() if path.suffix == ".py" or path.name in CODE]


def test_mlx_computes_what_transformers_makes_of_the_original_shards(replit: Path, converted: Path) -> None:
    inputs = tokens(500)
    expected = transformers_logits(replit, inputs)
    assert relative(mlx_logits(converted, inputs), expected) < CLOSE
    assert relative(transformers_logits(converted, inputs), expected) == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_computed_as_transformers_does(name: str, replit: Path, tmp_path: Path) -> None:
    folder, inputs = varied(replit, tmp_path / "model", VARIANTS[name]), tokens(300)
    expected = transformers_logits(folder, inputs)
    assert relative(mlx_logits(folder, inputs), expected) < CLOSE
    assert name == "as Replit" or relative(expected, transformers_logits(replit, inputs)) > 0.1  # the variant has an effect


def test_bfloat16_is_as_near_as_its_own_rounding(converted: Path) -> None:
    inputs = tokens(400)
    exact = mlx_logits(converted, inputs)
    assert 1e-4 < relative(mlx_logits(converted, inputs, "bfloat16"), exact) < 4e-2  # 8 bits, through 3 layers of random weights


def test_a_text_read_token_by_token_gives_the_logits_of_the_whole(converted: Path) -> None:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    inputs, model = tokens(40), loaded(converted)
    cache = make_prompt_cache(model)
    parts = [model(mx.array(inputs[:, :17]), cache=cache)]
    parts += [model(mx.array(inputs[:, i : i + 1]), cache=cache) for i in range(17, 40)]
    assert relative(np.array(mx.concatenate(parts, axis=1)), np.array(model(mx.array(inputs)))) < CLOSE


def test_rows_of_different_lengths_in_a_batch_give_the_logits_of_each_alone(converted: Path) -> None:
    import mlx.core as mx
    from mlx_lm.models.cache import BatchKVCache

    model, (long, short) = loaded(converted), tokens(30)
    padding = 11
    rows = np.stack([long, np.concatenate([np.zeros(padding, int), short[padding:]])])
    cache = [BatchKVCache([0, padding]) for _ in model.layers]
    first, then = (model(mx.array(part), cache=cache) for part in (rows[:, :25], rows[:, 25:]))
    found = np.array(mx.concatenate([first, then], axis=1))
    alone = [np.array(model(mx.array(row[None])))[0] for row in (long, short[padding:])]
    assert relative(found[0], alone[0]) < CLOSE and relative(found[1, padding:], alone[1]) < CLOSE


def test_attention_in_blocks_gives_the_loss_and_the_gradient_of_the_whole(replit: Path, tmp_path: Path) -> None:
    folder = varied(replit, tmp_path / "model", VARIANTS["clipped, scaled"])
    batch, found = random_batch(2, length=500), {}
    for attention in ("blocks", "fused"):
        engine = open_engine(config("mlx", attention=attention, share_prefixes="never"), folder)
        spread(engine)
        result = engine.step([batch], 1e-3, seed=0)
        found[attention] = result.loss, result.grad_norm, engine.loss_sum(batch)
    np.testing.assert_allclose(found["blocks"], found["fused"], rtol=1e-5)


def test_rows_that_begin_alike_are_trained_in_trees_as_alone(converted: Path) -> None:
    rows = random_batch(4, rows=3, length=200)
    inputs, found = rows.inputs.copy(), []
    inputs[1:, :90] = inputs[0, :90]
    batch = type(rows)(inputs, rows.targets, rows.weights * (np.arange(rows.inputs.shape[1]) > 90))
    for share in ("always", "never"):
        engine = open_engine(config("mlx", share_prefixes=share), converted)
        spread(engine)
        result = engine.step([batch], 1e-3, seed=0)
        found.append((result.loss, result.grad_norm, result.computed))
    with pytest.raises(UserError, match="share_prefixes: always is not there for this architecture"):
        open_engine(config("torch", share_prefixes="always"), converted)  # transformers' MPT attends by itself
    assert found[0][2] < found[1][2]  # fewer tokens
    np.testing.assert_allclose(found[0][:2], found[1][:2], rtol=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora rslora checkpointed", "full", "last layers", "neftune"])
def test_both_engines_train_it_alike(name: str, converted: Path) -> None:
    check_parity(converted, SETTINGS[name])


def test_both_engines_train_a_model_with_a_head_of_its_own_alike(replit: Path, tmp_path: Path) -> None:
    folder = varied(replit, tmp_path / "model", VARIANTS["a head of its own"])
    check_parity(folder, {"target_modules": "Wqkv,out_proj,up_proj,down_proj,lm_head"})


def test_each_engine_trains_as_peft_does(engine_name: str, converted: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    engine, batch = open_engine(config(engine_name, max_grad_norm=1e9, weight_decay=0.0), converted), random_batch(1)
    spread(engine)
    names = {f"transformer.blocks.{i}.{part}" for i in range(3) for part in ("attn.Wqkv", "attn.out_proj")}
    names |= {f"transformer.blocks.{i}.ffn.{part}" for i in range(3) for part in ("up_proj", "down_proj")}
    assert engine.targets.keys() == names
    base = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    reference = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=sorted(engine.targets)))
    put(engine.state(), reference)
    assert list(engine.generate([5, 9, 17], 6, frozenset())) == greedy(reference, [5, 9, 17], 6)
    loss, norm = loss_and_norm(reference, batch)
    result = engine.step([batch], 1e-3, seed=0)
    assert result.loss == pytest.approx(loss, rel=1e-5) and result.grad_norm == pytest.approx(norm, rel=1e-4)


def test_layers_below_the_first_that_learns_are_kept_from_epoch_to_epoch(converted: Path, tmp_path: Path) -> None:
    results = []
    for keep in (False, True):
        engine = open_engine(config("mlx", num_layers=1, cache_trunk=keep, out=str(tmp_path / str(keep))), converted)
        spread(engine)
        results.append([engine.step([random_batch(i % 2)], 1e-3, seed=i).loss for i in range(4)])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


@pytest.fixture(scope="module")
def data(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, code = tmp_path_factory.mktemp("data"), lines()
    turns = [
        (Message("system", "You write Python."), Message("user", f"line {i}"), Message("assistant", code[i].strip()))
        for i in range(20)
    ]
    write_conversations(folder / "c.jsonl", [Conversation(each, "gptme", f"log-{i}", "MIT") for i, each in enumerate(turns)])
    told = {"max_length": 256, "valid_fraction": 0.2, "validation_by": "hash"}
    prepare([folder / "c.jsonl"], ChatTemplate.load(converted), make_config(told, "test"), folder / "dataset", {})
    return folder / "dataset"


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_was_trained_is_handed_back_in_the_weights(
    kind: str, engine_name: str, converted: Path, data: Path, tmp_path: Path
) -> None:
    rate = {"learning_rate": 1e-2 if kind == "lora" else 1e-3}
    trained = run(settings(converted, data, tmp_path / "run", engine_name, steps=5, fine_tune_type=kind, **rate))
    checkpoint = trained / "checkpoints" / "step-000005"
    fused, verified = fuse_and_verify(converted, checkpoint, tmp_path / "tuned", ["def f(x):\n    return x\n"])
    assert verified.passed and verified.backend == "transformers"
    assert fused.tensors == (12 if kind == "lora" else len(tensor_headers(converted)))
    inputs = tokens(200)
    after = transformers_logits(tmp_path / "tuned", inputs)
    assert relative(mlx_logits(tmp_path / "tuned", inputs), after) < CLOSE
    assert relative(after, transformers_logits(converted, inputs)) > 1e-3
    losses = [json.loads(line)["loss"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_a_model_that_mlx_quantised_is_loaded_and_trained(tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model

    make_replit(tmp_path / "original", {"d_model": 64, "n_layers": 2})
    model = loaded(convert_replit(tmp_path / "original", tmp_path / "whole"))
    model, told = quantize_model(model, {**CONFIG, "d_model": 64, "n_layers": 2}, group_size=32, bits=4)
    (tmp_path / "packed").mkdir()
    save_model(tmp_path / "packed", model)
    save_config(told, tmp_path / "packed" / "config.json")
    inputs, packed = tokens(60), loaded(tmp_path / "packed")
    assert (
        relative(np.array(packed(mx.array(inputs))), np.array(dequantize_model(model)(mx.array(inputs)))) < 1e-4
    )  # its own products
    engine = open_engine(config("mlx", learning_rate=1e-2), tmp_path / "packed")
    losses = [engine.step([random_batch(0)], 1e-2, seed=i).loss for i in range(4)]
    assert losses[-1] < losses[0] - 0.1


def test_embeddings_that_are_the_head_too_are_refused_for_an_adapter(engine_name: str, converted: Path) -> None:
    with pytest.raises(UserError, match=r"embeddings that are the head too, and are called transformer\.wte"):
        open_engine(config(engine_name, target_modules="Wqkv,wte"), converted)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attn_config": {**ATTENTION, "alibi": False}}, "alibi False"),
        ({"attn_config": {**ATTENTION, "alibi_bias_max": 16}}, "alibi_bias_max 16"),
        ({"attn_config": {**ATTENTION, "prefix_lm": True}}, "prefix_lm True"),
        ({"attn_config": {**ATTENTION, "qk_ln": True}}, "qk_ln True"),
        ({"attn_config": {**ATTENTION, "rope": True}}, "rope True"),
        ({"attn_config": {**ATTENTION, "attn_type": "multiquery_attention"}}, "attn_type multiquery_attention"),
        ({"attn_config": "torch"}, "attn_config .*torch"),
        ({"expansion_ratio": 2}, "expansion_ratio 2"),
        ({"no_bias": False}, "no_bias False"),
        ({"logit_scale": "inv_sqrt_d_model"}, "logit_scale inv_sqrt_d_model"),
        ({"norm_type": "rmsnorm"}, "norm_type rmsnorm"),
        ({"n_heads": 7}, "n_heads 7"),
        ({"d_model": None}, "no d_model"),
        ({"max_seq_len": "2048"}, "max_seq_len"),
        ({"mlp_ratio": 4, "alibi": True}, "mlp_ratio is of the first files of replit-code-v1"),
        ({"model_type": "replit_lm"}, "model_type 'replit_lm' is of the first files"),
    ],
)
def test_what_transformers_would_not_read_is_refused_by_name_on_both_engines(
    changes: dict[str, Any], said: str, engine_name: str, converted: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(UserError, match=said):
        check_mpt({**CONFIG, **changes})
    with pytest.raises(UserError, match=said):
        open_engine(config(engine_name), tmp_path)


def test_tensors_by_the_names_of_the_first_files_are_refused(engine_name: str, converted: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    renamed = {"norm_1": "ln_1", "norm_2": "ln_2", "ffn.up_proj": "mlp.mlp_up", "ffn.down_proj": "mlp.mlp_down"}
    weights = weights_of(CONFIG, 0)
    for new, old in renamed.items():
        weights = {name.replace(new, old): array for name, array in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(converted / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"ln_1|mlp\.mlp_up"):
        open_engine(config(engine_name), tmp_path)


def test_more_tokens_than_the_model_takes_are_refused(converted: Path, data: Path, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    model = loaded(converted)
    with pytest.raises(UserError, match=f"{LONGEST + 1} tokens are more than the {LONGEST} of this model"):
        model(mx.array(tokens(LONGEST + 1)))
    cache = make_prompt_cache(model)
    model(mx.array(tokens(LONGEST)), cache=cache)
    with pytest.raises(UserError, match="tokens are more than"):
        model(mx.array(tokens(1)), cache=cache)
    with pytest.raises(UserError, match="takes no cache that forgets"):
        model(mx.array(tokens(3)), cache=make_prompt_cache(model, max_kv_size=16))
    short = tmp_path / "short"
    shutil.copytree(converted, short)
    (short / "config.json").write_text(json.dumps({**CONFIG, "max_seq_len": 40}))
    with pytest.raises(UserError, match=r"an example of \d+ tokens; .* takes 40 \(its max_seq_len\)"):
        check_length(short, Dataset.open(data))
    with pytest.raises(UserError, match=r"an example of \d+ tokens; .* takes 40 \(its max_seq_len\)"):
        run(settings(short, data, tmp_path / "run", "torch"))


def test_a_length_that_is_null_is_what_transformers_takes() -> None:
    assert longest_of({**CONFIG, "max_seq_len": None}) == 2048 == longest_of({"model_type": "mpt"})
