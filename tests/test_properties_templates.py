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
    "put together again and again": GROWS.format("ns.x ~ ns.x"),
    "added again and again": GROWS.format("ns.x + ns.x"),
    "set again and again": GROWS.replace("set ns.x = {}", "set ns.x")
    .format("")
    .replace("{% endfor %}", "{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}"),
    "loops in loops": LOOPS,
    "loops over what has no length": LOOPS.replace("range(99999) %}{% endfor %}", "range(99999)|map('abs') %}{% endfor %}"),
    "macros that call themselves": CALLS,
    "a constant text": "{% for a in 'x' * 4000 %}{% for b in 'x' * 4000 %}{% endfor %}{% endfor %}",
    "blind text": "{{ lipsum(99999999) }}",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_huge_is_refused_before_it_is_computed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_STEPS", 10**5)
    with pytest.raises(TemplateError, match="may not"):
        compiled(REFUSED[what]).render()


def test_what_templates_do_compute_stays_as_it_is() -> None:
    source = "{{ 3 * 4 }}{{ '=' * 3 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ '%s%%' % 3 }}"
    source += "{{ 'a b'.replace('b', 'cc') }}"
    source += "{{ 'b'|replace('b', 'd') }}{{ '{:>3}|{}'.format(1, 'x') }}{{ ','.join(['a', 'b']) }}"
    source += "{{ '%5.1f'|format(2.25) }}{{ 'x\ny'|indent(2) }}"
    assert compiled(source).render() == "12===310243%a ccd  1|xa,b  2.2x\n  y"


SORTS = "{% for i in range(9999) %}{% set x = range(99999)|sort|list|sort %}{% endfor %}"
HOLDS = "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x, range(99999)|list] %}{% endfor %}"


@pytest.mark.parametrize(
    ("bomb", "reason"), [(SORTS, "computes for more than 1 s"), (HOLDS, "takes more than")], ids=["sorts", "holds"]
)
def test_a_template_without_end_is_ended(bomb: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, *(("SECONDS", 1) if bomb == SORTS else ("GROWTH", 2**28)))
    with pytest.raises(UserError, match=reason), bounds.in_bounds("model"):
        compiled(bomb).render()
    time.sleep(3 * bounds.LOOK)  # the timer is off


@pytest.mark.long
def test_a_model_whose_template_has_no_end_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("model") / "x"
    reader = READERS["chat template"]
    fresh(reader, folder)
    said = reader.check(folder, (SORTS + CHATML).encode())
    assert "its chat template computes for more than 20 s" in said and str(folder) in said


def test_numbers_of_a_conversation_are_no_widths() -> None:
    source = "{% macro m(n) %}{{ n }}{% endmacro %}{{ m(x) }} {{ x|tojson }} {{ {'a': x}.get('a', x) }} {{ '%d'|format(x) }}"
    source += "{{ '%s 12345678'|format('y') }} {{ 'id 12345678 {}'.format(x) }} {{ 'a 12345678'|replace('a', 'b') }}"
    seconds = 1700000000
    expected = f"{seconds} {seconds} {seconds} {seconds}y 12345678 id 12345678 {seconds} b 12345678"
    assert compiled(source).render(x=seconds) == expected


def test_loops_know_where_they_are_and_shipped_shapes_of_loops_stay() -> None:
    source = "{% for k, v in d.items() %}{{ loop.index }}/{{ loop.length }}{{ k }}{{ v }}{{ '.' if loop.last }}{% endfor %}"
    source += "{% for x in nothing %}{% else %}none{% endfor %}{% for c in 'ab' if c != 'a' %}{{ c ~ 1 ~ nothing }}{% endfor %}"
    source += "{% for x in t recursive %}{{ x.n }}{{ loop(x.c) }}{% endfor %}{{ [1] + [2] }}{{ 'a' + 'b' }}{{ 1 + 2 }}"
    told = {"d": {"a": 1, "b": 2}, "t": [{"n": 1, "c": [{"n": 2, "c": []}]}]}
    assert compiled(source).render(told) == "1/2a12/2b2.noneb112[1, 2]ab3"
