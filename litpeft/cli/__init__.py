"""The command line: a parser for the command that is called, and what runs it.

Imports are late, so that `litpeft --help` only reads the table of commands.py.
"""

import gc
import io
import os
import signal
import sys
import time
import traceback
from contextlib import redirect_stdout
from dataclasses import fields
from importlib import import_module
from typing import Any

from litpeft import __version__
from litpeft.cli.commands import COMMANDS, Command, called
from litpeft.core import errors
from litpeft.core.errors import ConfigError, ResourceError, UserError, brief, quoted
from litpeft.core.memory import memory_error, out_of_memory
from litpeft.core.terminal import TolerantStream, say, tell
from litpeft.methods import METHODS
from litpeft.train.launch import PATIENCE, launch, leave, peer_lost, started_by


def main(argv: list[str] | None = None) -> None:
    """Runs one command and exits with its code (see litpeft/core/errors.py)."""
    began = time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = ["--debug"] if "--debug" in argv else []
    argv = [word for word in argv if word != "--debug"]
    command = argv[0] if argv else ""
    pressed: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    before, stderr = signal.signal(signal.SIGINT, interrupt), sys.stderr
    sys.stderr = TolerantStream(stderr)  # a closed stderr changes neither the work nor the exit code
    try:
        dispatch(argv, debug, began)
        sys.stdout.flush()
        if started_by() is not None:
            leave(0)
    except SystemExit as stop:
        if started_by() is not None:
            leave(int(stop.code or 0))
        raise
    except (Exception, KeyboardInterrupt) as error:
        # some libraries turn Ctrl-C during their import into another error
        if isinstance(error, KeyboardInterrupt) or (pressed and not isinstance(error, UserError)):
            tell("litpeft: interrupted")
            leave(errors.INTERRUPTED)
        if debug:
            tell("".join(traceback.format_exception(error)).rstrip())
        leave(_report(error, command))
    finally:
        signal.signal(signal.SIGINT, before)
        sys.stderr = stderr


def _report(error: Exception, command: str) -> int:
    """Prints the error of a command (its first word) and returns the exit code."""
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()  # the reader of our output is gone
        return 1
    text = " ".join(str(error).split())
    if peer_lost(error):
        tell(f"litpeft: another rank of the run is gone: {text[:200]}")
        return errors.PEER_LOST
    others = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0"
    if isinstance(error, UserError) and others and not isinstance(error, ResourceError):
        if started_by() == "litpeft":
            return error.exit_code  # every rank has the same error: the machine's first rank prints it
        time.sleep(PATIENCE)  # torchrun ends all ranks once one has left: let the first rank print first
    if out_of_memory(error):
        error = error if isinstance(error, ResourceError) else memory_error(error, command)
    elif isinstance(error, OSError):
        error = ResourceError(error.strerror or text, where=error.filename or "")
    if isinstance(error, UserError):
        tell(f"litpeft: {error}")
        return error.exit_code
    tell(f"litpeft: internal error: {type(error).__name__}: {brief(text)}")
    tell("hint: this is a bug of litpeft; --debug shows where")
    return errors.INTERNAL_ERROR


def dispatch(argv: list[str], debug: list[str], began: float) -> None:
    """Runs the command that `argv` begins with, with the settings of the rest.

    `debug` is passed on to processes that the command starts; the program `began` at that time.
    """
    if argv and argv[0] == "--version":
        say(__version__)
        return
    words: list[str] = []
    while argv and not argv[0].startswith("-") and " ".join(words) not in COMMANDS:
        words.append(argv.pop(0))
        if not any(f"{name} ".startswith(" ".join(words) + " ") for name in COMMANDS):
            from litpeft.cli.suggestions import suggest_command

            two = " ".join([*words, *argv[:1]])  # the method shows that a misspelt word is `finetune`
            near = suggest_command(two, COMMANDS) or suggest_command(" ".join(words), COMMANDS)
            if words[0] in METHODS:
                near = f' (did you mean "finetune {words[0]}"?)'
            what = f"there is no command {quoted(' '.join(words))}{near}"
            raise ConfigError(what, hint="litpeft --help lists the commands")
    name = " ".join(words)
    if name not in COMMANDS:
        unknown = [word for word in argv if word not in ("-h", "--help")]
        if unknown:
            raise ConfigError(f"{quoted(unknown[0])} comes before a command", hint="litpeft --help lists them")
        return usage(name)
    command = COMMANDS[name]
    given = [*words, *argv, *debug]
    settings, method, lines = parse(name, command, argv)
    if command.method is not None and settings.devices * settings.num_nodes > 1 and not settings.dry_run:
        code = launch(given, settings.devices, settings.num_nodes)
        if code is not None:
            sys.exit(code)
    begin_early(command, settings)
    function = load(command.function, called(name))
    if not gc.isenabled():  # see __main__.py
        gc.freeze()  # imported modules stay: never scan them
        gc.enable()
    try:
        function(settings) if command.method is None else function(settings, command.method, method, began)
    except UserError as error:  # add the file and line of the key that it names
        error.where = f"{lines[error.where]}: {error.where}" if error.where in lines else error.where
        raise


def begin_early(command: Command, settings: Any) -> None:
    """Begins what takes long and needs no lock of Python's, beside the imports of the command."""
    if hasattr(settings, "compared"):
        from litpeft.core.early_sums import begin_folders

        begin_folders(settings.compared)
    if command.method is not None:  # whose settings have imported torch
        from litpeft.core.precision import start_device

        start_device()


def usage(prefix: str) -> None:
    """Prints the commands that begin with `prefix`."""
    say(f"usage: litpeft {prefix + ' ' if prefix else ''}COMMAND [options]\n\ncommands:")
    helps = {name: command.help for name, command in COMMANDS.items() if name.startswith(prefix)}
    for name, text in helps.items():
        say(f"  {name:<{max(map(len, helps))}}  {text}")
    say("\n`litpeft COMMAND --help` lists a command's options.\n--debug shows where an error came from.")


def parse(name: str, command: Command, argv: list[str]) -> tuple[Any, Any, dict[str, str]]:
    """Returns the settings of a command, its method (for `finetune`), and `file:line` of each key in a YAML file."""
    from jsonargparse import ArgumentError

    from litpeft.cli.help import help_text, wanted
    from litpeft.cli.paths import expand_paths
    from litpeft.cli.yaml_keys import check_options, check_yaml, in_plain_words

    parser = parser_of(name, command)
    group = wanted(argv, parser)
    if group is not None:
        say(help_text(parser, group), end="")
        raise SystemExit(0)
    argv = check_options(parser, argv, command.unnamed)
    lines = check_yaml(parser, argv)
    printed = io.StringIO()  # by --print_config
    try:
        with redirect_stdout(printed):
            given = parser.parse_args(argv)
            expand_paths(given)
            parsed = parser.instantiate(given)
        cls = settings_of(name, command)
        settings = cls(**{field.name: parsed[field.name] for field in fields(cls)})
    except (ArgumentError, TypeError, ValueError) as error:
        text = in_plain_words(" ".join(str(getattr(error, "message", None) or error).split()), parser)
        hint = f"for example: {parser.epilog}" if "are required" in text else ""
        where = next((at for key, at in lines.items() if key in text), "")
        raise ConfigError(text, where=where, hint=hint) from None
    finally:
        say(printed.getvalue(), end="")
    return settings, parsed.get("method"), lines


def parser_of(name: str, command: Command) -> Any:
    """Returns the jsonargparse.ArgumentParser of a command: its options, with their defaults and help."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    cls = settings_of(name, command)
    example = f"litpeft {name} {command.example}"
    parser = ArgumentParser(prog=f"litpeft {name}", description=cls.__doc__, epilog=example, exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(cls, as_group=False, as_positional=not command.in_yaml)
    if command.method is not None:
        from litpeft.methods import PRESETS, method_class

        parser.add_class_arguments(method_class(command.method), "method")
        parser.set_defaults(PRESETS.get(command.method, {}))
    return parser


def settings_of(name: str, command: Command) -> type:
    """Returns the dataclass of a command's settings."""
    return load(command.settings, called(name).capitalize())


def load(module: str, name: str) -> Any:
    """Returns what a module of litpeft calls so; imports it."""
    return getattr(import_module(f"litpeft.{module}"), name)
