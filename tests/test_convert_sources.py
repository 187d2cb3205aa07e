"""Where a conversion comes from and where it goes: .bin, GGUF, AWQ, stored logits, small machines, the command line, training."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from awq_checkpoints import make_awq
from conftest import Answer
from mxfp4_checkpoints import make_mxfp4
from test_architectures import RELATIVE, tokens, transformers_logits
from test_convert import FOUR, MLX_LM, apart, change_config, config_of, converted, left, plain_mlx_logits
from tiny_models import VOCABULARY, make_tiny, tiny_tokenizer

from mlx_finetune.config import make_config
from mlx_finetune.data.conversation import Conversation, Message, write_conversations
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.data.prepare import prepare
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.export.convert import How
from mlx_finetune.models.gguf import find_smollm2
from mlx_finetune.models.mlx_config import max_exact_length
from mlx_finetune.models.origin import original_folder, read_origin
from mlx_finetune.models.quantisation import Quantisation
from mlx_finetune.training.checks import check_mlx

# zephyr-7b-beta's own keys, but for its sizes
ZEPHYR = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
ZEPHYR_TEMPLATE = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def zephyr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one: a window of 64 tokens, padding and end of turn the same token, roles in plain text."""
    folder = tmp_path_factory.mktemp("zephyr") / "zephyr"
    sizes = {"intermediate_size": 128, "sliding_window": 64, "pad_token_id": 2, "max_position_embeddings": 32768}
    make_tiny("mistral", folder, tokenizer=False, dtype="bfloat16", style="v4", changes=sizes)
    change_config(folder, **ZEPHYR)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = ZEPHYR_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def dataset(model: Path, folder: Path, words: int) -> Path:
    turns = (Message("user", "list the files " * words), Message("assistant", "```shell\nls\n```"))
    write_conversations(folder / "c.jsonl", [Conversation(turns, "gptme", f"log-{i}", "MIT", {"i": i}) for i in range(6)])
    told = {"max_length": 512, "valid_fraction": 0.2, "validation_by": "hash"}
    prepare([folder / "c.jsonl"], ChatTemplate.load(model), make_config(told, "test"), folder / "data", {})
    return folder / "data"


@pytest.mark.parametrize("how", [How(), How(FOUR)])
def test_a_zephyr_converts_within_its_window_and_is_refused_beyond_it(how: How, zephyr: Path, tmp_path: Path) -> None:
    made = converted(zephyr, tmp_path / "out", how)
    assert made.verified and made.verified.passed and made.verified.read_by_mlx_lm
    config = config_of(tmp_path / "out")
    assert (config["sliding_window"], config["pad_token_id"], max_exact_length(config)) == (64, 2, 64)
    check_mlx(tmp_path / "out", Dataset.open(dataset(tmp_path / "out", tmp_path, words=2)))
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match="exact up to 64"):
        check_mlx(tmp_path / "out", Dataset.open(dataset(tmp_path / "out", tmp_path, words=20)))


def test_training_runs_on_a_converted_folder_of_4_bits(zephyr: Path, tmp_path: Path, cli: Callable[..., Answer]) -> None:
    status, out, _ = cli("convert", zephyr, "--out", "four", "--bits", 4, "--group-size", 32, "--json")
    assert status == 0 and json.loads(out)["bits_per_weight"] < 6
    data = dataset(tmp_path / "four", tmp_path, words=2)
    settings = ("--set", "steps=4", "--set", "rank=4", "--set", "learning_rate=1e-2", "--set", "batch_size=2")
    status, out, err = cli("train", "--model", "four", "--data", data, "--out", "run", "--engine", "mlx", *settings, "--json")
    assert status == 0, err
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    learned = [row["loss"] for row in losses if row["split"] == "train"]
    assert learned[-1] < learned[0]
    assert original_folder(tmp_path / "four") == zephyr.resolve()


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4", "mixed_3_6"])
def test_every_kind_of_packing_is_learned_on(kind: str, tmp_path: Path) -> None:
    from test_engines import config, random_batch

    from mlx_finetune.engines import open_engine

    model = make_tiny("llama", tmp_path / "model", tokenizer=True, dtype="bfloat16", changes={"intermediate_size": 128})
    converted(model, tmp_path / "out", How(MLX_LM[kind][0], verify=False))
    engine, batch = open_engine(config("mlx", dtype="auto"), tmp_path / "out"), random_batch(0)
    before = engine.loss_sum(batch)
    for step in range(5):
        engine.step([batch], 1e-2, seed=step)
    assert engine.loss_sum(batch) < before / 2


def test_a_checkpoint_of_torch_files_becomes_the_same_model(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    expected = transformers_logits(tiny_llama, tokens(24))
    for how, bound in ((How(), RELATIVE), (How(FOUR), 2.0)):
        out = tmp_path / f"out-{bound}"
        made = converted(model, out, how)
        assert made.verified and made.verified.passed
        assert apart(plain_mlx_logits(out, tokens(24)), expected) < bound
        origin = read_origin(out)
        assert origin and origin.format == "bin" and len(origin.fingerprint) == 16
    assert original_folder(tmp_path / f"out-{RELATIVE}") == tmp_path / f"out-{RELATIVE}"
    with pytest.raises(UserError, match="which holds no safetensors"):
        original_folder(tmp_path / "out-2.0")


def test_awq_keeps_its_own_4_bits_and_rounds_nothing_but_scale_times_zero(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 128}
    make_awq(
        make_tiny("llama", tmp_path / "model", tokenizer=True, changes=sizes),
        tmp_path / "awq",
        tmp_path / "unpacked",
        tmp_path / "rounded",
    )
    made = converted(tmp_path / "awq", tmp_path / "out", How())
    assert made.verified and made.verified.passed and made.verified.reference is None and "awq" in made.unverified
    found = plain_mlx_logits(tmp_path / "out", tokens(24))
    assert apart(found, transformers_logits(tmp_path / "rounded", tokens(24))) < RELATIVE
    assert apart(found, transformers_logits(tmp_path / "unpacked", tokens(24))) < 1e-2  # float16 holds scale * zero with 11 bits
    assert config_of(tmp_path / "out")["quantization"] == {"group_size": 32, "bits": 4}
    with pytest.raises(
        UserError, match=r"quantised with AWQ \(4 bits, gemm\) already, so 4 bits, groups of 32 would round it twice"
    ):
        converted(tmp_path / "awq", tmp_path / "again", How(FOUR))
    with pytest.raises(UserError, match="so bfloat16 would round it twice"):
        converted(tmp_path / "awq", tmp_path / "again", How(dtype="bfloat16"))
    with pytest.raises(UserError, match="its weights are packed by awq"):
        check_mlx(tmp_path / "awq", Dataset.open(dataset(tmp_path / "awq", tmp_path, words=2)))


def test_stored_logits_stand_in_for_transformers(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = tmp_path / "probe.safetensors"
    here = converted(tiny_llama, tmp_path / "here", How(FOUR, write_probe=probe))
    without_torch(monkeypatch)
    there = converted(tiny_llama, tmp_path / "there", How(FOUR, probe=probe))
    assert here.verified and there.verified and there.verified.reference.startswith("probe.safetensors (transformers")
    assert there.verified.differences == here.verified.differences and there.verified.kl == here.verified.kl
    other = make_tiny("llama", tmp_path / "other", tokenizer=True, seed=1)
    with pytest.raises(UserError, match="the logits of another model"):
        converted(other, tmp_path / "wrong", How(FOUR, probe=probe))
    with pytest.raises(UserError, match="not a file that convert --write-probe wrote"):
        converted(tiny_llama, tmp_path / "wrong", How(FOUR, probe=tiny_llama / "model.safetensors"))


@pytest.mark.parametrize("how", [How(), How(FOUR), How(dtype="bfloat16")])
def test_without_torch_a_model_is_compared_with_the_original_in_mlx(
    how: How, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_torch(monkeypatch)
    made = converted(tiny_llama, tmp_path / "out", how)
    assert made.verified and made.verified.passed and made.verified.reference.startswith("mlx ")


def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "torch" else found(name, *more))


def test_where_memory_does_not_suffice_it_is_said_and_asking_for_it_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=500_000))
    made = converted(tiny_llama, tmp_path / "four", How(FOUR))
    assert made.verified and made.verified.differences.keys() == {"packed"} and made.verified.kl is None
    assert "GB of memory in float32" in made.unverified
    assert converted(tiny_llama, tmp_path / "whole", How()).verified is None
    for how in (How(verify=True), How(FOUR, verify=True), How(probe=tiny_llama)):
        with pytest.raises(UserError, match="cannot be compared with the original"):
            converted(tiny_llama, tmp_path / "out", how)
    with pytest.raises(UserError, match="--write-probe"):
        converted(tiny_llama, tmp_path / "out", How(write_probe=tmp_path / "probe"))
    assert left(tmp_path) == {"four", "whole"}


def test_a_model_of_the_hub_is_named_with_its_commit(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    commit = "c" * 40
    cached = tmp_path / "cache" / "models--org--tiny"
    shutil.copytree(tiny_llama, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    converted(Path("org/tiny"), tmp_path / "out", How(FOUR, verify=False))
    origin = read_origin(tmp_path / "out")
    assert origin and (origin.model, origin.revision) == ("org/tiny", commit)
    assert original_folder(tmp_path / "out") == cached / "snapshots" / commit


def test_no_room_on_the_disk_is_found_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    for how in (How(), How(FOUR), How(dtype="float16")):
        with pytest.raises(UserError, match=r"the weights take 0\.\d GB, and 0\.0 GB are free"):
            converted(tiny_llama, tmp_path / "out", how)
    assert left(tmp_path) == set()


def test_the_command_line_says_what_it_costs_and_what_comes_next(tiny_llama: Path, cli: Callable[..., Answer]) -> None:
    status, out, err = cli("convert", tiny_llama, "--out", "four", "--bits", 4)
    assert status == 0
    assert "0.001 GB before" in out and "bits per weight" in out and "KL" in out and out.splitlines()[-1] == "four"
    assert "4 bits, groups of 64" in err and err.splitlines()[-1] == "next: mlx-finetune prepare collected --model four"
    assert "4 layers are stored as they were, such as model.layers.0.mlp.down_proj" in err
    assert cli("convert", tiny_llama, "--out", "four")[0::2] == (
        2,
        "error: four exists already\nhint: choose another --out, or move the old one away\n",
    )
    for arguments, said in {
        ("--bits", "7"): "--bits 7: MLX has 2, 3, 4, 5, 6, 8",
        ("--dtype", "int8"): "--dtype int8: not one of float32, float16, bfloat16",
        ("--bits", "4", "--shard-size", "many"): "--shard-size many: not a size",
        ("--shard-size", "1GB"): "--shard-size 1GB without --bits",
        ("--probe", "nowhere"): "--probe nowhere: no such file",
        ("--write-probe", "nowhere/probe"): "--write-probe nowhere/probe: no such folder",
        ("--probe", "x", "--no-verify"): "--probe and --no-verify do not go together",
    }.items():
        status, out, err = cli("convert", tiny_llama, "--out", "other", *arguments)
        assert (status, out) == (2, "") and f"error: {said}" in err and "hint: " in err
    status, out, err = cli("convert", "nowhere", "--out", "other")
    assert status == 2 and "nowhere: no such model folder" in err
    assert not Path("other").exists()


def test_a_result_in_json_holds_every_figure(tiny_llama: Path, cli: Callable[..., Answer]) -> None:
    status, out, _ = cli("convert", tiny_llama, "--out", "eight", "--bits", 8, "--group-size", 32, "--json")
    result = json.loads(out)
    assert status == 0 and result["out"] == "eight" and result["quantization"]["bits"] == 8
    assert 8 < result["bits_per_weight"] < 10.5 and result["bytes_after"] < result["bytes_before"] / 3
    assert 0 < result["verified"]["kl"] < 0.01
    origin = read_origin(Path("eight"))
    assert origin and origin.verified == result["verified"] and origin.versions["mlx-lm"]


@pytest.mark.long
def test_a_gguf_file_becomes_a_model_that_answers(tmp_path: Path) -> None:
    made = converted(find_smollm2(), tmp_path / "out", How(Quantisation(4, 64), dtype="bfloat16"))
    assert made.verified and made.verified.passed and made.verified.kl < 0.6
    assert made.bits_per_weight == pytest.approx(4.5, abs=0.05) and made.bytes_after < 80e6
    origin = read_origin(tmp_path / "out")
    assert origin and (origin.format, origin.model) == ("gguf", str(find_smollm2().resolve()))
    assert says_paris(tmp_path / "out")


def says_paris(folder: Path) -> bool:
    from mlx_lm import generate, load

    model, tokenizer = load(str(folder))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    return "Paris" in generate(model, tokenizer, prompt, max_tokens=12)


def test_a_word_piece_model_without_tokenizer_json_gets_one(tiny_llama: Path, tmp_path: Path) -> None:
    sentencepiece: Any = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text("the assistant runs the command and the tool answers\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "spiece"), vocab_size=40, model_type="unigram", hard_vocab_limit=False
    )
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    shutil.copy(tmp_path / "spiece.model", model)
    converted(model, tmp_path / "out", How())
    from transformers import AutoTokenizer

    ids = sentencepiece.SentencePieceProcessor(model_file=str(model / "spiece.model")).encode("the tool runs")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the tool runs", add_special_tokens=False)["input_ids"] == ids


def test_the_last_token_of_the_vocabulary_is_compared_too(tiny_llama: Path) -> None:
    from mlx_finetune.export.stored_logits import probe_tokens

    rows = probe_tokens(tiny_llama)
    assert {0, VOCABULARY - 1} <= set(rows[-1]) and len(rows) == 4
    assert max(map(len, rows)) <= 64 and np.unique(rows[-1]).size == 64


def test_experts_of_gpt_oss_keep_their_mxfp4_and_compute_what_transformers_unpacks(tmp_path: Path) -> None:
    import mlx.core as mx
    import torch
    from transformers import AutoModelForCausalLM, Mxfp4Config

    from mlx_finetune.engines.mlx.load import load_model

    model = make_mxfp4(tmp_path / "oss", tokenizer=True)
    made = converted(model, tmp_path / "out", How())
    assert made.quantization and made.verified and made.verified.passed and "mxfp4" in made.unverified
    tokens = np.random.default_rng(1).integers(3, 300, size=(2, 24))
    unpacked = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True))
    with torch.no_grad():
        expected = unpacked.float().eval()(torch.from_numpy(tokens)).logits.numpy()
    for folder in (model, tmp_path / "out"):
        found = np.array(load_model(folder, "float32")(mx.array(tokens)).astype(mx.float32))
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
