"""Strict options and YAML keys: an unknown or repeated one is an error with its file and line."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentParser

from litpeft.cli.suggestions import suggest
from litpeft.cli.yaml_bounds import TooMuch, compose
from litpeft.cli.yaml_values import check_value, check_word
from litpeft.core.errors import ConfigError, quoted
from litpeft.core.kinds import alternatives, in_words

LARGEST = 1 << 20  # bytes of a YAML file


def _options(parser: ArgumentParser) -> dict[str, Any]:
    """Returns the type of each option by its dotted name; None for a group of options."""
    return {action.dest: getattr(action, "_typehint", None) for action in parser._actions}


def _kind(name: str, options: dict[str, Any]) -> Any:
    """Returns the type of an option, or of the dict option that takes it as `OPTION.KEY`; None for any other name."""
    if name in options:
        return options[name]
    dicts = (kind for option, kind in options.items() if "dict" in str(kind) and name.startswith(f"{option}."))
    return next(dicts, None)


def _unknown(name: str, options: dict[str, Any]) -> str:
    """Returns a suggestion for an unknown key, to be appended to its name."""
    groups = {name.partition(".")[0] for name in options if "." in name}
    return suggest(name, [option for option in options if option not in groups])


def check_options(parser: ArgumentParser, argv: list[str], unnamed: str = "") -> list[str]:
    """Checks `argv`; returns it with --config first, so that options override it, and `true` after a bare switch.

    A word after all that must be given is the value of the option `unnamed`, if there is one.
    """
    options = _options(parser)
    positional = [action.dest for action in parser._actions if not action.option_strings]
    first: list[str] = []
    rest: list[str] = []
    words, alone = list(argv), 0
    while words:
        word = words.pop(0)
        name, has_value, _ = word.removeprefix("--").partition("=")
        if not word.startswith("--") or word == "--":
            if re.match("-[^-0-9.]", word) and word != "-h" and "--" not in rest:
                what = f"there is no option {word}{_unknown(word[1:], options)}"
                raise ConfigError(what, hint="`--help` lists the options")
            if positional:
                check_word(word, positional[0], str, " or ".join(positional))
            alone += word != "--"
            if unnamed and alone == len(positional) + 1:
                first += [f"--{unnamed}", word]
            else:
                rest.append(word)
            continue
        if name not in ("config", "help") and any(option.startswith(f"{name}.") for option in options):
            keys = ", ".join(f"--{option}" for option in options if option.startswith(f"{name}."))
            raise ConfigError(f"--{name} takes no value of its own; its keys are {keys}")
        if name in positional:
            what = f"--{name} is no option: its value is given alone, without a name before it"
            raise ConfigError(what, hint=parser.epilog or "")
        kind = _kind(name, options)
        if name not in options and kind is None:
            hint = "`--help` lists the options"
            raise ConfigError(f"there is no option --{name}{_unknown(name, options)}", hint=hint)
        value = [] if has_value or not words or words[0].startswith("--") else [words.pop(0)]
        if kind is not None and kind is not bool:
            for text in [word.partition("=")[2]] if has_value else value:
                check_word(text, name, kind, f"--{name}")
        if not has_value and options.get(name) is bool:
            said = value[0].lower() if value else ""
            if said.startswith("-"):  # the next option, not this switch's value
                words, value, said = value + words, [], ""
            if value and said not in ("true", "false") and not positional:
                raise ConfigError(f"{name} must be true or false, got {quoted(value[0])}")
            if said not in ("true", "false"):
                words, value = value + words, ["true"]
            else:
                value = [said]
        if str(options.get(name)).startswith("tuple[str") and value and not value[0].startswith("["):
            value = [json.dumps(value)]  # one string stands for a list of it
        (first if name == "config" else rest).extend([word, *value])
    return first + rest


def check_yaml(parser: ArgumentParser, argv: list[str]) -> dict[str, str]:
    """Returns `file:line` of every key in the --config files; raises for an unknown or repeated key."""
    files = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"]
    files += [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    options = {name: kind for name, kind in _options(parser).items() if name not in ("help", "config", "print_config")}
    lines: dict[str, str] = {}
    for file in files:
        try:
            text = Path(file).read_bytes()
            if len(text) > LARGEST:
                raise ConfigError(f"{len(text):,} bytes are too many for a YAML file", where=file)
            root = compose(text)
        except TooMuch as error:
            raise ConfigError(str(error), where=f"{file}:{error.line}") from None
        except OSError as error:
            raise ConfigError(error.strerror or str(error), where=file) from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{file}:{mark.line + 1}" if mark else file
            what = getattr(error, "problem", None) or " ".join(str(error).split())
            raise ConfigError(f"not YAML: {what}", where=where) from None
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError("the file must hold keys and values", where=file)
        _walk(root, "", file, options, lines)
    # the longest first: an error about `train.lr` must not get the line of `train`
    return dict(sorted(lines.items(), key=lambda item: -len(item[0])))


def _walk(node: yaml.MappingNode, prefix: str, file: str, options: dict[str, Any], lines: dict[str, str]) -> None:
    seen: set[str] = set()
    for key_node, value in node.value:
        where = f"{file}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError("a key must be a word", where=where)
        key = prefix + key_node.value
        kind = _kind(key, options)
        free = key not in options and kind is not None
        group = not free and any(option.startswith(f"{key}.") for option in options)
        if key_node.value in seen:
            raise ConfigError(f'the key "{key}" stands twice', where=where)
        seen.add(key_node.value)
        if not free and ((key not in options and not group) or "." in key_node.value):
            group_of, _, leaf = key_node.value.rpartition(".")
            nested = f"; in a file it stands below {group_of}, as {group_of}: {{{leaf}: ...}}" if key in options else ""
            raise ConfigError(f'there is no key "{key}"{nested or _unknown(key, options)}', where=where)
        if not value.tag.startswith("tag:yaml.org,2002:") or "python" in value.tag:
            raise ConfigError(f'the tag {value.tag} of "{key}" is not plain YAML', where=where)
        if group and not isinstance(value, yaml.MappingNode):
            raise ConfigError(f'"{key}" must hold keys and values', where=where)
        if isinstance(value, yaml.MappingNode) and kind and "dict" not in str(kind):
            raise ConfigError(f'"{key}" must be {in_words(kind)}, got keys and values', where=where)
        if value.tag.endswith(":null") and options.get(key) and type(None) not in get_args(kind):
            raise ConfigError(f'"{key}" must not be null; leave it out for its default', where=where)
        if isinstance(value, yaml.ScalarNode) and "\0" in value.value:
            raise ConfigError(f'"{key}" holds a NUL character', where=where)
        if free:
            check_value(key_node, key, str, where)
        if kind is not None and not isinstance(value, yaml.MappingNode):
            check_value(value, key, kind, where)
        lines[key] = where
        if isinstance(value, yaml.MappingNode):
            _walk(value, f"{key}.", file, options, lines)


def in_plain_words(complaint: str, parser: ArgumentParser) -> str:
    """Returns a complaint of jsonargparse in plain words: the key, what is allowed, and what came."""
    options = _options(parser)
    wrong = re.match(r'Parser key "([^"]+)": .*?(?:Got value|Given value): ?(.*)', complaint)
    if wrong and options.get(wrong[1]):
        return f"{wrong[1]} must be {in_words(options[wrong[1]])}, got {quoted(wrong[2])}"
    empty = re.match(r"argument --(\S+): expected one argument", complaint)
    if empty and options.get(empty[1]):
        kind, dashed = options[empty[1]], f"; one that begins with - is given as --{empty[1]}=-..."
        return f"--{empty[1]} needs a value: {in_words(kind)}{dashed if str in alternatives(kind) else ''}"
    loose = re.match("unrecognized arguments: (.*)", complaint)
    if loose:
        return f"no option takes {quoted(loose[1])}; a value that has spaces needs quotes"
    return complaint
