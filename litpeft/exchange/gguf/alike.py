"""Whether what a GGUF header says is what a model's config says."""

import math
from dataclasses import fields
from typing import Any

from litpeft.exchange.gguf.layout import allowed
from litpeft.model.config import ModelConfig

UNSAID = {"longrope": "factor", "yarn": "truncate"}  # kind of scaling -> what a header does not say: see rope.py


def same_model(read: ModelConfig, written: ModelConfig, known: Any) -> bool:
    """Returns whether the config that was read from a file computes the same as the one that was written to it.

    A file says a context that ends with the window instead of the window, where llama.cpp has none for the family.
    """
    for field in fields(ModelConfig):
        ours, theirs = getattr(read, field.name), getattr(written, field.name)
        either = field.name == "activation" and {ours, theirs} <= set(allowed(known, written, field.name))
        if field.name not in ("max_positions", "window") and not either and not alike(ours, theirs):
            return False
    return True


def alike(one: Any, other: Any) -> bool:
    """Returns whether two values are equal, as far as a header says them and float32 holds numbers."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, list) != isinstance(other, list):  # a number for all layers, or one for each
        one, other = (one, other) if isinstance(one, list) else (other, one)
        return all(alike(value, other) for value in one)
    if hasattr(one, "__dataclass_fields__") and type(one) is type(other):
        idle = UNSAID.get(getattr(one, "kind", ""))
        return all(alike(value, getattr(other, key)) for key, value in vars(one).items() if key != idle)
    return one == other
