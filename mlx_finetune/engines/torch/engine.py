"""TorchEngine: transformers' model classes with our LoRA, on CUDA, or in float32 on a CPU."""

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Batch
from mlx_finetune.engines import Arrays, StepResult, process_peak
from mlx_finetune.engines.adapter import LAYER, choose_targets, initial_adapter
from mlx_finetune.errors import UserError

MOMENT_NAMES = {"m": "exp_avg", "v": "exp_avg_sq"}


class LoRALinear(torch.nn.Module):
    """base(x) + scale * B A x, the adapter in float32 whatever the base is in."""

    def __init__(self, base: torch.nn.Linear, rank: int, scale: float, dropout: float) -> None:
        """`base`: the frozen layer [out, in]."""
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        device = base.weight.device
        self.lora_A = torch.nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        low = F.dropout(x.float(), self.dropout, self.training) @ self.lora_A.T
        return self.base(x) + (self.scale * (low @ self.lora_B.T)).to(x.dtype)


class TorchEngine:
    """See `Engine`."""

    name = "torch"

    def __init__(self, model: Path, config: RunConfig) -> None:
        """Loads the folder `model` and puts a fresh adapter on it."""
        _refuse(config)
        self.config = config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = _load(model, config.dtype, self.device)
        # The head, the largest matrix product and the largest array, only where something is learned.
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        linears = {n: m for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.shapes = choose_targets({n: (m.out_features, m.in_features) for n, m in linears.items()}, config)
        self.adapted: dict[str, LoRALinear] = {}
        for name in self.shapes:
            self.adapted[name] = LoRALinear(linears[name], config.rank, config.alpha / config.rank, config.dropout)
            self.model.set_submodule(name, self.adapted[name])
        self._set_dropout(False)
        self._recompute(config.grad_checkpoint)
        self.parameters = {
            f"{name}.{part}.weight": getattr(module, part) for name, module in self.adapted.items() for part in ("lora_A", "lora_B")
        }
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0, weight_decay=config.weight_decay)
        adapter = initial_adapter(self.shapes, config.rank, config.seed)
        self.load_state({f"adapter/{name}": array for name, array in adapter.items()}, step=0)

    def step(self, micro_batches: Sequence[Batch], learning_rate: float, seed: int) -> StepResult:
        """See `Engine.step`."""
        torch.manual_seed(seed)
        self._set_dropout(True)
        total = sum(batch.learned for batch in micro_batches)
        loss = 0.0
        for batch in micro_batches:
            part = self._loss(batch) / total
            part.backward()
            loss += part.item()
        self._set_dropout(False)
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in self.parameters.values()])).item()
        if norm < float("inf"):
            clip = min(1.0, self.config.max_grad_norm / (norm + 1e-6))
            for parameter in self.parameters.values():
                parameter.grad.mul_(clip)
            self.optimizer.param_groups[0]["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        learned = sum(int((batch.weights > 0).sum()) for batch in micro_batches)
        return StepResult(loss, learned, norm, sum(batch.inputs.size for batch in micro_batches))

    @torch.no_grad()
    def loss_sum(self, batch: Batch) -> float:
        """See `Engine.loss_sum`."""
        return self._loss(batch).item()

    @torch.no_grad()
    def generate(self, prompt: Sequence[int], limit: int, stop: frozenset[int]) -> Iterator[int]:
        """See `Engine.generate`."""
        tokens, cache = torch.tensor([list(prompt)], device=self.device), None
        last = {"logits_to_keep": 1} if self._keeps_logits else {}
        for _ in range(limit):
            answer = self.model(tokens, past_key_values=cache, use_cache=True, **last)
            cache, token = answer.past_key_values, int(answer.logits[0, -1].argmax())
            if token in stop:
                return
            yield token
            tokens = torch.tensor([[token]], device=self.device)

    def state(self) -> Arrays:
        """See `Engine.state`."""
        arrays = {f"adapter/{n}": p.detach() for n, p in self.parameters.items()}
        for kind, torch_name in MOMENT_NAMES.items():
            moments = {n: self.optimizer.state[p].get(torch_name) for n, p in self.parameters.items()}
            arrays |= {f"{kind}/{n}": torch.zeros_like(self.parameters[n]) if m is None else m for n, m in moments.items()}
        return {name: array.detach().cpu().numpy().copy() for name, array in arrays.items()}

    @torch.no_grad()
    def load_state(self, state: Arrays, step: int) -> None:
        """See `Engine.load_state`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(torch.from_numpy(state[f"adapter/{name}"]))
            moments = {
                torch_name: torch.from_numpy(state[f"{kind}/{name}"].copy()).to(self.device)
                if f"{kind}/{name}" in state
                else torch.zeros_like(parameter)
                for kind, torch_name in MOMENT_NAMES.items()
            }
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}

    def peak_memory(self) -> int:
        """See `Engine.peak_memory`."""
        if self.device == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return process_peak()

    def _loss(self, batch: Batch) -> torch.Tensor:
        columns = batch.columns
        arrays = (batch.inputs, columns, batch.targets[:, columns], batch.weights[:, columns])
        inputs, kept, targets, weights = (torch.from_numpy(array).to(self.device) for array in arrays)
        if self._keeps_logits:
            logits = self.model(inputs.long(), use_cache=False, logits_to_keep=kept).logits
        else:
            logits = self.model(inputs.long(), use_cache=False).logits[:, kept]
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().long(), reduction="none")
        return (losses * weights.flatten()).sum()

    def _recompute(self, every: int) -> None:
        """Lets each `every`-th layer with something to learn compute its activations again in the backward pass."""
        layers = dict.fromkeys(name[: match.end() - 1] for name in self.shapes if (match := LAYER.search(name)))
        for name in list(layers)[::every] if every else []:
            layer = self.model.get_submodule(name)
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def _set_dropout(self, on: bool) -> None:
        for module in self.adapted.values():
            module.training = on


def _refuse(config: RunConfig) -> None:
    """What only MLX has, by name, before anything is loaded."""
    for name, value in (("attention", "blocks"), ("share_prefixes", "always")):
        if getattr(config, name) == value:
            raise UserError(f"{name}: {value} is not there with torch", hint=f"leave {name} out, or --engine mlx")
    if config.cache_trunk:
        raise UserError("cache_trunk is not there with torch", hint="leave it out, or --engine mlx")
    if config.pack_length:
        raise UserError(f"pack_length: {config.pack_length} is not there with torch", hint="leave pack_length out, or --engine mlx")


def _load(folder: Path, dtype: str, device: str) -> torch.nn.Module:
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), trust_remote_code=False, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{folder}: transformers cannot load this model: {reason}", hint="see that the folder is complete"
        ) from error
    if found["missing_keys"] or found["unexpected_keys"]:
        keys = sorted(found["missing_keys"])[:2] + sorted(found["unexpected_keys"])[:2]
        raise UserError(
            f"{folder}: weights do not fit the model: {', '.join(map(str, keys))}", hint="see that the folder is complete"
        )
    return model.to(device).requires_grad_(False).eval()
