"""Twenty steps on either engine end alike: every setting that both have, and every kind of architecture.

float32, tiny random models, AdamW unless it is said otherwise; sums are added in another order on each side.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_engines import config, random_batch, spread
from tiny_models import make_tiny, mostly_long

from mlx_finetune.engines import open_engine
from mlx_finetune.errors import UserError
from mlx_finetune.training.schedule import learning_rate

STEPS = 20
FALLING = {"learning_rate": 1e-3, "lr_schedule": "linear", "warmup_ratio": 0.0}
LOSS, NORM, ADAPTER = 1e-5, 3e-5, 3e-4
# AdamW divides by the root of the second moment: where a gradient is no larger than epsilon, 1e-8, its rounding decides which way
# a weight goes. Where all weights are trained there are such gradients, with lr 1e-3 off by up to 2e-3 in one weight; FEW of them.
NEAR_EPSILON, FEW = 1e-2, 1e-4
ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "granite",
    "smollm3",
    "mixtral",
    "qwen3_moe",
    "olmoe",
)
# With the weights of seed 0 a choice of experts hangs on the last bit: torch's own losses move by 4e-4 where weights are rounded.
SEEDS = {("mixtral", "dora"): 1}
OFTEN = (("gemma3_text", "lora"), ("phi3", "lora"), ("granite", "dora"), ("olmoe", "lora"), ("qwen3_moe", "dora"))
EMBEDDINGS = {"target_modules": "q_proj,v_proj,embed_tokens"}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"fine_tune_type": "dora"},
    "dora rslora checkpointed": {"fine_tune_type": "dora", "use_rslora": True, "grad_checkpoint": 2},
    "full": {"fine_tune_type": "full"},
    "full, last layers": {"fine_tune_type": "full", "num_layers": 2},
    "full, checkpointed, muon": {"fine_tune_type": "full", "grad_checkpoint": 1, "optimizer": "muon"},
    "full, adafactor": {"fine_tune_type": "full", "optimizer": "adafactor"},
    "head": {"target_modules": "q_proj,lm_head"},
    "head, dora": {"target_modules": "q_proj,lm_head", "fine_tune_type": "dora"},
    "embeddings": EMBEDDINGS,
    "pattern": {"target_modules": r".*\.[01]\..*(q|up)_proj"},
    "last layers": {"num_layers": 2},
    "adafactor": {"optimizer": "adafactor"},
    "muon": {"optimizer": "muon"},
    "loraplus": {"loraplus_lr_ratio": 8.0},
    "neftune": {"neftune_noise_alpha": 5.0},
    "decay": {"weight_decay": 0.3},
    "clipping": {"max_grad_norm": 0.01},
    "rows alone": {"share_prefixes": "never"},
}
TIED = ("embeddings", "full, adafactor", "full, checkpointed, muon")


def near_epsilon(settings: dict[str, Any]) -> bool:
    """Whether there are many gradients so small that rounding decides what AdamW makes of them: all weights are trained."""
    whole = settings.get("fine_tune_type") == "full" and "num_layers" not in settings
    return whole and settings.get("optimizer", "adamw") == "adamw"


def twenty_steps(engine: str, model: Path, settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Losses, gradient norms, and the state at the end; rates fall, micro-batches are accumulated.

    An adapter is begun away from zero, so that gradients reach A too; far enough that few gradients of A, which are
    in proportion to B, are as small as epsilon: over six settings and four draws the worst loss was off by 4e-6, at .02 by 1.5e-5.
    """
    how = config(engine, **FALLING | settings)
    opened = open_engine(how, model)
    if how.fine_tune_type != "full":
        spread(opened, scale=0.05)
    rates = [learning_rate(i, STEPS, how) for i in range(STEPS)]
    results = [opened.step([random_batch(i), random_batch(i + 100)], rate, seed=i) for i, rate in enumerate(rates)]
    return np.array([r.loss for r in results]), np.array([r.grad_norm for r in results]), opened.state()


def check_parity(model: Path, settings: dict[str, Any]) -> None:
    (loss, norm, state), (loss_, norm_, state_) = (twenty_steps(engine, model, settings) for engine in ("mlx", "torch"))
    loose = near_epsilon(settings)
    np.testing.assert_allclose(loss, loss_, atol=LOSS)
    np.testing.assert_allclose(norm, norm_, rtol=NORM)
    assert state.keys() == state_.keys() and len(state) > 10
    for name, array in state.items():
        if name.startswith("adapter/"):
            np.testing.assert_allclose(array, state_[name], atol=NEAR_EPSILON if loose else ADAPTER, err_msg=name)
    apart = [np.abs(array - state_[name]).ravel() for name, array in state.items() if name.startswith("adapter/")]
    assert (np.concatenate(apart) > ADAPTER).mean() < FEW


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_that_both_engines_have_gives_the_same_on_either(name: str, tiny_llama: Path) -> None:
    check_parity(tiny_llama, SETTINGS[name])


@pytest.mark.parametrize("name", TIED)
def test_embeddings_that_are_the_head_too_are_trained_alike(name: str, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", tokenizer=False, changes={"tie_word_embeddings": True})
    check_parity(model, SETTINGS[name])


@pytest.mark.parametrize(
    ("model_type", "kind"),
    mostly_long([(one, kind) for one in ARCHITECTURES for kind in ("lora", "dora")], *OFTEN),
)
def test_every_kind_of_architecture_is_trained_alike(model_type: str, kind: str, tmp_path: Path) -> None:
    seed = SEEDS.get((model_type, kind), 0)
    check_parity(make_tiny(model_type, tmp_path / "model", tokenizer=False, seed=seed), {"fine_tune_type": kind})


@pytest.mark.parametrize("model_type", ["gemma3_text", "granite", "qwen3"])
def test_embeddings_are_adapted_alike_where_a_model_scales_them(model_type: str, tmp_path: Path) -> None:
    check_parity(make_tiny(model_type, tmp_path / "model", tokenizer=False), EMBEDDINGS | {"neftune_noise_alpha": 2.0})


def test_a_pad_token_that_is_a_token_of_the_text_too_is_learned_like_any_other(engine_name: str, tiny_llama: Path) -> None:
    engine = open_engine(config(engine_name, fine_tune_type="full", target_modules="embed_tokens"), tiny_llama)
    batch = random_batch(0)
    inputs = batch.inputs.copy()
    inputs[:, 0] = 0  # what transformers calls padding, and gives no gradient
    before = engine.state()["adapter/model.embed_tokens.weight"]
    engine.step([type(batch)(inputs, batch.targets, batch.weights)], 1e-3, seed=0)
    assert np.abs(engine.state()["adapter/model.embed_tokens.weight"][0] - before[0]).max() > 1e-4


NO_CUDA = pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="a machine with CUDA")
NO_LIGER, NO_FLASH = (
    pytest.mark.skipif(importlib.util.find_spec(package) is not None, reason=f"{package} is installed")
    for package in ("liger_kernel", "flash_attn")
)
NO_METAL = pytest.mark.skipif(sys.platform == "darwin", reason="a Mac")


@pytest.mark.parametrize(
    ("engine", "settings", "said"),
    [
        ("mlx", {"quantization": "4bit"}, "quantization = 4bit is not there with the mlx engine"),
        ("mlx", {"optimizer": "adamw_8bit"}, "optimizer = adamw_8bit is not there with the mlx engine"),
        ("mlx", {"device": "cuda"}, "device = cuda is not there with the mlx engine"),
        ("mlx", {"torch_compile": True}, "torch_compile = true is not there with the mlx engine"),
        pytest.param("torch", {"device": "cuda"}, "device = cuda: torch .* (is built without CUDA|finds no NVIDIA)", marks=NO_CUDA),
        pytest.param("torch", {"device": "mps"}, "device = mps: there is no Metal here", marks=NO_METAL),
        pytest.param("torch", {"use_liger_kernel": True}, "use_liger_kernel = true needs liger_kernel", marks=NO_LIGER),
        pytest.param("torch", {"attention": "flash"}, "attention = flash needs flash_attn", marks=NO_FLASH),
        ("torch", {"attention": "flash", "share_prefixes": "always"}, "do not go together"),
        ("torch", {"fsdp": True, "quantization": "4bit"}, "fsdp and quantization = 4bit do not go together"),
        ("torch", {"fsdp": True}, "fsdp cuts the weights over several processes"),
        ("torch", {"fine_tune_type": "full", "dropout": 0.1}, "dropout is for adapters"),
        ("torch", {"fine_tune_type": "full", "dtype": "bfloat16"}, "full trains in float32"),
        ("mlx", {"neftune_noise_alpha": 5.0, "share_prefixes": "always"}, "do not go together"),
        ("mlx", {"decay_ratio": 0.3}, "decay_ratio is of lr_schedule = wsd, not of cosine"),
        ("mlx", {"fine_tune_type": "dora", "target_modules": "embed_tokens"}, "dora is not there for model.embed_tokens"),
        ("torch", {"target_modules": ".*nothing"}, "'.*nothing' matches no layer"),
    ],
)
def test_what_an_engine_does_not_have_is_refused_by_name(
    engine: str, settings: dict[str, Any], said: str, tiny_llama: Path
) -> None:
    with pytest.raises(UserError, match=said):
        open_engine(config(engine, **settings), tiny_llama)


def test_the_head_of_tied_embeddings_is_refused_with_the_name_that_adapts_both(engine_name: str, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", tokenizer=False, changes={"tie_word_embeddings": True})
    with pytest.raises(UserError, match=r"its embeddings|called 'lm_head'"):
        open_engine(config(engine_name, target_modules="q_proj,lm_head"), model)
