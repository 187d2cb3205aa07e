"""Chat templates as transformers renders them, without its copies of every message: the text is the same, in half the time.

Templates come from other people: they run in Jinja's sandbox and see nothing but strings, numbers, lists and dictionaries.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace, generate_lorem_ipsum
from jinja2.visitor import NodeTransformer

from mlx_finetune.data.bounds import (
    CALL,
    WIDE_FILTERS,
    begin,
    bounded,
    check_arguments,
    check_method,
    check_operator,
    check_size,
    counted,
    joined,
    spend,
)

COUNTED, JOINED, KEPT = " counted", " joined", " kept"  # filters that a template cannot name
OF_DICTIONARIES = frozenset(dir(dict))


@lru_cache(maxsize=64)
def compiled(source: str) -> Template:
    """The template, ready to render.

    Raises:
        TemplateError: it is no Jinja.
    """
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters |= {name: bounded(name, environment.filters[name]) for name in WIDE_FILTERS}
    environment.filters |= {"tojson": bounded("tojson", _tojson), COUNTED: _counted, JOINED: _joined, KEPT: _kept}
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}
    return environment.from_string(source)


class _Template(Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        begin()
        return super().render(*args, **kwargs)


class _Bounding(NodeTransformer):
    """Each loop passes through what is counted, `~` joins within bounds, and what takes a name, as `+` can grow, is looked at."""

    def visit_Assign(self, node: nodes.Assign) -> nodes.Assign:
        self.generic_visit(node)
        node.node = nodes.Filter(node.node, KEPT, [], [], None, None).set_lineno(node.lineno)
        return node

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, COUNTED, [], [], None, None).set_lineno(node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes).set_lineno(node.lineno)
        return nodes.Filter(parts, JOINED, [], [], None, None).set_lineno(node.lineno)


@pass_context  # so that it is not computed while the template is compiled
def _counted(context: Context, items: Any) -> Any:
    return counted(items)


@pass_context
def _kept(context: Context, value: Any) -> Any:
    check_size(value)
    return value


@pass_context
def _joined(context: Context, parts: list[Any]) -> str:
    return joined(map(str, parts))


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "%"))
    template_class = _Template
    concat = staticmethod(joined)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Bounding().visit(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        spend(CALL)
        for value in (*args, *kwargs.values()):
            check_size(value)
        if __obj in (generate_lorem_ipsum, safe_range):
            check_arguments(*args, **kwargs)
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps `format`
        if type(text := getattr(method, "__self__", None)) is str:
            check_method(text, method.__name__, args)
        return super().call(__context, __obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`message.role`: of a dictionary its item, unless it has such a method; as in the sandbox, but found at once."""
        if type(obj) is dict and attribute not in OF_DICTIONARIES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


class _Generation(Extension):
    """`{% generation %}` marks what a model writes; the text is that of its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The body in a scope of its own, as where transformers looks at it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict` of a template: what makes one, and nothing that leads elsewhere."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    fromkeys: Callable[..., dict[Any, Any]] = staticmethod(dict.fromkeys)


class _Namespace(Namespace):
    """`namespace` of a template, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not keep {name!r} in a namespace")


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Without Jinja's escapes for HTML, and as templates for transformers call it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
