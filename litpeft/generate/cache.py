"""The tokens that a model has read, with their keys and values, so that only new tokens are computed.

Letters: B rows, T new tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from litpeft.data.batches import framed
from litpeft.generate.cpu.fused_block import NATIVE_TOKENS
from litpeft.generate.cuda_graph import WIDTHS, RecordedStep
from litpeft.model.context import Context, KVCache
from litpeft.model.gpt import GPT
from litpeft.model.slots import Slot

FIRST_LENGTH = 256  # tokens of a new cache


class TokenCache:
    """The keys and values of B rows of tokens in all layers, and those tokens.

    Valid even after an interrupt: `rows` never names a token whose keys may have been overwritten.
    """

    def __init__(self, model: GPT):
        self.model = model
        self.layers: list[KVCache] = []
        self.rows: list[list[int]] = []
        self.prompts: list[int] = []  # length of each row's prompt, in tokens
        self.edits = False  # whether a method acts at positions that depend on `prompts`
        self.turn = model.config.turning_length  # beyond it the keys of all earlier tokens are others
        # FSDP's class gathers weights at every step; a recorded step knows neither the length of its text nor how many
        # tokens an expert has
        alone = type(model) is GPT and model.config.experts is None
        self.records = model.embed.weight.is_cuda and alone and self.turn is None
        self.recorded: dict[tuple[int, int], RecordedStep | None] = {}  # steps over the `layers` of now

    @torch.inference_mode()
    def logits(self, rows: Sequence[Sequence[int]], last: int = 1, prompts: Sequence[int] | None = None) -> Tensor:
        """Returns the logits (B * last, V) after the last tokens of each row; computes only tokens not in the cache.

        Shorter rows are padded at the end; keys of padding are overwritten before any token sees their positions.
        Placeholders for virtual tokens come before each row and after its prompt. `prompts` are the lengths of the
        rows' prompts; without them nothing stands after one.
        """
        before, after = self.model.frame
        ends, after = (prompts, after) if prompts else ([0] * len(rows), 0)
        rows = [framed(row, end, before, after) for row, end in zip(rows, ends, strict=True)]
        prompts = [before + n + after for n in prompts] if prompts else [0] * len(rows)
        held = self.rows if self.layers else [[] for _ in rows]
        if prompts != self.prompts:
            slots = [module for module in self.model.modules() if isinstance(module, Slot)]
            self.edits = any(delta.at_prompt for slot in slots for delta in slot.deltas.values())
            held = [[] for _ in rows] if self.edits else held
            self.prompts = prompts
        if self.turn is not None and max(map(len, held)) <= self.turn < max(map(len, rows)):
            held = [[] for _ in rows]
        starts = [min(common_prefix(old, new), len(new) - last) for old, new in zip(held, rows, strict=True)]
        new = [list(row[start:]) for row, start in zip(rows, starts, strict=True)]
        self.reserve(len(rows), max(starts) + self.width(max(map(len, new)), max(starts)))
        self.rows = [list(row[:start]) for row, start in zip(rows, starts, strict=True)]
        logits = [self.read(part, new[part], starts[part], last) for part in self.parts([len(row) for row in new])]
        self.rows = rows
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def parts(self, tokens: Sequence[int]) -> list[slice]:
        """Returns which rows are read at once, given the number of new tokens of each: on a GPU all of them.

        On a CPU as many as the C++ block takes: its result for a row does not depend on the other rows.
        """
        if self.model.embed.weight.device.type != "cpu":
            return [slice(0, len(tokens))]
        parts, start, width = [], 0, 0
        for row, count in enumerate(tokens):
            width = max(width, count)
            if row > start and (row + 1 - start) * width > NATIVE_TOKENS:
                parts.append(slice(start, row))
                start, width = row, count
        return [*parts, slice(start, len(tokens))]

    def read(self, part: slice, new: Sequence[Sequence[int]], starts: Sequence[int], last: int) -> Tensor:
        """Reads the new tokens of some rows, which begin at `starts`; returns the logits after the last tokens."""
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
        """Returns how many tokens of each row a step computes: rounded up to a width that can be recorded, if any."""
        fitting = [n for n in WIDTHS if tokens <= n and start + n <= self.model.max_positions]
        return fitting[0] if self.records and fitting else tokens

    def step(self, rows: int, width: int) -> RecordedStep | None:
        """Returns the recorded step for `width` new tokens of each row, or None if the step is to run eagerly.

        The first call of a shape runs eagerly: it warms the kernels up.
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
        """Grows the cache to `length` tokens or more; by doubling, so that not every token copies all earlier ones."""
        weight, config = self.model.embed.weight, self.model.config
        most, old = self.model.max_positions, self.layers or [None] * config.n_layers
        have = min((layer.k.size(2) for layer in self.layers), default=0)
        if length <= have:
            return
        capacity = max(length, min(2 * have, most), min(FIRST_LENGTH, most))
        grown = []
        for number, layer in enumerate(old):
            new = KVCache(rows, capacity, config, self.model.dtype or weight.dtype, weight.device, number)
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
    while least < most:  # bisection: every step of an answer comes here, and comparing slices is fast
        middle = (least + most + 1) // 2
        same = a[least:middle] == b[least:middle]
        least, most = (middle, most) if same else (least, middle - 1)
    return least
