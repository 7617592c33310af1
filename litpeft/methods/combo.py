"""Combinations: several methods in one run. Each fills slots of its own, and they train together.

    y <- f_n(... f_1(y))        for the methods f_1, ..., f_n that act at one place, in the order of the registry

Mao et al. https://arxiv.org/abs/2110.07577 train LoRA, prefix tuning and adapters together.
Trains what its methods train. Folds if each of them does.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import tee
from random import Random
from typing import Any

from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.core.json import jsonable
from litpeft.core.typed import typed
from litpeft.data.batches import Batch
from litpeft.methods import METHODS, PRESETS, method_class
from litpeft.model.delta import Held, Method
from litpeft.model.gpt import GPT
from litpeft.model.slots import Linear


def each(hook: str) -> Callable[..., None]:
    """Returns a method of Combo that calls this hook of each of its methods."""

    def call(self: "Combo", *args: Any) -> None:
        for one in self.parts:
            getattr(one, hook)(*args)

    return call


@dataclass
class Combo(Method):
    """Several methods at once."""

    methods: dict[str, Any] = field(default_factory=lambda: {"lora": {}, "prefix": {}})
    """The methods by name, each with those of its keys that are not at their defaults, e.g.
    {"lora": {"rank": 4}, "prefix": {}}."""

    def __post_init__(self) -> None:
        self.parts = [part(name, self.methods[name]) for name in METHODS if name in self.methods]
        if len(self.parts) < max(2, len(self.methods)):
            wrong = next((name for name in self.methods if name not in METHODS), None)
            what = "must name two methods or more" if wrong is None else f'"{wrong[:40]}" is no method'
            raise ValueError(f"method.methods: {what}; there are {', '.join(METHODS)}")
        self.idle_parts = any(one.idle_parts for one in self.parts)
        self.add_tokens = tuple(dict.fromkeys((*self.add_tokens, *(t for one in self.parts for t in one.add_tokens))))
        self.unfreeze = tuple(dict.fromkeys((*self.unfreeze, *(glob for one in self.parts for glob in one.unfreeze))))

    def defines(self, hook: str) -> bool:
        return any(one.defines(hook) for one in self.parts)

    def attach(self, model: GPT) -> None:
        for one in self.parts:
            one.attach(model)
        if model.after_embed.virtual_tokens and model.learned_keys:
            what = "two of the methods write the virtual tokens, and one would undo what the other does"
            raise ConfigError(what, where="method.methods", hint="choose one of them")

    def start(self, name: str, linear: Linear, weight: Tensor, held: Held, saved: dict[str, Tensor] | None) -> Tensor:
        for one in self.parts:
            weight = one.start(name, linear, weight, held, saved)
        return weight

    configure, read, start_embedding = each("configure"), each("read"), each("start_embedding")
    restore, after_step = each("restore"), each("after_step")

    def result(self, model: GPT, tensors: dict[str, Tensor]) -> tuple[Method, dict[str, Tensor]]:
        kept = dict(self.methods)
        for name, one in zip((name for name in METHODS if name in self.methods), self.parts, strict=True):
            method, tensors = one.result(model, tensors)
            kept |= {} if method is one else {name: jsonable(asdict(method))}
        return replace(self, methods=kept), tensors

    @contextmanager
    def training_step(self, model: GPT, draws: Random) -> Iterator[None]:
        with ExitStack() as stack:
            for one in self.parts:
                stack.enter_context(one.training_step(model, draws))
            yield

    def calibrate(self, model: GPT, batches: Iterator[Batch]) -> None:
        for one, rows in zip(self.parts, tee(batches, len(self.parts)), strict=True):
            one.calibrate(model, rows)

    def penalty(self, model: GPT) -> Tensor | None:
        found = [penalty for one in self.parts if (penalty := one.penalty(model)) is not None]
        return sum(found) if found else None

    @property
    def searches(self) -> bool:
        return any(one.searches for one in self.parts)

    def search_step(self, steps: int) -> int:
        return max((one.search_step(steps) for one in self.parts if one.searches), default=steps)

    def search(self, model: GPT, loss: Callable[[], float]) -> str | None:
        said = [one.search(model, loss) for one in self.parts if one.searches]
        return "; ".join(filter(None, said)) or None


def part(name: str, keys: Any) -> Method:
    """Returns a method with these keys, which are checked as if they had been given to it alone."""
    cls, key = method_class(name), f"method.methods.{name}"
    on_codes = "base.quantize" in PRESETS.get(name, {})
    if cls is Combo or cls.writes_model or on_codes:
        same = next((other for other, (path, _) in METHODS.items() if path == METHODS[name][0] and other != name), None)
        hint = f"; name {same}, and set base.quantize" if on_codes and same else ""
        raise ValueError(f"{key} cannot be combined with others{hint}")
    if not isinstance(keys, dict):
        raise ValueError(f"{key} must be keys and values, {{}} for its defaults")
    return typed(cls, jsonable(asdict(cls())) | keys, key)
