"""LLaMA-Adapter: in the top blocks every token also attends to a few learned prompts, through a gate that starts shut.

    y = softmax(q k^T / sqrt(D)) v  +  tanh(gate) * softmax(q kp^T / sqrt(D)) vp

The keys kp = W_k prompt and values vp = W_v prompt are made by the layers of the block. The prompt (n, d) starts
random, from N(0, 1). The gate (heads,) starts at zero, so nothing changes at first.

LLaMA-Adapter https://arxiv.org/abs/2303.16199.
Trains layers * (prompt_length * d + heads) parameters. Does not fold: the prompts act on activations.
"""

from dataclasses import dataclass

import torch.nn as nn
from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.core.kinds import check_least
from litpeft.model.attention import attend
from litpeft.model.context import Context
from litpeft.model.delta import Method
from litpeft.model.gpt import GPT
from litpeft.model.multi_head import Attention
from litpeft.model.slots import Delta

LONGEST_PROMPT = 65536  # tokens; longer than what any model reads


class PromptAttention(Delta):
    """Attention to the text plus gated attention to prompts (n, d), each with a softmax of its own.

    The prompts pass, without norm or rotary angle, through the block's own projections with their slots: an adapted k
    gives adapted keys. All documents and positions see all prompts. Each call computes the prompts' keys and values:
    cached ones would be stale after an optimizer step, and those of a validation pass would carry no gradient.
    """

    claims = "the attention"
    unlike_peft = "peft's adaption prompt has one gate for all heads of a layer, without tanh, and this has one a head"

    def __init__(self, width: int, heads: int, prompt_length: int):
        super().__init__()
        self.tensor("prompt", (prompt_length, width), nn.init.normal_)
        self.tensor("gate", (heads,), 0.0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, attn: Attention) -> Tensor:
        y = attend(q, k, v, mask=ctx.mask, documents=ctx.documents, **attn.kind())  # (B, H, T, D)
        prompt = self.prompt.to(q.dtype)[None]
        kp, vp = attn.heads(attn.k(prompt)), attn.heads(attn.v(prompt))  # (1, G, n, D)
        kp, vp = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (kp, vp))  # (1, H, n, D)
        # With so few keys plain products take a third of the fused kernel's time in bfloat16 (measured on the CPU,
        # forward and backward), and the weights that autograd keeps are small.
        weights = (q @ (kp * attn.head_dim**-0.5).mT).softmax(-1)  # (B, H, T, n)
        return y + (weights * self.gate.tanh().to(q.dtype)[:, None, None]) @ vp


@dataclass
class Adapter(Method):
    """Learned prompts in the attention of the top blocks, behind gates that start shut."""

    layers: int = 30
    """Blocks that get prompts, counted from the top; a model with fewer gets them in all. Those without attention get
    none."""
    prompt_length: int = 10
    """Prompts of each of these blocks."""

    def __post_init__(self) -> None:
        check_least(self, "method.", layers=1)
        check_least(self, "method.", prompt_length=1, most=LONGEST_PROMPT)

    def attach(self, model: GPT) -> None:
        numbered = list(enumerate(model.blocks))[-self.layers :]
        top = [block for number, block in numbered if model.config.layer(number).attends]
        if not top:
            what = f"none of the top {self.layers} blocks has attention"
            raise ConfigError(what, where="method.layers", hint="say more, or take another method, such as lora")
        for block in top:
            if len(block.attn.keys_and_values()) < 2:
                what = f"the prompts of layer {block.attn.layer} need keys and values that the layer computes itself"
                raise ConfigError(what, where="method", hint="take another method, such as prompt or lora")
            delta = PromptAttention(model.config.d_model, model.config.n_heads, self.prompt_length)
            block.attn.core.add("adapter", delta)
