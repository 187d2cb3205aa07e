"""What is proven before a fused folder appears: by the engine that trained, by greedy answers, and byte for byte."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import WORDS, as_of_old, make_base, make_run
from safetensors.numpy import load_file, save_file
from tiny_models import CHATML

from mlx_finetune.evaluation.compare import open_run
from mlx_finetune.export.card import split_card
from mlx_finetune.export.distance import Choices, choices
from mlx_finetune.export.facts import read_facts
from mlx_finetune.export.folder_checks import check_folder
from mlx_finetune.export.fuse import write_template
from mlx_finetune.export.in_engine import logits_of, trained_with
from mlx_finetune.export.probes import ANSWER, MOST_LOGITS, PROBE_TEXTS, bounded
from mlx_finetune.export.push import choose_files, find_private
from mlx_finetune.export.verify import Verified, fuse_and_verify, verify
from mlx_finetune.models.weights import tensor_headers
from mlx_finetune.training.checkpoint import trained_template

# Settings of the run, and of the base.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "dora on bfloat16": ({"fine_tune_type": "dora", "num_layers": 2}, {"dtype": "bfloat16"}),
    "full": ({"fine_tune_type": "full", "learning_rate": 3e-3}, {}),
    "tied embeddings": ({"target_modules": ("q_proj", "embed_tokens")}, {"changes": {"tie_word_embeddings": True}}),
}
CASES = [
    ("lora", "mlx", "llama"),
    ("dora on bfloat16", "torch", "qwen3"),
    ("full", "mlx", "qwen2"),
    pytest.param("tied embeddings", "torch", "gemma3_text", marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the MLX engine, never written to."""
    root = tmp_path_factory.mktemp("verify")
    make_base(root)
    return make_run(root, "mlx")


@pytest.fixture(scope="module")
def handed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verified]:
    """Its fused folder, never written to, and what was found of it."""
    config, model, checkpoint = open_run(run, "best")
    out = tmp_path_factory.mktemp("handed") / "fused"
    facts = read_facts(run, checkpoint, model, config)
    return out, fuse_and_verify(model, checkpoint, out, PROBE_TEXTS, template=trained_template(run), facts=facts)[1]


@pytest.fixture
def spoiled(handed: tuple[Path, Verified], tmp_path: Path) -> Path:
    """A copy of the fused folder that the test may spoil."""
    return Path(shutil.copytree(handed[0], tmp_path / "spoiled"))


@pytest.mark.parametrize(("kind", "engine", "model_type"), CASES)
def test_the_engine_that_trained_peft_and_the_fused_folder_say_the_same(kind, engine, model_type, tmp_path):
    values, how = KINDS[kind]
    make_base(tmp_path, model_type, **how)
    _, model, checkpoint = open_run(make_run(tmp_path, engine, **values), "best")
    _, found = fuse_and_verify(model, checkpoint, tmp_path / "fused", PROBE_TEXTS)
    assert found.passed and found.backend == "transformers" and not found.folder["problems"]
    assert found.engine is not None and found.engine["name"] == engine and found.engine["passed"]
    assert found.engine["largest_difference"] < 1e-4 * found.largest_logit  # float32, in kernels of another library
    for said in (found.choices, found.engine["choices"]):
        assert said["tokens"] == ANSWER * len(PROBE_TEXTS) == said["same"] + said["tied"]
    assert found.choices["same"] == found.choices["tokens"] or kind == "dora on bfloat16"


def test_both_engines_give_the_logits_of_transformers(run):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, model, checkpoint = open_run(run, "best")
    rows = [[5, 17, 300, 2, 44, 101, 9], list(range(40))]
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), checkpoint).eval()
    with torch.no_grad():
        expected = [tuned(torch.tensor([row])).logits[0].numpy() for row in rows]
    for engine in ("mlx", "torch"):
        found = list(logits_of(model, checkpoint, engine, rows))
        assert [one.shape for one in found] == [(7, 320), (40, 320)]
        assert all(np.abs(one - other).max() < 1e-4 for one, other in zip(found, expected, strict=True))


def test_an_engine_that_trained_with_another_scale_is_not_believed(run, handed, tmp_path):
    _, model, checkpoint = open_run(run, "best")
    other = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    as_of_old(other, lambda progress: progress | {"config": progress["config"] | {"alpha": 10}})
    found = verify(model, other, handed[0], PROBE_TEXTS, trained_template(run))
    assert found.engine is not None and not found.engine["passed"] and not found.passed
    assert found.largest_difference < 1e-4  # peft and the folder agree all the same
    (other / "progress.json").unlink()
    found = verify(model, other, handed[0], PROBE_TEXTS, trained_template(run))
    assert trained_with(other) is None and found.engine is None and found.passed


def test_verification_json_says_what_was_found_and_nothing_of_the_machine(handed, run):
    folder, found = handed
    report = json.loads((folder / "verification.json").read_text())
    assert report["version"] == 2 and {"mlx", "mlx-lm", "torch", "transformers", "peft", "mlx-finetune"} <= set(report["versions"])
    verified = report["verified"]
    assert verified["passed"] and verified["engine"]["name"] == "mlx"
    assert (verified["missing"], verified["unexpected"]) == ([], [])
    assert (
        verified["folder"]["changed"] == 28 and verified["folder"]["unchanged"] == 11
    )  # 7 in each of 4 layers; 2 norms in each, 3 outside
    assert verified["folder"]["special_tokens"] == {"end of turn": [2], "padding": [0]}
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(verified["folder"]["tokenizer_files"])
    text = (folder / "verification.json").read_text() + (folder / "README.md").read_text()
    assert not any(word in text for word in (*WORDS.split(), str(run.parent), "/tmp", "/root"))
    assert json.loads(json.dumps(vars(found))) == verified
    assert find_private(folder, list(choose_files(folder).files), Path("/home/jo.nasim")) == []
    assert "What its makers say." in split_card((folder / "README.md").read_text())[1]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def other_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (other_norm, "model.norm.weight is not the base's, and was not trained"),
        (lambda f: append(f / "tokenizer.json", " "), "tokenizer.json is not the base's"),
        (lambda f: edit(f / "tokenizer_config.json", model_max_length=7), "tokenizer_config.json is not the base's"),
        (lambda f: edit(f / "generation_config.json", eos_token_id=[2, 5]), "end of turn [2, 5] is not the base's [2]"),
        (lambda f: edit(f / "generation_config.json", eos_token_id=[2, 900]), "end of turn 900 is not in the vocabulary of 320"),
        (lambda f: edit(f / "generation_config.json", temperature=0.3), "generation_config.json is not the base's"),
        (lambda f: edit(f / "tokenizer_config.json", pad_token="<|im_end|>"), "padding [2] is not the base's [0]"),
        (lambda f: append(f / "chat_template.jinja", " "), "the chat template is not the one that was trained"),
    ],
)  # fmt: skip
def test_what_must_not_change_is_looked_at_and_named(spoil, problem, spoiled, run):
    _, model, checkpoint = open_run(run, "best")
    changed = [
        name.removeprefix("base_model.model.").partition(".lora_")[0]
        for name in load_file(checkpoint / "adapter_model.safetensors")
    ]
    weights = {f"{name}.weight" for name in changed}
    assert check_folder(model, spoiled, weights, trained_template(run)).problems == []
    spoil(spoiled)
    assert problem in check_folder(model, spoiled, weights, trained_template(run)).problems


def test_a_folder_with_a_problem_does_not_pass(spoiled, run):
    _, model, checkpoint = open_run(run, "best")
    other_norm(spoiled)
    found = verify(model, checkpoint, spoiled, PROBE_TEXTS, trained_template(run))
    assert not found.passed and found.largest_difference < 1e-4 and len(found.folder["problems"]) == 1


def test_the_template_of_the_run_may_differ_from_the_bases(spoiled, run):
    _, model, _ = open_run(run, "best")
    template = CHATML + "{# of the run #}"
    write_template(spoiled, template)
    found = check_folder(model, spoiled, tensor_headers(model), template)
    assert not found.problems and found.template["as_trained"]
    assert (spoiled / "chat_template.jinja").read_text() == template


def test_a_token_beyond_the_vocabulary_of_the_base_itself_is_no_fault_of_the_folder(spoiled, tmp_path):
    for folder in (base := Path(shutil.copytree(spoiled, tmp_path / "base")), spoiled):
        edit(folder / "generation_config.json", eos_token_id=[2, 900])
    found = check_folder(base, spoiled, ())
    assert not found.problems and found.remarks == ["end of turn 900 is not in the vocabulary of 320"]
    assert found.special_tokens["end of turn"] == [2, 900]


def test_a_tie_within_float_noise_is_no_other_answer_and_a_real_one_is():
    first = [np.array([[1.0, 1.0 + 1e-6, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 2.0]], np.float32)]
    second = [np.array([[1.0 + 1e-6, 1.0, 0.0], [3.0, 0.0, 0.0], [0.0, 2.0, 0.0]], np.float32)]
    found = choices(first, second, 1e-3)
    assert found == Choices(tokens=3, same=1, tied=1) and found.different == 1
    nearly = [np.array([[1.0, 1.01, 0.0]], np.float32)], [np.array([[1.01, 1.0, 0.0]], np.float32)]
    assert choices(*nearly, 1e-3).different == 1 and choices(*nearly, 1e-2).tied == 1


def test_logits_that_are_kept_fit_in_a_quarter_of_a_gigabyte(tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 262144}}')
    texts, spread = bounded(tmp_path, [list(range(256))] * 3, [list(range(0, 262144, 1024))] * 2)
    kept = sum(len(row) + ANSWER for row in texts) + sum(map(len, spread))
    assert kept * 262144 <= MOST_LOGITS and all(len(row) >= 8 for row in (*texts, *spread))
    assert spread[0][0] == 0 and spread[0][-1] == 261120
    (tmp_path / "config.json").write_text('{"vocab_size": 320}')
    assert bounded(tmp_path, [[1] * 256], [[2] * 256]) == ([[1] * 256], [[2] * 256])
