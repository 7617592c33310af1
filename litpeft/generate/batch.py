"""Answers that are written at once, a token of each in a step; requests for them come and go between the steps.

A step reads every weight once for all answers (continuous batching: https://www.usenix.org/conference/osdi22/presentation/yu).
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from litpeft.core.errors import UserError
from litpeft.data.batches import framed
from litpeft.generate.cache import TokenCache
from litpeft.generate.cpu.fused_block import NATIVE_TOKENS
from litpeft.generate.draft import Draft
from litpeft.generate.logprobs import TokenScore, scored
from litpeft.generate.sampling import next_tokens
from litpeft.generate.settings import Sampling
from litpeft.generate.speculate import Lookup
from litpeft.model.gpt import GPT

PART = NATIVE_TOKENS  # tokens of prompts that a server reads in a step, while no answer goes on


def raised(error: Exception | None) -> None:
    if error is not None:
        raise error


@dataclass(eq=False)
class Request:
    """An answer that is wanted. `came` is told each new text of it, `ended` that it has ended, or why it failed."""

    draft: Draft
    sampling: Sampling
    adapter: int = 0  # the number of its run, where several are beside one base; 0: the base
    came: Callable[[str], None] = lambda text: None
    ended: Callable[[Exception | None], None] = raised
    cancelled: bool = False  # set by the one who no longer wants it
    generator: torch.Generator | None = None
    top: int | None = None  # how many of the likeliest tokens `scores` has beside each that was drawn; None: no scores

    def __post_init__(self) -> None:
        self.prompt = len(self.draft.ids)  # tokens
        self.scores: list[TokenScore] = []
        self.lookup = Lookup(self.sampling.lookup)

    def advance(self, logits: Tensor) -> int | None:
        """Takes the next token from logits (1, V), and returns it; None if that failed, which ends the answer."""
        if self.generator is None:
            self.generator = torch.Generator(logits.device).manual_seed(self.sampling.seed)
        try:
            (token,) = next_tokens(logits, [self.draft.ids], self.sampling, [self.generator]).tolist()
        except UserError as error:
            self.draft.ended = True
            self.ended(error)
            return None
        if self.top is not None:
            self.scores += scored(logits, [token], self.top)
        if text := self.draft.add(token):
            self.came(text)
        if self.draft.ended:
            self.ended(None)
        return token


class Batch:
    """The requests to one model. The first rows of its cache are those of the answers that are being written.

    The rows after them keep what earlier requests read: the next turn of a chat does not read it again.
    """

    def __init__(self, model: GPT, rows: int, part: int | None = None, keeps: bool = True):
        """`rows` answers are written at once; a step reads `part` tokens of prompts, or all that have a row.

        Without `keeps` every prompt is read whole: then an answer does not depend on what was read before, whose keys
        may be rounded otherwise.
        """
        self.model, self.part, self.keeps = model, part, keeps
        # beyond a length the keys of all tokens of all rows would be others
        self.capacity = rows if model.config.turning_length is None else 1
        self.waiting: deque[Request] = deque()
        self.writing: list[Request] = []  # row by row
        self.reading: list[Request] = []  # their prompts are read into the next rows
        self.clear()

    def clear(self) -> list[Request]:
        """Forgets everything; returns the requests that had not ended."""
        left = [*self.writing, *self.reading, *self.waiting]
        self.waiting.clear()
        self.writing, self.reading = [], []
        self.cache = TokenCache(self.model, self.capacity)
        self.cache.rows = [[] for _ in range(self.capacity)]
        self.cache.prompts, self.cache.adapters = [0] * self.capacity, [0] * self.capacity
        return left

    def forget(self, adapter: int, moved: bool) -> None:
        """Forgets what was read for a run, whose number another run gets; `moved`: others' maps were, in memory."""
        for row, number in enumerate(self.cache.adapters):
            if number == adapter:
                self.cache.rows[row] = []
        if moved:
            self.cache.recorded = {}

    @property
    def count(self) -> int:
        """Returns how many requests have not ended."""
        return len(self.writing) + len(self.reading) + len(self.waiting)

    def step(self) -> None:
        """Writes a token of each answer, and reads prompts if there is room."""
        self.drop(row for row, request in enumerate(self.writing) if request.cancelled)
        self.reading = [request for request in self.reading if not request.cancelled]  # it was alone, see `read`
        if self.writing:
            self.write()
        if not self.reading:
            self.begin()
        if self.reading:
            self.read()

    def write(self) -> None:
        """Writes the next token of each answer; of one by itself some more, if they are guessed."""
        cache, live, padding = self.cache, list(self.writing), self.padding()
        kept = [cache.rows[row] for row in padding]
        guesses = len(live) == 1 and not cache.only_on  # a wrong guess would have to be taken back
        guess = live[0].lookup.guess(live[0].draft.ids, live[0].draft.left - 1) if guesses else []
        rows = [[*request.draft.ids, *guess] for request in live] + [[*row, 0] for row in kept]
        prompts = [request.prompt for request in live] + [cache.prompts[row] for row in padding]
        logits = cache.logits(rows, len(guess) + 1, prompts)
        for row, tokens in zip(padding, kept, strict=True):
            cache.rows[row] = tokens
        for right, guessed in enumerate([*guess, None]):  # the next logits count if this token is the guessed one
            after = logits[right :: len(guess) + 1]
            tokens = [request.advance(after[row : row + 1]) for row, request in enumerate(live)]
            if tokens != [guessed] or live[0].draft.ended:
                break
        if guess:
            live[0].lookup.learn(right)
        self.drop(row for row, request in enumerate(live) if request.draft.ended)

    def padding(self) -> range:
        """Returns the idle rows of a step, whose results are not used: on a GPU steps are recorded for few numbers.

        What such a row keeps stays as it is: the step writes behind it.
        """
        live = len(self.writing)
        if not self.cache.records or any(self.model.frame):
            return range(live, live)
        return range(live, min(self.capacity, 1 << (live - 1).bit_length()))

    def begin(self) -> None:
        """Gives rows to requests that wait: as many as there are rows, and as their prompts are read in one step."""
        most = 0
        while self.waiting and len(self.writing) + len(self.reading) < self.capacity:
            request = self.waiting[0]
            most = max(most, request.prompt)
            if self.reading and self.part is not None and most * (len(self.reading) + 1) > self.part:
                return
            self.waiting.popleft()
            if not request.cancelled:
                self.place(request)
                self.reading.append(request)

    def place(self, request: Request) -> None:
        """Gives a request the row that holds most of its prompt already; of several the one that is idle longest."""
        next_row, cache = len(self.writing) + len(self.reading), self.cache
        prompt = framed(request.draft.ids, request.prompt, *self.model.frame)

        def known(row: int) -> int:
            return cache.known(cache.rows[row], prompt) if cache.adapters[row] == request.adapter else 0

        if self.keeps:
            cache.swap(next_row, max(range(next_row, self.capacity), key=lambda row: (known(row), row)))
        if not self.keeps or cache.adapters[next_row] != request.adapter:
            cache.adapters[next_row], cache.rows[next_row] = request.adapter, []

    def read(self) -> None:
        """Reads prompts, a part of one that is longer than a step allows; the last token of each begins its answer."""
        first, prompts = len(self.writing), [request.draft.ids for request in self.reading]
        if len(prompts) == 1 and self.part is not None and not any(self.model.frame):
            done = self.cache.known(self.cache.rows[first], prompts[0])
            prompts = [prompts[0][: max(done, 1) + self.part]]
        logits = self.cache.logits(prompts, 1, [request.prompt for request in self.reading], first)
        if len(prompts[-1]) < self.reading[-1].prompt:
            return
        live = list(self.reading)
        self.writing, self.reading = self.writing + live, []
        for row, request in enumerate(live):
            request.advance(logits[row : row + 1])
        self.drop(first + row for row, request in enumerate(live) if request.draft.ended)

    def drop(self, rows: Iterable[int]) -> None:
        """Takes rows out of the batch: the last one comes in the place of each."""
        for row in sorted(rows, reverse=True):
            last = len(self.writing) - 1
            self.cache.swap(row, last)
            self.writing[row] = self.writing[last]
            del self.writing[last]
            if self.reading:  # of several steps: its row follows those of the answers
                self.cache.swap(last, last + 1)
