"""What a chat template can reach, and what it may cost: it runs in a process that ends where it takes too much."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
from chat_samples import CHATML, write_folder

import litpeft
from litpeft.core.errors import UserError
from litpeft.data import sandbox
from litpeft.data.formats.turn import Turn
from litpeft.data.sandbox import LimitError, Template
from litpeft.data.settings import Data
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import load_dataset
from litpeft.data.tokenizer import Tokenizer

ESCAPES = """{{ ''.__class__.__mro__[1].__subclasses__() }}
{{ self.__init__.__globals__ }}
{{ namespace.__init__.__globals__ }}
{{ raise_exception.__globals__ }}
{{ range.__class__ }}
{{ cycler.__init__.__globals__.os.popen('id').read() }}
{{ messages.append(1) }}
{{ messages[0].update(role='x') }}
{{ messages | attr('__class__') }}
{{ messages | map(attribute='__class__') | list | first }}
{{ '{0.__class__.__init__.__globals__}'.format(messages) }}
{{ '{a.__class__}'.format_map({'a': 1}) }}
{{ namespace(__class__=1) }}
{% set ns = namespace() %}{% set ns.__class__ = 1 %}
{% include '/etc/passwd' %}
{% extends 'base' %}
{% import 'os' as os %}
{{ lipsum.__globals__ }}""".splitlines()
COSTS = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ 2 ** (10**9) }}",
    "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '1'.zfill(10**9) }}",
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ 'a' | indent(1000000000, true) }}",
    "{{ 1.5 | round(1000000000, 'ceil') }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ range(99999) | join('a' * 100000) }}",
    "{{ ('b' * 100000).join(range(99999) | map('string')) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 10000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 10000) }}",
    "{{ range(10**9) | list }}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x={}) %}{% for i in range(60) %}{% set ns.x = {1: ns.x, 2: ns.x} %}{% endfor %}{{ ns.x }}",
    "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}{{ n }}",
    "{% set l = range(99999) | list %}{{ l | select('in', l) | list | length }}",
    "{{ (range(99999) | list | string * 9000) | wordcount }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'y' * 100000 }}{% endfor %}",
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% filter upper %}{% for i in range(99999) %}" + "z" * 10000 + "{% endfor %}{% endfilter %}",
    "{% macro m() %}{% for i in range(99999) %}" + "z" * 10000 + "{% endfor %}{% endmacro %}{{ m()[:1] }}",
    "{% set a = range(99999) | list %}{% for i in a %}{% for j in a | sort | reverse %}{% endfor %}{% endfor %}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{{ " + "not " * 50000 + "1 }}",
    "{{ 1" + " + 1" * 50000 + " }}",
    "x" * 10**6,
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_hostile_template_reaches_nothing_outside(source):
    messages = [{"role": "user", "content": "hi"}]
    try:
        text = Template(source, datetime(2024, 1, 1)).render({"messages": messages})
    except (ValueError, LimitError):
        text = ""
    assert messages == [{"role": "user", "content": "hi"}]
    assert not any(sign in text for sign in ("<class", "<function", "<module", "root:", "uid=", "{'__"))


@pytest.mark.parametrize("source", COSTS, ids=[source[:50] for source in COSTS])
def test_a_costly_template_is_stopped(source):  # where it would take hours or all memory
    with pytest.raises((LimitError, ValueError)):
        Template(source, datetime(2024, 1, 1)).render({"messages": [{"role": "user", "content": "hi"}]})


def test_a_costly_template_of_a_model_is_an_error_of_the_model(tmp_path):
    tokenizer = Tokenizer.load(write_folder(tmp_path, "chatml"))
    costly = "{{ 'a' * 10**9 if loop.index == 3 }}"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>" + costly + "{% endfor %}"
    template = ChatTemplate(tokenizer)
    with pytest.raises(UserError, match="costs more than it may") as error:
        template.spans([Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")])
    assert (error.value.where, error.value.exit_code) == (str(tmp_path / "chat_template.jinja"), 4)
    tokenizer.chat_template = "{{ broken"
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        with pytest.raises(UserError, match="cannot be used: line 1") as error:
            ChatTemplate(tokenizer)
        assert error.value.where == str(tmp_path / name)
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)


def test_what_a_template_says_is_cut_to_what_a_person_reads():
    template = Template("{{ raise_exception(text) }}", datetime(2024, 1, 1))
    for text, told in ((" too\n many ", "too many"), ("x" * 10**6, "x" * 500 + " ...")):
        with pytest.raises(ValueError) as error:
            template.render({"text": text})
        assert str(error.value) == told


def test_the_row_that_makes_a_template_too_costly_is_named(tmp_path):
    tokenizer = Tokenizer.load(write_folder(tmp_path, "chatml"))
    tokenizer.chat_template = CHATML + "{{ 2 ** (10**9) if messages[0].content == 'bad' }}"
    row = '{"instruction": "%s", "output": "x"}\n'
    (tmp_path / "rows.jsonl").write_text(row % "good" * 200 + row % "bad" + row % "good" * 99)
    with pytest.raises(UserError, match=r"costs more than it may, with \S+rows.jsonl:201: .* processor time") as error:
        load_dataset(Data(str(tmp_path / "rows.jsonl")), tokenizer, ChatTemplate(tokenizer), 512)
    assert error.value.exit_code == 4


def test_templates_print_the_date_that_they_were_given():
    template = Template("{{ strftime_now('%d %b %Y') }} {{ {'a': '<&'} | tojson }}", datetime(2024, 7, 26))
    assert template.render({}) == '26 Jul 2024 {"a": "<&"}'


def test_a_long_message_may_cost_more_than_a_short_one():
    text = "ü🙂" * (8 << 20)
    template = Template("{% for m in messages %}{{ m.content | trim + '.' }}{% endfor %}", datetime(2024, 1, 1))
    assert template.render({"messages": [{"content": text}]}) == text + "."


def test_time_in_which_a_template_does_not_run_is_not_its_own():
    template = Template("{% for i in range(99999) %}{% endfor %}{{ x }}", datetime(2024, 1, 1))
    process = template._process.pid
    os.kill(process, signal.SIGSTOP)
    timer = threading.Timer(4 * sandbox.Limits.of(0).seconds, os.kill, (process, signal.SIGCONT))
    timer.start()
    assert template.render({"x": "done"}) == "done"
    assert not timer.is_alive()
    assert template._process.pid == process


def test_a_process_that_stands_still_or_was_killed_is_replaced(monkeypatch):
    template = Template("{{ x }}", datetime(2024, 1, 1))
    os.kill(template._process.pid, signal.SIGKILL)
    assert template.render({"x": "a"}) == "a"
    monkeypatch.setattr(sandbox, "LAST_RESORT", 0.0)
    os.kill(template._process.pid, signal.SIGSTOP)
    assert template.render({"x": "b"}) == "b"


def test_where_the_kernel_bounds_no_memory_a_process_that_takes_too_much_is_killed():
    hungry = subprocess.Popen([sys.executable, "-c", "kept = b'x' * (300 << 20); input()"], stdin=subprocess.PIPE)
    sandbox._watch(hungry, threading.Event(), 60.0, 200 << 20, look=True)
    assert hungry.wait() == -signal.SIGKILL
    hungry.stdin.close()


def test_an_interrupted_template_answers_the_next_question_not_the_last():
    template = Template("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}{{ n }}", datetime.now())

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KeyboardInterrupt):
        template.render({"n": 99999})
    signal.signal(signal.SIGALRM, before)
    assert template.render({"n": 2}) == "2"


SCRIPT = """
import signal, sys, time
from datetime import datetime
from litpeft.data.sandbox import Limits, Template
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a job in the background inherits may ignore it
Limits.of = lambda size: Limits(60.0, 1 << 30, 1 << 20)  # as a large chat has: the limit must not be what ends it
template = Template("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}", datetime.now())
print(template._process.pid, flush=True)
if sys.argv[1] == "busy":
    template.render({"n": 99999})
if sys.argv[1] != "end":
    time.sleep(60)
"""


@pytest.mark.parametrize("doing", ["idle", "busy"])
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_process_is_left_behind_when_the_program_is_ended(by, doing):
    program = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, doing], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    process = int(program.stdout.readline())
    time.sleep(0.1)
    program.send_signal(by)
    assert program.wait() != 0
    program.stdout.close()
    assert gone(process)


def test_no_process_is_left_behind_at_the_end_of_a_program():
    ended = subprocess.run([sys.executable, "-c", SCRIPT, "end"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert gone(int(ended.stdout))


def test_it_finds_a_package_that_is_on_no_folder_of_sys_path(tmp_path):
    program = """
import importlib.machinery, importlib.util, sys
from datetime import datetime

class Finder:  # as pip's for `pip install -e`
    def find_spec(name, path=None, target=None):
        if name == "litpeft":
            parts = [sys.argv[1] + "/litpeft"]
            file = parts[0] + "/__init__.py"
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=parts)

sys.meta_path.insert(0, Finder)
sys.path = [folder for folder in sys.path if not importlib.machinery.PathFinder.find_spec("litpeft", [folder])]
from litpeft.data.sandbox import Template
print(Template("{{ x }}", datetime.now()).render({"x": "found"}))
"""
    command = [sys.executable, "-c", program, str(Path(litpeft.__file__).parent.parent)]
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={})
    assert told.stdout == "found\n", told.stderr


def gone(process):
    """Whether the process ends by itself, and soon."""
    for _ in range(300):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout
        if not state.strip() or state.startswith("Z"):
            return True
        time.sleep(0.1)
    return False


def test_the_process_has_neither_the_secrets_of_the_environment_nor_the_right_to_write_files(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    template = Template("{{ x }}", datetime(2024, 1, 1))
    shown = subprocess.run(["ps", "eww", "-p", str(template._process.pid)], capture_output=True, text=True).stdout
    assert "renderer" in shown
    assert "hf_secret" not in shown
    if hasattr(resource, "prlimit"):
        assert resource.prlimit(template._process.pid, resource.RLIMIT_FSIZE) == (0, 0)


def test_neither_side_imports_what_is_heavy():
    code = "import sys; import litpeft.data.{}; print([name for name in ('torch', 'jinja2') if name in sys.modules])"
    for module, expected in (("sandbox", "[]"), ("renderer", "['jinja2']")):
        told = subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, text=True)
        assert told.stdout.strip() == expected, told.stderr


def test_a_row_too_large_for_a_template_is_the_rows_fault_and_can_be_skipped(tmp_path):
    tokenizer = Tokenizer.load(write_folder(tmp_path, "chatml"))
    tokenizer.chat_template = (
        CHATML
        + "{% for m in messages %}{% for a in m.content %}{% for b in m.content %}{% endfor %}{% endfor %}{% endfor %}"
    )
    rows = ['{"instruction": "%s", "output": "x"}\n' % ("a" * size) for size in (9, 1_000_000, 5)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    data = Data(str(tmp_path / "rows.jsonl"), validation_split=0.0, bad_rows="skip")
    found = load_dataset(data, tokenizer, ChatTemplate(tokenizer), 512)
    assert [row.source[-2:] for row in found.train] == [":1", ":3"]
    assert [bad.where[-2:] for bad in found.rejected] == [":2"]
    assert "bytes are too many for the chat template" in found.rejected[0].reason


@pytest.mark.parametrize(
    ("suffix", "large", "said"),
    [
        ("json", {"instruction": "a", "output": "ab " * (3 << 20)}, "characters are more than a row's tokens can hold"),
        (
            "jsonl",
            {"instruction": "<|im_end|> " * 800_000, "output": "a"},
            "characters are more than a row's tokens can hold",
        ),
        (
            "json",
            {"messages": [{"role": r, "content": "a"} for r in ["user", "assistant"] * 9_000]},
            "its 9,000 answers in",
        ),
    ],
)
def test_a_row_of_megabytes_is_named_and_left_out_at_once(tmp_path, suffix, large, said):
    tokenizer = Tokenizer.load(write_folder(tmp_path, "chatml"))
    rows = [
        json.dumps(row) for row in ({"instruction": "a", "output": "b"}, large, {"instruction": "c", "output": "d"})
    ]
    path = tmp_path / f"rows.{suffix}"
    path.write_text("\n".join(rows) if suffix == "jsonl" else "[" + ",\n".join(rows) + "]")
    for option in ({"bad_rows": "skip"}, {"overlong": "drop"}):
        found = load_dataset(Data(str(path), None, 0.0, **option), tokenizer, ChatTemplate(tokenizer), 512)
        assert [row.source[-2:] for row in found.train] == [":1", ":3"]
        assert [bad.where[-2:] for bad in found.rejected] == [":2"]
        assert said in found.rejected[0].reason
    with pytest.raises(UserError, match="1 bad row to put right, or to leave out with data.bad_rows skip") as error:
        load_dataset(Data(str(path), None, 0.0), tokenizer, ChatTemplate(tokenizer), 512)
    assert error.value.where == f"{path}:2"
