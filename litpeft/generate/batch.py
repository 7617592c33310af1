"""Answers to several requests, written at once, a token of each in a step; requests come and go between the steps.

A step reads every weight once for all answers (continuous batching: https://www.usenix.org/conference/osdi22/presentation/yu).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from litpeft.core.errors import UserError
from litpeft.data.batches import framed
from litpeft.generate.cache import TokenCache, common_prefix
from litpeft.generate.cpu.fused_block import NATIVE_TOKENS
from litpeft.generate.engine import Draft
from litpeft.generate.sampling import next_tokens
from litpeft.generate.settings import Sampling
from litpeft.model.gpt import GPT

PART = NATIVE_TOKENS  # tokens of prompts that are read in a step, while no answer goes on


@dataclass(eq=False)
class Request:
    """An answer that is wanted. `came` is told each new text of it, `ended` that it has ended, or why it failed.

    Both are called by the thread that computes.
    """

    draft: Draft
    sampling: Sampling
    adapter: int  # the number of its run, where several are beside one base; 0: the base
    came: Callable[[str], None]
    ended: Callable[[Exception | None], None]
    cancelled: bool = False  # set by the one who no longer wants it
    generator: torch.Generator | None = None
    prompt: int = field(init=False)  # tokens

    def __post_init__(self) -> None:
        self.prompt = len(self.draft.ids)

    def advance(self, logits: Tensor) -> None:
        """Takes the next token from logits (1, V); a failure ends this answer alone."""
        if self.generator is None:
            self.generator = torch.Generator(logits.device).manual_seed(self.sampling.seed)
        try:
            (token,) = next_tokens(logits, [self.draft.ids], self.sampling, [self.generator]).tolist()
        except UserError as error:
            self.draft.ended = True
            self.ended(error)
            return
        if text := self.draft.add(token):
            self.came(text)
        if self.draft.ended:
            self.ended(None)


class Batch:
    """The requests to one model. The first rows of its cache are those of the answers that are being written.

    The rows after them keep what earlier requests read: the next turn of a chat does not read it again.
    """

    def __init__(self, model: GPT, rows: int):
        self.model = model
        # beyond a length the keys of all tokens of all rows would be others
        self.capacity = rows if model.config.turning_length is None else 1
        self.waiting: deque[Request] = deque()
        self.clear()

    def clear(self) -> list[Request]:
        """Forgets everything; returns the requests that had not ended."""
        left = [*getattr(self, "writing", ()), *getattr(self, "reading", ()), *self.waiting]
        self.waiting.clear()
        self.writing: list[Request] = []  # row by row
        self.reading: list[Request] = []  # one at most: its prompt is read into the next row
        self.cache = TokenCache(self.model, self.capacity)
        self.cache.rows = [[] for _ in range(self.capacity)]
        self.cache.prompts, self.cache.adapters = [0] * self.capacity, [0] * self.capacity
        return left

    @property
    def count(self) -> int:
        """Returns how many requests have not ended."""
        return len(self.writing) + len(self.reading) + len(self.waiting)

    def step(self) -> None:
        """Writes a token of each answer, and reads prompts while there is room."""
        self.drop(row for row, request in enumerate(self.writing) if request.cancelled)
        if self.writing:
            self.write()
        left = PART
        while left > 0 and len(self.writing) < self.capacity and (self.reading or self.waiting):
            if not self.reading:
                self.begin(self.waiting.popleft())
            left -= self.read(left)

    def write(self) -> None:
        """Writes the next token of each answer."""
        cache, padding = self.cache, self.padding()
        kept = [cache.rows[row] for row in padding]
        rows = [request.draft.ids for request in self.writing] + [[*row, 0] for row in kept]
        prompts = [request.prompt for request in self.writing] + [cache.prompts[row] for row in padding]
        logits = cache.logits(rows, 1, prompts)
        for row, tokens in zip(padding, kept, strict=True):
            cache.rows[row] = tokens
        for row, request in enumerate(self.writing):
            request.advance(logits[row : row + 1])
        self.drop(row for row, request in enumerate(self.writing) if request.draft.ended)

    def padding(self) -> range:
        """Returns the idle rows of a step, whose results are not used: on a GPU steps are recorded for few numbers.

        What such a row keeps stays as it is: the step writes behind it.
        """
        live = len(self.writing)
        if not self.cache.records or any(self.model.frame):
            return range(live, live)
        return range(live, min(self.capacity, 1 << (live - 1).bit_length()))

    def begin(self, request: Request) -> None:
        """Gives a request the row that holds most of its prompt already; of several the one that is idle longest."""
        first, cache = len(self.writing), self.cache
        prompt = framed(request.draft.ids, request.prompt, *self.model.frame)

        def known(row: int) -> int:
            return common_prefix(cache.rows[row], prompt) if cache.adapters[row] == request.adapter else 0

        cache.swap(first, max(range(first, self.capacity), key=lambda row: (known(row), row)))
        if cache.adapters[first] != request.adapter:
            cache.adapters[first], cache.rows[first] = request.adapter, []
        self.reading = [request]

    def read(self, most: int) -> int:
        """Reads a part of a prompt, of `most` tokens or less; returns how many. The last one begins the answer."""
        (request,), row = self.reading, len(self.writing)
        if request.cancelled:
            self.reading = []
            return 0
        tokens = request.draft.ids
        done = 0 if any(self.model.frame) else common_prefix(self.cache.rows[row], tokens)
        part = tokens if any(self.model.frame) else tokens[: max(done, 1) + most]
        logits = self.cache.logits([part], 1, [request.prompt], row)
        if len(part) == len(tokens):
            self.reading = []
            request.advance(logits)
            self.writing += [] if request.draft.ended else [request]
        return len(part) - done

    def drop(self, rows: Iterable[int]) -> None:
        """Takes rows out of the batch: the last one comes in the place of each."""
        for row in sorted(rows, reverse=True):
            last = len(self.writing) - 1
            self.cache.swap(row, last)
            self.writing[row] = self.writing[last]
            del self.writing[last]


class Worker(threading.Thread):
    """Computes the answers to what is added to its batches, by turns, until it is stopped."""

    def __init__(self, batches: Sequence[Batch], failed: Callable[[Exception], None]):
        """`failed` is told of an error that is not the fault of one request; all those of its batch have failed."""
        super().__init__(name="answers", daemon=True)
        self.batches, self.failed = batches, failed
        self.changed = threading.Condition()
        self.stopped = False

    def add(self, batch: Batch, requests: Iterable[Request]) -> None:
        with self.changed:
            batch.waiting.extend(requests)
            self.changed.notify()

    def stop(self) -> None:
        """Ends the thread after its step, and waits for that."""
        with self.changed:
            self.stopped = True
            self.changed.notify()
        self.join()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.stopped or any(batch.count for batch in self.batches))
                if self.stopped:
                    return
            for batch in self.batches:
                try:
                    batch.step()
                except Exception as error:  # the server lives on: whoever waits is told
                    self.failed(error)
                    for request in batch.clear():
                        request.ended(error)
