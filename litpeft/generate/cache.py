"""What a model has read already, so that only what is new is computed.

Letters: B rows, T new tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from litpeft.data.batches import PLACEHOLDER
from litpeft.generate.cpu.fused_block import FEW
from litpeft.generate.cuda_graph import WIDTHS, RecordedStep
from litpeft.model.context import Context, KVCache
from litpeft.model.gpt import GPT
from litpeft.model.slots import is_empty

FIRST_LENGTH = 256  # tokens that a new cache has room for


class TokenCache:
    """The keys and values of B rows of tokens in all layers, and those tokens.

    It is always whole: `rows` never names a token whose keys may have been overwritten, even if a call was interrupted.
    """

    def __init__(self, model: GPT):
        self.model = model
        self.layers: list[KVCache] = []
        self.rows: list[list[int]] = []
        self.prompts: list[int] = []  # tokens of each row's prompt
        self.edits = False  # whether a method acts at positions that depend on them
        self.records = model.embed.weight.is_cuda and type(model) is GPT  # and not FSDP's, which gathers at every step
        self.recorded: dict[tuple[int, int], RecordedStep | None] = {}  # of the layers that there are now

    @torch.inference_mode()
    def logits(self, rows: Sequence[Sequence[int]], last: int = 1, prompts: Sequence[int] | None = None) -> Tensor:
        """Returns the logits (B * last, V) after the last tokens of each row; computes only what is not held yet.

        Shorter rows are padded at the end. What is written there lies at positions that no token looks at before it
        is overwritten. Placeholders for virtual tokens come before each row. `prompts` are the tokens of its prompt.
        """
        virtual = self.model.virtual_tokens
        rows = [[PLACEHOLDER] * virtual + list(row) for row in rows]
        prompts = [virtual + n for n in prompts] if prompts else [0] * len(rows)
        held = self.rows if self.layers else [[] for _ in rows]
        if prompts != self.prompts:
            self.edits = any(not is_empty(block.after_block) for block in self.model.blocks)
            held = [[] for _ in rows] if self.edits else held
            self.prompts = prompts
        starts = [min(common_prefix(old, new), len(new) - last) for old, new in zip(held, rows, strict=True)]
        new = [list(row[start:]) for row, start in zip(rows, starts, strict=True)]
        self.reserve(len(rows), max(starts) + self.width(max(map(len, new)), max(starts)))
        self.rows = [list(row[:start]) for row, start in zip(rows, starts, strict=True)]
        logits = [self.read(part, new[part], starts[part], last) for part in self.parts([len(row) for row in new])]
        self.rows = rows
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def parts(self, tokens: Sequence[int]) -> list[slice]:
        """Returns the rows that are read at once, each with so many new tokens: on a GPU all of them.

        On a CPU as many as the fused block takes: what it computes for a row does not depend on the other rows.
        """
        if self.model.embed.weight.device.type != "cpu":
            return [slice(0, len(tokens))]
        parts, start, width = [], 0, 0
        for row, count in enumerate(tokens):
            width = max(width, count)
            if row > start and (row + 1 - start) * width > FEW:
                parts.append(slice(start, row))
                start, width = row, count
        return [*parts, slice(start, len(tokens))]

    def read(self, part: slice, new: Sequence[Sequence[int]], starts: Sequence[int], last: int) -> Tensor:
        """Returns the logits after the last tokens of some rows, whose new ones begin at `starts`, and holds them."""
        width, device = self.width(max(map(len, new)), max(starts)), self.model.embed.weight.device
        ids = torch.tensor([[*row, *(0 for _ in range(width - len(row)))] for row in new], device=device)  # (B, T)
        pos = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
        ends = torch.tensor([i * width + len(row) for i, row in enumerate(new)], device=device)
        at = (ends[:, None] + torch.arange(-last, 0, device=device)).flatten()
        prompts = torch.tensor(self.prompts[part], device=device)[:, None] if self.edits else None  # (B, 1)
        step = self.step(len(new), width)
        if step is not None:
            return step(ids, pos, prompts).flatten(0, 1)[at]
        layers = self.layers if len(new) == len(self.rows) else [layer.of_rows(part) for layer in self.layers]
        start = starts[0] if len(set(starts)) == 1 else None
        return self.model(ids, Context(pos, None, prompts, cache=layers, end=max(starts) + width, start=start), at=at)

    def width(self, tokens: int, start: int) -> int:
        """Returns for how many tokens of each row a step is computed: for some more, if it can be recorded so."""
        fitting = [n for n in WIDTHS if tokens <= n and start + n <= self.model.config.max_positions]
        return fitting[0] if self.records and fitting else tokens

    def step(self, rows: int, width: int) -> RecordedStep | None:
        """Returns the recorded step for `width` new tokens of each row; None where it is to be computed one by one.

        That is so at the first time, which makes ready what cannot be recorded.
        """
        if not self.records or width not in WIDTHS:
            return None
        shape = (rows, width)
        if shape not in self.recorded:
            self.recorded[shape] = None
        elif self.recorded[shape] is None:
            self.recorded[shape] = RecordedStep(self.model, self.layers, shape)
        return self.recorded[shape]

    def reserve(self, rows: int, length: int) -> None:
        """Makes room for `length` tokens; by doubling, so that a token costs no copy of all earlier ones."""
        weight, config = self.model.embed.weight, self.model.config
        old = self.layers or [None] * config.n_layers
        have = min((layer.k.size(2) for layer in self.layers), default=0)
        if length <= have:
            return
        room = max(length, min(2 * have, config.max_positions), min(FIRST_LENGTH, config.max_positions))
        grown = []
        for layer in old:
            new = KVCache(rows, room, config, self.model.dtype or weight.dtype, weight.device)
            if layer is not None:
                new.k[:, :, :have], new.v[:, :, :have] = layer.k, layer.v
            grown.append(new)
        self.layers, self.recorded = grown, {}

    @torch.inference_mode()
    def keep(self, numbers: Sequence[int]) -> None:
        """Drops all rows but these."""
        chosen = torch.tensor(numbers, device=self.model.embed.weight.device)
        for layer in self.layers:
            layer.k, layer.v = layer.k[chosen], layer.v[chosen]
        self.rows, self.prompts = ([held[number] for number in numbers] for held in (self.rows, self.prompts))
        self.recorded = {}


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many tokens from the start are the same in both."""
    least, most = 0, min(len(a), len(b))
    while least < most:  # halves: each step of an answer comes by, and comparing slices is fast
        middle = (least + most + 1) // 2
        same = a[least:middle] == b[least:middle]
        least, most = (middle, most) if same else (least, middle - 1)
    return least
