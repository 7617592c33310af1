"""Selective finetuning: some of the model's own parameters train, such as its norms or its last blocks.

    W <- W - lr * update(dL/dW)        for the parameters that are named; the others stay as they are

Training the norms alone is LN-tuning, https://arxiv.org/abs/2312.11420. Unlike `full`, a run saves what trained and not
the model, and the rest may be quantised.
Trains the parameters that are named. Folds: W is what it learned. In peft: LN_TUNING.
"""

from dataclasses import dataclass

from litpeft.core.errors import ConfigError
from litpeft.model.delta import Method, train_base
from litpeft.model.gpt import GPT
from litpeft.model.norms import LayerNorm, RMSNorm


@dataclass
class Selective(Method):
    """Some of the model's own parameters train: norms, the last blocks, or those that globs name."""

    norms: bool = True
    """The norms train."""
    last_blocks: int = 0
    """The last so many blocks train whole."""

    def attach(self, model: GPT) -> None:
        if not 0 <= self.last_blocks <= len(model.blocks):
            what = f"must be at least 0 and at most {len(model.blocks)}, the blocks of this model"
            raise ConfigError(f"{what}, got {self.last_blocks}", where="method.last_blocks")
        places = {name: module for name, module in model.named_modules() if isinstance(module, RMSNorm | LayerNorm)}
        first = len(model.blocks) - self.last_blocks
        blocks = {f"blocks.{number}": model.blocks[number] for number in range(first, len(model.blocks))}
        for chosen, key in ((places if self.norms else {}, "norms"), (blocks, "last_blocks")):
            names = [f"{place}.{leaf}" for place, module in chosen.items() for leaf, _ in module.named_parameters()]
            train_base(model, names, f"method.{key}")
