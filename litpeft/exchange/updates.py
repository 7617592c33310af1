"""The update of each weight that a run has learned: how large it is, and its effective rank.

    D = W' - W        norm |D|        share |D| / |W|        effective rank exp(H(p)), p_i = s_i / sum s

with the Frobenius norm |.|, the singular values s of D and the entropy H (Roy and Vetterli,
https://www.eurasip.org/Proceedings/Eusipco/Eusipco2007/Papers/a5p-h05.pdf): r equal singular values give r,
and one that outweighs all others gives 1.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litpeft.core.safetensors import Weights
from litpeft.exchange.run import Run
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.model.gpt import GPT
from litpeft.model.slots import Embedding, Linear, TiedHead


def low_rank_values(a: Tensor, b: Tensor) -> Tensor:
    """Returns the singular values of B A, for A (r, in) and B (out, r); the product itself is never made."""
    return torch.linalg.svdvals(torch.linalg.qr(b.double()).R @ torch.linalg.qr(a.double().T).R.T)


def measured(values: Tensor, weight: Tensor | None) -> dict[str, float]:
    """Returns norm, share and effective rank of an update with these singular values, of a weight if it is known."""
    norm = float(values.norm())
    shares = values[values > 0] / values.sum()
    found = {"norm": norm, "effective_rank": float((-shares * shares.log()).sum().exp()) if norm else 0.0}
    return found if weight is None else found | {"share": norm / float(weight.double().norm())}


@torch.no_grad()
def learned(model: GPT) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name of each weight that a run's delta changes, and how; the delta must fold."""
    for name, layer in model.named_modules():
        if isinstance(layer, Linear | Embedding) and layer.slot.deltas and not isinstance(layer, TiedHead):
            affine, dense = layer.slot.frozen(layer), layer.dense()
            if affine.gain is None and affine.A is not None:
                values = low_rank_values(affine.A, affine.B)
            else:
                values = torch.linalg.svdvals(affine.fold(dense.double().clone(), None)[0] - dense.double())
            yield f"{name}.weight", {"shape": list(dense.shape), **measured(values, dense)}
    for name, before in model.base_values.items():
        yield name, changed(before, model.get_parameter(name))


def trained(run: Run, base: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields what `learned` does, of a run that is a model, from the files of both."""
    names = NameMap(*read_config(base))
    before, after = Weights(base), Weights(run.folder)
    for name in names.ours:
        yield name, changed(names.read(before, name), names.read(after, name))
        before.drop_pages()
        after.drop_pages()


@torch.no_grad()
def changed(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Returns shape and size of a parameter's change; of a matrix its effective rank, too."""
    change = after.double() - before.double()
    values = torch.linalg.svdvals(change) if change.dim() == 2 else change.norm()[None]
    found = {"shape": list(change.shape), **measured(values, before)}
    return found if change.dim() == 2 else found | {"effective_rank": None}
