"""What is said of a run before it starts, and what is refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from short_runs import prepared
from tiny_models import make_tiny

from mlx_finetune.config import RunConfig, make_config
from mlx_finetune.data.dataset import Dataset
from mlx_finetune.engines.torch.device import _built_for, choose_device, without_cuda
from mlx_finetune.errors import UserError
from mlx_finetune.planning import before_run
from mlx_finetune.training.remarks import experts_left_alone, folds_nothing, untrained_tokens


@pytest.fixture(scope="module")
def data(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(prepared(tiny_llama, tmp_path_factory.mktemp("data"), "ls"))


def config(**values: Any) -> RunConfig:
    return make_config(values, "test")


@pytest.mark.parametrize("how", ["nothing", "the same"])
def test_special_tokens_that_nobody_trained_are_named_unless_the_run_trains_them(
    how: str, tiny_llama: Path, data: Dataset, tmp_path: Path
) -> None:
    assert untrained_tokens(tiny_llama, config(), data.train) is None
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    embeddings[1:3] = 1e-4 if how == "nothing" else embeddings[1]  # <|im_start|> and <|im_end|>
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    said = untrained_tokens(model, config(), data.train)
    assert said and said.startswith("<|im_start|>, <|im_end|>: in the data") and "embed_tokens" in said
    for trains in ({"fine_tune_type": "full"}, {"target_modules": "q_proj,embed_tokens,lm_head"}):
        assert untrained_tokens(model, config(**trains), data.train) is None


def test_a_mixture_of_experts_is_told_what_is_not_adapted(tiny_llama: Path, tmp_path: Path) -> None:
    model = make_tiny("qwen3_moe", tmp_path / "model", tokenizer=False)
    assert "the experts" in (experts_left_alone(model, config()) or "")
    assert experts_left_alone(tiny_llama, config()) is None


def test_training_all_weights_is_refused_where_they_do_not_fit(
    tiny_llama: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = before_run.check_memory(tiny_llama, config(fine_tune_type="full"), data.train, 0.3)
    assert said.startswith("up to ")
    machine = before_run.this_machine()
    small = replace(machine, usable=2**20)
    monkeypatch.setattr(before_run, "this_machine", lambda: small)
    with pytest.raises(UserError, match=r"fine_tune_type = full needs .* may be used") as error:
        before_run.check_memory(tiny_llama, config(fine_tune_type="full"), data.train, 0.3)
    assert "lora" in error.value.hint


def test_without_cuda_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    import torch

    reason = without_cuda()
    if reason is None:
        pytest.skip("CUDA is here")
    with pytest.raises(UserError, match="device = cuda: ") as error:
        choose_device("cuda")
    assert "pytorch.org" in error.value.hint and choose_device("auto") == "cpu"

    def too_old() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).", stacklevel=1)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    assert "driver on your system is too old" in (without_cuda() or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (3, 7))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla K80")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_90"])
    assert "not built for this GPU (Tesla K80, compute 3.7)" in (without_cuda() or "")


@pytest.mark.parametrize(
    ("major", "minor", "runs"), [(3, 7, False), (7, 5, True), (8, 6, True), (8, 9, True), (9, 0, True), (12, 0, True)]
)
def test_a_gpu_runs_code_of_its_own_generation_or_what_is_compiled_for_it(major: int, minor: int, runs: bool) -> None:
    assert _built_for(major, minor, ["sm_75", "sm_80", "sm_90a", "compute_90"]) == runs


def test_a_pattern_that_means_the_embeddings_is_taken_for_training_them(tiny_llama: Path, data: Dataset, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][1:3] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert untrained_tokens(model, config(target_modules=r".*(q_proj|embed_tokens)"), data.train) is None
    assert untrained_tokens(model, config(target_modules=r".*(q|v)_proj"), data.train)


def test_a_setting_that_has_nothing_to_act_on_is_named() -> None:
    assert "pack_length has no effect" in (folds_nothing(config(pack_length=900, share_prefixes="never")) or "")
    assert folds_nothing(config(pack_length=900)) is None and folds_nothing(config(share_prefixes="never")) is None
