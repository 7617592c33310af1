"""Writing with a model: compute only what is new, stop where an answer ends; and the command `litpeft generate`.

Letters: B rows, T new tokens, V vocabulary.
"""

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from litpeft.build import Loaded, load
from litpeft.data.templates import with_system
from litpeft.errors import UserError
from litpeft.model import GPT, Context, KVCache
from litpeft.prompts import Prompt, atomic_file, new_file, read_prompts, typed_prompt
from litpeft.sampling import next_tokens
from litpeft.settings.generate import Generate, Sampling
from litpeft.terminal import clean
from litpeft.tokenizer import StreamDecoder, Tokenizer

FIRST_LENGTH = 256  # tokens that a new cache has room for


class TokenCache:
    """The keys and values of B rows of tokens in all layers, and those tokens.

    It is always whole: `rows` never names a token whose keys may have been overwritten, even if a call was interrupted.
    """

    def __init__(self, model: GPT):
        self.model = model
        self.layers: list[KVCache] = []
        self.rows: list[list[int]] = []

    @torch.inference_mode()
    def logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Returns the logits (B, V) after the last token of each row; computes only what follows the tokens held.

        Shorter rows are padded at the end. What is written there lies at positions that no token looks at before it
        is overwritten.
        """
        held = self.rows if self.layers else [[] for _ in rows]
        starts = [min(common_prefix(old, new), len(new) - 1) for old, new in zip(held, rows, strict=True)]
        new = [list(row[start:]) for row, start in zip(rows, starts, strict=True)]
        width = max(map(len, new))
        self.reserve(len(rows), max(starts) + width)
        self.rows = [list(row[:start]) for row, start in zip(rows, starts, strict=True)]
        device = self.model.embed.weight.device
        ids = torch.tensor([part + [0] * (width - len(part)) for part in new], device=device)  # (B, T)
        pos = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
        last = torch.tensor([i * width + len(part) - 1 for i, part in enumerate(new)], device=device)
        start = starts[0] if len(set(starts)) == 1 else None
        ctx = Context(pos, cache=self.layers, end=max(starts) + width, start=start)
        logits = self.model(ids, ctx, at=last)
        self.rows = [list(row) for row in rows]
        return logits

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
        self.layers = grown

    @torch.inference_mode()
    def keep(self, numbers: Sequence[int]) -> None:
        """Drops all rows but these."""
        chosen = torch.tensor(numbers, device=self.model.embed.weight.device)
        for layer in self.layers:
            layer.k, layer.v = layer.k[chosen], layer.v[chosen]
        self.rows = [self.rows[number] for number in numbers]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many tokens from the start are the same in both."""
    if a == b[: len(a)]:  # each step of an answer is this case
        return len(a)
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class Answer:
    """What a model wrote to a prompt, without the token or the string that ended it."""

    ids: list[int]
    text: str
    reason: str  # stop | length | string | interrupted


class Draft:
    """An answer while it is written: which of its text may be shown, and whether it has ended."""

    def __init__(
        self, prompt: Sequence[int], tokenizer: Tokenizer, sampling: Sampling, stop_ids: Collection[int], limit: int
    ):
        self.ids = list(prompt)  # the prompt's tokens, then the answer's
        self.answer = Answer([], "", "interrupted")
        self.ended = False
        self.stop, self.stop_ids, self.limit = sampling.stop, stop_ids, limit
        self.decoder = StreamDecoder(tokenizer)
        self.held = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """Takes the next token; returns the text that can be shown now."""
        if token in self.stop_ids:
            return self.end("stop")
        self.ids.append(token)
        self.answer.ids.append(token)
        shown = self.show(self.decoder.feed(token))
        if not self.ended and len(self.answer.ids) == self.limit:
            shown += self.end("length")
        return shown

    def end(self, reason: str) -> str:
        """Ends the answer; returns the rest of its text."""
        shown = self.show(self.decoder.flush())
        if self.ended:  # the rest held a stop string
            return shown
        self.ended, self.answer.reason = True, reason
        rest, self.held = self.held, ""
        self.answer.text += rest
        return shown + rest

    def show(self, text: str) -> str:
        text = self.held + text
        found = min((at for at in map(text.find, self.stop) if at >= 0), default=-1)
        if found >= 0:
            self.ended, self.answer.reason = True, "string"
            text, self.held = text[:found], ""
        else:
            split = len(text) - max((overlap(text, stop) for stop in self.stop), default=0)
            text, self.held = text[:split], text[split:]
        self.answer.text += text
        return text


def overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that a stop string begins with, short of the whole of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def room(model: GPT, prompt: Sequence[int], sampling: Sampling, where: str = "") -> int:
    """Returns how many tokens an answer to `prompt` may have; an error if the prompt leaves none."""
    reach = model.config.max_positions
    if not prompt:
        raise UserError("DATA-400", "the prompt is empty: there is no token to continue from", where=where)
    if len(prompt) >= reach:
        what = f"the prompt has {len(prompt)} tokens; the model reaches {reach}, answer included"
        raise UserError("DATA-401", what, where=where, hint="shorten the prompt")
    return min(sampling.max_new_tokens, reach - len(prompt))


def decode(
    cache: TokenCache, drafts: Sequence[Draft], sampling: Sampling, seeds: Sequence[int]
) -> Iterator[tuple[int, str]]:
    """Writes all drafts to their ends at once; yields (row, new text) as it comes. Ended rows leave the batch."""
    device = cache.model.embed.weight.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    live = list(range(len(drafts)))
    while live:
        history = [drafts[row].ids for row in live]
        picked = next_tokens(cache.logits(history), history, sampling, [generators[row] for row in live])
        for row, token in zip(live, picked.tolist(), strict=True):
            yield row, drafts[row].add(token)
        stay = [number for number, row in enumerate(live) if not drafts[row].ended]
        if 0 < len(stay) < len(live):
            cache.keep(stay)
        live = [live[number] for number in stay]


def answer(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    sampling: Sampling,
    stop_ids: Collection[int],
    on_token: Callable[[int, str], None] | None = None,
    *,
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """Returns the answer to each prompt, all written in one batch; `on_token(row, text)` sees text as it comes.

    Row i draws with seed `sampling.seed + i`, or `seeds[i]`. After Ctrl-C the error carries on; nothing is returned.
    """
    drafts = [Draft(p, tokenizer, sampling, stop_ids, room(model, p, sampling)) for p in prompts]
    seeds = [sampling.seed + row for row in range(len(prompts))] if seeds is None else seeds
    for row, text in decode(TokenCache(model), drafts, sampling, seeds):
        if on_token is not None:
            on_token(row, text)
    return [draft.answer for draft in drafts]


class Stream:
    """Iterates over the text of one answer as it comes; `answer` is what there is of it, at any time."""

    def __init__(
        self,
        cache: TokenCache,
        prompt: Sequence[int],
        tokenizer: Tokenizer,
        sampling: Sampling,
        stop_ids: Collection[int],
    ):
        draft = Draft(prompt, tokenizer, sampling, stop_ids, room(cache.model, prompt, sampling))
        self.answer = draft.answer
        self._pieces = decode(cache, [draft], sampling, [sampling.seed])

    def __iter__(self) -> Iterator[str]:
        return (text for _, text in self._pieces if text)


def generate(settings: Generate) -> None:
    """The command. Answers go to stdout, or to `output`; figures to stderr."""
    output = new_file(settings.output)
    if settings.input is None:
        prompts = [typed_prompt(settings.prompt, settings.raw)]
    else:
        prompts = read_prompts(Path(settings.input), settings.raw)
    loaded = load(settings.model, settings.base, settings.precision, settings.quantize)
    system = loaded.system if settings.system is None else settings.system
    ids = [prompt_ids(loaded, prompt, system) for prompt in prompts]
    for tokens, prompt in zip(ids, prompts, strict=True):
        room(loaded.model, tokens, settings.sampling, prompt.where)
    stop_ids = loaded.tokenizer.stop_ids if settings.raw else loaded.template.stop_ids
    began = time.perf_counter()
    if settings.input is None and output is None:
        stream = Stream(TokenCache(loaded.model), ids[0], loaded.tokenizer, settings.sampling, stop_ids)
        for text in stream:
            print(clean(text) if sys.stdout.isatty() else text, end="", flush=True)
        print()
        answers = [stream.answer]
    else:
        answers = answer_all(loaded, ids, settings.batch_size, settings.sampling, stop_ids)
        rows = [prompt.row | {"answer": a.text} for prompt, a in zip(prompts, answers, strict=True)]
        with nullcontext(sys.stdout) if output is None else atomic_file(output) as handle:
            handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(figures(answers, time.perf_counter() - began), file=sys.stderr)


def prompt_ids(loaded: Loaded, prompt: Prompt, system: str | None) -> list[int]:
    """Returns the tokens of a prompt, ready to be continued."""
    tokenizer = loaded.tokenizer
    try:
        if not isinstance(prompt.content, str):
            return loaded.template.prompt(with_system(prompt.content, system))
        ids = tokenizer.encode(prompt.content)  # raw: BOS first if the model saw plain text so
        return [tokenizer.bos_id, *ids] if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id] else ids
    except ValueError as error:
        raise UserError("DATA-408", str(error), where=prompt.where) from None


def answer_all(
    loaded: Loaded, ids: list[list[int]], batch_size: int, sampling: Sampling, stop_ids: Collection[int]
) -> list[Answer]:
    """Returns the answers to all prompts, in their order; those of like length are answered together, longest first."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        seeds = [sampling.seed + i for i in batch]
        prompts = [ids[i] for i in batch]
        done = answer(loaded.model, prompts, loaded.tokenizer, sampling, stop_ids, seeds=seeds)
        answers |= zip(batch, done, strict=True)
        print(f"{len(answers)} of {len(ids)} prompts answered", file=sys.stderr)
    return [answers[i] for i in range(len(ids))]


def figures(answers: list[Answer], seconds: float) -> str:
    """Returns one line on how much was written, how fast, and how much of it was cut."""
    tokens = sum(len(a.ids) for a in answers)
    cut = sum(a.reason == "length" for a in answers)
    speed = f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s)"
    return speed + (f"; {cut} of {len(answers)} answers cut at their longest length" if cut else "")
