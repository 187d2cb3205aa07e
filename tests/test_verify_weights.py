"""A fused folder is proven without running it: every number is computed again, and what is wrong is found."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from architecture_row import written
from safetensors.numpy import load_file, save_file
from test_engines import config, spread
from test_experts import MORE
from test_from_mlx import trained
from test_fuse_kinds import LINEAR, bytes_of, edit_config, make_case, make_model, peft_checkpoint
from test_fuse_quantised import trained as on_packed
from test_torch_architectures import made
from tiny_models import make_tiny

from mlx_finetune.engines import open_engine
from mlx_finetune.errors import UserError
from mlx_finetune.export.changes import read_changes
from mlx_finetune.export.distance import VerificationError
from mlx_finetune.export.fuse import fuse
from mlx_finetune.export.memory import HEADROOM, shortage
from mlx_finetune.export.report import told
from mlx_finetune.export.verify import fuse_and_verify
from mlx_finetune.export.verify_weights import Weights, verify_weights
from mlx_finetune.models.weights import from_float32, read_float32, tensor_headers, to_float32

PROJECTION = f"{LINEAR[0]}.weight"
EMBEDDED = "model.embed_tokens.weight"
MIXTURES = ("qwen3_moe", "mixtral", "granitemoe")


def prove(model: Path, checkpoint: Path, fused: Path) -> Weights:
    return verify_weights(model, checkpoint, fused, read_changes(model, checkpoint))


def patch(folder: Path, tensor: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Writes what becomes of the float32 numbers over a tensor, in its own dtype."""
    at = tensor_headers(folder)[tensor]
    with at.file.open("r+b") as file:
        file.seek(at.start)
        file.write(from_float32(change(read_float32(at)), at.dtype))


def flip(folder: Path, tensor: str, bit: int, number: int = 7) -> None:
    """Another bit in one number, counted from the last place."""
    at = tensor_headers(folder)[tensor]
    size = (at.end - at.start) // int(np.prod(at.shape))
    with at.file.open("r+b") as file:
        file.seek(at.start + number * size + bit // 8)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def lora(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Model, adapter on two linear layers and fused folder, never written to."""
    root = tmp_path_factory.mktemp("lora")
    model = make_model(root, is_tied=False, dtype=request.param)
    checkpoint = peft_checkpoint(model, root / "checkpoint", target_modules=[*LINEAR], use_rslora=True)
    fuse(model, checkpoint, root / "fused")
    return model, checkpoint, root / "fused"


@pytest.fixture
def spoiled(lora: tuple[Path, Path, Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """The same with a fused folder that the test may spoil."""
    return lora[0], lora[1], Path(shutil.copytree(lora[2], tmp_path / "spoiled"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind", ["dora", "dora with rslora", "embeddings and head", "shared weight as peft leaves it", "shared weight", "full"]
)
def test_every_number_of_every_kind_is_base_plus_checkpoint_rounded_once(kind: str, dtype: str, tmp_path: Path) -> None:
    model, checkpoint = make_case(kind, tmp_path, dtype=dtype)
    _, found = fuse_and_verify(model, checkpoint, tmp_path / "fused", (), by_weights=True)
    assert found.passed and found.backend == "weights" and found.weights is not None
    changes, weights = read_changes(model, checkpoint), found.weights
    assert weights["tensors"] == weights["independent"] == len(changes) == found.folder["changed"]
    assert weights["numbers"] == sum(int(np.prod(change.location.shape)) for change in changes.values())
    assert 0.9 * weights["numbers"] < weights["changed"] <= weights["numbers"] and weights["unchanged_tensors"] == 0
    if dtype == "bfloat16":  # float32 sums decide ties alone
        assert 0.4 < weights["largest_deviation"] < 0.51 and weights["nearest"] > 0.999 * weights["numbers"]
        assert 1e-4 < weights["rounding"] < 0.1
    else:  # some roundings of 6e-8; of numbers that cancel out, more of their own last places
        assert weights["rounding"] < 2e-7
    if kind.startswith("full"):
        assert weights["nearest"] == weights["numbers"] and weights["largest_deviation"] <= 0.5


@pytest.mark.parametrize("is_silent", [False, True])
@pytest.mark.parametrize("kind", ["shared weight", "full with a shared weight"])
def test_a_shared_weight_that_is_stored_twice_is_proven_in_both_places(kind: str, is_silent: bool, tmp_path: Path) -> None:
    model, checkpoint = make_case(kind, tmp_path)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors[EMBEDDED].copy()}, model / "model.safetensors", metadata={"format": "pt"})
    if is_silent:  # then it is what transformers takes for a Gemma, and that is shared
        found = json.loads((model / "config.json").read_text())
        del found["tie_word_embeddings"]
        (model / "config.json").write_text(json.dumps(found | {"model_type": "gemma"}))
    fuse(model, checkpoint, tmp_path / "fused")
    found = prove(model, checkpoint, tmp_path / "fused")
    assert found.problems == [] and {"lm_head.weight", EMBEDDED} <= read_changes(model, checkpoint).keys()
    patch(tmp_path / "fused", "lm_head.weight", lambda trained: tensors[EMBEDDED])
    assert [line.partition(":")[0] for line in prove(model, checkpoint, tmp_path / "fused").problems] == ["lm_head.weight"]


def test_rslora_in_both_dtypes_is_proven(lora: tuple[Path, Path, Path]) -> None:
    found = prove(*lora)
    assert not (found.problems or found.missing or found.unexpected)
    assert found.tensors == found.independent == 2 and found.changed > 0.9 * found.numbers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_are_proven_wherever_they_are_stored(model_type: str, dtype: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    if model_type in MORE:
        made(model_type, model, MORE[model_type])
        if dtype != "float32":
            rewrite_in_bfloat16(model)
    else:
        make_tiny(model_type, model, tokenizer=False, dtype=dtype)
    engine = open_engine(config("torch", target_modules="q_proj,experts"), model)
    spread(engine, scale=0.1)
    checkpoint = written(engine, tmp_path / "checkpoint", model)
    fuse(model, checkpoint, tmp_path / "fused")
    found = prove(model, checkpoint, tmp_path / "fused")
    assert not (found.problems or found.missing or found.unexpected)
    changes = read_changes(model, checkpoint)
    assert found.tensors == found.independent == len(changes) and found.unchanged_tensors == 0
    assert {headers.dtype for headers in tensor_headers(model).values()} >= {{"float32": "F32", "bfloat16": "BF16"}[dtype]}
    expert = next(name for name in changes if "expert" in name or "linear" in name)
    last = int(np.prod(changes[expert].location.shape)) - 1
    flip(tmp_path / "fused", expert, bit=6 if dtype == "bfloat16" else 22, number=last)
    assert [line.partition(":")[0] for line in prove(model, checkpoint, tmp_path / "fused").problems] == [expert]


def rewrite_in_bfloat16(model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)


def wrong_scale(model: Path, checkpoint: Path, fused: Path) -> None:
    edit_config(checkpoint, lora_alpha=8.5)
    shutil.rmtree(fused)
    fuse(model, checkpoint, fused)
    edit_config(checkpoint, lora_alpha=8)


def added_twice(model: Path, checkpoint: Path, fused: Path) -> None:
    base = read_float32(tensor_headers(model)[PROJECTION])
    patch(fused, PROJECTION, lambda once: once + (once - base))


def forgotten(model: Path, checkpoint: Path, fused: Path) -> None:
    base = read_float32(tensor_headers(model)[PROJECTION])
    patch(fused, PROJECTION, lambda once: base)


def one_infinite(model: Path, checkpoint: Path, fused: Path) -> None:
    patch(fused, PROJECTION, lambda once: np.where(np.arange(once.size).reshape(once.shape) == 9, np.inf, once).astype(np.float32))


def one_nan(model: Path, checkpoint: Path, fused: Path) -> None:
    patch(fused, PROJECTION, lambda once: np.where(np.arange(once.size).reshape(once.shape) == 9, np.nan, once).astype(np.float32))


@pytest.mark.parametrize("spoil", [wrong_scale, added_twice, forgotten, one_infinite, one_nan])
def test_a_wrong_sum_is_found_and_named(
    spoil: Callable[[Path, Path, Path], None], spoiled: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, checkpoint, fused = spoiled
    checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    spoil(model, checkpoint, fused)
    found = prove(model, checkpoint, fused)
    named = [line for line in found.problems if line.startswith(f"{PROJECTION}: ")]
    assert len(named) == 1 and "numbers are not base + checkpoint, number" in named[0]
    assert spoil not in (one_infinite, one_nan) or f"{PROJECTION}: 1 of 4096 numbers" in named[0]
    assert spoil is not forgotten or found.unchanged_tensors == 1


def test_a_flipped_bit_of_a_changed_tensor_is_found(spoiled: tuple[Path, Path, Path]) -> None:
    """Of bfloat16 any that moves a number by a whole last place; of float32 those above what the order of sums decides."""
    model, checkpoint, fused = spoiled
    at = tensor_headers(fused)[PROJECTION]
    for bit in (1, 3, 6, 9) if at.dtype == "BF16" else (10, 17, 22, 28):
        flip(fused, PROJECTION, bit)
        (line,) = prove(model, checkpoint, fused).problems
        assert line.startswith(f"{PROJECTION}: 1 of 4096 numbers are not base + checkpoint, number 7 is ")
        flip(fused, PROJECTION, bit)
    assert prove(model, checkpoint, fused).problems == []


def test_a_flipped_bit_of_another_tensor_a_lost_one_and_another_config_leave_no_folder(
    lora: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, checkpoint, _ = lora

    def lost(folder: Path) -> None:
        at = tensor_headers(folder)
        arrays = {name: read_float32(one) for name, one in at.items() if name != "model.norm.weight"}
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})

    for spoil, said in (
        (lambda folder: flip(folder, "model.norm.weight", 0), "model.norm.weight is not the base's, and was not trained"),
        (lost, "missing=['model.norm.weight']"),
        (lambda folder: append(folder / "config.json"), "config.json is not the base's"),
    ):

        def when_written(done: int, total: int, spoil: Callable[[Path], None] = spoil) -> None:
            if done == total:
                (folder,) = tmp_path.iterdir()  # the one that gets its name at the end
                spoil(folder)

        with pytest.raises(VerificationError, match="was not written") as raised:
            fuse_and_verify(model, checkpoint, tmp_path / "out", (), when_written, by_weights=True)
        assert said in str(raised.value) and list(tmp_path.iterdir()) == []


def append(path: Path) -> None:
    path.write_text(path.read_text() + " ")


def test_a_tensor_that_should_have_changed_and_was_left_out_of_the_changes_is_named(spoiled: tuple[Path, Path, Path]) -> None:
    model, checkpoint, fused = spoiled
    changes = read_changes(model, checkpoint)
    del changes[PROJECTION]
    assert verify_weights(model, checkpoint, fused, changes).problems == [f"not changed, or not to be changed: {PROJECTION}"]


def test_a_change_that_rounding_undoes_is_counted(tmp_path: Path) -> None:
    model = make_model(tmp_path, is_tied=False, dtype="bfloat16")
    checkpoint = peft_checkpoint(model, tmp_path / "checkpoint", target_modules=[*LINEAR])
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    small = {name: array * np.float32(1e-9 if LINEAR[1] in name else 0.1) for name, array in tensors.items()}
    save_file(small, checkpoint / "adapter_model.safetensors")
    fuse(model, checkpoint, tmp_path / "fused")
    found = prove(model, checkpoint, tmp_path / "fused")
    assert (found.problems, found.tensors, found.unchanged_tensors) == ([], 2, 1)
    before, after = bytes_of(model), bytes_of(tmp_path / "fused")
    changed = sum(int((to_float32(before[name], "BF16") != to_float32(after[name], "BF16")).sum()) for name in before)
    assert found.changed == changed and found.nearest <= found.numbers


@pytest.mark.parametrize("kind", ["lora", "full"])  # the change of the latter is carried back through mlx-lm's class
def test_an_adapter_of_mlx_lm_is_recomputed_and_not_called_independent(kind: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, is_tied=False)
    trained(model, tmp_path / "adapter", kind)
    fused, found = fuse_and_verify(model, tmp_path / "adapter", tmp_path / "fused", (), by_weights=True)
    assert found.passed and found.weights is not None
    assert found.weights["independent"] == 0 and found.weights["tensors"] == fused.tensors
    assert "by the code that fused them" in told(fused.tensors, vars(found))[1]
    at = next(name for name in read_changes(model, tmp_path / "adapter"))
    flip(tmp_path / "fused", at, 20)
    assert len(prove(model, tmp_path / "adapter", tmp_path / "fused").problems) == 1


def test_where_memory_does_not_suffice_nothing_is_run_and_it_is_said(
    lora: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    model, checkpoint, _ = lora
    numbers = sum(int(np.prod(at.shape)) for at in tensor_headers(model).values())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=HEADROOM * 4 * numbers))
    assert shortage(model) is None
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=HEADROOM * 4 * numbers - 1))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *arguments, **how: pytest.fail("it was run"))
    fused, found = fuse_and_verify(model, checkpoint, tmp_path / "fused", ("text",))
    assert (found.backend, found.positions, found.choices, found.engine) == ("weights", 0, {}, None)
    assert found.largest_difference is found.kl is found.tolerance is found.largest_logit is None
    report = json.loads((tmp_path / "fused" / "verification.json").read_text())["verified"]
    assert report == json.loads(json.dumps(vars(found)))
    gigabytes = f"{HEADROOM * 4 * numbers / 1e9:.1f} GB"
    first = f"not run: its weights take {gigabytes} of memory in float32, and {gigabytes} are free; every one of "
    assert told(fused.tensors, report)[0] == f"{first}{found.weights['numbers']:,} numbers was recomputed instead"  # type: ignore[index]


def test_memory_that_runs_out_while_it_runs_is_one_line(
    lora: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    def starve(*arguments: Any, **how: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", starve)
    for error in (MemoryError("Unable to allocate 9 GiB"), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("bad_alloc")):
        with pytest.raises(UserError, match=f"no memory left to run it in float32 \\({error}\\)") as raised:
            fuse_and_verify(lora[0], lora[1], tmp_path / "fused", ("text",), by_weights=False)
        assert "--by-weights" in raised.value.hint and list(tmp_path.iterdir()) == []


def test_the_proof_reads_a_large_tensor_in_blocks(tmp_path: Path) -> None:
    model, random = tmp_path / "model", np.random.default_rng(0)
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    name, rows, columns = "model.layers.0.mlp.up_proj", 16384, 1024  # 64 MiB
    save_file({f"{name}.weight": random.standard_normal((rows, columns), np.float32)}, model / "model.safetensors")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    sides = {"A": (4, columns), "B": (rows, 4)}
    tensors = {f"base_model.model.{name}.lora_{s}.weight": random.standard_normal(shape, np.float32) for s, shape in sides.items()}
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (checkpoint / "adapter_config.json").write_text(json.dumps(told))
    fuse(model, checkpoint, tmp_path / "fused")
    tracemalloc.start()
    found = prove(model, checkpoint, tmp_path / "fused")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.problems == [] and found.numbers == rows * columns
    assert peak < 40 << 20  # the tensor is 128 MiB in float64, and several of that size are compared


def test_fuse_says_that_nothing_was_run_and_with_a_quantised_base_that_it_was_only_recomputed(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = on_packed(tmp_path, dtype="bfloat16")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=2000))
    status, out, err = cli("fuse", run, "--out", "original")
    assert status == 0, err
    assert out.startswith("not run: its weights take 0.0 GB of memory in float32, and 0.0 GB are free; every one of ")
    assert "recomputed in float64 by other code: no missing and no unexpected keys" in out
    status, out, err = cli("fuse", run, "--out", "exact", "--quantised-base", "--json")
    assert status == 0, err
    found = json.loads(out)["verified"]
    assert found["passed"] and found["trained_on"] is None and found["weights"]["independent"] == 0 < found["weights"]["tensors"]
    assert "weights: numbers" in (tmp_path / "exact" / "README.md").read_text()
