"""P-tuning: vectors that a small network computes stand before the text, or after its prompt, between fixed words.

    x = [T; embed(prompt); U; embed(answer)]        T, U: vectors of P and embeddings of words, as a template says
    P = W_3 relu(W_2 relu(W_1 E))                   E (n, d); each W with a bias
    P = W_2 relu(W_1 LSTM(E))                       with encoder lstm: two layers in both directions, `hidden` wide

P-tuning https://arxiv.org/abs/2103.10385. Of the network a run's result keeps what it computes, T and U.
Trains E and the network. E has n d parameters. With h = `hidden` the network has, for `encoder` mlp,

    W_1 (d h + h),  W_2 (h^2 + h),  W_3 (h d + d)

and for lstm

    first LSTM layer 8 h (d + h + 2),  second 8 h (3 h + 2),  W_1 (4 h^2 + 2 h),  W_2 (2 h d + d)

Does not fold: the vectors are part of what is read. For peft it is prompt tuning if none stand after the prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litpeft.core.distributed import copy_shard
from litpeft.core.kinds import check_choices, check_least
from litpeft.data.tokenizer import Tokenizer
from litpeft.methods.adapter import LONGEST_PROMPT
from litpeft.methods.prompt import Placed, uniform
from litpeft.model.delta import Method
from litpeft.model.gpt import GPT
from litpeft.model.slots import kaiming

Piece = tuple[bool, int]  # whether it is learned, and how many positions it has


class Encoded(Placed):
    """Vectors in pieces: learned ones, which a network computes if there is one, and fixed ones."""

    none_after = "method.after []"

    def __init__(self, width: int, before: list[Piece], after: list[Piece], encoder: str | None, hidden: int):
        super().__init__(sum(count for _, count in before), sum(count for _, count in after))
        ends, self.pieces = {True: 0, False: 0}, []  # each piece: whether it is learned, and its rows
        for is_learned, count in (*before, *after):
            self.pieces.append((is_learned, slice(ends[is_learned], ends[is_learned] + count)))
            ends[is_learned] += count
        self.tensor("vectors", (ends[True], width), nn.init.normal_)
        if ends[False]:
            self.tensor("words", (ends[False], width), 0.0, trains=False)
        self.lstm: list[str] = []  # the names of its tensors, torch's, in torch's order
        for layer, inputs in enumerate((width, 2 * hidden) if encoder == "lstm" else ()):
            matrices = {"weight_ih": (4 * hidden, inputs), "weight_hh": (4 * hidden, hidden)}
            shapes = matrices | {"bias_ih": (4 * hidden,), "bias_hh": (4 * hidden,)}
            for way in ("", "_reverse"):
                for kind, shape in shapes.items():
                    self.tensor(f"{kind}_l{layer}{way}", shape, uniform(hidden**-0.5))
                    self.lstm.append(f"{kind}_l{layer}{way}")
        sizes = {"lstm": (2 * hidden, 2 * hidden, width), "mlp": (width, hidden, hidden, width), None: ()}[encoder]
        self.linears = list(range(1, len(sizes)))
        for number in self.linears:
            self.tensor(f"W_{number}", (sizes[number], sizes[number - 1]), kaiming)
            self.tensor(f"b_{number}", (sizes[number],), uniform(sizes[number - 1] ** -0.5))

    def table(self, own: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns the vectors in the order of their positions; computed from other tensors than its own, if given."""
        own = dict(self.named_parameters()) if own is None else own
        x = own["vectors"]
        with torch.autocast(x.device.type, enabled=False):  # in float32, as the result is computed
            if self.lstm:
                weights = [own[name] for name in self.lstm]
                state = x.new_zeros(4, 1, weights[1].size(1))  # of two layers in two directions
                x = torch.lstm(x[None], (state, state), weights, True, 2, 0.0, True, True, True)[0][0]
            for number in self.linears:
                x = F.linear(x if number == 1 else x.relu(), own[f"W_{number}"], own[f"b_{number}"])
        return torch.cat([(x if is_learned else own["words"])[rows] for is_learned, rows in self.pieces])


@dataclass
class PTuning(Method):
    """Vectors that a network computes, before the text and after its prompt, between fixed words."""

    before: tuple[int | str, ...] = (20,)
    """What stands before the text: numbers of vectors, and words, e.g. [3, "Order to JSON:", 3]."""
    after: tuple[int | str, ...] = (8,)
    """What stands between the prompt and its answer."""
    encoder: Literal["lstm", "mlp"] | None = "mlp"
    """The network that computes the vectors in training; null: they are learned as they are."""
    hidden: int | None = None
    """Inner width of the network; default: half of the model's width."""

    def __post_init__(self) -> None:
        check_choices(self, "method.")
        check_least(self, "method.", hidden=1, most=LONGEST_PROMPT)
        numbers = [piece for piece in (*self.before, *self.after) if isinstance(piece, int)]
        if not numbers or min(numbers) < 1 or sum(numbers) > LONGEST_PROMPT:
            what = f"numbers of at least 1 among them, at most {LONGEST_PROMPT} in sum"
            raise ValueError(f"method.before and method.after must have {what}, got {numbers}")
        self.words: dict[str, list[int]] = {}  # tokens of each text of the template

    def read(self, tokenizer: Tokenizer) -> None:
        self.words = {piece: tokenizer.encode(piece) for piece in (*self.before, *self.after) if isinstance(piece, str)}

    def pieces(self, template: tuple[int | str, ...]) -> list[Piece]:
        return [(True, piece) if isinstance(piece, int) else (False, len(self.words[piece])) for piece in template]

    def attach(self, model: GPT) -> None:
        before, after = self.pieces(self.before), self.pieces(self.after)
        width = model.config.d_model
        delta = Encoded(width, before, after, self.encoder, self.hidden or width // 2)
        model.after_embed.add("ptuning", delta)

    def start_embedding(self, model: GPT, weight: Tensor) -> None:
        tokens = [i for piece in (*self.before, *self.after) if isinstance(piece, str) for i in self.words[piece]]
        if tokens:
            words = model.after_embed.deltas["ptuning"].words
            copy_shard(words, weight[torch.tensor(tokens, device=weight.device)])

    def result(self, model: GPT, tensors: dict[str, Tensor]) -> tuple[Method, dict[str, Tensor]]:
        delta = model.after_embed.deltas["ptuning"]
        names = {leaf: f"after_embed.ptuning.{leaf}" for leaf in delta.starts}
        tensors[names["vectors"]] = delta.table({leaf: tensors.pop(name) for leaf, name in names.items()})
        before, after = ((count,) if count else () for count in (delta.virtual_tokens, delta.infix_tokens))
        return replace(self, before=before, after=after, encoder=None), tensors
