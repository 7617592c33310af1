"""Methods whose deltas take one of several forms in each layer: a search on held-out rows chooses them.

Each step trains a path, the forms of the terms of a layer, drawn anew. Then an evolutionary search compares paths by
their loss, and the steps that are left train the best one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.core.kinds import check_least
from litpeft.methods.evolution import Genes, evolve
from litpeft.model.delta import Method, deltas_of
from litpeft.model.gpt import GPT
from litpeft.model.slots import Delta

Path = tuple[str, ...]  # the genes of one layer


class Searched(Delta):
    """A Delta of several terms, of which each takes one of the forms that it allows, the largest first."""

    def __init__(self, forms: dict[str, Path], known: Path):
        super().__init__()
        self.forms, self.known = forms, known
        self.largest = tuple(allowed[0] for allowed in forms.values())
        self.buffer("path", (len(forms), len(known)), lambda path: self.take(self.largest, path), kept="result")
        self.buffer("chosen", (1,), 0.0, kept="checkpoint")  # 1 once a search has chosen the path

    @torch.no_grad()
    def take(self, path: Path, where: Tensor | None = None) -> None:
        """Takes this path from now on; `path`, the buffer, has a 1 for the form of each term."""
        rows = [[float(form == one) for form in self.known] for one in path]
        (self.path if where is None else where).copy_(torch.tensor(rows))

    def gates(self, name: str) -> Tensor:
        """Returns a 1 at the form that a term takes, and zeros (forms,)."""
        return self.path[list(self.forms).index(name)]

    def count(self, path: Path) -> int:
        """Returns how many parameters the terms of a path have."""
        raise NotImplementedError(f"{type(self).__name__} must say how many parameters a path has")


@contextmanager
def random_paths(layers: Sequence[Searched], draws: Random) -> Iterator[None]:
    """Has each layer take a path at random, and its largest one afterwards; no-op once a search has chosen."""
    layers = [layer for layer in layers if not layer.chosen]
    for layer in layers:
        layer.take(tuple(draws.choice(allowed) for allowed in layer.forms.values()))
    yield
    for layer in layers:
        layer.take(layer.largest)


def search(
    layers: Sequence[Searched],
    loss: Callable[[], float],
    limit: int | None,
    population: int,
    generations: int,
    seed: int,
) -> str:
    """Has each layer take a path, together those with the least loss in `limit`; returns a line about them."""

    def paths(genes: Genes) -> list[tuple[Searched, Path]]:
        rest = iter(genes)
        return [(layer, tuple(next(rest) for _ in layer.forms)) for layer in layers]

    def parameters(genes: Genes) -> int:
        return sum(layer.count(path) for layer, path in paths(genes))

    def measured(genes: Genes) -> float:
        for layer, path in paths(genes):
            layer.take(path)
        return loss()

    choices = [allowed for layer in layers for allowed in layer.forms.values()]
    fits = lambda genes: limit is None or parameters(genes) <= limit  # noqa: E731
    losses = evolve(choices, measured, fits, population, generations, seed)
    best = min(losses, key=losses.__getitem__)
    for layer, path in paths(best):
        layer.take(path)
        layer.chosen.fill_(1)
    least = f"{losses[best]:.4f} is the least loss on the held-out rows of {len(losses)} paths"
    return f"{least}; that path has {parameters(best):,} parameters"


@dataclass
class SearchedMethod(Method):
    """A method whose deltas are Searched."""

    kind: ClassVar[type[Searched]]  # of its deltas

    limit: int | None = None
    """Most parameters that the path found may have."""
    population: int = 16
    """Paths that the search compares in each generation."""
    generations: int = 4
    """Generations of the search."""
    search_after: float = 0.3
    """Share of the steps after which the search is; the others train the path that it found. 1 is the paper's way."""
    seed: int = 0
    """What the search draws follows from."""

    def __post_init__(self) -> None:
        check_least(self, "method.", population=2, generations=1, most=100_000)
        check_least(self, "method.", limit=0, seed=0)
        if not 0 < self.search_after <= 1:
            raise ValueError(f"method.search_after must be above 0 and at most 1, got {self.search_after}")

    def check_limit(self, layers: Sequence[Searched]) -> None:
        """Raises a ConfigError if not even the smallest path is within `limit`."""
        least = sum(layer.count(tuple(allowed[-1] for allowed in layer.forms.values())) for layer in layers)
        if self.limit is not None and self.limit < least:
            raise ConfigError(f"{self.limit:,} are fewer than the {least:,} of the smallest path", where="method.limit")

    def training_step(self, model: GPT, draws: Random) -> AbstractContextManager[None]:
        return random_paths(deltas_of(model, self.kind), draws)

    def search_step(self, steps: int) -> int:
        return max(1, round(self.search_after * steps))

    def search(self, model: GPT, loss: Callable[[], float]) -> str:
        layers = deltas_of(model, self.kind)
        return search(layers, loss, self.limit, self.population, self.generations, self.seed)
