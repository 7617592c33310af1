"""`litpeft chat`: the same conversation through a pipe, through a terminal, and without the finetuned part."""

import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import CHATML, finetune, make_folder
from short_runs import forked

from litpeft.core.errors import UserError
from litpeft.core.safetensors import Weights
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.identity import config_identity, tokenizer_identity
from litpeft.exchange.run import base_facts, save_result
from litpeft.generate.chat import chat
from litpeft.generate.engine import answer
from litpeft.generate.load import held, load_model
from litpeft.generate.session import Session
from litpeft.generate.settings import Chat, Sampling
from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.delta import copy_into, delta_state

SHORT = Sampling(max_new_tokens=12)
DRAWN = Sampling(max_new_tokens=12, temperature=0.9, seed=5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "wide", seed=7, vocab_size=258, initializer_range=0.25)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose delta is large enough to change every answer."""
    method = LoRA(rank=4)
    model = build(base, torch.float32, method)
    torch.manual_seed(0)
    copy_into(model, {name: torch.randn_like(tensor) * 0.1 for name, tensor in delta_state(model).items()})
    folder = tmp_path_factory.mktemp("runs") / "lora"
    template = ChatTemplate(Tokenizer.load(base))
    facts = {"template": {"name": "model", "sha256": template.hash, "system": None}, "precision": "32-true"}
    facts |= {"step": 1, "steps_done": 1, "steps_planned": 1, "finished": True}
    reads = config_identity(base), tokenizer_identity(template)
    facts["base"] = base_facts(base, None, Weights(base).fingerprint(), *reads)
    save_result(folder / "final", model, "lora", method, base, facts)
    return folder


def session(model: Path, sampling: Sampling = SHORT, system: str | None = None) -> Session:
    return Session({"model": load_model(str(model), precision="32-true")}, system, sampling)


def ask(talk: Session, *texts: str) -> list[str]:
    return [talk.ask(text, lambda piece: None).text for text in texts]


def pipe(monkeypatch, capsys, model: Path, text: str, **settings: object) -> tuple[str, str]:
    """Returns what `chat` writes to stdout and to stderr, given `text` through a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat(Chat(str(model), precision="32-true", **({"sampling": SHORT} | settings)))
    return capsys.readouterr()


def test_every_answer_is_that_to_the_whole_conversation_in_the_template(base):
    talk = session(base, system="be brief")
    first, second = ask(talk, "hello", "and now?")
    text = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        f"<|im_start|>assistant\n{first}<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"
    )
    loaded = talk.loaded
    prompt = loaded.tokenizer.encode(text)
    assert second == answer(loaded.model, [prompt], loaded.tokenizer, SHORT, loaded.template.stop_ids)[0].text


def test_a_pipe_gets_one_answer_a_line_and_nothing_else(base, monkeypatch, capsys):
    out, err = pipe(monkeypatch, capsys, base, "hello\n\n/system\nand \\\nnow?\n")
    expected = ask(session(base), "hello", "and \nnow?")
    assert out == "".join(text + "\n" for text in expected)
    assert "no system message" in err


def test_base_switches_the_finetuned_part_off_and_on_in_the_same_conversation(base, run):
    finetuned, plain = session(run), session(base)
    start = ask(finetuned, "hello")
    assert start != ask(plain, "hello")
    assert finetuned.switch() is True
    plain.turns = list(finetuned.turns)
    assert ask(finetuned, "go on") == ask(plain, "go on")
    assert finetuned.switch() is False
    never_left = session(run)
    never_left.turns = list(finetuned.turns)
    assert ask(finetuned, "and again") == ask(never_left, "and again")


def test_base_says_which_model_answers_and_refuses_where_there_is_no_delta(base, run, monkeypatch, capsys):
    _, err = pipe(monkeypatch, capsys, run, "/base\n/base\n")
    assert re.findall("now the (.*) model answers", err) == ["base", "finetuned"]
    with pytest.raises(UserError, match="no finetuned part"):
        pipe(monkeypatch, capsys, base, "/base\n")


@pytest.mark.parametrize("sampling", [SHORT, DRAWN])
def test_undo_restores_the_state_before_exactly(base, sampling):
    talk, other = session(base, sampling), session(base, sampling)
    ask(talk, "hello")
    before = list(talk.turns)
    first = ask(talk, "and now?")
    assert talk.undo() == "and now?"
    assert talk.turns == before
    assert ask(talk, "something else", "and now?")[0] != first[0]
    talk.undo()
    talk.undo()
    assert ask(talk, "and now?") == first == ask(other, "hello", "and now?")[1:]


def test_reset_and_system_change_what_the_model_reads(base, monkeypatch, capsys):
    out, _ = pipe(monkeypatch, capsys, base, 'hi\n/reset\nhi\n/system be brief\n/reset\nhi\n/system ""\n/reset\nhi\n')
    plain, brief = ask(session(base), "hi")[0], ask(session(base, system="be brief"), "hi")[0]
    assert out == "".join(text + "\n" for text in (plain, plain, brief, plain))


def test_system_shows_what_the_template_inserts_by_itself(tmp_path, monkeypatch, capsys):
    model = make_folder(tmp_path / "model", vocab_size=258)
    inserts = "{% if messages[0].role != 'system' %}<|im_start|>system\nI am \x1b[31mTiny<|im_end|>\n{% endif %}"
    (model / "chat_template.jinja").write_text(inserts + CHATML)
    _, err = pipe(monkeypatch, capsys, model, '/system\n/system be brief\n/system ""\n')
    by_itself = "<|im_start|>system\nI am \ufffd[31mTiny<|im_end|>\n<|im_start|>user\n"
    none = f"no system message of your own\nbefore your first message the model reads:\n{by_itself}\n"
    own = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n"
    assert err.endswith(f"\n{none}system message: be brief\nbefore your first message the model reads:\n{own}\n{none}")


def test_a_system_message_that_the_template_refuses_is_not_taken(tmp_path):
    model = make_folder(tmp_path / "model", vocab_size=258)
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refuses + CHATML)
    talk = session(model)
    with pytest.raises(UserError, match="no system message"):
        talk.instruct("be brief")
    assert len(ask(talk, "hello")) == 1


def test_save_replaces_a_file_of_somebody_else_only_if_asked_to(base, tmp_path, monkeypatch, capsys):
    path = tmp_path / "two words.json"
    path.write_text("precious")
    with pytest.raises(UserError) as error:
        pipe(monkeypatch, capsys, base, f"hello\n/save {path}\n")
    assert path.read_text() == "precious"
    way = re.search("/save --overwrite .*", error.value.hint)[0]
    _, err = pipe(monkeypatch, capsys, base, f"hello\n{way}\n")
    assert f"written to {path}" in err
    assert [turn["role"] for turn in json.loads(path.read_text())[0]["messages"]] == ["user", "assistant"]


def test_save_writes_the_messages_and_replaces_only_its_own_file(base, tmp_path):
    talk, path, foreign = session(base, system="be brief"), tmp_path / "talk.json", tmp_path / "foreign.json"
    foreign.write_text("precious")
    (text,) = ask(talk, "hello")
    talk.save(str(path))
    first = {"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}
    assert json.loads(path.read_text()) == [{"messages": [*first, {"role": "assistant", "content": text}]}]
    ask(talk, "more")
    assert talk.save("") == path.absolute()
    assert len(json.loads(path.read_text())[0]["messages"]) == 5
    with pytest.raises(UserError, match="the file exists"):
        talk.save(str(foreign))
    other = session(base)
    other.turns = list(talk.turns)
    with pytest.raises(UserError, match="the file exists"):
        other.save(str(path))
    assert foreign.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [foreign, path]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/resett", r'no command /resett \(did you mean "/reset"\?\)'),
        ("/undo", "nothing to undo"),
        ("/save", "nothing to save"),
    ],
)
def test_a_command_that_cannot_be_obeyed_says_so(base, monkeypatch, capsys, line, problem):
    with pytest.raises(UserError, match=problem):
        pipe(monkeypatch, capsys, base, line + "\n")


def test_a_conversation_beyond_the_model_is_an_error_that_says_reset_and_keeps_it(base):
    talk = session(base)
    ask(talk, "hello")
    before = list(talk.turns)
    with pytest.raises(UserError, match="the model reaches 512") as error:
        ask(talk, "x" * 600)
    assert "/reset" in error.value.hint
    assert talk.turns == before
    ask(talk, "short")


def talk_at(terminal: str, environment: dict[str, str], settings: Chat, readline: bool) -> None:
    """What a process of its own does: it makes a terminal its own, as a shell does, and talks there."""
    os.setsid()
    for number in range(3):
        os.dup2(os.open(terminal, os.O_RDWR), number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, 1) for n, mode in enumerate("rww"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= environment
    assert "readline" not in sys.modules  # it looks at the terminal when it is imported
    if not readline:
        sys.modules["readline"] = None
    chat(settings)


class Terminal:
    """`litpeft chat` in a process of its own, at the other end of a pseudo-terminal."""

    def __init__(self, model: Path, state: Path, max_new_tokens: int, term: str = "dumb", readline: bool = True):
        settings = Chat(str(model), precision="32-true", sampling=Sampling(max_new_tokens=max_new_tokens))
        self.fd, self.other = pty.openpty()
        environment = {"XDG_STATE_HOME": str(state), "TERM": term}
        self.process = forked(talk_at, os.ttyname(self.other), environment, settings, readline)
        self.seen = ""

    def until(self, pattern: str, again: str = "") -> None:
        """Reads up to a match of `pattern`; types `again` every two seconds for which it has not come."""
        waits, typed = 0, time.monotonic()
        while not (match := re.search(pattern, self.seen, re.DOTALL)):
            if select.select([self.fd], [], [], 2)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
            if time.monotonic() - typed >= 2:
                waits, typed = waits + 1, time.monotonic()
                assert waits < 60, f"{pattern!r} did not come; this did: {self.seen!r}"
                self.type(again)
        self.seen = self.seen[match.end() :]

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def exit_code(self) -> int:
        self.process.join()
        return self.process.exitcode

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.other)


@pytest.fixture
def terminal(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """A chat whose answers take long: thousands of tokens."""
    changes = {"vocab_size": 258, "initializer_range": 0.25, "max_position_embeddings": 8192}
    model = make_folder(tmp_path / "model", seed=7, **changes)
    talk = Terminal(model, tmp_path / "state", 8000)
    yield talk
    talk.close()


PASTE = "one\ntwo \\\n\n/reset\nthree"


@pytest.mark.parametrize(
    ("term", "readline", "before", "after"),
    [
        ("xterm", True, "\x1b[200~", "\x1b[201~\n"),  # what a terminal sends around a paste, and Enter
        ("dumb", True, "\x1b[200~", "\x1b[201~\n"),  # unasked
        ("dumb", True, "", "\n"),  # the lines as they are
        ("xterm", True, "", "\n"),  # though it was asked
        ("dumb", False, "", "\n"),  # and no readline
    ],
)
def test_a_paste_of_several_lines_is_one_message(base, tmp_path, term: str, readline: bool, before: str, after: str):
    talk = Terminal(base, tmp_path / "state", 4, term, readline)
    talk.until(r"\x1b\[\?2004h> " if term == "xterm" else "> ")  # asks the terminal to mark what is pasted
    talk.type(before + PASTE + after)
    talk.until(r"three.*\[cut at sampling.*> ")
    talk.type(f"/save {tmp_path / 'talk.json'}\n")
    talk.until("written to")
    talk.type("/exit\n")
    assert talk.exit_code() == 0
    talk.close()
    messages = json.loads((tmp_path / "talk.json").read_text())[0]["messages"]
    assert [turn["role"] for turn in messages] == ["user", "assistant"]
    assert messages[0]["content"] == PASTE


def test_ctrl_c_stops_an_answer_keeps_its_part_and_not_the_program(terminal, tmp_path):
    terminal.until("> ")
    terminal.type("hello\n")
    terminal.until(r"hello\r\n.{20}")
    terminal.type("\x03")
    terminal.until(r"\[stopped\]\r\n> ", again="\x03")  # Python drops one that comes while it runs a finaliser
    terminal.type(f"/save {tmp_path / 'talk.json'}\n")
    terminal.until("written to .*> ")
    terminal.type("\x03")  # while it prints a prompt, Python's readline may miss one
    terminal.until("leave with Ctrl-D or /exit.*> ", again="\x03")
    terminal.type("/udno\n")
    terminal.until(r'did you mean "/undo".*> ')
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    question, part = json.loads((tmp_path / "talk.json").read_text())[0]["messages"]
    assert (question["content"], part["role"]) == ("hello", "assistant")
    whole = ask(session(tmp_path / "model", Sampling(max_new_tokens=600)), "hello")[0]
    assert len(part["content"]) >= 20
    assert whole.startswith(part["content"][:300])
    history = tmp_path / "state" / "litpeft" / "chat_history"
    assert history.read_text().splitlines()[0] == "hello"


def test_several_runs_answer_in_one_conversation_each_as_it_does_alone(
    base, run, tmp_path, monkeypatch, capsys
) -> None:
    other = finetune(base, tmp_path, "--train.lr", "1e-1", "--train.epochs", "3", out="other", method="dora")
    capsys.readouterr()
    turns = "hi\n/use other\nand now?\n/use lora\nand this?\n/base\nlast\n/use\n/use other\nwell?\n/use nobody\n"
    said, told = pipe(monkeypatch, capsys, run, turns.removesuffix("/use nobody\n"), also=(str(other),))
    answers = said.removesuffix("\n")
    assert "* lora\n  other" in told
    talk, expected = [], []
    for name, text in (
        ("lora", "hi"),
        ("other", "and now?"),
        ("lora", "and this?"),
        ("base", "last"),
        ("other", "well?"),
    ):
        alone = session({"lora": run, "other": other, "base": base}[name])
        alone.turns = list(talk)
        expected += ask(alone, text)
        talk = alone.turns
    assert answers == "\n".join(expected)
    with pytest.raises(UserError, match="no model is called 'nobody'"):
        pipe(monkeypatch, capsys, run, turns, also=(str(other),))
    with pytest.raises(UserError, match="are both called lora"):
        pipe(monkeypatch, capsys, run, turns, also=(str(run / "final"),))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_runs_on_one_base_hold_its_memory_once_and_answer_as_before(base, run, precision) -> None:
    ids = torch.arange(3, 40)[None]
    first = load_model(str(run), precision=precision)
    with torch.no_grad():
        logits = first.model(ids)
        again, plain = (load_model(str(path), precision=precision, beside=[first]) for path in (run, base))
        ours, theirs, bases = (held(one.model) for one in (first, again, plain))
        for name, tensor in theirs.items():
            assert tensor.is_mkldnn or tensor.data_ptr() == ours[name].data_ptr()
        shared = {name for name, tensor in bases.items() if not tensor.is_mkldnn and name in ours}
        assert {name for name in shared if bases[name].data_ptr() == ours[name].data_ptr()} >= {
            "norm.weight",
            "embed.weight",
        }
        assert torch.equal(again.model(ids), logits)
        assert torch.equal(plain.model(ids), load_model(str(base), precision=precision).model(ids))
        assert torch.equal(first.model(ids), logits)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as in a UTF-8 locale, and as in that called C
def test_input_in_another_encoding_is_told_as_generate_tells_it(errors: str, base, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Größe\n".encode("cp1252")), "utf-8", errors))
    with pytest.raises(UserError, match="this is not UTF-8") as error:
        chat(Chat(str(base), sampling=SHORT))
    assert error.value.where == "standard input"
