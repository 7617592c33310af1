"""How much the loss depends on the weights of linear layers: their squared gradients (Fisher information)."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from litpeft.data.batches import Batch
from litpeft.model.gpt import GPT
from litpeft.model.objective import summed_loss
from litpeft.model.slots import Linear

FLOOR = 0.01  # of the mean: smallest weight of a row or a column, by which is divided


def mean_squares(
    model: GPT, layers: Mapping[str, Linear], batches: Iterable[Batch]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns by name the mean of each row (out, 1) and column (1, in) of a layer's squared gradients, in float64.

    They are added up over `batches` of one row each: the square of a sum of rows would not be their information. The
    weights train afterwards: the model is to be thrown away.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, weight: Tensor) -> None:
        squares = weight.grad.double().square()
        means = squares.mean(1, True), squares.mean(0, True)
        sums[name] = tuple(a + b for a, b in zip(sums[name], means, strict=True)) if name in sums else means
        weight.grad = None  # so that there is one at a time

    for name, layer in layers.items():
        layer.weight.requires_grad_(True).register_post_accumulate_grad_hook(lambda w, name=name: add(name, w))
    for batch in batches:
        (summed_loss(model, batch) / batch.weight).backward()
    return sums


def error_weights(means: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns weights of a layer's rows (out, 1) and columns (1, in), of which each product is near a gradient's size.

    `means` are those of `mean_squares`.
    """
    roots = [(squares / squares.mean().sqrt()).sqrt() for squares in means]
    return tuple(root.clamp(min=FLOOR * root.mean()).nan_to_num(1.0) for root in roots)
