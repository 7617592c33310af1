"""`litpeft chat`: a conversation in the terminal, or one message a line through a pipe."""

import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from litpeft.core.errors import ConfigError, DataError, UserError, nearest
from litpeft.core.terminal import tell, write
from litpeft.generate.draft import Answer
from litpeft.generate.load import load_models
from litpeft.generate.session import Session
from litpeft.generate.settings import Chat

HISTORY_LINES = 1000
PASTED_WITHIN = 0.05  # seconds in which the next line of a paste is there, where the terminal does not mark it


def chat(settings: Chat) -> None:
    """The command. Answers go to stdout, all else to stderr; without a terminal an error ends the program."""
    session = Session(load_models(settings), settings.system, settings.sampling)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with line_editing() if terminal else nullcontext():
        if terminal:
            tell(f"{settings.model}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        while True:
            try:
                respond(session, read_message(session, terminal), terminal)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not terminal:
                    raise
                tell("\nleave with Ctrl-D or /exit")
            except UserError as error:
                if not terminal:
                    raise
                tell(error.what + (f"; {error.hint}" if error.hint else ""))


def read_message(session: Session, terminal: bool) -> str:
    """Returns the next message: a line, those after it where it ends with a backslash, or those pasted with it."""
    name = "base> " if session.on_base else f"{session.name}> " if len(session.models) > 1 else "> "
    try:
        lines = [input(name if terminal else "")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(input("... " if terminal else ""))
            except EOFError:  # the message ends with the input
                break
        while terminal and select.select([sys.stdin], [], [], PASTED_WITHIN)[0]:  # nobody types so fast: it was pasted
            lines.append(input())
        message = "\n".join(lines).strip()
        message.encode()  # under some locales Python reads bytes of another encoding as lone surrogates
    except UnicodeError as error:
        raise DataError(f"this is not UTF-8: {error}", where="standard input") from None
    return message


def respond(session: Session, message: str, terminal: bool) -> None:
    """Answers a message or runs a command."""
    command = re.fullmatch(r"(/[A-Za-z]*)(?:\s+(.*))?", message, re.DOTALL)
    if command is not None:
        word, argument = command[1].lower(), (command[2] or "").strip()
        if word not in COMMANDS:
            raise ConfigError(f"there is no command {word}{nearest(word, list(COMMANDS))}; /help lists them")
        tell(COMMANDS[word][1](session, argument))
    elif message:
        report(session, session.ask(message, write), terminal)


def report(session: Session, answer: Answer, terminal: bool) -> None:
    """Ends the answer's line and says why the answer ended, unless the model ended it."""
    write("\n")
    if answer.reason == "interrupted":
        if not terminal:
            raise KeyboardInterrupt
        tell("[stopped]" if answer.text else "[stopped before it began: your message is taken back]")
    elif answer.reason == "length" and len(answer.ids) == session.sampling.max_new_tokens:
        tell(f"[cut at sampling.max_new_tokens = {session.sampling.max_new_tokens}]")
    elif answer.reason == "length":
        tell(f"[cut: the model reaches {session.loaded.model.reach} tokens; /reset starts anew]")


def show_help(session: Session, argument: str) -> str:
    rows = [f"{word + usage:<16}{meaning}" for word, (usage, _, meaning) in COMMANDS.items()]
    rows.append("Pasted lines are one message, and a line that ends with \\ goes on. Ctrl-C stops an answer.")
    return "\n".join(rows)


def reset(session: Session, argument: str) -> str:
    session.turns.clear()
    return "a new conversation"


def system(session: Session, argument: str) -> str:
    if argument:
        session.instruct("" if argument == '""' else argument)
    own = f"system message: {session.system}" if session.system else "no system message of your own"
    return f"{own}\nbefore your first message the model reads:\n{session.opening()}"


def undo(session: Session, argument: str) -> str:
    dropped = session.undo()
    return f"dropped: {dropped if len(dropped) <= 60 else dropped[:57] + '...'}"


def save(session: Session, argument: str) -> str:
    word, _, name = argument.partition(" ")
    overwrite = word == "--overwrite"
    return f"written to {session.save(name.strip() if overwrite else argument, overwrite)}"


def base(session: Session, argument: str) -> str:
    return f"now the {'base' if session.switch() else 'finetuned'} model answers; /base switches back"


def use(session: Session, argument: str) -> str:
    if not argument:
        return "\n".join(f"{'*' if name == session.name else ' '} {name}" for name in session.models)
    session.use(argument)
    return f"now {argument} answers"


def leave(session: Session, argument: str) -> str:
    raise EOFError


Command = Callable[[Session, str], str]  # takes what follows the word, returns what to say
COMMANDS: dict[str, tuple[str, Command, str]] = {
    "/help": ("", show_help, "this list"),
    "/reset": ("", reset, "start a new conversation; the system message stays"),
    "/system": (" [text]", system, 'set the system message ("" removes it), or show what the model reads first'),
    "/undo": ("", undo, "drop the last exchange"),
    "/save": (" [file]", save, "write the messages to a JSON file; /save --overwrite FILE replaces one"),
    "/base": ("", base, "switch between the finetuned model and its base, in the same conversation"),
    "/use": (" [name]", use, "let another of the models answer in the same conversation, or list them"),
    "/exit": ("", leave, "leave, like Ctrl-D"),
}


@contextmanager
def line_editing() -> Iterator[None]:
    """Line editing and a persistent history, if Python comes with readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    if "libedit" not in (readline.__doc__ or ""):  # GNU's has pasted text marked, so that it is sent as one
        asks = os.environ.get("TERM", "dumb") != "dumb"  # a dumb terminal would show the request itself
        readline.parse_and_bind(r'"\e[200~": bracketed-paste-begin')
        readline.parse_and_bind(f"set enable-bracketed-paste {'on' if asks else 'off'}")
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state if os.path.isabs(state) else os.path.expanduser("~/.local/state")) / "litpeft"
    path = folder / "chat_history"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        if path.stat().st_size:  # libedit takes an empty file for a broken one
            readline.read_history_file(path)
    except OSError as error:
        tell(f"no history of earlier lines: {path}: {error.strerror}")
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        try:
            readline.write_history_file(path)
        except OSError as error:
            tell(f"the history was not saved: {path}: {error.strerror}")
