"""One architecture on its whole road: read, trained a step by both engines, fused, opened by peft. Relative errors of logits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from test_engines import config, random_batch, spread
from tiny_models import VOCABULARY

from mlx_finetune.engines import Engine, open_engine
from mlx_finetune.engines.adapter import peft_config, peft_tensors
from mlx_finetune.errors import UserError
from mlx_finetune.export.adapter import read_adapter
from mlx_finetune.export.adapter_folder import write_formats
from mlx_finetune.export.fuse import fuse
from mlx_finetune.files import write_json
from mlx_finetune.models.weights import tensor_headers

TOKENS = np.random.default_rng(1).integers(3, VOCABULARY, size=(2, 24))


@dataclass(frozen=True)
class Row:
    """Largest differences over the largest logit, of the loss, and of the gradient's norm; a text says why there is none."""

    load: float | str
    loss: float | str
    norm: float | str
    fuse: float | str
    peft: float | str
    mlx_lm: float | str = ""
    targets: int = 0


def row_of(model: Path, work: Path, exported: bool = False) -> Row:
    """Of the folder `model`; what is written goes into `work`. `exported`: opened by mlx-lm too."""
    from mlx_finetune.engines.mlx.load import load_model

    base = of_transformers(model)
    load = refused(lambda: relative(of_mlx(load_model(model, "float32")), base))
    if isinstance(load, str):
        return Row(load, "", "", "", "")
    settings = {"max_grad_norm": 1e9, "target_modules": targets_of(model)}
    try:
        mlx = open_engine(config("mlx", **settings), model)
    except UserError as error:
        return Row(load, str(error), "", "", "")
    spread(mlx)
    adapter = written(mlx, work / "adapter")
    tuned = of_mlx(mlx.model)  # type: ignore[attr-defined]
    assert relative(tuned, base) > 1e-2, "the adapter is not seen"
    fused = refused(lambda: (fuse(model, adapter, work / "fused"), relative(of_transformers(work / "fused"), tuned))[1])
    peft = refused(lambda: relative(of_peft(model, adapter), tuned))
    loss: float | str
    norm: float | str
    try:
        torch = open_engine(config("torch", **settings), model)
        spread(torch)
        found = [engine.step([random_batch(1), random_batch(2)], 1e-3, seed=0) for engine in (mlx, torch)]
        loss, norm = (abs(getattr(found[0], n) / getattr(found[1], n) - 1) for n in ("loss", "grad_norm"))
    except UserError as error:
        loss, norm = str(error), ""
    mlx_lm = refused(lambda: relative(of_mlx_lm(model, adapter, work / "exported"), tuned)) if exported else ""
    return Row(load, loss, norm, fused, peft, mlx_lm, len(mlx.targets))


def targets_of(model: Path) -> str:
    """All linear layers, and the experts where there are some that can be adapted."""
    try:
        open_engine(config("mlx", target_modules="all-linear,experts"), model)
    except UserError:
        return "all-linear"
    return "all-linear,experts"


def written(engine: Engine, folder: Path, base: str | Path = "base") -> Path:
    """The adapter of an engine as a checkpoint has it."""
    folder.mkdir(parents=True)
    arrays = {name.removeprefix("adapter/"): a for name, a in engine.state().items() if name.startswith("adapter/")}
    save_file(peft_tensors(arrays, engine.targets), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", peft_config(engine.targets, engine.config, str(base)))
    return folder


def of_mlx(network: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(network(mx.array(TOKENS)).astype(mx.float32))


def opened(folder: Path) -> Any:
    import torch

    from mlx_finetune.engines.torch.load import auto_class

    network, keys = auto_class(folder).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not keys["missing_keys"] and not keys["unexpected_keys"], keys
    return network.eval()


def logits(network: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return network(torch.from_numpy(TOKENS)).logits.numpy()


def of_transformers(folder: Path) -> np.ndarray:
    return logits(opened(folder))


def of_peft(model: Path, adapter: Path) -> np.ndarray:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(opened(model), adapter).eval())


def of_mlx_lm(model: Path, adapter: Path, folder: Path) -> np.ndarray:
    """Of the folder that `export --to mlx-lm` makes, on a base that is read as transformers reads it."""
    from mlx_lm.tuner.utils import load_adapters

    from mlx_finetune.engines.mlx.load import load_model

    folder.mkdir()
    write_formats(folder, model, adapter, read_adapter(adapter), ["mlx-lm"], False, tensor_headers(model), None)
    network = load_adapters(load_model(model, "float32"), str(folder))
    network.eval()
    return of_mlx(network)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def refused(compute: Callable[[], float]) -> float | str:
    try:
        return compute()
    except UserError as error:
        return str(error)
