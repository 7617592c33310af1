"""An evolutionary search: of tuples of choices the one with the least loss, as far as a few generations find it."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from litpeft.model.slots import Delta

Genes = tuple[str, ...]
Path = tuple[str, ...]  # the genes of one layer

MUTATED = 0.2  # share of the genes that a mutation draws anew


def evolve(
    choices: list[Genes],
    loss: Callable[[Genes], float],
    fits: Callable[[Genes], bool],
    population: int,
    generations: int,
    seed: int,
) -> dict[Genes, float]:
    """Returns the losses of all that were compared; the same arguments give the same.

    `choices` are those of each gene, the smallest last: what does not fit gets smallest genes until it does. The first
    generation is random, but for one of the first choices; children of the best quarter, by crossover or mutation, are
    the others.
    """
    draw = random.Random(seed)
    losses: dict[Genes, float] = {}

    def fitting(genes: list[str]) -> Genes:
        for at in draw.sample(range(len(genes)), len(genes)):
            if fits(tuple(genes)):
                break
            genes[at] = choices[at][-1]
        return tuple(genes)

    def child(best: list[Genes]) -> list[str]:
        if not best:
            return [draw.choice(allowed) for allowed in choices]
        one, other = draw.choice(best), draw.choice(best)
        if draw.random() < 0.5:
            return [draw.choice(pair) for pair in zip(one, other, strict=True)]
        pairs = zip(one, choices, strict=True)
        return [draw.choice(allowed) if draw.random() < MUTATED else gene for gene, allowed in pairs]

    for generation in range(generations):
        best = sorted(losses, key=losses.__getitem__)[: max(2, population // 4)]
        born = [child(best) for _ in range(population)]
        if generation == 0:
            born[0] = [allowed[0] for allowed in choices]
        for genes in map(fitting, born):
            if genes not in losses:
                losses[genes] = loss(genes)
    return losses


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
def random_paths(layers: Sequence[Searched], draws: random.Random) -> Iterator[None]:
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
