"""A model opened to be talked to: of a run, tuned and with its adapter at zero; or of a folder as it is."""

from collections.abc import Generator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

from mlx_finetune.config import RunConfig, make_config
from mlx_finetune.data.policies import policy_of
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.engines import Arrays, Engine, choose_engine, open_engine
from mlx_finetune.engines.answers import Choose, Kept, in_common
from mlx_finetune.engines.supported import for_a_look
from mlx_finetune.errors import UserError
from mlx_finetune.evaluation.compare import open_run
from mlx_finetune.files import read_json
from mlx_finetune.models.hub import check_model_folder, model_folder
from mlx_finetune.models.mlx_config import check_supported, max_exact_length, text_config
from mlx_finetune.models.mpt_config import longest_of
from mlx_finetune.models.quantised_sources import packed_by
from mlx_finetune.serving.trained import Trained, read_trained, served_name
from mlx_finetune.training.checkpoint import load_checkpoint, trained_template
from mlx_finetune.training.checks import check_names
from mlx_finetune.training.memory_watch import loading

TUNED, BASE = "tuned", "base"
MOST_CONVERSATIONS, MOST_KEPT = 8, 32_768  # that are kept, and tokens of all but the newest
WORTH_A_COPY = 64  # tokens in common with another conversation
SAME = 0.8  # of what a conversation began with: then it is that one going on


@dataclass(frozen=True)
class Source:
    """What is to be opened, found and checked before anything is loaded. `checkpoint`: None where there is no run."""

    config: RunConfig
    model: Path
    template: ChatTemplate
    context: int | None  # most tokens of prompt and answer; None: as many as fit in memory
    trained: Trained
    run: Path | None = None
    checkpoint: Path | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        """What can be talked to, the usual one first."""
        return (TUNED, BASE) if self.checkpoint else (BASE,)

    def named(self, told: str = "") -> str:
        """The name of the model for clients: see `served_name`."""
        return served_name(self.config.model, self.run, self.template.source, told)


def find_source(place: str, checkpoint: str, engine: str) -> Source:
    """A run, or else a model folder or hub id.

    Raises:
        UserError: neither, no such checkpoint, or a model that the engine does not have.
    """
    run = Path(place).expanduser()
    if (run / "config.yaml").is_file():
        config, model, folder = open_run(run, checkpoint or "best", engine)
        template = ChatTemplate.load(model, trained_template(run))
        context = _context(model, choose_engine(config.engine))
        return Source(config, model, template, context, read_trained(config), run, folder)
    if checkpoint:
        raise UserError(f"{place}: not a run (no config.yaml), so there is no checkpoint", hint="leave --checkpoint out")
    model = model_folder(place)
    check_model_folder(model)
    config = make_config({"model": place, "engine": engine or "auto"}, "the command line")
    context = _context(model, choose_engine(config.engine))
    return Source(config, model, ChatTemplate.load(model, _handed_back(model)), context, Trained())


def _handed_back(model: Path) -> str:
    """The template of a model that was fused, which holds the role policy of its run; empty of any other."""
    path = model / "chat_template.jinja"
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    return text if policy_of(text) else ""


def _context(model: Path, engine: str) -> int | None:
    """How many tokens the model takes in the engine; raises UserError where the engine does not have the model."""
    architecture = read_json(model / "config.json")
    exact = None
    if engine == "mlx":
        check_supported(architecture)
        if method := packed_by(architecture):
            hint = f"mlx-finetune convert {model} --out DIR keeps its 4 bits"
            raise UserError(f"{model}: its weights are packed by {method}", hint=hint)
        exact = max_exact_length(architecture)
    said = longest_of(architecture) or text_config(architecture).get("max_position_embeddings")
    return min((number for number in (exact, said) if isinstance(number, int)), default=None)


@dataclass
class _Conversation:
    """What was read of one; `began`: tokens of its last prompt."""

    kept: Kept
    began: int = 0


@dataclass
class Memory:
    """Conversations whose tokens need not be read again, the newest last."""

    conversations: list[_Conversation] = field(default_factory=list)

    def take(self, prompt: Sequence[int]) -> _Conversation:
        """That which goes on with `prompt`, or a new one, with a copy of what another begins with in common."""
        common = [in_common(one.kept.tokens, prompt) for one in self.conversations]
        best = max(range(len(common)), key=lambda i: (common[i], i), default=None)
        if best is None or common[best] < WORTH_A_COPY:
            return _Conversation(Kept())
        one = self.conversations[best]
        if common[best] >= SAME * one.began:
            return self.conversations.pop(best)
        return _Conversation(deepcopy(one.kept))

    def put(self, one: _Conversation) -> None:
        """Keeps it as the newest, and lets go of the oldest where they are too many."""
        self.conversations.append(one)
        others = self.conversations[:-1]
        while others and (len(others) >= MOST_CONVERSATIONS or sum(len(o.kept.tokens) for o in others) > MOST_KEPT):
            self.conversations.remove(others.pop(0))


class Opened:
    """The model in memory. Everything here is for one thread: the one that made it."""

    def __init__(self, source: Source) -> None:
        """Loads it; raises UserError where the memory is too small, or the checkpoint is not of this model."""
        self.source, self.template = source, source.template
        name = choose_engine(source.config.engine)
        adapted = source.checkpoint is not None
        with loading(source.model):
            self.engine: Engine = open_engine(for_a_look(source.config, name), source.model, adapted=adapted)
        self._states: dict[str, Arrays] = {}  # of adapters; whole weights are read again each time
        self._now = BASE
        if adapted:
            check_names(self.engine, source.model)
            self._use(TUNED)
        self.forget()

    def generate(self, variant: str, prompt: Sequence[int], limit: int, choose: Choose | None = None) -> Generator[int]:
        """Tokens of the answer of a variant, without the one that ends it."""
        self._use(variant)
        memory = self._memories[variant]
        one = memory.take(prompt)
        one.began = len(prompt)
        finished = False
        try:
            yield from self.engine.generate(prompt, limit, self.template.stop_ids | self.template.end_ids, choose, one.kept)
            finished = True
        except GeneratorExit:
            finished = True  # the other side has gone, between two tokens
            raise
        finally:
            if finished:  # else nobody knows what was kept
                memory.put(one)

    def forget(self) -> None:
        """Lets go of all conversations: they are read again."""
        self._memories = {variant: Memory() for variant in self.source.variants}

    def _use(self, variant: str) -> None:
        if variant != self._now:
            self._now = ""  # while neither is whole
            self.engine.load_state(self._state(variant), 0)
            self._now = variant

    def _state(self, variant: str) -> Arrays:
        if variant in self._states:
            return self._states[variant]
        checkpoint = self.source.checkpoint
        assert checkpoint
        state = _tuned(self.engine, checkpoint) if variant == TUNED else self.engine.initial()
        if self.engine.targets:
            self._states[variant] = state
        return state


def _tuned(engine: Engine, checkpoint: Path) -> Arrays:
    """What the checkpoint trained, as the engine takes it.

    Raises:
        UserError: it has not what the engine would train.
    """
    state, _ = load_checkpoint(checkpoint, moments=False)
    wanted = {f"adapter/{name}": shape for name, shape in engine.trained.items()}
    for name, shape in wanted.items():
        if name not in state or state[name].shape != shape:
            raise UserError(f"{checkpoint}: its adapter has other shapes than the model", hint="name another --checkpoint")
    return {name: state[name] for name in wanted}
