"""The adapter in the original weights: bit for bit where it can be, by logits where it cannot, nothing else touched."""

import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import make_tiny

from mlx_finetune.errors import UserError
from mlx_finetune.export.fuse import fuse
from mlx_finetune.export.verify import VerificationError, fuse_and_verify, verify
from mlx_finetune.models.weights import (
    INDEX,
    file_headers,
    fingerprint,
    from_float32,
    tensor_headers,
    to_float32,
    weight_files,
)

TEXTS = ("List the files of this folder.", "def add(a, b):\n    return a + b\n", "Grüße, 世界!")
PARTS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
MODULES = tuple(f"model.layers.{layer}.{part}" for layer in range(2) for part in PARTS)
KINDS = {"llama": "float32", "qwen2": "bfloat16", "mistral": "float16"}


def reshard(model: Path, folder: Path) -> Path:
    """The same model in many small files with an index, as transformers writes a large one."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(model, dtype="auto").save_pretrained(folder, max_shard_size="50KB")
    return folder


def make_adapter(model: Path, folder: Path, rank: int = 4, **settings: Any) -> Path:
    """Random A and B in sixty-fourths, so that every sum in scale * B @ A is exact in float32 in whatever order."""
    rng = np.random.default_rng(2)
    headers = tensor_headers(model)
    tensors = {}
    for module in MODULES:
        rows, width = headers[f"{module}.weight"].shape
        for side, shape in (("A", (rank, width)), ("B", (rows, rank))):
            numbers = rng.integers(-16, 17, shape).astype(np.float32) / 64
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = numbers
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": list(MODULES),
    }
    config |= {"use_rslora": False, "use_dora": False, "bias": "none", "lora_dropout": 0.1, "fan_in_fan_out": False}
    config |= {"base_model_name_or_path": str(model), "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: location.file.read_bytes()[location.start : location.end] for name, location in tensor_headers(folder).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny Llama in F32, Qwen2 (with biases) in BF16 and many files, Mistral in F16: never written to."""
    root = tmp_path_factory.mktemp("models")
    made = {kind: make_tiny(kind, root / kind, tokenizer=True, dtype=dtype) for kind, dtype in KINDS.items()}
    return made | {"qwen2": reshard(made["qwen2"], root / "sharded"), "whole qwen2": made["qwen2"]}


@pytest.fixture(params=KINDS)
def any_model(request: pytest.FixtureRequest, models: dict[str, Path]) -> Path:
    return models[request.param]


@pytest.fixture
def llama(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(models["llama"], tmp_path / "llama"))


@pytest.fixture
def checkpoint(llama: Path, tmp_path: Path) -> Path:
    return make_adapter(llama, tmp_path / "checkpoint")


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_numbers_are_rounded_exactly_as_torch_rounds_them(dtype):
    import torch

    every_kind = np.random.default_rng(3).integers(0, 1 << 32, 500_000, dtype=np.uint32)
    ties = (np.arange(0, 1 << 16, dtype=np.uint32) << 16) + 0x8000
    near_half = np.random.default_rng(4).normal(0, 1000, 200_000).astype(np.float32)
    values = np.concatenate([every_kind.view(np.float32), ties.view(np.float32), near_half])
    stored = torch.from_numpy(values).to({"BF16": torch.bfloat16, "F16": torch.float16}[dtype])
    ours = to_float32(from_float32(values, dtype), dtype)
    assert np.array_equal(ours, stored.float().numpy(), equal_nan=True)
    assert np.isnan(ours).sum() == np.isnan(values).sum() > 0


def test_the_adapted_tensors_are_base_plus_change_rounded_once_and_all_other_bytes_are_the_base(any_model, tmp_path):
    import torch
    from safetensors import safe_open

    checkpoint = make_adapter(any_model, tmp_path / "checkpoint")
    fused = fuse(any_model, checkpoint, tmp_path / "fused")
    before, after = bytes_of(any_model), bytes_of(tmp_path / "fused")
    assert {name for name in before if before[name] != after[name]} == {f"{module}.weight" for module in MODULES}
    assert fused.tensors == len(MODULES)
    for file in weight_files(any_model):
        data_start = min(location.start for location in file_headers(file).values())
        assert (tmp_path / "fused" / file.name).read_bytes()[:data_start] == file.read_bytes()[:data_start]
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    for module in MODULES:
        name = f"{module}.weight"
        tensors = []
        for folder in (any_model, tmp_path / "fused"):
            with safe_open(folder / tensor_headers(folder)[name].file.name, "pt") as file:
                tensors.append(file.get_tensor(name))
        a, b = (torch.from_numpy(adapter[f"base_model.model.{module}.lora_{side}.weight"]) for side in "AB")
        assert torch.equal((tensors[0].float() + 2 * b @ a).to(tensors[0].dtype), tensors[1])


def test_every_other_file_of_the_model_comes_along_and_stale_copies_of_the_weights_do_not(llama, checkpoint, tmp_path):
    (llama / "LICENSE").write_text("MIT")
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for stale in ("pytorch_model.bin", "model.gguf", "consolidated.00.pth", "consolidated.safetensors", ".hidden"):
        (llama / stale).write_bytes(b"old weights")
    (llama / ".git").mkdir()
    fused = fuse(llama, checkpoint, tmp_path / "fused")
    files = {str(path.relative_to(llama)) for path in llama.rglob("*") if path.is_file()}
    copied = {str(path.relative_to(tmp_path / "fused")): path for path in (tmp_path / "fused").rglob("*") if path.is_file()}
    assert files - set(copied) == {
        "pytorch_model.bin",
        "model.gguf",
        "consolidated.00.pth",
        "consolidated.safetensors",
        ".hidden",
    }
    assert {"LICENSE", "config.json", "tokenizer.json", "additional_chat_templates/tools.jinja"} <= set(copied)
    for name, path in copied.items():
        assert name == "model.safetensors" or path.read_bytes() == (llama / name).read_bytes()
    assert fused.bytes == sum(path.stat().st_size for path in copied.values())


def test_fusing_reads_a_tensor_in_blocks(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({"wide.weight": np.ones((4096, 4096), np.float16)}, tmp_path / "model" / "model.safetensors")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    sides = {"A": np.ones((1, 4096), np.float32), "B": np.ones((4096, 1), np.float32)}
    tensors = {f"base_model.model.wide.lora_{side}.weight": numbers for side, numbers in sides.items()}
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    (checkpoint / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 3}))
    tracemalloc.start()
    fuse(tmp_path / "model", checkpoint, tmp_path / "fused")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (load_file(tmp_path / "fused" / "model.safetensors")["wide.weight"] == 4).all()
    assert peak < 60 << 20  # the whole tensor is 64 MiB in float32, and it is needed several times over


def test_progress_counts_bytes_up_to_the_total(llama, checkpoint, tmp_path):
    seen: list[tuple[int, int]] = []
    fused = fuse(llama, checkpoint, tmp_path / "fused", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == fused.bytes


def test_the_fused_model_is_base_plus_adapter_as_peft_opens_it(any_model, tmp_path):
    checkpoint = make_adapter(any_model, tmp_path / "checkpoint")
    fused, verified = fuse_and_verify(any_model, checkpoint, tmp_path / "fused", TEXTS)
    assert verified.backend == "transformers"
    assert verified.passed and not verified.missing and not verified.unexpected
    assert verified.largest_difference <= verified.tolerance
    if fused.dtypes == ("F32",):
        assert verified.tolerance == 1e-3
        assert verified.largest_difference < 1e-4
    else:
        assert 1e-3 < verified.tolerance < 0.1 * verified.largest_logit
    assert 0 <= verified.kl < 1e-2
    assert (tmp_path / "fused" / "config.json").is_file()


def test_peft_finds_every_tensor_of_the_checkpoint_and_merges_it_to_the_fused_weights(llama, checkpoint, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    fuse(llama, checkpoint, tmp_path / "fused")
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, checkpoint)
    assert sum("lora_B" in name for name, _ in tuned.named_parameters()) == len(MODULES)
    merged = tuned.merge_and_unload().state_dict()
    for name, weight in load_file(tmp_path / "fused" / "model.safetensors").items():
        assert np.array_equal(merged[name].numpy(), weight)


def test_the_base_alone_and_another_adapter_do_not_pass(models, tmp_path):
    base = models["qwen2"]
    checkpoint = make_adapter(base, tmp_path / "checkpoint")
    other = make_adapter(base, tmp_path / "other", lora_alpha=9)
    fuse(base, other, tmp_path / "fused")
    assert not verify(base, checkpoint, base, TEXTS).passed
    assert not verify(base, checkpoint, tmp_path / "fused", TEXTS).passed


def test_one_forgotten_module_does_not_hide_behind_the_rounding(models, tmp_path):
    base, fused = models["qwen2"], tmp_path / "fused"
    checkpoint = make_adapter(base, tmp_path / "checkpoint", lora_alpha=0.01)
    _, whole = fuse_and_verify(base, checkpoint, fused, TEXTS)
    name = f"{MODULES[0]}.weight"
    location = tensor_headers(fused)[name]
    with location.file.open("r+b") as file:
        file.seek(location.start)
        file.write(bytes_of(base)[name])
    forgotten = verify(base, checkpoint, fused, TEXTS)
    assert whole.passed and not forgotten.passed
    assert forgotten.largest_difference < forgotten.tolerance


def test_a_missing_and_an_unexpected_tensor_do_not_pass(llama, checkpoint, tmp_path):
    def rename(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.scale"] = tensors.pop("model.norm.weight")

    fuse(llama, checkpoint, tmp_path / "fused")
    edit_tensors(tmp_path / "fused" / "model.safetensors", rename)
    verified = verify(llama, checkpoint, tmp_path / "fused", TEXTS)
    assert (verified.missing, verified.unexpected) == (["model.norm.weight"], ["model.norm.scale"])
    assert not verified.passed


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_without_torch_the_proof_is_made_in_mlx(kind, models, tmp_path):
    checkpoint = make_adapter(models[kind], tmp_path / "checkpoint")
    program = (
        "import sys; sys.modules['torch'] = sys.modules['peft'] = None\n"  # as on a machine without them
        "from pathlib import Path; from mlx_finetune.export.verify import fuse_and_verify, verify\n"
        "model, checkpoint, out = (Path(argument) for argument in sys.argv[1:])\n"
        f"texts = {TEXTS!r}\n"
        "fused, verified = fuse_and_verify(model, checkpoint, out, texts)\n"
        "print(verified.backend, verified.passed, verify(model, checkpoint, model, texts).passed)\n"
    )
    arguments = [str(path) for path in (models[kind], checkpoint, tmp_path / "fused")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mlx", "True", "False"]


def corrupt_adapter(root: Path) -> None:
    name = f"base_model.model.{MODULES[0]}.lora_B.weight"
    edit_tensors(root / "checkpoint" / "adapter_model.safetensors", lambda tensors: tensors.update({name: -tensors[name]}))


def corrupt_fused(root: Path) -> None:
    (temporary,) = root.glob(".fused.*")
    location = tensor_headers(temporary)["model.layers.1.mlp.up_proj.weight"]
    with location.file.open("r+b") as file:
        file.seek(location.start)
        file.write(b"\0" * (location.end - location.start))


@pytest.mark.parametrize("corrupt", [corrupt_adapter, corrupt_fused])
def test_nothing_is_left_when_the_fused_model_is_not_base_plus_adapter(corrupt, llama, checkpoint, tmp_path):
    def tamper_when_written(done: int, total: int) -> None:
        if done == total:
            corrupt(tmp_path)

    with pytest.raises(VerificationError, match="not base"):
        fuse_and_verify(llama, checkpoint, tmp_path / "fused", TEXTS, tamper_when_written)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "llama"]


def test_an_existing_folder_is_never_written_to(llama, checkpoint, tmp_path):
    (tmp_path / "fused").mkdir()
    with pytest.raises(UserError, match="exists already"):
        fuse(llama, checkpoint, tmp_path / "fused")
    assert not any((tmp_path / "fused").iterdir())


def test_rslora_scales_by_the_root_of_the_rank(llama, tmp_path):
    fuse(llama, make_adapter(llama, tmp_path / "plain", lora_alpha=16), tmp_path / "a")
    fuse(llama, make_adapter(llama, tmp_path / "rslora", lora_alpha=8, use_rslora=True), tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "has no lora_magnitude_vector"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"rank_pattern": {"q_proj": 8}}, r"are not \[8, in\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type is not LORA"),
        ({"r": 8}, r"are not \[8, in\]"),
        ({"r": "four"}, "r 'four'"),
        ({"lora_alpha": 0}, "changes no weight"),
    ],
)
def test_adapters_that_cannot_be_fused_are_refused_by_name(settings, message, llama, checkpoint, tmp_path):
    edit_json(checkpoint / "adapter_config.json", **settings)
    with pytest.raises(UserError, match=message):
        fuse(llama, checkpoint, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def rename_module(tensors: dict[str, np.ndarray], name: str) -> None:
    for side in ("lora_A", "lora_B"):
        tensors[f"base_model.model.{name}.{side}.weight"] = tensors.pop(f"base_model.model.{MODULES[0]}.{side}.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: rename_module(t, "model.layers.7.mlp.gate"),
            r"adapter on model\.layers\.7\.mlp\.gate: .* no tensor",
        ),
        (lambda t: rename_module(t, "transformer.wte"), r"adapter on transformer\.wte: .*tied"),
        (lambda t: rename_module(t, "model.layers.0.self_attn.k_proj"), r"changes \[64, 64\], .* has \[32, 64\]"),
        (lambda t: t.pop(f"base_model.model.{MODULES[0]}.lora_B.weight"), f"{MODULES[0]} has only one of"),
        (lambda t: t.update({"base_model.model.x.lora_magnitude_vector": np.ones(3, np.float32)}), "is no LoRA matrix"),
        (lambda t: t[f"base_model.model.{MODULES[0]}.lora_A.weight"].fill(np.nan), "not finite"),
        (lambda t: [weight.fill(0) for weight in t.values()], "changes no weight"),
        (lambda t: t.clear(), "no LoRA tensors"),
    ],
)
def test_adapter_tensors_that_do_not_fit_are_refused_by_name(change, message, llama, checkpoint, tmp_path):
    edit_tensors(checkpoint / "adapter_model.safetensors", change)
    with pytest.raises(UserError, match=message):
        fuse(llama, checkpoint, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_a_sum_that_the_stored_dtype_cannot_hold_is_refused(models, tmp_path):
    checkpoint = make_adapter(models["mistral"], tmp_path / "checkpoint", lora_alpha=1e7)
    with pytest.raises(UserError, match="F16 cannot hold"):
        fuse(models["mistral"], checkpoint, tmp_path / "fused")


def test_quantised_weights_are_refused(llama, checkpoint, tmp_path):
    edit_tensors(
        llama / "model.safetensors",
        lambda tensors: tensors.update({f"{MODULES[0]}.weight": tensors[f"{MODULES[0]}.weight"].astype(np.uint8)}),
    )
    with pytest.raises(UserError, match=f"{MODULES[0]}.weight is stored as U8"):
        fuse(llama, checkpoint, tmp_path / "fused")
    edit_json(llama / "config.json", quantization={"bits": 4, "group_size": 64})
    with pytest.raises(UserError, match="quantised"):
        fuse(llama, checkpoint, tmp_path / "fused")


@pytest.mark.parametrize("kept", [0, 7, 8, 500, -1, -1000])
def test_a_cut_file_is_refused_before_it_is_read(kept, llama, checkpoint, tmp_path):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors: .*(cut|promises)") as caught:
        fuse(llama, checkpoint, tmp_path / "fused")
    assert "download it again" in caught.value.hint
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not JSON", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"w": 3}', "unknown dtype None"),
        (b'{"w": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}', "unknown dtype 'X9'"),
        (b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "no shape"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "no shape"),
        (b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "cannot fill"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "cannot fill"),
        (b'{"w": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}', "cut at byte"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "starts at byte"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "the header promises"),
    ],
)
def test_a_broken_header_is_refused_by_name(header, message, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(UserError, match=message) as caught:
        tensor_headers(tmp_path)
    assert str(file) in caught.value.message


def test_an_index_must_agree_with_the_files(models, tmp_path):
    folder = Path(shutil.copytree(models["qwen2"], tmp_path / "sharded"))
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1 and set(tensor_headers(folder)) == set(index["weight_map"])
    edit_json(folder / INDEX, weight_map=index["weight_map"] | {"model.extra.weight": files[0]})
    with pytest.raises(UserError, match=r"model\.extra\.weight is not in"):
        tensor_headers(folder)
    edit_json(folder / INDEX, weight_map={"w": "../elsewhere.safetensors"})
    with pytest.raises(UserError, match=r"not the name of a \.safetensors file of this folder"):
        tensor_headers(folder)
    edit_json(folder / INDEX, **index)
    (folder / files[1]).unlink()
    with pytest.raises(UserError, match=f"names {files[1]}, which is not there"):
        tensor_headers(folder)
    shutil.copy(models["llama"] / "model.safetensors", folder)
    (folder / files[1]).write_bytes(b"")
    with pytest.raises(UserError, match="which is the model"):
        tensor_headers(folder)


def test_a_fingerprint_knows_a_model_wherever_it_lies_and_however_it_is_cut(models, tmp_path):
    whole = models["whole qwen2"]
    copy = Path(shutil.copytree(models["qwen2"], tmp_path / "copy"))
    assert fingerprint(copy) == fingerprint(models["qwen2"]) == fingerprint(whole)
    assert len(weight_files(copy)) > len(weight_files(whole))
    assert len(fingerprint(copy)) == 16 and int(fingerprint(copy), 16)


def test_a_fingerprint_tells_a_finetune_and_another_config_from_the_base(llama, checkpoint, tmp_path):
    fuse(llama, checkpoint, tmp_path / "fused")
    base = fingerprint(llama)
    assert fingerprint(tmp_path / "fused") != base
    edit_json(llama / "config.json", rope_theta=12345.0)
    assert fingerprint(llama) != base
