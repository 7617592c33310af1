"""PreLayer: what the model computes at special tokens, before the text and after its prompt, is learned in every layer.

    h_l = [P_l; h_l of the prompt; Q_l; h_l of the answer]        P_l (n, d) and Q_l (m, d) are learned

h_0 are the embeddings, h_l the output of block l. That of the last block is not replaced: no other token reads it.
The prefix-layer baseline of the LoRA paper, https://arxiv.org/abs/2106.09685.
Trains layers * (prefix_length + infix_length) * d parameters. Does not fold: the vectors are part of what is read.
"""

from dataclasses import dataclass
from typing import ClassVar

from litpeft.methods.pre_embed import PreEmbed
from litpeft.model.gpt import GPT


@dataclass
class PreLayer(PreEmbed):
    """Learned vectors before the text and after its prompt, in place of what each layer computes there."""

    name: ClassVar[str] = "pre_layer"

    def attach(self, model: GPT) -> None:
        super().attach(model)
        for block in model.blocks[:-1]:
            block.after_block.add(self.name, self.tokens(model.config.d_model))
