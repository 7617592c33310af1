"""The process in which a chat template runs; litpeft/data/sandbox.py starts it. It imports Jinja and nothing heavy.

Nobody has read a template that came with a model's files, so it gets no more than it needs: Jinja's sandbox keeps it
away from Python, and the kernel bounds the processor time of each text and the memory of the process.
"""

import gc
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from litpeft.data.pipes import packed, receive

try:
    import resource
except ImportError:  # on Windows only the clock of the parent ends a template
    resource = None

FEW = 16  # texts that are sent together
MOST_SAID = 500  # characters of an error: a template can make it as long as the whole chat


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Returns JSON without Jinja's escapes for HTML, which no model was trained on."""
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
        before, after = self.environment.marks
        return before + caller() + after


def environment(now: datetime) -> ImmutableSandboxedEnvironment:
    """Returns the environment of a template, as transformers makes it."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
        optimized=False,  # else compiling computes constants, in branches that are never taken too
    )
    made.marks = ("", "")  # what is written before and after a generation block while its place is sought
    made.filters["tojson"] = tojson
    made.globals |= {"namespace": PlainNamespace, "dict": lambda *args, **names: dict(*args, **names)}
    made.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: now.strftime(form)}
    return made


def serve() -> None:
    """Compiles the template that comes first on stdin and renders the texts of every later batch, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    if resource is not None:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # it ends the process
        for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
            resource.setrlimit(kind, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the interpreter prints when a template ends it
    gc.freeze()
    threading.Thread(target=_end_with_input, daemon=True).start()
    limits, (source, now, constants) = receive(sys.stdin.buffer), receive(sys.stdin.buffer)
    jinja = environment(datetime.fromisoformat(now))
    templates: list[jinja2.Template] = []

    def compile_source() -> str:
        templates.append(jinja.from_string(source, constants))
        return ""

    def render(variables: dict[str, Any], marks: Sequence[str]) -> str:
        jinja.marks = marks
        # render() would also rewrite the traceback of an error, which takes longer than the text
        return "".join(templates[0].root_render_func(templates[0].new_context(variables)))

    _answer([compile_source], *limits)
    while True:
        try:
            limits, texts = receive(sys.stdin.buffer), receive(sys.stdin.buffer)
        except EOFError:
            return
        _answer([partial(render, *text) for text in texts], *limits)


def _end_with_input() -> None:
    """Ends this process as soon as nobody can write to its input any more, whatever it is doing: its parent is gone."""
    if hasattr(select, "poll"):
        waiting = select.poll()
        waiting.register(sys.stdin.fileno(), 0)  # no event of its own, so only the hang-up
        waiting.poll()
        os._exit(0)


def _answer(calls: Sequence[Callable[[], str]], seconds: float, memory: int, characters: int) -> None:
    """Writes the texts that the calls return, in lists of a few, each text made within the limits."""
    for start in range(0, len(calls), FEW):
        _limit_memory(memory)
        replies = [_reply(call, seconds, memory, characters) for call in calls[start : start + FEW]]
        _limit_time(0)
        _limit_memory(None)
        sys.stdout.buffer.write(packed(replies))
        sys.stdout.buffer.flush()


def _reply(call: Callable[[], str], seconds: float, memory: int, characters: int) -> str | dict[str, str]:
    """Returns the text, or what went wrong. A template is a program: anything can."""
    _limit_time(seconds)
    try:
        text = call()
    except MemoryError:
        return {"limit": f"it needs more than {memory >> 20:,} MiB of memory"}
    except RecursionError:
        return {"limit": "it is nested too deeply"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": _one_line(f"line {error.lineno}: {error.message}")}
    except Exception as error:
        return {"error": _one_line(str(error)) or type(error).__name__}
    return text if len(text) <= characters else {"limit": f"it writes more than {characters:,} characters"}


def _one_line(text: str) -> str:
    """Returns what a template says without the lines with which it could pretend to be somebody else, and in short."""
    text = " ".join(text[: 2 * MOST_SAID].split())
    return text if len(text) <= MOST_SAID else f"{text[:MOST_SAID]} ..."


def _limit_time(seconds: float) -> None:
    """Lets the kernel end this process after so many seconds of its processor time, even within one operation."""
    if resource is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF comes at its end


def _limit_memory(size: int | None) -> None:
    """Lets the kernel refuse this process more bytes than `size`. That of macOS does not: there the parent looks."""
    if resource is not None and sys.platform != "darwin":
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        bounds = [bound for bound in (size, hard) if bound not in (None, resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(bounds, default=resource.RLIM_INFINITY), hard))
