"""MlxEngine: mlx-lm's model classes with our LoRA, on Metal, or in float32 on a CPU."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_finetune.config import RunConfig
from mlx_finetune.data.batches import Batch
from mlx_finetune.engines import TRUNK, Arrays, StepResult, process_peak, weighted
from mlx_finetune.engines.adapter import HEAD, LAYER, initial_adapter
from mlx_finetune.engines.answers import Advance, Choose, Kept, answered
from mlx_finetune.engines.full import read_weights
from mlx_finetune.engines.mlx.adapt import Adapters, adapt, is_tied, thaw
from mlx_finetune.engines.mlx.answers import answer, answers, takes_several
from mlx_finetune.engines.mlx.attention import follows_layout, install
from mlx_finetune.engines.mlx.input import Input
from mlx_finetune.engines.mlx.load import load_model
from mlx_finetune.engines.mlx.lora import noisy, row_norms, set_dropout
from mlx_finetune.engines.mlx.loss import Caught, Given, loss_sum, losses_of
from mlx_finetune.engines.mlx.optimizers import Parameters, Updater
from mlx_finetune.engines.mlx.parts import parts_of, train_recurrences
from mlx_finetune.engines.mlx.ranks import ranks_of, sum_gradients
from mlx_finetune.engines.mlx.recompute import recomputed
from mlx_finetune.engines.mlx.trunk import Trunk
from mlx_finetune.engines.noise import noise_of
from mlx_finetune.engines.supported import check_settings, folds
from mlx_finetune.engines.work import Work, share_of, works_of
from mlx_finetune.errors import UserError
from mlx_finetune.files import read_json
from mlx_finetune.models.mlx_config import hidden_size, names_of
from mlx_finetune.models.tensor_names import transformers_name
from mlx_finetune.models.weights import fingerprint


class MlxEngine:
    """See `Engine`."""

    name, lockstep = "mlx", False

    def __init__(self, model: Path, config: RunConfig, adapted: bool = True) -> None:
        """Loads the folder `model` and puts a fresh adapter on it, unless it is to be as it is."""
        check_settings(config, self.name)
        self.config, self._folder = config, model
        self.ranks = ranks_of()
        self.on_gpu = mx.default_device() == mx.Device(mx.gpu)
        _bound_buffers()
        self.device = "Metal" if mx.metal.is_available() else "gpu" if self.on_gpu else "cpu"
        full = adapted and config.fine_tune_type == "full"
        dtype = config.dtype if config.dtype != "auto" else None if self.on_gpu else "float32"
        self.model = load_model(model, "float32" if full else dtype)
        self.model.freeze()
        self._parts, self._names = parts_of(self.model), names_of(read_json(model / "config.json"))
        adapters = adapt(self.model, self._names, config) if adapted and not full else Adapters()
        self.targets, self._adapted, self._paths = adapters.targets, adapters.modules, adapters.paths
        if full:
            thaw(self.model, self._name, model, config)
        self.trained = dict(sorted((self._name(n), tuple(p.shape)) for n, p in self._parameters().items()))
        self._of_head = [name for name in self._parameters() if not LAYER.search(name) and self._is_behind_layers(name)]
        self.model.eval()
        train_recurrences(self.model)
        self._choose_paths(model)
        self._trunk: Trunk | None = None
        if config.cache_trunk:
            if any(not LAYER.search(name) for name in self.trained):
                raise UserError("cache_trunk: embeddings or head are trained too", hint="leave it out, or them")
            what = {"model": fingerprint(model), "dtype": dtype or "as stored", "attention": config.attention}
            own = f"process-{self.ranks.rank}" if self.ranks.size > 1 else ""  # each writes what it has computed itself
            self._trunk = Trunk(self._parts, Path(config.out) / TRUNK / own, what)
        self._updater = Updater(config, {name: self._name(name) for name in self._parameters()}, self.trained)
        self.load_state(self.initial(), updates=0)

    def _name(self, name: str) -> str:
        """An array of the model by the name that PEFT gives it."""
        module, _, leaf = name.rpartition(".")
        name = f"{self._paths[module]}.{leaf}" if module in self._paths else transformers_name(name, self._names)
        return f"{name}.weight" if leaf in ("lora_A", "lora_B") else name

    def _is_behind_layers(self, name: str) -> bool:
        """Whether an array that is in no layer is used behind them: of the head, or of embeddings that are the head too."""
        parts = name.split(".")
        return HEAD in parts or (is_tied(self.model) and self._parts.embeddings in parts)

    def _choose_paths(self, folder: Path) -> None:
        """Which attention, and whether rows may be folded into trees; refuses by name what this model cannot."""
        able, config = follows_layout(self.model, read_json(folder / "config.json")), self.config
        for name, asked in (
            ("attention: blocks", config.attention == "blocks"),
            ("share_prefixes: always", config.share_prefixes == "always"),
        ):
            if asked and not able:
                hint = "its attention is its own: leave the setting out"
                raise UserError(f"{folder}: {name} is not there for this architecture", hint=hint)
        self._by_layout = able and (config.attention == "blocks" or (config.attention == "auto" and not self.on_gpu))
        self._in_trees = able and folds(config)
        self._takes_several = able and self.model.model_type != "mpt"  # whose slopes go by one place for all rows
        if able:
            install(self.model)

    def step(self, micro_batches: Sequence[Batch], learning_rate: float, seed: int) -> StepResult:
        """See `Engine.step`."""
        result, gradient = self._gradient(micro_batches, seed)
        if result.finite:
            self.whole = False
            clip = min(1.0, self.config.max_grad_norm / (result.grad_norm + 1e-6))
            self._updater.step(self._parameters(), gradient, clip, learning_rate, self._set)
            self.whole = True
        mx.clear_cache()  # shapes differ from step to step: what they leave cached is seldom used again
        return result

    def measure(self, micro_batches: Sequence[Batch], seed: int) -> StepResult:
        """See `Engine.measure`."""
        return self._gradient(micro_batches, seed)[0]

    def _gradient(self, micro_batches: Sequence[Batch], seed: int) -> tuple[StepResult, Parameters]:
        """Of the mean loss, over all processes."""
        total = sum(batch.learned for batch in micro_batches)
        parameters = self._parameters()
        loss, gradient = 0.0, {name: mx.zeros(p.shape) for name, p in parameters.items()}
        works = works_of(micro_batches, self._in_trees, self.config.pack_length)
        for number in share_of([work.inputs.size for work in works], self.ranks.rank, self.ranks.size):
            set_dropout(self.model, int(np.random.default_rng((seed, number)).integers(2**63)))
            work = self._input(works[number], (seed, number))
            part, fresh = mx.value_and_grad(self._loss)(parameters, work, 1 / total, self._states(work))
            gradient = {name: value + fresh[name] for name, value in gradient.items()}
            mx.eval(part, gradient)
            self._set(parameters)  # computing layers again leaves others behind
            loss += _number(part)
        set_dropout(self.model, None)
        gradient, mean = sum_gradients(self.ranks, gradient), float(self.ranks.sum(np.array([loss]))[0])
        norm = _number(mx.sqrt(mx.stack([mx.square(g).sum() for g in gradient.values()]).sum()))
        learned = sum(int((batch.weights > 0).sum()) for batch in micro_batches)
        return StepResult(mean, learned, norm, sum(work.inputs.size for work in works)), gradient

    def loss_sum(self, batch: Batch) -> float:
        """See `Engine.loss_sum`."""
        return weighted(self.losses(batch), batch)

    def losses(self, batch: Batch) -> np.ndarray:
        """See `Engine.losses`."""
        work = self._input(Work.of_rows(batch))
        with self._below(self._states(work)):
            hidden = self._hidden(work)
        mx.eval(hidden)
        return losses_of(self._head, hidden, work.targets)

    def logits(self, batch: Batch) -> np.ndarray:
        """See `Engine.logits`."""
        work = self._input(Work.of_rows(batch))
        return np.array(self._head(self._hidden(work)).astype(mx.float32))

    def _input(self, work: Work, drawn: tuple[int, int] | None = None) -> Input:
        """`drawn`: step's seed and number of the micro-batch, by which noise is drawn where some is asked for."""
        noise = None
        if drawn and self.config.neftune_noise_alpha:
            shape = (*work.inputs.shape, hidden_size(read_json(self._folder / "config.json")))
            noise = noise_of(self.config.neftune_noise_alpha, shape, *drawn)
        return Input.of(work, self._by_layout, noise)

    def generate(
        self, prompt: Sequence[int], limit: int, stop: frozenset[int], choose: Choose | None = None, kept: Kept | None = None
    ) -> Iterator[int]:
        """See `Engine.generate`."""
        return answer(self.model, self._last_logits, prompt, limit, stop, choose, Kept() if kept is None else kept)

    def generate_all(
        self, prompts: Sequence[Sequence[int]], limit: int, stop: frozenset[int], advance: Advance | None = None
    ) -> list[list[int]]:
        """See `Engine.generate_all`."""
        several = self._takes_several and takes_several(self.model)
        together = partial(answers, self.model, limit, stop) if several else None
        return answered(prompts, limit, lambda prompt, kept: self.generate(prompt, limit, stop, kept=kept), together, advance)

    def _last_logits(self, tokens: mx.array, caches: list[Any]) -> mx.array:
        """[1, T] -> [V], of the last token alone."""
        caught = Caught(self._parts.backbone)
        with self._parts.replaced(caught):
            self.model(tokens, cache=caches)
        assert caught.hidden is not None
        return self._head(caught.hidden[0, -1:])[0]

    def state(self) -> Arrays:
        """See `Engine.state`."""
        return {f"adapter/{self._name(n)}": np.array(p) for n, p in self._parameters().items()} | self._updater.state()

    def initial(self) -> Arrays:
        """See `Engine.initial`."""
        if self.config.fine_tune_type == "full":
            return {f"adapter/{name}": array for name, array in read_weights(self._folder, self.trained).items()}
        arrays = initial_adapter(self.targets, self.config, lambda name: np.array(row_norms(self._adapted[name].linear)))
        return {f"adapter/{name}": array for name, array in arrays.items()}

    def load_state(self, state: Arrays, updates: int) -> None:
        """See `Engine.load_state`."""
        self._set({name: mx.array(state[f"adapter/{self._name(name)}"]) for name in self._parameters()})
        self._updater.load(state, updates)
        self.whole = True

    @property
    def updates(self) -> int:
        """See `Engine.updates`."""
        return self._updater.updates

    def peak_memory(self) -> int:
        """See `Engine.peak_memory`."""
        return int(mx.get_peak_memory()) if self.on_gpu else process_peak()

    def _states(self, work: Input) -> mx.array | None:
        """What enters the first layer with something to learn, where that is kept from epoch to epoch."""
        if self._trunk is None:
            return None
        return self._trunk.states(self.model, work.inputs, work.layouts(len(self.model.layers)), work.rows)

    def _below(self, states: mx.array | None) -> AbstractContextManager[None]:
        """Inside, layers with nothing to learn are not computed where `states` is what comes out of them."""
        return self._trunk.given(states) if self._trunk and states is not None else nullcontext()

    def _loss(self, parameters: Parameters, work: Input, scale: float, states: mx.array | None) -> mx.array:
        self._set(parameters)
        with recomputed(self._parts, self.config.grad_checkpoint), self._below(states):
            hidden = self._hidden(work)
        of_head = {name: parameters[name] for name in self._of_head}
        return loss_sum(self._head, hidden, work.targets, work.weights, of_head) * scale

    def _hidden(self, work: Input) -> mx.array:
        """[n, D]: what the head is to make logits of."""
        backbone = self._parts.backbone
        caught = Caught(backbone)
        with noisy(backbone, self._parts.embeddings, work.noise), self._parts.replaced(caught):
            self.model(work.inputs, cache=work.layouts(len(self.model.layers)))
        assert caught.hidden is not None
        return caught.hidden.reshape(-1, caught.hidden.shape[-1])[work.places]

    def _head(self, hidden: mx.array, learned: Parameters | None = None) -> mx.array:
        """[n, D] -> [n, V]; `learned`: of the head itself, put in first."""
        if learned:
            self._set(learned)
        with self._parts.replaced(Given(self._parts.backbone, hidden[None])):
            logits: mx.array = self.model(mx.zeros((1, 1), mx.int32))[0]
        return logits

    def _parameters(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.model.trainable_parameters()))

    def _set(self, parameters: dict[str, mx.array]) -> None:
        self.model.update(tree_unflatten(list(parameters.items())))


def _bound_buffers() -> None:
    """On Metal: weights stay in memory that is not swapped, and what is freed is kept for reuse up to a tenth of it."""
    if mx.metal.is_available():
        usable = int(mx.device_info()["max_recommended_working_set_size"])
        mx.set_wired_limit(usable)
        mx.set_cache_limit(usable // 10)


def _number(scalar: mx.array) -> float:
    value = scalar.item()
    assert isinstance(value, float)
    return value
