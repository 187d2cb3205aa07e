"""TorchEngine: transformers' model classes with our LoRA, on CUDA, on Metal through mps, or in float32 on a CPU."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from mlx_finetune.allocator import keep_blocks
from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Batch
from mlx_finetune.data.trees import Tree
from mlx_finetune.engines import Arrays, StepResult, process_peak, weighted
from mlx_finetune.engines.adapter import (
    HEAD,
    LAYER,
    Target,
    check_targets,
    choose_targets,
    initial_adapter,
    is_bypassed,
    scale_of,
    trained_shapes,
)
from mlx_finetune.engines.answers import Advance, Choose, Kept, answered
from mlx_finetune.engines.full import choose_weights, read_weights
from mlx_finetune.engines.noise import noise_of
from mlx_finetune.engines.supported import check_settings, folds
from mlx_finetune.engines.torch.answers import answer, answers
from mlx_finetune.engines.torch.attention import along, takes_trees
from mlx_finetune.engines.torch.device import check_device
from mlx_finetune.engines.torch.experts import adapt_experts, expert_targets
from mlx_finetune.engines.torch.fits import Given, check_fits, check_peft_reads
from mlx_finetune.engines.torch.fused import take_over
from mlx_finetune.engines.torch.load import load_model
from mlx_finetune.engines.torch.lora import LoRAEmbedding, LoRALinear, TiedHead, to_numpy
from mlx_finetune.engines.torch.loss import loss_sum, losses_of
from mlx_finetune.engines.torch.optimizers import updater_of
from mlx_finetune.engines.torch.ranks import gathering, ranks_of, sum_gradients
from mlx_finetune.engines.work import Work, in_step, share_of, works_of
from mlx_finetune.errors import UserError


class TorchEngine:
    """See `Engine`."""

    name = "torch"

    def __init__(self, model: Path, config: RunConfig, adapted: bool = True) -> None:
        """Loads the folder `model` and puts a fresh adapter on it, unless it is to be as it is."""
        check_settings(config, self.name)
        self.config, self._folder = config, model
        self.device = check_device(config)
        self.ranks, self.lockstep = ranks_of(self.device), config.fsdp
        if self.device == "cpu":
            keep_blocks()
        self.model = load_model(model, config, self.device)
        self._backbone = self.model.base_model_prefix
        decoder = self.model.get_decoder()
        self._decoder = next((f"{name}." for name, module in self.model.named_modules() if name and module is decoder), "")
        self._vocabulary = self.model.config.get_text_config().vocab_size
        self._in_trees = self._follows_trees()
        self.targets: dict[str, Target] = {}
        self._adapted: dict[str, Any] = {}
        self.parameters = {} if not adapted else self._thaw() if config.fine_tune_type == "full" else self._adapt()
        self.trained = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        self._of_head = self._head_parameters()
        check_peft_reads(self.model, self.targets, config.fine_tune_type == "dora")
        if config.fsdp:  # before it is asked anything: only then it is on its device
            self._cut()
        with gathering(), self._multiplying():
            check_fits(self.model, self._adapted, self._hidden_and_head)
        self._noise: torch.Tensor | None = None
        self.model.get_input_embeddings().register_forward_hook(self._add_noise)
        if not config.use_liger_kernel:
            take_over(self.model, joint=not (config.fsdp or config.torch_compile))
        self._change_layers()
        self._updater = updater_of(config, self.parameters)
        self.load_state(self.initial(), step=0)

    def step(self, micro_batches: Sequence[Batch], learning_rate: float, seed: int) -> StepResult:
        """See `Engine.step`."""
        total = sum(batch.learned for batch in micro_batches)
        works = works_of(micro_batches, self._in_trees, self.config.pack_length)
        loss = torch.zeros((), device=self.device)
        self._set_dropout(True)
        sizes = [work.inputs.size for work in works]
        mine = share_of(sizes, self.ranks.rank, self.ranks.size)
        for number, counts in in_step(mine, sizes, self.ranks.size) if self.lockstep else [(number, 1.0) for number in mine]:
            self._draw(seed, number, works[number])
            with gathering(), along(self.model, works[number].tree):
                part = self._loss(works[number]) * counts
                part.backward()  # of a sum: gradients of a mean over many tokens are too small for float16
            loss += part.detach()
        self._set_dropout(False)
        self._noise = None
        gradients = [self._gradient(parameter) for parameter in self.parameters.values()]
        sum_gradients(self.ranks, gradients)
        torch._foreach_mul_(gradients, 1 / total)
        mean = float(self.ranks.sum(np.array([loss.item()]))[0]) / total
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).item()
        if norm < float("inf"):
            torch._foreach_mul_(gradients, min(1.0, self.config.max_grad_norm / (norm + 1e-6)))
            self.whole = False
            self._updater.step(learning_rate)
            self.whole = True
        for parameter in self.parameters.values():
            parameter.grad = None
        learned = sum(int((batch.weights > 0).sum()) for batch in micro_batches)
        return StepResult(mean, learned, norm, sum(work.inputs.size for work in works))

    def loss_sum(self, batch: Batch) -> float:
        """See `Engine.loss_sum`."""
        return weighted(self.losses(batch), batch)

    @torch.no_grad()
    def losses(self, batch: Batch) -> np.ndarray:
        """See `Engine.losses`."""
        work = Work.of_rows(batch)
        inputs, places, targets = self._moved(work.inputs, work.places, work.targets)
        with gathering(), self._multiplying():
            return to_numpy(losses_of(self._head, self._vocabulary, self._hidden(inputs, places), targets.long()))

    @torch.no_grad()
    def logits(self, batch: Batch) -> np.ndarray:
        """See `Engine.logits`."""
        work = Work.of_rows(batch)
        inputs, places = self._moved(work.inputs, work.places)
        with gathering(), self._multiplying():
            return to_numpy(self._head(self._hidden(inputs, places)))

    def generate(
        self, prompt: Sequence[int], limit: int, stop: frozenset[int], choose: Choose | None = None, kept: Kept | None = None
    ) -> Iterator[int]:
        """See `Engine.generate`."""
        backbone, kept = self.model.get_submodule(self._backbone), Kept() if kept is None else kept
        return answer(backbone, self._head, self._multiplying, self.device, prompt, limit, stop, choose, kept)

    def generate_all(
        self, prompts: Sequence[Sequence[int]], limit: int, stop: frozenset[int], advance: Advance | None = None
    ) -> list[list[int]]:
        """See `Engine.generate_all`."""
        backbone = self.model.get_submodule(self._backbone)
        several = partial(answers, backbone, self._head, limit, stop, self.device) if takes_trees(self.model) else None
        with self._multiplying():
            return answered(prompts, limit, lambda prompt, kept: self.generate(prompt, limit, stop, kept=kept), several, advance)

    def state(self) -> Arrays:
        """See `Engine.state`."""
        return {f"adapter/{name}": to_numpy(parameter) for name, parameter in self.parameters.items()} | self._updater.state()

    def initial(self) -> Arrays:
        """See `Engine.initial`."""
        if self.config.fine_tune_type == "full":
            return {f"adapter/{name}": array for name, array in read_weights(self._folder, self.trained).items()}
        arrays = initial_adapter(self.targets, self.config, lambda name: to_numpy(self._adapted[name].row_lengths()))
        return {f"adapter/{name}": array for name, array in arrays.items()}

    @torch.no_grad()
    def load_state(self, state: Arrays, step: int) -> None:
        """See `Engine.load_state`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(torch.from_numpy(state[f"adapter/{name}"]))
        self._updater.load(state, step)
        self.whole = True

    def peak_memory(self) -> int:
        """See `Engine.peak_memory`."""
        if self.device == "mps":
            return int(torch.mps.driver_allocated_memory())  # it keeps what it once had
        return int(torch.cuda.max_memory_allocated()) if self.device == "cuda" else process_peak()

    def _adapt(self) -> dict[str, torch.nn.Parameter]:
        """Puts adapters beside the modules that are chosen; their arrays by PEFT's names."""
        config, modules = self.config, dict(self.model.named_modules())
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        tied = head is not None and head.weight is embedding.weight
        linear = {n: m for n, m in modules.items() if isinstance(m, torch.nn.Linear) and self._is_of_text(n)}
        parents = {n: modules[n.rpartition(".")[0]] for n in linear}
        known = {n: Target(m.out_features, m.in_features, bypassed=is_bypassed(n, parents[n])) for n, m in linear.items()}
        (name,) = (n for n, m in modules.items() if m is embedding)
        known[name] = Target(embedding.num_embeddings, embedding.embedding_dim, "tied" if tied else "embedding")
        known |= expert_targets(self.model)
        self.targets = choose_targets(known, config)
        check_targets(self.targets, tied, config, next((n for n, m in modules.items() if m is head), HEAD))
        self._adapted = adapt_experts(self.model, self.targets, config)
        for path, target in ((path, target) for path, target in self.targets.items() if target.kind != "experts"):
            base, scale = modules[path], scale_of(config)
            dora = config.fine_tune_type == "dora"
            is_linear = target.kind == "linear"
            self._adapted[path] = (
                LoRALinear(base, config.rank, scale, config.dropout, dora) if is_linear else LoRAEmbedding(base, config.rank, scale)
            )
            self.model.set_submodule(path, self._adapted[path])
            if target.kind == "tied":
                self.model.set_output_embeddings(TiedHead(head, self._adapted[path]))
        self._set_dropout(False)
        return {name: self._parameter(name) for name in trained_shapes(self.targets, config)}

    def _is_of_text(self, name: str) -> bool:
        """Whether a module or an array is of what reads text, and not of layers that see or hear."""
        return not LAYER.search(f"{name}.") or name.startswith(self._decoder)

    def _parameter(self, name: str) -> torch.nn.Parameter:
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        parameter: torch.nn.Parameter = getattr(self._adapted[module], leaf)
        return parameter

    def _thaw(self) -> dict[str, torch.nn.Parameter]:
        """The weights that are trained themselves."""
        parameters = {name: p for name, p in self.model.named_parameters() if name.startswith((self._decoder, HEAD))}
        chosen = choose_weights({name: tuple(p.shape) for name, p in parameters.items()}, self.config)
        return {name: parameters[name].requires_grad_() for name in chosen}

    def _head_parameters(self) -> list[torch.Tensor]:
        """What is trained and used behind the layers."""
        head = self.model.get_output_embeddings()
        found = {id(parameter) for parameter in head.parameters()}
        if isinstance(head, TiedHead):
            found |= {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}
        return [parameter for parameter in self.parameters.values() if id(parameter) in found]

    def _change_layers(self) -> None:
        """Lets each `grad_checkpoint`-th layer that a gradient goes through be computed again; compiles layers."""
        layers = self._layers_with_gradient()
        if self.config.torch_compile:
            for name in layers:
                layer = self.model.get_submodule(name)
                layer.forward = torch.compile(layer.forward, dynamic=True)  # inside what computes it again
        every = self.config.grad_checkpoint
        for name in layers[::every] if every else []:
            layer = self.model.get_submodule(name)
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def _cut(self) -> None:
        from mlx_finetune.engines.torch.fsdp import cut

        every_layer = [self.model.get_submodule(name) for name in self._layers().values()]
        cut(self.model, every_layer, self.parameters.values(), self.device)

    def _layers(self) -> dict[int, str]:
        """Their paths."""
        names = [name for name, _ in self.model.named_modules() if self._is_of_text(name)]
        found = [(name, match) for name in names if (match := LAYER.search(f"{name}."))]
        return {int(match[1]): name[: match.end() - 1] for name, match in found if match.end() > len(name)}

    def _layers_with_gradient(self) -> list[str]:
        """Paths of the layers from the first on that has something to learn, or of all where embeddings do."""
        layers = self._layers()
        learning = [int(match[1]) for name in self.trained if (match := LAYER.search(name))]
        embeddings = {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}
        everything = any(id(parameter) in embeddings for parameter in self.parameters.values())
        first = 0 if everything else min(learning, default=len(layers))
        return [layers[number] for number in sorted(layers) if number >= first]

    def _follows_trees(self) -> bool:
        able = takes_trees(self.model)
        if self.config.share_prefixes == "always" and not able:
            hint = "its attention is its own: leave the setting out"
            raise UserError(f"{self._folder}: share_prefixes: always is not there for this architecture", hint=hint)
        return able and folds(self.config)

    def _loss(self, work: Work) -> torch.Tensor:
        inputs, places, targets, weights = self._moved(work.inputs, work.places, work.targets, work.weights)
        positions: Mapping[str, Any] = {}
        if isinstance(work.tree, Tree):
            (where,) = self._moved(work.tree.positions)
            positions = {"position_ids": where[None].long()}
        with self._multiplying():
            hidden = self._hidden(inputs, places, **positions)
            return loss_sum(self._head, self._vocabulary, hidden, targets.long(), weights, self._of_head)

    def _hidden(self, inputs: torch.Tensor, places: torch.Tensor, **positions: Any) -> torch.Tensor:
        """[n, D]: what the head is to make logits of."""
        states = self.model.get_submodule(self._backbone)(inputs.long(), use_cache=False, **positions).last_hidden_state
        hidden: torch.Tensor = states.reshape(-1, states.shape[-1])[places.long()]
        return hidden

    def _hidden_and_head(self, tokens: torch.Tensor) -> torch.Tensor:
        """[1, T] -> logits [T, V], by the way of training."""
        return self._head(self.model.get_submodule(self._backbone)(tokens, use_cache=False).last_hidden_state[0])

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, D] -> [n, V]: whatever the model does behind its layers, it does to `hidden`."""
        with self._given(hidden[None]):
            logits: torch.Tensor = self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=hidden.device)).logits
        return logits.flatten(0, 1)  # a view backward too: of [0] the gradient would be written into zeros

    @contextmanager
    def _given(self, states: torch.Tensor) -> Iterator[None]:
        own = self.model._modules[self._backbone]
        self.model._modules[self._backbone] = Given(states, own)
        try:
            yield
        finally:
            self.model._modules[self._backbone] = own

    def _multiplying(self) -> AbstractContextManager[Any]:
        """Weights that are trained are float32; on CUDA they multiply in bfloat16."""
        if self.config.fine_tune_type == "full" and self.device == "cuda" and self.config.dtype == "auto":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def _moved(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """To the device, without waiting for it."""
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        if self.device != "cuda":
            return [tensor.to(self.device) for tensor in tensors]
        return [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]

    def _draw(self, seed: int, number: int, work: Work) -> None:
        """What is random about a micro-batch: by its number in the step, whichever process computes it."""
        torch.manual_seed(int(np.random.default_rng((seed, number)).integers(2**63)))
        if self.config.neftune_noise_alpha:
            width = self.model.get_input_embeddings().weight.shape[1]
            noise = noise_of(self.config.neftune_noise_alpha, (*work.inputs.shape, width), seed, number)
            self._noise = torch.from_numpy(noise).to(self.device)

    def _add_noise(self, module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        if self._noise is None:
            return output
        return output + (self._noise * getattr(module, "scalar_embed_scale", 1.0)).to(output.dtype)

    def _gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if parameter.grad is None:  # nothing was computed here, or nothing depends on it
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def _set_dropout(self, on: bool) -> None:
        for module in self._adapted.values():
            module.training = on
