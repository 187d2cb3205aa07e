"""What is served under which names, and how a request becomes the very tokens that training has in that place."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.native import with_calls_as_text
from mlx_finetune.data.provenance import Refused
from mlx_finetune.data.written_calls import Written, written_by
from mlx_finetune.serving.answer import Question
from mlx_finetune.serving.opened import BASE, Source
from mlx_finetune.serving.requests import ChatRequest, Refusal

OF_BASE = "-base"
LONGEST = 32  # characters for each token of the context: more cannot fit, and is not made into tokens, which takes much memory


@dataclass(frozen=True)
class Served:
    """`name`: the tuned model, and with `-base` behind it the one without its adapter; of a model folder just the model."""

    source: Source
    name: str
    max_tokens: int  # of an answer, where the request does not say

    @cached_property
    def variants(self) -> dict[str, str]:
        """Which variant each name is."""
        names = [self.name] if len(self.source.variants) == 1 else [self.name, self.name + OF_BASE]
        return dict(zip(names, self.source.variants, strict=True))

    @cached_property
    def way(self) -> Written | None:
        """How the model writes native calls, where it is known and they are no text to it."""
        return None if self.calls_as_text else written_by(self.source.template)

    @property
    def calls_as_text(self) -> bool:
        """Whether native calls of a request are fed as gptme's text for them: as in training, or where the template has none."""
        return self.source.trained.calls_as_text or bool(self.source.template.native_refusal)

    @property
    def without_schemas(self) -> bool:
        """Whether it learned native calls without having seen the schemas of tools, as gptme's logs hold none."""
        return self.source.trained.native and not self.source.trained.schemas

    def question(self, request: ChatRequest) -> Question:
        """Raises Refusal: an unknown model, messages or tools that the template does not take, or more than the context holds."""
        if request.model not in self.variants:
            raise Refusal(
                f"there is no model {request.model!r:.100}; there is {' and '.join(self.variants)}", "model", "model_not_found", 404
            )
        self._check_tools(request)
        messages = tuple(with_calls_as_text(request.messages)) if self.calls_as_text else request.messages
        tools = () if self.calls_as_text or self.without_schemas else request.tools
        self._check_length(messages)
        try:
            prompt = [int(token) for token in self.source.template.prompt(messages, tools)]
        except Refused as refused:
            raise Refusal(str(refused), "messages") from refused
        return Question(
            variant=self.variants[request.model],
            prompt=prompt,
            limit=self._limit(len(prompt), request.limit),
            sampling=request.sampling,
            stop=request.stop,
            way=self.way if request.tools else None,
            tools=request.tools,
            one_call=request.one_call,
        )

    def _check_tools(self, request: ChatRequest) -> None:
        trained = self.source.trained
        if request.tools and self.calls_as_text and not trained.calls_as_text:
            told = trained.tool_format if trained.tool_format in ("markdown", "xml") else "markdown"
            what = f"the chat template of this model takes no tools ({self.source.template.native_refusal})"
            raise Refusal(f"{what}; with gptme use --tool-format {told}", "tools", "unsupported_parameter")

    def _check_length(self, messages: Sequence[Message]) -> None:
        characters = sum(len(message.content) + sum(len(call.arguments) for call in message.tool_calls) for message in messages)
        if self.source.context is not None and characters > LONGEST * self.source.context:
            raise self._too_long(f"{characters:,} characters")

    def _too_long(self, length: str) -> Refusal:
        said = f"This model's maximum context length is {self.source.context} tokens. However, your messages resulted in {length}."
        return Refusal(said, "messages", "context_length_exceeded")

    def _limit(self, prompt: int, asked: int | None) -> int:
        limit, context = asked or self.max_tokens, self.source.context
        if context is None:
            return limit
        if prompt >= context:
            raise self._too_long(f"{prompt} tokens")
        return min(limit, context - prompt)

    def unlike_training(self, request: ChatRequest) -> str:
        """What a person should know who asks otherwise than was trained; empty where there is nothing."""
        told = self.source.trained.tool_format
        if not request.tools:
            return ""
        if told in ("markdown", "xml") and self.variants.get(request.model) != BASE:
            return f"this request brings tools, and the model was trained for gptme --tool-format {told}"
        if self.without_schemas or self.calls_as_text:
            return (
                "the schemas of tools are not shown to the model: it was trained without them (gptme's prompt describes its tools)"
            )
        return ""
