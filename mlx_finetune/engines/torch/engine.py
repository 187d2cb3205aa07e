"""TorchEngine: transformers' model classes with our LoRA, on CUDA, on Metal through mps, or in float32 on a CPU."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlx_finetune.allocator import keep_blocks
from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Batch
from mlx_finetune.data.trees import Tree
from mlx_finetune.engines import Arrays, StepResult, process_peak, weighted
from mlx_finetune.engines.adapter import initial_adapter
from mlx_finetune.engines.answers import Advance, Choose, Kept, answered
from mlx_finetune.engines.full import read_weights
from mlx_finetune.engines.noise import noise_of
from mlx_finetune.engines.supported import check_settings, folds
from mlx_finetune.engines.torch.adapt import Trained, choose, head_parameters
from mlx_finetune.engines.torch.answers import answer, answers
from mlx_finetune.engines.torch.attention import along, takes_trees
from mlx_finetune.engines.torch.device import check_device
from mlx_finetune.engines.torch.fits import Given, check_fits, check_peft_reads
from mlx_finetune.engines.torch.fused import take_over
from mlx_finetune.engines.torch.layers import Layers
from mlx_finetune.engines.torch.load import load_model
from mlx_finetune.engines.torch.lora import to_numpy
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
        self._vocabulary = self.model.config.get_text_config().vocab_size
        self._in_trees = self._follows_trees()
        chosen = choose(self.model, config) if adapted else Trained()
        self.targets, self._adapted, self.parameters = chosen.targets, chosen.modules, chosen.parameters
        self.trained = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        self._of_head = head_parameters(self.model, self.parameters)
        check_peft_reads(self.model, self.targets, config.fine_tune_type == "dora")
        layers = Layers(self.model, self.parameters)
        if config.fsdp:  # before it is asked anything: only then it is on its device
            layers.cut(self.device)
        with gathering(), self._multiplying():
            check_fits(self.model, self._adapted, self._hidden_and_head)
        self._noise: torch.Tensor | None = None
        self.model.get_input_embeddings().register_forward_hook(self._add_noise)
        if not config.use_liger_kernel:
            take_over(self.model, joint=not (config.fsdp or config.torch_compile))
        layers.change(config)
        self._updater = updater_of(config, self.parameters)
        self.load_state(self.initial(), updates=0)

    def step(self, micro_batches: Sequence[Batch], learning_rate: float, seed: int) -> StepResult:
        """See `Engine.step`."""
        result, gradients = self._gradients(micro_batches, seed)
        if result.finite:
            torch._foreach_mul_(gradients, min(1.0, self.config.max_grad_norm / (result.grad_norm + 1e-6)))
            self.whole = False
            self._updater.step(learning_rate)
            self.updates += 1
            self.whole = True
        self._forget_gradients()
        return result

    def measure(self, micro_batches: Sequence[Batch], seed: int) -> StepResult:
        """See `Engine.measure`."""
        result, _ = self._gradients(micro_batches, seed)
        self._forget_gradients()
        return result

    def _gradients(self, micro_batches: Sequence[Batch], seed: int) -> tuple[StepResult, list[torch.Tensor]]:
        """Of the mean loss, over all processes; they are each parameter's `grad`."""
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
        learned = sum(int((batch.weights > 0).sum()) for batch in micro_batches)
        return StepResult(mean, learned, norm, sum(sizes)), gradients

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
    def load_state(self, state: Arrays, updates: int) -> None:
        """See `Engine.load_state`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(torch.from_numpy(state[f"adapter/{name}"]))
        self._updater.load(state, updates)
        self.updates, self.whole = updates, True

    def peak_memory(self) -> int:
        """See `Engine.peak_memory`."""
        if self.device == "mps":
            return int(torch.mps.driver_allocated_memory())  # it keeps what it once had
        return int(torch.cuda.max_memory_allocated()) if self.device == "cuda" else process_peak()

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
            context: AbstractContextManager[Any] = torch.autocast("cuda", torch.bfloat16)
            return context
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

    def _forget_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def _set_dropout(self, on: bool) -> None:
        for module in self._adapted.values():
            module.training = on
