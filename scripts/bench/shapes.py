"""What a training step or a new token costs, counted from shapes alone: FLOPs, bytes, and the share of a roof.

A multiplication and an addition are two FLOPs. n is the tokens of a document, r a LoRA rank. Only matrix products are
counted: norms, softmax, activations, the optimiser and the loss add less than one percent to them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shapes:
    """The sizes of a Llama."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int  # of the MLP
    tied: bool  # the head is the embedding

    @classmethod
    def read(cls, folder: Path) -> "Shapes":
        """Returns the sizes that a folder's config.json says."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads = config["num_attention_heads"]
        return cls(
            vocab=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            hidden=config["intermediate_size"],
            tied=config.get("tie_word_embeddings", False),
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Returns (in, out) of the linear layers of one block."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        d, f = self.width, self.hidden
        return {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, f), "up": (d, f), "down": (f, d)}

    def block_parameters(self) -> int:
        """Returns the parameters of the linear layers of one block."""
        return sum(i * o for i, o in self.linears().values())

    def parameters(self) -> int:
        """Returns all parameters but those of the norms."""
        return self.layers * self.block_parameters() + self.vocab * self.width * (1 if self.tied else 2)

    def lora_parameters(self, rank: int) -> int:
        """Returns the parameters of a LoRA on all linear layers of the blocks."""
        return self.layers * sum(rank * (i + o) for i, o in self.linears().values())


def pairs(lengths: Sequence[int]) -> int:
    """Returns how many pairs of a query and a key that it may see the documents have."""
    return sum(n * (n + 1) // 2 for n in lengths)


def attention_flops(shapes: Shapes, lengths: Sequence[int], products: int) -> int:
    """Returns the FLOPs of so many products of (n, n) and (n, head size) in every head, for the visible pairs only."""
    return products * 2 * shapes.head_size * shapes.heads * shapes.layers * pairs(lengths)


def step_flops(shapes: Shapes, lengths: Sequence[int], trained: int, what: str, rank: int = 8) -> int:
    """Returns the FLOPs that training on these documents needs; `trained` of their tokens have a loss.

    `what` is lora (qlora needs the same: unpacking weights is no product) or full.
    """
    tokens, linears = sum(lengths), shapes.linears()
    blocks, head = shapes.layers * shapes.block_parameters(), shapes.vocab * shapes.width
    # forward: two products with the input, two in attention; backward: four in attention
    attention = attention_flops(shapes, lengths, 6)
    first = sum(linears[name][0] * linears[name][1] for name in "qkv")  # whose input needs no gradient in block 0
    if what == "full":  # forward, gradient of the input, gradient of the weight
        return 6 * blocks * tokens + 6 * head * trained + attention  # the embedding trains, so block 0 passes one on
    frozen = (4 * blocks - 2 * first) * tokens + 4 * head * trained
    lora_first = sum(rank * linears[name][0] for name in "qkv")  # A of q, k and v in block 0, likewise
    return frozen + attention + (6 * shapes.lora_parameters(rank) - 2 * lora_first) * tokens


def decode_bytes(shapes: Shapes, bits: float, head_bits: float, keys: int, batch: int, cache_bytes: int = 2) -> float:
    """Returns the bytes that one decoding step must read: every weight once, and `keys` cached keys and values a row.

    `bits` are those of a weight in the blocks, constants of its quantisation included; `head_bits` of one in the head.
    """
    weights = shapes.layers * shapes.block_parameters() * bits / 8 + shapes.vocab * shapes.width * head_bits / 8
    return weights + batch * keys * 2 * shapes.layers * shapes.kv_heads * shapes.head_size * cache_bytes


RANK, ALPHA = 8, 16.0  # of every LoRA in the benchmark
LLAMA_8B = Shapes(128256, 4096, 32, 32, 8, 128, 14336, False)
