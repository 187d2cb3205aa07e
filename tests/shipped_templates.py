"""Every chat template that the installed trl, transformers and mlx_lm ship, on a small tokenizer that knows its control tokens."""

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from served_oracle import Server, Tools, Verdict, judge
from shipped_chats import CONTROL as CONTROL_TEXTS
from shipped_chats import conversation
from tiny_models import tiny_tokenizer

from mlx_finetune.data.conversation import Conversation, Message
from mlx_finetune.data.exact import Pieces, pieces_of
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.template import ChatTemplate, Encoded
from mlx_finetune.data.windows import cut
from mlx_finetune.errors import UserError
from mlx_finetune.files import write_json

CONTROL = re.compile(
    r"<\|[\w/:. -]+\|?>|<[a-z_]+\|>|<｜[^｜<>]*｜>|\[/?(?:INST|[A-Z]+_[A-Z_]+)\]"
    r"|</?s>|<(?:seed:)?(?:bos|eos)>|<(?:start|end)_of_\w+>"
)
TEXT_TAGS = re.compile(r"</?(?:think|tool_call|tool_response|tool_calls)>")  # tokens of their own, but no control tokens
# Where the servers of these models stop: eos_token_id of their generation_config.json, in words.
STOPS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>", "<|return|>",
    "<|call|>", "<|tool_response>", "<end_of_utterance>", "</s>", "<seed:eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
STOPS_OTHERWISE = ("<|end|>", "<|user|>", "<|observation|>")  # Phi-3; GLM-4.5, which stops where the other's turn begins
LENGTH = 10**6  # tokens: every chat is one window
EOS = "</s>"  # where the template writes eos_token and names none itself


@dataclass(frozen=True)
class Shipped:
    """A template as a package ships it; `name` says package and file."""

    name: str
    jinja: str

    @property
    def control(self) -> list[str]:
        """The control tokens that it writes itself."""
        return list(dict.fromkeys(CONTROL.findall(self.jinja)))

    @property
    def stops(self) -> list[str]:
        """Its control tokens at which a server stops; one that the template writes by its variable comes first."""
        named = [EOS] if "eos_token" in self.jinja else []
        own = [token for token in self.control if token in STOPS] or [t for t in self.control if t in STOPS_OTHERWISE]
        return list(dict.fromkeys([*named, *own]))


def shipped() -> list[Shipped]:
    """All of them, in order of their names; the same text is there once, under the first of its names."""
    found: dict[str, str] = {}
    for name, text in sorted([*_of_trl(), *_in_modules("transformers"), *_in_modules("mlx_lm")]):
        found.setdefault(text, name)
    return [Shipped(name, text) for text, name in found.items()]


def _of_trl() -> Iterator[tuple[str, str]]:
    for path in sorted((_package("trl") / "chat_templates").glob("*.jinja")):
        yield f"trl/{path.stem}", path.read_text(encoding="utf-8")


def _in_modules(package: str) -> Iterator[tuple[str, str]]:
    """Chat templates that stand as text in the modules of a package, none of which is imported."""
    for path in sorted(_package(package).rglob("*.py")):
        source = path.read_bytes()
        if b"{%" not in source or b"messages" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and re.search(r"\{%-?\s*for \w+ in (loop_)?messages", text):
                yield f"{package}/{path.stem}:{node.lineno}", text  # type: ignore[attr-defined]


def renderers() -> dict[str, Callable[..., str]]:
    """The chat templates of mlx_lm that are Python functions."""
    found = {}
    for path in sorted((_package("mlx_lm") / "chat_templates").glob("*.py")):
        tree = ast.parse(path.read_bytes())
        if any(isinstance(node, ast.FunctionDef) and node.name == "apply_chat_template" for node in tree.body):
            found[path.stem] = import_module(f"mlx_lm.chat_templates.{path.stem}").apply_chat_template
    return found


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec and spec.submodule_search_locations, f"{name} is not installed"
    return Path(spec.submodule_search_locations[0])


def model_folder(folder: Path, jinja: str, control: Sequence[str], stops: Sequence[str], rstrip: bool = False) -> Path:
    """A model's tokenizer and generation_config: `control` are its special tokens, at `stops` a server stops."""
    from tokenizers import AddedToken

    tokenizer: Any = tiny_tokenizer()
    special = [AddedToken(token, normalized=False, special=True, rstrip=rstrip) for token in dict.fromkeys([*control, *stops])]
    tokenizer.add_tokens(special, special_tokens=True)
    plain = dict.fromkeys(TEXT_TAGS.findall(jinja))
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in plain])
    begin = next((token for token in ("<bos>", "<s>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>") if token in control), "<s>")
    tokenizer.add_special_tokens({"bos_token": begin, "eos_token": stops[0] if stops else "<|endoftext|>"})
    tokenizer.chat_template = jinja
    tokenizer.save_pretrained(folder)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in stops or ["<|endoftext|>"]]
    write_json(folder / "generation_config.json", {"eos_token_id": ids})
    return folder


@dataclass(frozen=True)
class Row:
    """What became of one template: why it was refused whole, or a verdict on each shape of conversation."""

    name: str
    policy: str
    why: str
    verdicts: Mapping[str, Verdict]

    @property
    def total(self) -> Verdict:
        """Of all shapes."""
        total = Verdict()
        for verdict in self.verdicts.values():
            total.add(verdict)
        return total

    @property
    def refuses_gptme(self) -> bool:
        """Whether nothing of a chat as gptme sends it can be learned."""
        verdict = self.verdicts.get("gptme", Verdict())
        return not verdict.exact + verdict.inexact.total()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        total = self.total
        return {
            "policy": self.policy,
            "why": self.why,
            "exact": total.exact,
            "inexact": dict(total.inexact.most_common()),
            "refused": dict(total.refused.most_common()),
            "wrong": total.wrong,
            "shapes": {name: verdict.outcome for name, verdict in self.verdicts.items()},
        }


def row_of(folder: Path, one: Shipped, shapes: Sequence[str], seeds: Sequence[int]) -> Row:
    """Loads the template as `prepare` would, and judges a random chat of each shape for each seed; odd seeds are the wild ones."""
    try:
        # Phi-3's control tokens take the blanks behind them.
        template = ChatTemplate.load(model_folder(folder, one.jinja, one.control, one.stops, rstrip="phi" in one.name))
    except UserError as error:
        return Row(one.name, "", error.message.partition(": ")[2], {})
    server, verdicts = Server(folder, template), {}
    for shape in shapes:
        verdicts[shape] = Verdict()
        for seed in seeds:
            wild = [*CONTROL_TEXTS, *one.control] if seed % 2 else []
            random = np.random.default_rng([seed, *shape.encode(), *one.name.encode()])
            messages, tools = conversation(random, shape, wild)
            verdicts[shape].add(judge(server, messages, tools, learned(template, messages, tools)))
    return Row(one.name, template.policy.name, template.why, verdicts)


def learned(template: ChatTemplate, messages: Sequence[Message], tools: Tools) -> Pieces:
    """As `prepare` makes examples of a conversation that fits one window."""
    windows = cut(Conversation(tuple(messages), "test", "g", "none", {}, tuple(tools)), template.count, LENGTH)
    (window,) = windows.windows
    result: Encoded | Refused
    try:
        result = template.encode(window.messages, tools)
    except Refused as refused:
        result = refused
    return pieces_of(window, result, template, tools, LENGTH)


def table(rows: Sequence[Row]) -> str:
    """A line for each template: policy, turns that are exact, inexact and refused, and the reason most met."""
    lines = [f"{'template':44} {'policy':24} {'exact':>6} {'inexact':>8} {'refused':>8} {'wrong':>6}  most refused"]
    for row in rows:
        total = row.total
        reason = next((reason for reason, _ in total.refused.most_common(1)), "") or ("" if row.verdicts else row.why)
        counts = f"{total.exact:6} {total.inexact.total():8} {total.refused.total():8} {len(total.wrong):6}"
        lines.append(f"{row.name:44} {row.policy or 'REFUSED':24} {counts}  {reason[:90]}")
    return "\n".join(lines)
