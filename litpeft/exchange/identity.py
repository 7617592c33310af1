"""The identity of a model's config and tokenizer: values that a run records and compares when its base is used again.

They are taken from what was read, not from the files' bytes: the order of keys, white space and unused keys have no
effect.
"""

import hashlib
import json
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from litpeft.core.errors import ResourceError
from litpeft.core.folders import atomic_file
from litpeft.core.json import jsonable, read_json
from litpeft.data.templates import ChatTemplate
from litpeft.model.config import ModelConfig
from litpeft.model.families.read import read_config

# Its ids show what settings of a tokenizer do: to spaces, digits, special tokens, other scripts.
PROBE = " Hello,  world!\n\n\tIt's 12345.67 [x] <s>naïve</s> Straße 你好 \N{SLIGHTLY SMILING FACE}\u2581e\u0301 end "
UNUSED = ("version", "truncation", "padding", "post_processor")  # keys of tokenizer.json without effect in litpeft
KEPT_FROM = 1 << 20  # bytes of a tokenizer.json whose sum is kept
MEANINGS = {  # field of TokenizerIdentity -> what a difference in it means
    "file": "its file holds another one",
    "vocabulary": "other tokens are added or special",
    "probe": "the same text becomes other ids",
}


@dataclass(frozen=True)
class TokenizerIdentity:
    """What determines the ids of a text, and where an answer ends."""

    file: str  # sha256 of the content of tokenizer.json or tokenizer.model
    vocabulary: str  # sha256 of all tokens with their ids, and of which are special
    probe: str  # sha256 of the ids of a text that holds every added token
    special_tokens: dict[str, str]  # those of bos_token, eos_token, ... that the template or plain text uses
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
    file = content_sum(path) if path.suffix == ".json" else hashlib.sha256(path.read_bytes()).hexdigest()
    text = "".join(f"{PROBE}{token}" for token in ["", *sorted(backend.added)])
    named = tokenizer.special_tokens
    used = {k: named[k] for k in named if k in template.source or (k == "bos_token" and tokenizer.adds_bos)}
    vocabulary = checksum([sorted(backend.names.items()), sorted(backend.specials)])
    probe = checksum(backend.encode([text])[0].ids)
    return asdict(TokenizerIdentity(file, vocabulary, probe, used, tokenizer.adds_bos, template.stop_ids))


def content_sum(path: Path) -> str:
    """Returns the sha256 of what a tokenizer.json holds, without UNUSED keys.

    That takes a second for the 17 MB of Llama 3.1's, so it is kept in ~/.cache/litpeft, by the sha256 of the bytes.
    """
    kept = None
    with suppress(OSError, RuntimeError, ValueError):  # there is none yet; or no home, or it is damaged
        if path.stat().st_size >= KEPT_FROM:
            name = hashlib.sha256(repr(UNUSED).encode() + path.read_bytes()).hexdigest()
            kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litpeft" / "tokenizers" / name
            value, check = kept.read_text(encoding="ascii").split()
            if check == checksum([name, value]):
                return value
    value = checksum({key: value for key, value in read_json(path, path.name).items() if key not in UNUSED})
    if kept is not None:
        with suppress(OSError, ResourceError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(kept) as file:
                file.write(f"{value} {checksum([kept.name, value])}\n")
    return value


def config_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a line for each field in which the recorded config differs from the present one."""
    return changed(with_defaults(then), now)


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a recorded config with the defaults of fields that ModelConfig did not have then."""
    defaults = {field.name: field.default for field in fields(ModelConfig) if field.default is not MISSING}
    return jsonable(defaults) | config


def tokenizer_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a line for each difference between the recorded tokenizer identity and the present one."""
    return [MEANINGS.get(line.split(":")[0], line) for line in changed(then, now)]


def checksum(value: Any) -> str:
    """Returns the sha256 of a JSON value; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings with dotted keys, and lists for tuples."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = jsonable(value)
    return found


def changed(then: dict[str, Any], now: dict[str, Any], allowed: Collection[str] = ()) -> list[str]:
    """Returns a line like `train.lr: 0.001 -> 0.002` for each setting that differs and matches no `allowed` glob."""

    def shown(settings: dict[str, Any], key: str) -> str:
        return json.dumps(settings[key], default=str) if key in settings else "not set"

    then, now = flat(then), flat(now)
    keys = [key for key in dict.fromkeys((*then, *now)) if not any(fnmatchcase(key, glob) for glob in allowed)]
    differ = [key for key in keys if key not in then or key not in now or then[key] != now[key]]
    return [f"{key}: {shown(then, key)} -> {shown(now, key)}" for key in differ]
