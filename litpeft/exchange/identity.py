"""What decides the logits and ids of a model folder beside its weights, as values that a run keeps and compares.

They are taken from what was read, not from the files' bytes: another order of keys, other spaces, or a key that
litpeft does not use change nothing.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import MISSING, asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from litpeft.core.json import read_json
from litpeft.data.templates import ChatTemplate
from litpeft.model.config import ModelConfig
from litpeft.model.families.read import read_config

# Text whose ids show what the settings of a tokenizer do that no file of it spells out: spaces, digits, other scripts.
PROBE = " Hello,  world!\n\n\tIt's 12345.67 [x] <s>naïve</s> Straße 你好 \N{SLIGHTLY SMILING FACE}\u2581e\u0301 end "
UNUSED = ("version", "truncation", "padding", "post_processor")  # of tokenizer.json: litpeft adds and cuts nothing
MEANINGS = {  # of a difference in the sums
    "file": "its file holds another one",
    "vocabulary": "other tokens are added or special",
    "probe": "the same text becomes other ids",
}


@dataclass(frozen=True)
class TokenizerIdentity:
    """What decides the ids of a text, and where an answer ends."""

    file: str  # sha256 of what tokenizer.json or tokenizer.model says
    vocabulary: str  # sha256 of all tokens with their ids, and of which are special
    probe: str  # sha256 of the ids of a text that holds every added token
    special_tokens: dict[str, str]  # bos_token, eos_token, ... as far as the template or plain text use them
    adds_bos: bool
    stop_ids: tuple[int, ...]  # of the template and the tokenizer


def config_identity(folder: Path) -> dict[str, Any]:
    """Returns the model's config as litpeft reads it, with the name of its family."""
    name, config = read_config(folder)
    return {"model_type": name, **asdict(config)}


def tokenizer_identity(template: ChatTemplate) -> dict[str, Any]:
    """Returns the TokenizerIdentity of a template's tokenizer, as a dict."""
    tokenizer = template.tokenizer
    backend, path = tokenizer.backend, Path(tokenizer.where)
    if path.suffix == ".json":
        content = {key: value for key, value in read_json(path, path.name).items() if key not in UNUSED}
        file = sha256(content)
    else:
        file = hashlib.sha256(path.read_bytes()).hexdigest()
    text = "".join(f"{PROBE}{token}" for token in ["", *sorted(backend.added)])
    used = {
        name: token
        for name, token in tokenizer.special_tokens.items()
        if name in template.source or (name == "bos_token" and tokenizer.adds_bos)
    }
    identity = TokenizerIdentity(
        file=file,
        vocabulary=sha256([sorted(backend.names.items()), sorted(backend.specials)]),
        probe=sha256(backend.encode([text])[0].ids),
        special_tokens=used,
        adds_bos=tokenizer.adds_bos,
        stop_ids=template.stop_ids,
    )
    return asdict(identity)


def config_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a line for each field in which the config that a run kept differs from the one there is."""
    return changed(with_defaults(then), now, ())


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config that a run kept, with the defaults of what ModelConfig has got since."""
    return {field.name: field.default for field in fields(ModelConfig) if field.default is not MISSING} | config


def tokenizer_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns in words what differs between the tokenizer's identity that a run kept and the one there is."""
    lines = changed(then, now, ())
    return [MEANINGS.get(line.split(":")[0], line) for line in lines]


def sha256(value: Any) -> str:
    """Returns the sha256 of a JSON value, in which the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings under dotted keys, with lists for tuples."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def changed(then: dict[str, Any], now: dict[str, Any], allowed: Collection[str]) -> list[str]:
    """Returns a line like `train.lr: 0.001 -> 0.002` for each setting that differs and that no glob allows to."""

    def shown(settings: dict[str, Any], key: str) -> str:
        return json.dumps(settings[key], default=str) if key in settings else "not set"

    then, now = flat(then), flat(now)
    lines = []
    for key in dict.fromkeys((*then, *now)):
        differs = key not in then or key not in now or then[key] != now[key]
        if differs and not any(fnmatchcase(key, glob) for glob in allowed):
            lines.append(f"{key}: {shown(then, key)} -> {shown(now, key)}")
    return lines
