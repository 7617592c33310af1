"""The error of a run that is out of memory: an estimate of what needed how much, and the settings that save most."""

from dataclasses import dataclass
from typing import Any

from litpeft.core.errors import ResourceError, UserError, scaled
from litpeft.core.memory import asked_for
from litpeft.core.precision import Precision
from litpeft.model.delta import Method, trainable
from litpeft.model.gpt import GPT
from litpeft.model.loss import CHUNK
from litpeft.train.micro_tokens import MOST
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

    def error(self, cause: BaseException) -> UserError:
        """Returns the error for the user."""
        held = self.held()
        parts = ", ".join(f"{name} {scaled(count, 'B')}" for name, count in held.items() if count)
        what = f"out of memory{asked_for(cause)}; about what the run needs: {parts}"
        least = sum(held.values()) / 100
        helps = sorted(((saved, text) for text, saved in self.savings().items() if saved > least), reverse=True)
        options = "; ".join(f"{text} (about {scaled(saved, 'B')} less)" for saved, text in helps[:3])
        hint = f"try {options}" if options else "take a smaller model or a device with more memory"
        return ResourceError(what, hint=f"{hint}; checkpoints that were saved are whole: --resume goes on")

    def held(self) -> dict[str, int]:
        """Returns the bytes of weights, gradients, optimizer state and activations."""
        trained = self.trained()
        held = {"weights": self.frozen(), "what trains": trained, "its gradients": trained}
        held["the optimiser"] = int(trained * self.moments())
        ranks = self.settings.devices * self.settings.num_nodes if self.settings.strategy == "fsdp" else 1
        shares = {name: count // ranks for name, count in held.items()}
        tokens = self.tokens()
        return shares | {f"activations of {tokens:,} tokens a pass": self.activations(tokens)}

    def frozen(self) -> int:
        """Returns the bytes of the frozen weights."""
        size = self.precision.weights.itemsize
        every = [p for p in self.shapes.parameters() if not p.requires_grad]
        return sum(p.numel() * (size if p.is_floating_point() else p.element_size()) for p in every)

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

    def activations(self, tokens: int, recompute: bool | None = None) -> int:
        """Returns the bytes of the logits and of what is kept for the backward pass of so many tokens."""
        config = self.shapes.config
        recompute = self.settings.train.activation_checkpointing if recompute is None else recompute
        heads = 2 * config.n_heads * config.head_dim + 2 * config.n_kv_heads * config.head_dim  # q and answers, k and v
        layer = 4 * config.d_model + heads + config.active_d_ff * (3 if config.gated_mlp else 2)
        kept = config.n_layers * config.d_model + layer if recompute else config.n_layers * layer
        size = 2 if self.precision.name.startswith(("bf16", "16")) else self.precision.weights.itemsize
        return tokens * kept * size + 2 * min(tokens, CHUNK) * config.vocab_size * 4

    def savings(self) -> dict[str, int]:
        """Returns settings, as text, with the bytes that each would save."""
        settings, train = self.settings, self.settings.train
        tokens, trained, frozen = self.tokens(), self.trained(), self.frozen()
        now, half = self.activations(tokens), self.activations(max(1, tokens // 2))
        found: dict[str, int] = {}
        if not train.activation_checkpointing:
            found["train.activation_checkpointing true"] = now - self.activations(tokens, recompute=True)
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
