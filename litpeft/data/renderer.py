"""The process in which a chat template runs; litpeft/data/sandbox.py starts it. It imports nothing large but Jinja.

A template is untrusted code that came with a model's files: Jinja's sandbox keeps it away from Python, and the kernel
bounds the CPU time of each text and the memory of the process.
"""

import gc
import json
import os
import resource
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

REPLIES = 16  # texts that are sent back together
LONGEST_ERROR = 500  # characters: a template can raise an error as long as the chat


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Returns JSON. Jinja's own filter would also escape HTML, as no model was trained."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    """Templates call it to refuse a chat."""
    raise jinja2.TemplateError(message)


class PlainNamespace(Namespace):
    """A namespace that refuses names with a leading underscore, such as __class__."""

    def __init__(*args: Any, **names: Any):  # no `self`: a template may choose that name
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
    """Returns the Jinja environment that transformers renders templates in."""
    # not optimised: else compiling evaluates constant expressions, of branches that are never taken too
    options = {"trim_blocks": True, "lstrip_blocks": True, "optimized": False}
    made = ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols], **options)
    made.marks = ("", "")  # written before and after each generation block
    made.filters["tojson"] = tojson
    made.globals |= {"namespace": PlainNamespace, "dict": lambda *args, **names: dict(*args, **names)}
    made.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: now.strftime(form)}
    return made


def serve() -> None:
    """Compiles the template that stdin begins with and renders batch after batch, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the time limit's signal ends the process
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # no output of the interpreter when it is killed
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
        # not render(): on an error it rewrites the traceback, which takes longer than the text
        return "".join(templates[0].root_render_func(templates[0].new_context(variables)))

    _answer([compile_source], *limits)
    while True:
        try:
            limits, texts = receive(sys.stdin.buffer), receive(sys.stdin.buffer)
        except EOFError:
            return
        _answer([partial(render, *text) for text in texts], *limits)


def _end_with_input() -> None:
    """Ends this process as soon as the other end of stdin is closed, since its parent is then gone."""
    waiting = select.poll()
    waiting.register(sys.stdin.fileno(), 0)  # no events asked for: only the hang-up is reported
    waiting.poll()
    os._exit(0)


def _answer(calls: Sequence[Callable[[], str]], seconds: float, memory: int, characters: int) -> None:
    """Makes the calls within the limits and writes their texts to stdout."""
    for start in range(0, len(calls), REPLIES):
        _limit_memory(memory)
        replies = [_reply(call, seconds, memory, characters) for call in calls[start : start + REPLIES]]
        signal.setitimer(signal.ITIMER_PROF, 0)
        _limit_memory(None)
        sys.stdout.buffer.write(packed(replies))
        sys.stdout.buffer.flush()


def _reply(call: Callable[[], str], seconds: float, memory: int, characters: int) -> str | dict[str, str]:
    """Returns the text, or {"limit": ...} or {"error": ...} with what went wrong."""
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of CPU time, after which SIGPROF ends even a single operation
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
    """Returns an error's text, shortened and without line breaks, which could fake other lines of output."""
    text = " ".join(text[: 2 * LONGEST_ERROR].split())
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]} ..."


def _limit_memory(size: int | None) -> None:
    """Limits the address space of this process to `size` bytes. macOS has no such limit: there the parent polls."""
    if sys.platform != "darwin":
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        bounds = [bound for bound in (size, hard) if bound not in (None, resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(bounds, default=resource.RLIM_INFINITY), hard))
