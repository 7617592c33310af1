"""Runs a chat template that came with a model's files: nobody has read it, so it gets no more than it needs.

Jinja's sandbox keeps it away from Python. What it may cost is bounded here: every value that an expression makes is
weighed before it can grow (operators, calls, filters, literals, slices, output), and every iteration of a loop looks at
the clock. So the largest single step is one linear pass over `MAX_WEIGHT` characters.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from litpeft.data.limits import (
    CHECKED_FILTERS,
    CHECKED_OPERATORS,
    MAX_TEMPLATE,
    MAX_WEIGHT,
    MAX_WIDTH,
    Budget,
    LimitError,
    check_format,
    check_replace,
    check_width,
    joined,
    weigh,
)

# Filters that chat templates use; the others of Jinja can make much of little.
ALLOWED_FILTERS = """
abs capitalize count d default dictsort e escape first float format indent int items join last length list lower map max
min reject rejectattr replace reverse round safe select selectattr sort string title trim truncate unique upper
wordcount
"""
# Methods that make much of little, of str and int.
WIDE_METHODS = {"center", "ljust", "rjust", "zfill", "expandtabs", "translate", "format_map", "encode", "to_bytes"}


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Returns JSON without Jinja's escapes for HTML, which no model was trained on."""
    check_width(value, indent)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    """What templates call to refuse a chat."""
    raise jinja2.TemplateError(message)


class PlainNamespace(Namespace):
    """A namespace without names that Python gives a meaning."""

    def __init__(*args: Any, **names: Any):  # `self` is a name that a template may choose
        for name in (values := dict(*args[1:], **names)):
            _refuse_private(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"the name {name!r} of a namespace starts with an underscore")


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` around what the assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        before, after = self.environment.marks.value
        return before + caller() + after


class Marks(threading.local):
    """What is written before and after a generation block while its place is sought."""

    value = ("", "")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset(CHECKED_OPERATORS)

    def __init__(self, now: datetime):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], optimized=False)
        self.budget, self.marks = Budget(), Marks()
        self.finalize = self._weighed
        self.filters = {name: self._bounded(name, FILTERS[name]) for name in ALLOWED_FILTERS.split()}
        self.filters |= {"tojson": self._bounded("tojson", tojson), "_weighed": self._weighed, "_loop": self._loop}
        names = {"raise_exception": raise_exception, "strftime_now": lambda form: now.strftime(form[:MAX_WIDTH])}
        self.globals = {"range": self.globals["range"], "namespace": PlainNamespace, "dict": _new_dict, **names}

    def _weighed(self, value: Any) -> Any:
        self.budget.spend(weigh(value))
        return value

    def _loop(self, items: Any, weight: int) -> Iterator[Any]:
        for item in items:
            self.budget.spend(1 + weight)
            yield item

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a filter that weighs what goes in and what comes out."""
        pass_arg = getattr(function, "jinja_pass_arg", None)
        check = CHECKED_FILTERS.get(name)

        def bounded(*args: Any, **keywords: Any) -> Any:
            own, args = (args[:1], args[1:]) if pass_arg else ((), args)
            self.budget.spend()
            if check:
                check(*args, **keywords)
            if name == "join":
                args = (joined(args[0], *args[1:2], *[v for k, v in keywords.items() if k == "d"]), *args[1:])
            return self._weighed(function(*own, *args, **keywords))

        if pass_arg:
            bounded.jinja_pass_arg = pass_arg
        return bounded

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check = CHECKED_OPERATORS[operator]
        if check:
            check(left, right)
        return self._weighed(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **keywords: Any) -> Any:
        self.budget.spend()
        text = getattr(function, "__self__", None)
        if isinstance(text, str) and function.__name__ == "replace":
            check_replace(text, *args, **keywords)
        elif isinstance(text, str) and function.__name__ == "join":
            args = (joined(args[0], text), *args[1:])
        return self._weighed(super().call(context, function, *args, **keywords))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(
            getattr(value, "__self__", None), str
        ):
            check_format(value.__self__)
        return super().wrap_str_format(value)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in WIDE_METHODS and super().is_safe_attribute(obj, attr, value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Returns the template with every expression weighed that operators, calls and filters leave out."""
        tree = super()._parse(source, name, filename)
        for parent in [tree, *tree.find_all(nodes.Node)]:
            if isinstance(parent, nodes.For):
                if parent.recursive:
                    raise LimitError("recursive loops are not supported")
                static = sum(len(part.data) for child in parent.body for part in _texts(child))
                parent.iter = _filtered(parent.iter, "_loop", nodes.Const(static))
            for field, value in parent.iter_fields():
                if isinstance(value, list):
                    setattr(parent, field, [_filtered(v, "_weighed") if _makes(v) else v for v in value])
                elif _makes(value):
                    setattr(parent, field, _filtered(value, "_weighed"))
        return tree


def _new_dict(*args: Any, **keywords: Any) -> dict[Any, Any]:
    return dict(*args, **keywords)


def _texts(node: nodes.Node) -> list[nodes.TemplateData]:
    return [node] if isinstance(node, nodes.TemplateData) else list(node.find_all(nodes.TemplateData))


def _makes(node: Any) -> bool:
    """Returns whether a node makes a new value that no operator, call or filter has weighed."""
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Slice)
    # a tuple that is assigned to or unpacked is a place, not a value
    return isinstance(node, (nodes.Concat, nodes.List, nodes.Dict)) or (
        isinstance(node, nodes.Tuple) and node.ctx == "load"
    )


def _filtered(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None).set_lineno(node.lineno)


class Template:
    """A compiled template. Raises LimitError if it costs too much, ValueError for everything else that goes wrong."""

    def __init__(self, source: str, now: datetime):
        if len(source) > MAX_TEMPLATE:
            raise LimitError(f"it is longer than {MAX_TEMPLATE} characters")
        self._sandbox = Sandbox(now)
        self._sandbox.budget.restart()
        self.has_generation = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        with _one_kind_of_error():
            self._template = self._sandbox.from_string(source)

    def render(self, variables: dict[str, Any], marks: tuple[str, str] = ("", "")) -> str:
        """Returns the text; `marks` are written around each generation block."""
        self._sandbox.budget.restart()
        self._sandbox.marks.value = marks
        pieces, length = [], 0
        with _one_kind_of_error():
            for piece in self._template.generate(variables):
                pieces.append(piece)
                length += len(piece)
                self._sandbox.budget.spend()
                if length > MAX_WEIGHT:
                    raise LimitError(f"it writes more than {MAX_WEIGHT} characters")
        return "".join(pieces)


@contextmanager
def _one_kind_of_error() -> Iterator[None]:
    """A template is a program: whatever goes wrong in it becomes a ValueError of one line, but for the limits."""
    try:
        yield
    except LimitError:
        raise
    except (MemoryError, RecursionError):
        raise LimitError("it is nested too deeply") from None
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from None
    except Exception as error:
        raise ValueError(f"{error}" or type(error).__name__) from None
