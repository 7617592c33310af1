"""An evolutionary search: of tuples of choices the one with the least loss, as far as a few generations find it."""

import random
from collections.abc import Callable, Sequence
from typing import Protocol

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


class Layer(Protocol):
    """What has several terms, each in one of the forms that it allows."""

    forms: dict[str, Path]

    def take(self, path: Path) -> None:
        """Takes a form for each term."""

    def count(self, path: Path) -> int:
        """Returns how many parameters the terms have in these forms."""


def search(
    layers: Sequence[Layer],
    loss: Callable[[], float],
    limit: int | None,
    population: int,
    generations: int,
    seed: int,
) -> str:
    """Has each layer take a path, together those with the least loss in `limit`; returns a line about them."""

    def paths(genes: Genes) -> list[tuple[Layer, Path]]:
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
    least = f"{losses[best]:.4f} is the least loss on the held-out rows of {len(losses)} paths"
    return f"{least}; that path has {parameters(best):,} parameters"
