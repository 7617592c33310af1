"""An evolutionary search: of tuples of choices the one with the least loss, as far as a few generations find it."""

import random
from collections.abc import Callable

Genes = tuple[str, ...]

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
