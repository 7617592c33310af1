"""The tokens that a method adds to a vocabulary: their ids, and the config with their rows (added_rows.py)."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

from litpeft.core.errors import ConfigError
from litpeft.data.rows import Row
from litpeft.data.tokenizer import Tokenizer
from litpeft.model.config import ModelConfig
from litpeft.model.delta import Method

KEY = "method.add_tokens"
SEARCHED = 10_000  # rows


def note_tokens(method: Method, tokenizer: Tokenizer) -> None:
    """Adds a method's tokens to the tokenizer, and tells the method their ids."""
    if not method.add_tokens:
        return
    if method.writes_model:
        what = "this method writes a model of the base's own tokens"
        raise ConfigError(what, where=KEY, hint="take another method; method.unfreeze trains more of the base")
    tokenizer.add(method.add_tokens, KEY)
    method.token_ids = tuple(tokenizer.backend.ids[token] for token in method.add_tokens)


def unseen(method: Method, rows: Iterable[Row]) -> list[str]:
    """Returns the tokens of a method that none of the first rows has; each of them would stay as it begins."""
    left = dict(zip(method.token_ids, method.add_tokens, strict=True))
    for row in islice(rows, SEARCHED if left else 0):
        for number in left.keys() & set(row.ids):
            del left[number]
        if not left:
            break
    return list(left.values())


def grown(config: ModelConfig, method: Method | None) -> ModelConfig:
    """Returns the config with a row for each token that the method adds."""
    ids = () if method is None else method.token_ids
    if ids and config.layer_inputs is not None:
        what = "this model has a second embedding, with a vector for each token and layer: tokens cannot be added to it"
        raise ConfigError(what, where=KEY, hint="leave the key out, or take a model of another family")
    return replace(config, vocab_size=max(config.vocab_size, *(number + 1 for number in ids))) if ids else config


def describe(config: dict[str, Any], method: Method) -> None:
    """Changes a config.json, in place, so that it describes the model that a run of `method` is merged into."""
    method.configure(config)
    if method.token_ids:
        config["vocab_size"] = max(config["vocab_size"], method.token_ids[-1] + 1)
