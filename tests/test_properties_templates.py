"""A chat template of a stranger ends soon and small, whatever it asks for; those that ship compute as before."""

import time

import pytest
from hostile_model_readers import READERS
from hostile_readers import fresh
from jinja2 import TemplateError
from tiny_models import CHATML

from mlx_finetune.data import bounds
from mlx_finetune.data.jinja import compiled
from mlx_finetune.errors import UserError

GROWS = "{{% set ns = namespace(x='aaaaaaaa') %}}{{% for i in range(60) %}}{{% set ns.x = {} %}}{{% endfor %}}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
CALLS = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
REFUSED = {
    "a product": "{{ 'a' * 10**10 }}",
    "a list": "{{ 10**10 * [0] }}",
    "a power": "{{ 9 ** 9 ** 99999 }}",
    "a range": "{% for i in range(99999999) %}{% endfor %}",
    "a filter's width": "{{ 'a'|center(10000000000) }}",
    "a method's width": "{{ 'a'.ljust(10000000000) }}",
    "a keyword's width": "{{ 'a\nb'|indent(width=10000000000) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent and a star": "{{ '%*d'|format(3, 1) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "format of an argument": "{{ '{:{}}'.format(1, 10000000000) }}",
    "format, the filter": "{{ '%10000000000d'|format(1) }}",
    "indented JSON": "{{ [1]|tojson(indent=10000000000) }}",
    "replaced again and again": GROWS.format("ns.x.replace('a', ns.x)"),
    "replaced by the filter": GROWS.format("ns.x|replace('a', ns.x)"),
    "joined again and again": GROWS.format("ns.x.join([ns.x] * 99999)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_huge_is_refused_before_it_is_computed(what: str) -> None:
    with pytest.raises(TemplateError, match="may not"):
        compiled(REFUSED[what]).render()


def test_what_templates_do_compute_stays_as_it_is() -> None:
    source = "{{ 3 * 4 }}{{ '=' * 3 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ '%s%%' % 3 }}"
    source += "{{ 'a b'.replace('b', 'cc') }}"
    source += "{{ 'b'|replace('b', 'd') }}{{ '{:>3}|{}'.format(1, 'x') }}{{ ','.join(['a', 'b']) }}"
    source += "{{ '%5.1f'|format(2.25) }}{{ 'x\ny'|indent(2) }}"
    assert compiled(source).render() == "12===310243%a ccd  1|xa,b  2.2x\n  y"


@pytest.mark.parametrize(
    ("bomb", "reason"),
    [
        (LOOPS, "computes for more than 1 s"),
        pytest.param(CALLS, "computes for more than 1 s", marks=pytest.mark.long),
        pytest.param(GROWS.format("ns.x ~ ns.x"), "takes more than", marks=pytest.mark.long),
    ],
    ids=["loops", "calls", "grows"],
)
def test_a_template_without_end_is_ended(bomb: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "SECONDS", 1)
    monkeypatch.setattr(bounds, "GROWTH", 2**28)
    with pytest.raises(UserError, match=reason), bounds.in_bounds("model"):
        compiled(bomb).render()
    time.sleep(3 * bounds.LOOK)  # the timer is off


@pytest.mark.long
def test_a_model_whose_template_has_no_end_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("model") / "x"
    reader = READERS["chat template"]
    fresh(reader, folder)
    said = reader.check(folder, (LOOPS + CHATML).encode())
    assert "its chat template computes for more than 20 s" in said and str(folder) in said
