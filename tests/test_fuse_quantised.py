"""A run on quantised weights goes into the original ones, or with --quantised-base into exactly those it was trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from finished_runs import make_base, make_data, make_run
from test_architectures import RELATIVE, tokens, transformers_logits
from tiny_models import make_tiny

from mlx_finetune.errors import UserError
from mlx_finetune.export.convert import How, convert
from mlx_finetune.export.folder_checks import check_folder
from mlx_finetune.export.fuse import fuse_into
from mlx_finetune.export.packed_logits import packed_logits
from mlx_finetune.export.quantised_base import unpacked
from mlx_finetune.models.importing import find_source
from mlx_finetune.models.quantisation import Quantisation
from mlx_finetune.originals import original_of

Answer = tuple[int, str, str]
EMBEDDINGS = "model.embed_tokens.weight"
FOUR = Quantisation(bits=4, group_size=32)


def trained(root: Path, model_type: str = "llama", dtype: str = "float32", **settings: str) -> Path:
    """A run of MLX on root/packed, of 4 bits, which was converted from root/base."""
    base = make_base(root, model_type, dtype=dtype)
    convert(find_source(str(base)), root / "packed", How(FOUR, verify=False), lambda done, total: None)
    return make_run(root, "mlx", model=str(root / "packed"), **settings)


def of_trained(run: Path) -> np.ndarray:
    """Logits of the model as it was trained."""
    from mlx_finetune.export.in_engine import logits_of

    checkpoint = (run / "best").resolve()
    return np.stack(list(logits_of(run.parent / "packed", checkpoint, "mlx", tokens(24).tolist(), as_trained=True)))


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        ("llama", "float32"),
        ("lfm2_moe", "bfloat16"),
        pytest.param("llama", "bfloat16", marks=pytest.mark.long),
        pytest.param("qwen3_moe", "float32", marks=pytest.mark.long),
        pytest.param("qwen3_moe", "bfloat16", marks=pytest.mark.long),
        pytest.param("lfm2_moe", "float32", marks=pytest.mark.long),
    ],
)
def test_it_goes_into_the_original_weights_and_the_difference_is_told(
    cli: Callable[..., Answer], tmp_path: Path, model_type: str, dtype: str
) -> None:
    run = trained(tmp_path, model_type, dtype)
    status, out, err = cli("fuse", run, "--out", "original", "--json")
    assert status == 0, err
    assert "quantised" in err
    plain = json.loads(out)["verified"]
    assert plain["passed"] and plain["trained_on"]["kl"] > 0
    status, out, err = cli("fuse", run, "--out", "exact", "--quantised-base", "--json")
    assert status == 0, err
    exact = json.loads(out)["verified"]
    assert exact["passed"] and exact["trained_on"]["kl"] < plain["trained_on"]["kl"] / 20
    expected = of_trained(run)
    apart = [np.abs(transformers_logits(Path(folder), tokens(24)) - expected).max() for folder in ("original", "exact")]
    # bfloat16 keeps 8 bits of an unpacked number, which at times sends a token to another expert
    assert apart[1] < (0.3 * apart[0] if dtype == "bfloat16" else 4e-4 * np.abs(expected).max())
    assert json.loads(Path("exact/verification.json").read_text())["verified"]["trained_on"] == exact["trained_on"]


def test_original_weights_that_moved_are_named_again_and_others_are_refused(cli: Callable[..., Answer], tmp_path: Path) -> None:
    run = trained(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    status, _, err = cli("fuse", run, "--out", "fused")
    assert status == 2 and "no longer there" in err and "--original" in err
    assert cli("fuse", run, "--out", "fused", "--original", "moved")[0] == 0
    make_base(tmp_path, seed=5)
    status, _, err = cli("fuse", run, "--out", "other", "--original", "base")
    assert status == 2 and "not what" in err and not Path("other").exists()
    (tmp_path / "packed" / "origin.json").unlink()
    status, _, err = cli("fuse", run, "--out", "other")
    assert status == 2 and "no origin.json" in err and "--original" in err
    status, _, err = cli("fuse", run, "--out", "other", "--original", "base")
    assert status == 2 and "not what" in err and not Path("other").exists()
    assert cli("fuse", run, "--out", "other", "--original", "moved")[0] == 0


def test_a_base_that_was_only_rounded_is_no_quantised_one(cli: Callable[..., Answer], tmp_path: Path) -> None:
    base = make_base(tmp_path)
    convert(find_source(str(base)), tmp_path / "half", How(dtype="bfloat16", verify=False), lambda done, total: None)
    run = make_run(tmp_path, "mlx", model=str(tmp_path / "half"))
    status, out, err = cli("fuse", run, "--out", "fused", "--json")
    assert status == 0 and "quantised" not in err, err
    assert json.loads(out)["verified"]["trained_on"] is None
    status, _, err = cli("fuse", run, "--out", "again", "--quantised-base")
    assert status == 2 and "is not quantised" in err


def test_options_that_do_not_fit_what_is_fused_are_refused(cli: Callable[..., Answer], tmp_path: Path) -> None:
    make_base(tmp_path)
    run = make_run(tmp_path, "mlx")
    adapter = tmp_path / "adapter"
    shutil.copytree((run / "best").resolve(), adapter)
    for arguments, said in (
        ((run, "--quantised-base"), "is not quantised"),
        ((run, "--model", "base"), "a run knows its model"),
        ((run, "--original", "base"), "is the original itself"),
        ((adapter, "--model", "base", "--checkpoint", "best"), "an adapter, not a run"),
        ((adapter, "--model", "base", "--base", "a/b"), "a card is written for runs"),
        ((tmp_path / "dataset",), "neither a run nor the folder of an adapter"),
        ((run, "--base", "no id"), "no id of the Hub"),
    ):
        status, out, err = cli("fuse", *arguments, "--out", "fused")
        assert (status, out) == (2, "") and said in err and len(err.strip().splitlines()) <= 3, err
    assert not Path("fused").exists()


def test_the_folder_of_an_adapter_of_peft_or_mlx_lm_is_fused_and_proven(cli: Callable[..., Answer], tmp_path: Path) -> None:
    from test_from_mlx import trained as of_mlx_lm

    base = make_base(tmp_path, "qwen3_moe")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    for file in base.glob("*.jinja"):  # as of a base model: an adapter made elsewhere needs none
        template = file.read_text()
        file.unlink()
    expected = of_mlx_lm(base, tmp_path / "adapter", "lora")
    status, out, err = cli("fuse", "adapter", "--model", "base", "--out", "fused", "--json")
    assert status == 0, err
    verified = json.loads(out)["verified"]
    assert verified["backend"] == "mlx" and verified["missing"] == verified["unexpected"] == []
    found = transformers_logits(tmp_path / "fused", tokens(24))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert template
    (base / "chat_template.jinja").write_text(template)
    make_data(base, tmp_path)
    run = make_run(tmp_path, "torch")
    shutil.copytree((run / "best").resolve(), tmp_path / "of_peft")
    (tmp_path / "of_peft" / "progress.json").unlink()
    status, out, err = cli("fuse", "of_peft", "--model", "base", "--out", "fused too", "--json")
    assert status == 0 and json.loads(out)["verified"]["backend"] == "transformers", err


@pytest.mark.parametrize("to", ["peft", "mlx-lm", "gguf", "ollama"])
def test_a_run_on_quantised_weights_is_exported_for_the_original_ones(cli: Callable[..., Answer], tmp_path: Path, to: str) -> None:
    run = trained(tmp_path)
    status, out, err = cli("export", run, "--to", to, "--out", "made", "--json")
    assert status == 0, err
    if to in ("peft", "mlx-lm"):
        readers = json.loads(out)["verified"]["readers"]
        assert set(readers) == {"peft", "mlx-lm"}
        config = json.loads(Path("made/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "base"
    else:
        assert json.loads(out)["verified"]["verified"]["trained_on"]["kl"] > 0
        assert any(path.suffix == ".gguf" for path in Path("made").iterdir())


def test_the_gguf_holds_what_was_trained_on_where_that_is_asked_for(cli: Callable[..., Answer], tmp_path: Path) -> None:
    run = trained(tmp_path)
    assert cli("export", run, "--to", "gguf", "--quantisation", "f32", "--out", "exact", "--quantised-base")[0] == 0
    assert cli("export", run, "--to", "gguf", "--quantisation", "f32", "--out", "plain")[0] == 0
    sizes = [next(Path(name).glob("*.gguf")).read_bytes() for name in ("exact", "plain")]
    assert len(sizes[0]) == len(sizes[1]) and sizes[0] != sizes[1]
    status, _, err = cli("export", run, "--to", "peft", "--out", "adapter", "--quantised-base")
    assert status == 2 and "has no base in it" in err
    assert cli("export", run, "--to", "gguf", "--adapter-only", "--out", "lora")[0] == 0


def test_what_was_trained_on_awq_goes_back_as_an_adapter_alone(cli: Callable[..., Answer], tmp_path: Path) -> None:
    from awq_checkpoints import make_awq

    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    base = make_base(tmp_path, changes=sizes)
    make_awq(base, tmp_path / "awq", tmp_path / "unpacked", tmp_path / "rounded")
    convert(find_source(str(tmp_path / "awq")), tmp_path / "packed", How(verify=False), lambda done, total: None)
    run = make_run(tmp_path, "mlx", model=str(tmp_path / "packed"))
    for named in ((), ("--original", "base")):
        status, _, err = cli("fuse", run, "--out", "fused", *named)
        assert status == 2 and "AWQ scales weights" in err and "export" in err
    status, _, err = cli("export", run, "--to", "mlx-lm", "--out", "adapter", "--original", "base")
    assert status == 2 and "--original base" in err
    assert cli("export", run, "--to", "mlx-lm", "--out", "adapter")[0] == 0


def test_awq_of_the_hub_is_known_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants
    from awq_checkpoints import make_awq

    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    commit, cached = "c" * 40, tmp_path / "cache" / "models--org--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    make_awq(make_base(tmp_path, changes=sizes), cached / "snapshots" / commit, tmp_path / "unpacked", tmp_path / "rounded")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    convert(find_source("org/tiny"), tmp_path / "packed", How(verify=False), lambda done, total: None)
    with pytest.raises(UserError, match="AWQ scales weights"):
        original_of(tmp_path / "packed", "")


def test_embeddings_that_are_stored_twice_are_unpacked_in_both_places(cli: Callable[..., Answer], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = make_base(tmp_path, "qwen3", dtype="bfloat16", changes={"tie_word_embeddings": True})
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors[EMBEDDINGS].clone()}, base / "model.safetensors", {"format": "pt"})
    convert(find_source(str(base)), tmp_path / "packed", How(FOUR, verify=False), lambda done, total: None)
    run = make_run(tmp_path, "mlx", model=str(tmp_path / "packed"), target_modules=("q_proj", "embed_tokens"))
    status, _, err = cli("fuse", run, "--out", "exact", "--quantised-base")
    assert status == 0, err
    found = load_file(tmp_path / "exact" / "model.safetensors")
    assert found["lm_head.weight"].equal(found[EMBEDDINGS]) and not found[EMBEDDINGS].equal(tensors[EMBEDDINGS])
    save_file(found | {"lm_head.weight": tensors[EMBEDDINGS].clone()}, tmp_path / "exact" / "model.safetensors", {"format": "pt"})
    parted = check_folder(base, tmp_path / "exact", [*tensors, "lm_head.weight"]).problems
    assert parted[:1] == [f"{EMBEDDINGS} and lm_head.weight are one weight, and are not the same"]


@pytest.mark.parametrize(("model_type", "sizes"), [("granitemoe", {"intermediate_size": 128}), ("qwen3_moe", {})])
def test_packed_experts_are_unpacked_one_by_one_where_they_stand(model_type: str, sizes: dict[str, int], tmp_path: Path) -> None:
    base = make_tiny(model_type, tmp_path / "base", tokenizer=True, changes=sizes)
    convert(find_source(str(base)), tmp_path / "packed", How(FOUR, verify=False), lambda done, total: None)
    (tmp_path / "exact").mkdir()
    fuse_into(base, tmp_path / "packed", tmp_path / "exact", changes=unpacked(base, tmp_path / "packed"))
    expected = np.stack(packed_logits(tmp_path / "packed", tokens(24).tolist()))
    assert np.abs(transformers_logits(tmp_path / "exact", tokens(24)) - expected).max() < RELATIVE * np.abs(expected).max()
