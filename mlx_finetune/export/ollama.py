"""A Modelfile beside a GGUF: what `ollama create` makes a model of.

Format: https://docs.ollama.com/modelfile
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.export.gguf_metadata import context_length, read_config
from mlx_finetune.export.gguf_tokenizer import leading_token
from mlx_finetune.export.ollama_template import Translation, translate
from mlx_finetune.files import atomic_file, read_json, refuse_existing

MODELFILE = "Modelfile"
CONTEXT = 16384  # tokens of num_ctx where nothing else is asked for: gptme's own prompt and a session, at a bearable cost
# generation_config.json -> Ollama's parameter
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")


@dataclass(frozen=True)
class OllamaSettings:
    """gguf: the file's name in the folder. num_ctx: tokens of context; 0: the model's, up to 16384.

    template: the chat template that was trained; empty: the model's own.
    """

    gguf: str = "model.gguf"
    num_ctx: int = 0
    template: str = ""


def write_ollama(folder: Path, model: Path, settings: OllamaSettings) -> tuple[str, ...]:
    """Writes `folder`/Modelfile for the GGUF there, made of the Hugging Face folder `model`.

    Returns what a person should know: where Ollama cannot give the model the text that it was trained with.

    Raises:
        UserError: a Modelfile stands there already, there is no such GGUF, or the chat template cannot be translated.
    """
    path = folder / MODELFILE
    refuse_existing(path)
    if not (folder / settings.gguf).is_file():
        raise UserError(f"{folder / settings.gguf}: no such file", hint="write the GGUF first")
    config, naming = read_config(model)
    template, translation = translated(model, settings.template)
    lines = [f"FROM ./{settings.gguf}", f'TEMPLATE """{translation.source}"""']
    lines += [f"PARAMETER stop {_quoted(text)}" for text in template.stop_texts]
    lines += [f"PARAMETER num_ctx {settings.num_ctx or min(context_length(config, naming), CONTEXT)}"]
    lines += [f"PARAMETER {name} {value}" for name, value in _sampling(model)]
    lines += [f'LICENSE """{text}"""' for text in _licence(model)]
    with atomic_file(path) as file:
        file.write("\n".join(lines) + "\n")
    return translation.remarks


def translated(model: Path, served: str) -> tuple[ChatTemplate, Translation]:
    """The chat template `served`, empty: the model's own, and the same in Ollama's language; raises UserError as `translate`."""
    template = ChatTemplate.load(model, served=served)
    return template, translate(template, leading_token(model), str(model))


def _quoted(text: str) -> str:
    if '"' in text or "\n" in text:
        raise UserError(f"end of turn {text!r} cannot stand in a Modelfile", hint="serve the GGUF with llama.cpp")
    return f'"{text}"'


def _sampling(model: Path) -> Iterator[tuple[str, Any]]:
    """How the model's authors sample; a model that they do not sample gets temperature 0."""
    path = model / "generation_config.json"
    found = read_json(path) if path.exists() else {}
    settings: Mapping[str, Any] = found if isinstance(found, dict) else {}
    if settings.get("do_sample") is False:
        yield "temperature", 0
        return
    for key, name in SAMPLING.items():
        if isinstance(settings.get(key), int | float):
            yield name, settings[key]


def _licence(model: Path) -> Iterator[str]:
    """The text of the licence, else its name from the model card."""
    for name in LICENCES:
        if (model / name).is_file():
            text = (model / name).read_text(encoding="utf-8", errors="replace").strip()
            if '"""' not in text:
                yield text
                return
    from gguf import Metadata

    licence = Metadata.load_model_card(model).get("license")
    if isinstance(licence, str):
        yield licence
