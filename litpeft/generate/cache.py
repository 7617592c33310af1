"""The tokens that a model has read, and what each layer keeps of them: only new tokens are computed.

Letters: B rows, T new tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from litpeft.data.batches import framed
from litpeft.generate.cpu.fused_block import NATIVE_TOKENS
from litpeft.generate.cuda_graph import WIDTHS, RecordedStep
from litpeft.model.context import Cache, Context, layer_cache
from litpeft.model.gpt import GPT
from litpeft.model.slots import Slot

FIRST_LENGTH = 256  # tokens of a new cache


class TokenCache:
    """The keys and values of B rows of tokens in all layers, and those tokens.

    Valid even after an interrupt: `rows` never names a token whose keys may have been overwritten.
    """

    def __init__(self, model: GPT, capacity: int | None = None):
        """`capacity` is the number of rows that it has memory for; None: those of the first call."""
        self.model, self.capacity = model, capacity
        self.layers: list[Cache] = []
        self.rows: list[list[int]] = []
        self.prompts: list[int] = []  # length of each row's prompt, in tokens
        self.adapters: list[int] = []  # number of each row's run, where several are beside one base
        self.edits: bool | None = None  # whether a method acts at positions that depend on `prompts`
        self.turn = model.config.turning_length  # beyond it the keys of all earlier tokens are others
        # a row goes on where it ended, or is read anew: the state of a layer without attention is of all its tokens
        self.only_on = any(layer.recurs for layer in model.config.layers)
        # FSDP's class gathers weights at every step; a recorded step knows neither the length of its text nor how many
        # tokens an expert has or a row adds
        alone = type(model) is GPT and model.config.experts is None and not self.only_on
        self.records = model.embed.weight.is_cuda and alone and self.turn is None
        self.recorded: dict[tuple[int, int], RecordedStep | None] = {}  # steps over the `layers` of now

    @torch.inference_mode()
    def logits(
        self, rows: Sequence[Sequence[int]], last: int = 1, prompts: Sequence[int] | None = None, first: int = 0
    ) -> Tensor:
        """Returns the logits (B * last, V) after the last tokens of each row; computes only tokens not in the cache.

        Shorter rows are padded at the end; keys of padding are overwritten before any token sees their positions.
        Placeholders for virtual tokens come before each row and after its prompt. `prompts` are the lengths of the
        rows' prompts; without them nothing stands after one. The rows are those from `first` on of the cache, which
        has as many already.
        """
        before, after = self.model.frame
        ends, after = (prompts, after) if prompts else ([0] * len(rows), 0)
        rows = [framed(row, end, before, after) for row, end in zip(rows, ends, strict=True)]
        prompts = [before + n + after for n in prompts] if prompts else [0] * len(rows)
        here = slice(first, first + len(rows))
        held = self.rows[here] if self.layers else [[] for _ in rows]
        if prompts != self.prompts[here]:
            if self.edits is None:
                slots = [module for module in self.model.modules() if isinstance(module, Slot)]
                self.edits = any(delta.at_prompt for slot in slots for delta in slot.deltas.values())
            held = [[] for _ in rows] if self.edits else held
            self.prompts[here] = prompts
        if self.turn is not None and max(map(len, held)) <= self.turn < max(map(len, rows)):
            held = [[] for _ in rows]
        starts = [self.known(old, new, last) for old, new in zip(held, rows, strict=True)]
        new = [list(row[start:]) for row, start in zip(rows, starts, strict=True)]
        self.capacity = self.capacity or len(rows)
        self.reserve(self.capacity, max(starts) + self.width(max(map(len, new)), max(starts)))
        self.rows[here] = [[] if self.only_on else list(row[:at]) for row, at in zip(rows, starts, strict=True)]
        parts = self.parts([len(row) for row in new])
        logits = [self.read(first, part, new[part], starts[part], last) for part in parts]
        self.rows[here] = rows
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def known(self, held: Sequence[int], tokens: Sequence[int], last: int = 1) -> int:
        """Returns how many of the tokens need not be computed in a row that holds others, where `last` of them do."""
        start = min(common_prefix(held, tokens), len(tokens) - last)
        return 0 if self.only_on and start < len(held) else start

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

    def read(self, first: int, part: slice, new: Sequence[Sequence[int]], starts: Sequence[int], last: int) -> Tensor:
        """Reads the new tokens of some rows after `first`, which begin at `starts`; returns the last ones' logits."""
        width, device = self.width(max(map(len, new)), max(starts)), self.model.embed.weight.device
        ids = torch.tensor([[*row, *(0 for _ in range(width - len(row)))] for row in new], device=device)  # (B, T)
        pos = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
        ends = torch.tensor([i * width + len(row) for i, row in enumerate(new)], device=device)
        at = (ends[:, None] + torch.arange(-last, 0, device=device)).flatten()
        here = slice(first + part.start, first + part.stop)
        prompts = torch.tensor(self.prompts[here], device=device)[:, None] if self.edits else None  # (B, 1)
        adapter = torch.tensor(self.adapters[here], device=device) if self.adapters else None
        step = self.step(len(new), width) if here.start == 0 else None
        if step is not None:
            return step(ids, pos, prompts, adapter).flatten(0, 1)[at]
        start = starts[0] if len(set(starts)) == 1 else None
        counts = tuple(map(len, new)) if self.only_on else None
        ctx = Context(pos, None, prompts, adapter, self.of_rows(here), max(starts) + width, start, counts=counts)
        return self.model(ids, ctx, at=at)

    def of_rows(self, here: slice) -> list[Cache]:
        """Returns the layers of some rows."""
        every = here.start == 0 and here.stop == self.capacity
        return self.layers if every else [layer.of_rows(here) for layer in self.layers]

    def width(self, tokens: int, start: int) -> int:
        """Returns how many tokens of each row a step computes: rounded up to a width that can be recorded, if any."""
        fitting = [n for n in WIDTHS if tokens <= n and start + n <= self.model.max_positions]
        return fitting[0] if self.records and fitting else tokens

    def step(self, rows: int, width: int) -> RecordedStep | None:
        """Returns the recorded step for `width` new tokens of the first rows; None if the step is to run eagerly.

        The first call of a shape runs eagerly: it warms the kernels up.
        """
        if not self.records or width not in WIDTHS:
            return None
        shape = (rows, width)
        if shape not in self.recorded:
            self.recorded[shape] = None
        elif self.recorded[shape] is None:
            self.recorded[shape] = RecordedStep(self.model, self.of_rows(slice(0, rows)), shape)
        return self.recorded[shape]

    def reserve(self, rows: int, length: int) -> None:
        """Grows the cache to `length` tokens or more; by doubling, so that not every token copies all earlier ones."""
        weight, config = self.model.embed.weight, self.model.config
        most, old = self.model.max_positions, self.layers or [None] * config.n_layers
        have = min((layer.length for layer in self.layers if layer.length is not None), default=0)
        if length <= have:
            return
        capacity = max(length, min(2 * have, most), min(FIRST_LENGTH, most))
        grown, dtype = [], self.model.dtype or weight.dtype
        for number, layer in enumerate(old):
            if layer is not None and layer.length is None:
                grown.append(layer)
                continue
            new = layer_cache(rows, capacity, config, dtype, weight.device, number)
            if layer is not None:
                new.take(layer)
            grown.append(new)
        self.layers, self.recorded = grown, {}

    @torch.inference_mode()
    def swap(self, one: int, other: int) -> None:
        """Lets two rows change places."""
        if one == other:
            return
        length = max(len(self.rows[one]), len(self.rows[other]))
        for layer in self.layers:
            layer.swap(one, other, length)
        for held in (self.rows, self.prompts, self.adapters):
            if held:
                held[one], held[other] = held[other], held[one]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many tokens from the start are the same in both."""
    least, most = 0, min(len(a), len(b))
    while least < most:  # bisection: every step of an answer comes here, and comparing slices is fast
        middle = (least + most + 1) // 2
        same = a[least:middle] == b[least:middle]
        least, most = (middle, most) if same else (least, middle - 1)
    return least
