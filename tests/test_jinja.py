"""Chat templates render the very text that transformers makes of them, which is what servers do."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import TEMPLATES, chat, template_of
from jinja2 import TemplateError
from shipped_chats import SHAPES, TOOLS, conversation
from shipped_templates import shipped
from tiny_models import CHATML, tiny_tokenizer

from mlx_finetune.data.jinja import compiled
from mlx_finetune.data.policies import POLICIES
from mlx_finetune.data.rows import rows_of


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def theirs(tokenizer: Any, source: str, rows: list[dict[str, Any]], prompt: bool, tools: Any) -> str:
    """What transformers renders, or why it does not."""
    try:
        return str(
            tokenizer.apply_chat_template(
                rows, tools=tools or None, chat_template=source, tokenize=False, add_generation_prompt=prompt
            )
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        return f"{type(error).__name__}: {error}"


def ours(tokenizer: Any, source: str, rows: list[dict[str, Any]], prompt: bool, tools: Any) -> str:
    given = {"messages": rows, "tools": tools or None, "documents": None, "add_generation_prompt": prompt}
    try:
        return compiled(source).render(given, **tokenizer.special_tokens_map)
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        return f"{type(error).__name__}: {error}"


def test_every_shipped_template_renders_every_shape_of_chat_as_transformers_does(tokenizer: Any) -> None:
    rendered = raised = 0
    for one in shipped():
        for seed, shape in enumerate(SHAPES):
            messages, schemas = conversation(np.random.default_rng(seed), shape)
            rows, tools = rows_of(messages), list(schemas)
            expected = theirs(tokenizer, one.jinja, rows, seed % 3 == 0, tools)
            assert ours(tokenizer, one.jinja, rows, seed % 3 == 0, tools) == expected, f"{one.name} {shape}"
            rendered, raised = rendered + 1, raised + (": " in expected[:40] and "Error" in expected[:40])
    assert rendered > 1000 and raised < rendered / 2


@pytest.mark.parametrize("policy", [policy.name for policy in POLICIES])
def test_policies_render_as_transformers_renders_them(tokenizer: Any, policy: str) -> None:
    chosen = next(one for one in POLICIES if one.name == policy)
    for source in TEMPLATES.values():
        whole = chosen.before(source, trim=True, join=True)
        for shape in SHAPES:
            rows = rows_of(conversation(np.random.default_rng(7), shape)[0])
            assert ours(tokenizer, whole, rows, True, []) == theirs(tokenizer, whole, rows, True, [])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].__class__ }}",
        "{% set ns = namespace(_a=1) %}",
        "{% set ns = namespace() %}{% set ns._a = 1 %}",
        "{{ dict.__class__.__bases__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox_or_change_a_message(tokenizer: Any, source: str) -> None:
    row = {"role": "user", "content": "U"}
    own, expected = (render(tokenizer, source, [row], False, []) for render in (ours, theirs))
    assert own.partition(":")[0] == expected.partition(":")[0] and "class" not in own.partition(":")[0]
    assert row == {"role": "user", "content": "U"}


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.items() | list }}{{ m.x is defined }}{{ m.role }}{{ m['role'] }}{{ m.get(1) }}{% endfor %}",
        "{% set n = namespace(a=1, b=[]) %}{% for m in messages %}{% set n.a = n.a + 1 %}{% endfor %}{{ n.a }}",
        "{% for m in messages %}{% generation %}{% set x = 2 %}{{ loop.index }}{% endgeneration %}{{ x }}{% endfor %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
        "{{ tools | tojson(indent=2) }}{{ {'é': '<&>'} | tojson }}{{ dict(a=1) }}{{ dict.fromkeys(['a']) }}{{ eos_token }}",
    ],
)
def test_what_templates_write_is_the_same_there_and_here(tokenizer: Any, source: str) -> None:
    rows = rows_of(chat("one", "two", "three"))
    expected = theirs(tokenizer, source, rows, False, list(TOOLS))
    assert "Error" not in expected
    assert ours(tokenizer, source, rows, False, list(TOOLS)) == expected


def test_a_helper_process_renders_and_encodes_without_importing_transformers(tmp_path: Path) -> None:
    template = template_of(tmp_path / "model", CHATML)
    (tmp_path / "template").write_bytes(pickle.dumps(template))
    (tmp_path / "helper.py").write_text(
        "import pickle, sys\n"
        "from mlx_finetune.data.conversation import Message\n"
        f"template = pickle.load(open({str(tmp_path / 'template')!r}, 'rb'))\n"
        "encoded = template.encode([Message('user', 'one'), Message('assistant', 'two')])\n"
        "print(encoded.tokens.tolist(), 'transformers' in sys.modules, 'torch' in sys.modules)\n"
    )
    printed = subprocess.run([sys.executable, tmp_path / "helper.py"], check=True, capture_output=True, text=True).stdout
    assert printed == f"{template.encode(chat('one', 'two')).tokens.tolist()} False False\n"
