"""The keys of a config.json that say how positions rotate, in their old and new spellings. No torch."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from litpeft.model.config import Layer, Rope, RopeScaling, checked

PARTIAL, ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"
KINDS = Literal["default", "linear", "llama3", "dynamic", "yarn", "longrope"]
FULL, SLIDING, PROPORTIONAL = "full_attention", "sliding_attention", "proportional"


class Given:
    """Keys with the names that a config.json has for them, and their values."""

    def __init__(self, values: dict[str, tuple[str, Any]], where: str):
        self.values, self.where = values, where

    def take(self, key: str, kind: Any, default: Any = None) -> Any:
        """Returns the value of a key, if it is of its kind; without it the default, or a KeyError if there is none."""
        if key not in self.values and default is None:
            raise KeyError(f"{self.where}.{key}")
        return checked(*self.values.get(key, (key, default)), kind)

    def optional(self, key: str, kind: Any) -> Any:
        """Returns the value of a key, or None if it is missing or null."""
        return None if self.values.get(key, ("", None))[1] is None else self.take(key, kind)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Returns the numbers of a list."""
        name, value = self.values.get(key, (f"{self.where}.{key}", None))
        if not isinstance(value, list) or not value:
            raise ValueError(f"{name} {value!r:.80} is not supported; it must be a list of numbers")
        return tuple(checked(name, number, float) for number in value)


def rope_settings(
    hf: Mapping[str, Any],
    max_positions: int,
    theta: str = "rope_theta",
    share: str = PARTIAL,
    default_share: float = 1.0,
    default_theta: float = 10000.0,
) -> tuple[float, float, RopeScaling | None]:
    """Returns theta, the share of a head that rotates, and the scaling.

    Of several keys for one value the one that transformers reads counts: the first of `rope_scaling` and
    `rope_parameters` that is not empty, and its keys before `theta` and `share`, older files' keys at the top level.
    """
    where = next((key for key in ("rope_scaling", "rope_parameters") if checked(key, hf.get(key), dict | None)), "")
    values = {field: (name, hf[name]) for field, name in (("rope_theta", theta), (PARTIAL, share)) if name in hf}
    values |= {key: (f"{where}.{key}", value) for key, value in (hf[where] if where else {}).items()}
    if nested := [name for name, value in values.values() if isinstance(value, dict)]:
        raise ValueError(f"{', '.join(nested)}: rotary positions that differ from layer to layer are not supported")
    given = Given(values, where)
    base, part = given.take("rope_theta", float, default_theta), given.take(PARTIAL, float, default_share)
    kind = given.take("rope_type" if "rope_type" in values else "type", KINDS, "default")
    if kind == "default":
        return base, part, None
    if kind in ("llama3", "yarn", "longrope") and ORIGINAL in hf:  # it wins over the one inside
        values[ORIGINAL] = (ORIGINAL, hf[ORIGINAL])
    return base, part, _scaling(kind, given, max_positions)


def _scaling(kind: str, given: Given, max_positions: int) -> RopeScaling:
    """Returns how frequencies are scaled, by the rules of transformers' modeling_rope_utils.py."""
    if kind == "linear":
        return RopeScaling("linear", given.take("factor", float))
    if kind == "dynamic":
        return RopeScaling("dynamic", given.take("factor", float), original_positions=max_positions)
    if kind == "llama3":
        factor = given.take("factor", float)
        low, high = given.take("low_freq_factor", float), given.take("high_freq_factor", float)
        if low >= high:
            raise ValueError(f"{given.where}.low_freq_factor {low} must be below high_freq_factor {high}")
        return RopeScaling("llama3", factor, low, high, given.take(ORIGINAL, int, max_positions))
    original = given.take(ORIGINAL, int, max_positions)
    factor = given.take("factor", float | None) if kind == "yarn" else given.optional("factor", float)
    factor = max_positions / original if factor is None else factor
    attention = given.optional("attention_factor", float)
    if kind == "longrope":
        if attention is None:
            if original < 2:
                raise ValueError(f"{given.values[ORIGINAL][0]} {original} is not supported; it must be at least 2")
            attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        short, long = given.numbers("short_factor"), given.numbers("long_factor")
        return RopeScaling(
            "longrope",
            factor,
            original_positions=original,
            attention_factor=attention,
            short_factors=short,
            long_factors=long,
        )
    if attention is None:
        one, all_ = given.optional("mscale", float), given.optional("mscale_all_dim", float)
        attention = grown(factor, one) / grown(factor, all_) if one and all_ else grown(factor, 1.0)
    return RopeScaling(
        "yarn",
        factor,
        original_positions=original,
        attention_factor=attention,
        beta_fast=given.optional("beta_fast", float) or 32.0,
        beta_slow=given.optional("beta_slow", float) or 1.0,
        truncate=given.take("truncate", bool, True),
    )


def grown(factor: float, scale: float) -> float:
    """Returns yarn's factor for the size of queries and keys."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def stretched(theta: float, alpha: float, head_dim: int) -> float:
    """Returns the theta of Hunyuan's positions with an alpha."""
    return theta * alpha ** (head_dim / (head_dim - 2))


def rope_by_type(hf: Mapping[str, Any], max_positions: int, thetas: Mapping[str, tuple[str, float]]) -> dict[str, Rope]:
    """Returns the rotary positions of each type of layer, where config.json has them by type, as Gemma 3 does.

    `thetas` are for each type the older files' key for its theta, and the default. `rope_scaling` is of full attention.
    """
    given = checked("rope_parameters", hf.get("rope_parameters"), dict | None)
    given = {} if given is None else given
    ropes = {}
    for kind, (key, default) in thetas.items():
        inner = dict(checked(f"rope_parameters.{kind}", given.get(kind), dict | None) or {})
        if kind == FULL:
            inner = inner | (checked("rope_scaling", hf.get("rope_scaling"), dict | None) or {})
        inner.pop("truncate", None)  # which the class reads elsewhere
        flat = {"rope_parameters": inner} | ({key: hf[key]} if key in hf else {})
        if inner.get("rope_type") == PROPORTIONAL:
            ropes[kind] = _proportional(Given({k: (f"rope_parameters.{kind}.{k}", v) for k, v in inner.items()}, kind))
            continue
        try:
            theta, share, scaling = rope_settings(flat, max_positions, key, default_theta=default)
        except (KeyError, ValueError) as error:
            raise ValueError(str(error.args[0]).replace("rope_parameters.", f"rope_parameters.{kind}.")) from None
        if share != 1:
            raise ValueError(f"{PARTIAL} {share} is not supported; it must be 1")
        ropes[kind] = Rope(theta, scaling)
    if flat_keys := [key for key in given if key not in thetas]:
        what = ", ".join(f"rope_parameters.{key}" for key in flat_keys)
        raise ValueError(f"{what} is not supported; they belong into {' and '.join(thetas)}")
    return ropes


def _proportional(given: Given) -> Rope:
    """Returns positions of which the first frequencies of a head turn, and the others are 0."""
    share, factor = given.take(PARTIAL, float, 1.0), given.take("factor", float, 1.0)
    if share > 1:
        raise ValueError(f"{PARTIAL} {share} is not supported; it must be at most 1")
    return Rope(given.take("rope_theta", float, 10000.0), RopeScaling(PROPORTIONAL, factor, share=share))


def without_rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json without the keys of its rotary positions."""
    return {key: value for key, value in hf.items() if key not in ("rope_theta", "rope_parameters", "rope_scaling")}


def layers_of(
    types: Sequence[str] | None,
    slides: Callable[[int], bool],
    count: int,
    window: int | None,
    ropes: Rope | Mapping[str, Rope],
) -> list[Layer]:
    """Returns the layers that `layer_types` describes: those of sliding attention have the window.

    Without the key `slides` says which do.
    """
    if count > 10_000:  # before that many are made
        raise ValueError(f"num_hidden_layers {count} is not supported")
    if types is None:
        types = [SLIDING if slides(layer) else FULL for layer in range(count)]
    if len(types) != count:
        raise ValueError(f"layer_types has {len(types)} entries, num_hidden_layers says {count}")
    if strange := [kind for kind in types if kind not in (FULL, SLIDING)]:
        raise ValueError(f"layer_types {strange[0]!r} is not supported; it must be {FULL!r} or {SLIDING!r}")
    if SLIDING in types and window is None:
        raise ValueError(f"layer_types names {SLIDING!r}, but sliding_window is null or switched off")
    of = lambda kind: ropes if isinstance(ropes, Rope) else ropes[kind]
    return [Layer(window if kind == SLIDING else None, of(kind)) for kind in types]


def interpolated(hf: dict[str, Any], factor: float) -> None:
    """Changes a config.json, in place: the model reads `factor` times as many tokens, at positions that much closer."""
    if factor == 1:
        return
    found = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = found.get("rope_type", found.get("type"))
    before = found.get("factor", 1.0) if kind == "linear" else 1.0
    scaled = {**found, "rope_type": "linear", "factor": before * factor}
    scaled.pop("type", None)
    if kind == "dynamic" and (alpha := scaled.pop("alpha", None)):  # Hunyuan's, without effect beside "linear"
        theta = found.get("rope_theta", hf.get("rope_theta", 10000.0))
        scaled["rope_theta"] = stretched(theta, alpha, hf["head_dim"])
    hf["rope_scaling"], hf["rope_parameters"] = scaled, scaled  # for readers before transformers 5, and since
    hf["max_position_embeddings"] = int(hf["max_position_embeddings"] * factor)


def spell_twice(hf: dict[str, Any], names: Mapping[str, str]) -> None:
    """Gives a config.json, in place, the rotary settings as readers before transformers 5 spell them, and as since.

    `names` are the family's names for rope_theta and partial_rotary_factor at the top level, if they are others.
    """
    new = hf.get("rope_parameters")
    if isinstance(new, dict) and new and not any(isinstance(value, dict) for value in new.values()):
        kind = new.get("rope_type", new.get("type", "default"))
        scaling = {key: value for key, value in new.items() if key not in ("rope_theta", PARTIAL)}
        hf.setdefault("rope_scaling", None if kind == "default" else scaling | {"rope_type": kind, "type": kind})
        for key in ("rope_theta", PARTIAL):
            if key in new:
                hf.setdefault(names.get(key, key), new[key])
    elif not new and names.get("rope_theta", "rope_theta") in hf:
        at_top = {key: hf[names.get(key, key)] for key in ("rope_theta", PARTIAL) if names.get(key, key) in hf}
        scaling = hf.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        hf["rope_parameters"] = {**scaling, **at_top, "rope_type": kind}
