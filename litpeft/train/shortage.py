"""What memory a run needs, by part: told at its start on a GPU, and with the settings that save most if it runs out."""

from dataclasses import dataclass
from typing import Any

from litpeft.core.errors import ResourceError, UserError, scaled
from litpeft.core.kinds import Checkpointing
from litpeft.core.memory import asked_for
from litpeft.core.precision import Precision
from litpeft.model.delta import Method, trainable
from litpeft.model.gpt import GPT
from litpeft.model.known_block import at_defaults
from litpeft.model.loss import CHUNK, GPU_CHUNK
from litpeft.model.slots import Delta
from litpeft.train.activations import Kept, copies
from litpeft.train.fused_block import SWITCHES, groups_of
from litpeft.train.micro_tokens import MOST, SHARE
from litpeft.train.settings import Finetune

NF4_BYTES = 0.6  # of a weight in 4 bits, with its constants


@dataclass
class Shortage:
    """The memory of a run on one device, estimated in bytes."""

    settings: Finetune
    method: Method
    shapes: GPT  # on the meta device, with the method attached
    precision: Precision
    longest: int  # tokens of the longest row
    gpu: bool = False

    def error(self, cause: BaseException) -> UserError:
        """Returns the error for the user."""
        held = self.held()
        parts = ", ".join(f"{name} {scaled(count, 'B')}" for name, count in held.items() if count)
        what = f"out of memory{asked_for(cause)}; about what the run needs: {parts}"
        options = "; ".join(self.options()[:3])
        hint = f"try {options}" if options else "take a smaller model or a device with more memory"
        return ResourceError(what, hint=f"{hint}; checkpoints that were saved are whole: --resume goes on")

    def options(self) -> list[str]:
        """Returns the settings that need less memory, by how much they save; none that saves under a hundredth."""
        least = sum(self.held().values()) / 100
        helps = sorted(((saved, text) for text, saved in self.savings().items() if saved > least), reverse=True)
        return [f"{text} (about {scaled(saved, 'B')} less)" for saved, text in helps]

    def expected(self, name: str, free: int, total: int) -> str:
        """Returns the line that says at a run's start what share of a GPU's `total` bytes it will need, about.

        Where `micro_tokens` is left open, a pass has as many tokens as fit into what is free.
        """
        needed, tokens = sum(self.held().values()), self.tokens()
        if self.settings.data.packing and self.settings.train.micro_tokens == "auto":
            while needed > SHARE * free and tokens > self.longest:
                tokens = max(self.longest, tokens // 2)
                needed = sum(self.held(tokens).values())
        share = f"{needed / total:.0%} of the {scaled(total, 'B')} of {name}"
        said = f"memory      about {scaled(needed, 'B')}, {share}, with {tokens:,} tokens a pass"
        if needed <= free:
            return said
        return f"{said}; {scaled(free, 'B')} are free" + "".join(f"; {text}" for text in self.options()[:1])

    def held(self, tokens: int | None = None) -> dict[str, int]:
        """Returns the bytes of weights, gradients, optimizer state, activations of a pass of `tokens`, and logits."""
        trained = self.trained()
        held = {"weights": self.frozen(), "what trains": trained, "its gradients": trained}
        held["the optimiser"] = int(trained * self.moments())
        ranks = self.settings.devices * self.settings.num_nodes if self.settings.strategy == "fsdp" else 1
        shares = {name: count // ranks for name, count in held.items()}
        tokens = self.tokens() if tokens is None else tokens
        logits = self.logits(tokens)
        shares[f"activations of {tokens:,} tokens a pass"] = self.activations(tokens) - logits
        return shares | {"logits": logits}

    def frozen(self) -> int:
        """Returns the bytes of the frozen weights; packed ones, and a method's own, have types of their own."""
        size, count = self.precision.weights.itemsize, 0
        for module in self.shapes.modules():
            own = getattr(module, "packed_names", ())
            for name, p in module.named_parameters(recurse=False):
                kept = name in own or isinstance(module, Delta)
                count += 0 if p.requires_grad else p.numel() * (p.element_size() if kept else size)
        return count

    def trained(self) -> int:
        """Returns the bytes of the trained parameters."""
        size = self.method.trained_dtype(self.precision.weights).itemsize
        return size * sum(p.numel() for p in trainable(self.shapes).values())

    def moments(self) -> float:
        """Returns the size of the optimizer's state relative to the trained parameters; that of Adam if unknown."""
        optimizer = self.settings.train.optimizer
        if "8bit" in optimizer:
            return 0.5
        return {"SGD": 0.0, "Adafactor": 0.0, "Muon": 1.0, "Adagrad": 1.0, "RMSprop": 1.0}.get(optimizer, 2.0)

    def tokens(self) -> int:
        """Returns the tokens of the largest forward pass."""
        train = self.settings.train
        if not self.settings.data.packing:
            return min(train.micro_batch_size, train.batch_size) * self.longest
        micro = MOST if train.micro_tokens == "auto" else train.micro_tokens
        return max(self.longest, min(micro, train.batch_size * self.longest))

    def logits(self, tokens: int) -> int:
        """Returns the bytes of the logits that exist at one time; `activations` has them in it."""
        chunk, size = (GPU_CHUNK, self.precision.weights.itemsize) if self.gpu else (CHUNK, 4)
        return 2 * min(tokens, chunk) * self.shapes.config.vocab_size * size

    def activations(self, tokens: int, mode: Checkpointing | None = None) -> int:
        """Returns the bytes of the logits and of what the device keeps for the backward pass of so many tokens."""
        config, blocks = self.shapes.config, self.shapes.blocks
        mode = mode or self.settings.train.activation_checkpointing
        size = self.precision.weights.itemsize
        fused, cheap = self.fused(size), mode == "cheap"
        kept_by = Kept(cheap or fused, size, self.gpu, self.longest)
        each, copied = [kept_by.of(block) for block in blocks], [copies(block, size, cheap) for block in blocks]
        kept, others = sum(each), sum(copied)
        if mode in ("block", "offload"):  # of the others their inputs; of one all, while it is computed again
            kept, others = max(each) + config.n_layers * config.d_model * (1 + fused), max(copied)
        if mode == "offload" and self.gpu:
            kept = max(each) + 2 * config.d_model  # the input of a block, and that of the next
        ends = 3 * config.d_model  # the embedded text, the input of the head and its gradient
        ends += 0 if config.layer_inputs is None else 2 * config.n_layers * config.layer_inputs.size
        if self.shapes.head.dense().requires_grad:  # its gradient is computed in the forward pass
            others += 4 * config.d_model * config.vocab_size
        return int(tokens * (kept + ends) * size) + others + self.logits(tokens)

    def fused(self, size: int) -> bool:
        """Returns whether all blocks are computed by train/fused_block.py."""
        fits = self.gpu and size == 2 and at_defaults(self.shapes.config, SWITCHES)
        fits = fits and not any(isinstance(module, Delta) and module.dropout for module in self.shapes.modules())
        return fits and all(groups_of(block) is not None for block in self.shapes.blocks)

    def savings(self) -> dict[str, int]:
        """Returns settings, as text, with the bytes that each would save."""
        settings, train = self.settings, self.settings.train
        tokens, trained, frozen = self.tokens(), self.trained(), self.frozen()
        now, half = self.activations(tokens), self.activations(max(1, tokens // 2))
        found: dict[str, int] = {}
        modes = {"none": ("cheap", "block"), "cheap": ("block",), "block": ("offload",), "offload": ()}
        for mode in modes[train.activation_checkpointing]:
            found[f"train.activation_checkpointing {mode}"] = now - self.activations(tokens, mode)
        if not settings.data.packing and train.micro_batch_size > 1:
            found[f"train.micro_batch_size {train.micro_batch_size // 2}"] = now - half
        elif settings.data.packing and tokens > self.longest:
            fewer = max(self.longest, tokens // 2)
            found[f"train.micro_tokens {fewer}"] = now - self.activations(fewer)
        elif self.longest > 256:
            found[f"data.max_length {self.longest // 2} with data.overlong drop or split"] = now - half
        if self.precision.weights.itemsize > 2:
            share = 2 / self.precision.weights.itemsize
            found["base.precision bf16-true"] = int((1 - share) * (frozen + now))
        if settings.base.quantize is None and not self.method.writes_model:
            weights = sum(p.numel() for p in self.shapes.blocks.parameters() if not p.requires_grad and p.ndim > 1)
            found["base.quantize nf4"] = int(weights * (self.precision.weights.itemsize - NF4_BYTES))
        if self.method.writes_model:
            found["litpeft finetune lora"] = int(trained * (1 + self.moments()))
        if self.moments() == 2.0:
            found["train.optimizer bitsandbytes.AdamW8bit"] = int(1.5 * trained)
        rank: Any = getattr(self.method, "rank", None)
        if rank is not None and rank > 1:
            found[f"method.rank {rank // 2}"] = int(trained * (2 + self.moments()) / 2)
        return found
