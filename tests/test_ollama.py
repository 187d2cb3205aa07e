"""A Modelfile's template gives the text of the model's own chat template, for chats as gptme sends them, or is refused."""

import json
import shutil
from pathlib import Path

import pytest
from chats import TEMPLATES
from tiny_models import CHATML

from mlx_finetune.data.conversation import Message
from mlx_finetune.data.template import ChatTemplate
from mlx_finetune.errors import UserError
from mlx_finetune.export.ollama import OllamaSettings, write_ollama
from mlx_finetune.export.ollama_template import collate, render_go, translate

REFUSED = ("upper", "escapes")  # what they write depends on the content itself
CHAT = (
    Message("system", "You are a helpful assistant."),
    Message("user", "List the files."),
    Message("assistant", "```shell\nls\n```"),
    Message("system", "README.md\nsrc"),
    Message("user", "Thanks, {{ .Role }} 🙂"),
)


def with_template(model: Path, folder: Path, jinja: str) -> Path:
    """The model's folder with another chat template."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(jinja)
    (folder / "model.gguf").touch()
    return folder


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template_is_translated_to_the_same_text_or_refused(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    template = ChatTemplate.load(with_template(tiny_llama, tmp_path / "model", TEMPLATES[name]))
    if name in REFUSED:
        with pytest.raises(UserError, match="no proven translation for Ollama"):
            translate(template, "", name)
        return
    translation = translate(template, "", name)
    for length in (2, 4, 5):
        assert render_go(translation.source, CHAT[:length]) == template.render(CHAT[:length], True)


def test_chatml_is_the_template_that_ollamas_own_models_have(tiny_llama: Path) -> None:
    translation = translate(ChatTemplate.load(tiny_llama), "", "model")
    message = "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"
    assert translation.source == f"{{{{ range .Messages }}}}{message}{{{{ end }}}}<|im_start|>assistant\n"


def test_the_go_templates_that_are_written_here_render_as_go_does() -> None:
    # By the documentation of Go's text/template; `else if` chains, assignment to an outer variable, range.
    source = (
        '{{ $last := "first" }}{{ range .Messages }}{{ if eq .Role "user" }}{{ if eq $last "first" }}[{{ else if eq $last "user" }}'
        '+{{ else }}({{ end }}{{ .Content }}{{ $last = "user" }}{{ else }}-{{ .Content }}{{ $last = "other" }}{{ end }}{{ end }}!'
    )
    chat = [Message("user", "a"), Message("user", "b"), Message("assistant", "c"), Message("user", "d")]
    assert render_go(source, chat) == "[a+b-c(d!"


def test_neighbours_of_one_role_become_one_message_before_ollama_renders() -> None:
    chat = [Message("system", "a"), Message("system", "b"), Message("user", "c"), Message("tool", "d"), Message("tool", "e")]
    assert [(m.role, m.content) for m in collate(chat)] == [("system", "a\n\nb"), ("user", "c"), ("tool", "d"), ("tool", "e")]


def test_the_modelfile_has_template_stops_context_sampling_and_licence(tiny_llama: Path, tmp_path: Path) -> None:
    model = with_template(tiny_llama, tmp_path / "model", CHATML)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "temperature": 0.7, "top_p": 0.9}))
    (model / "LICENSE").write_text("Apache License\nVersion 2.0\n")
    remarks = write_ollama(model, model, OllamaSettings())
    text = (model / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ range .Messages }}<|im_start|>')
    assert set(text.splitlines()) >= {
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER num_ctx 512",
        "PARAMETER temperature 0.7",
        "PARAMETER top_p 0.9",
        'LICENSE """Apache License',
    }
    assert any("joins neighbouring messages" in remark for remark in remarks)


def test_what_ollama_puts_in_front_is_left_out_and_what_the_template_lacks_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    template = ChatTemplate.load(with_template(tiny_llama, tmp_path / "model", "{{ '<s>' }}" + CHATML))
    assert translate(template, "<s>", "model").source.startswith("{{ range .Messages }}<|im_start|>")
    remarks = translate(ChatTemplate.load(tiny_llama), "<s>", "model").remarks
    assert remarks[0] == "Ollama puts <s> in front of a chat, which the model's template does not"


def test_a_missing_gguf_and_an_existing_modelfile_are_named_and_nothing_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.gguf: no such file"):
        write_ollama(tmp_path, tiny_llama, OllamaSettings())
    (tmp_path / "Modelfile").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_ollama(tmp_path, tiny_llama, OllamaSettings())
    assert (tmp_path / "Modelfile").read_text() == "mine"
