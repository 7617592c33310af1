"""Generation, token by token until an answer ends; and the command `litpeft generate`."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from litpeft.core.errors import DataError, counted
from litpeft.core.folders import atomic_file
from litpeft.core.terminal import tell, write
from litpeft.data.channels import decoder_for
from litpeft.data.formats.keys import listed
from litpeft.data.prompts import Prompt, answer_key, new_file, read_prompts, typed_prompt, unread
from litpeft.data.sources import find_measured
from litpeft.data.templates import with_system
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.run import find_run
from litpeft.exchange.trained_rows import shape_of
from litpeft.generate.cache import TokenCache
from litpeft.generate.kept import kept, line
from litpeft.generate.load import Loaded, load_one, named
from litpeft.generate.sampling import next_tokens
from litpeft.generate.settings import Generate, Sampling
from litpeft.generate.speculate import Lookup
from litpeft.model.gpt import GPT


@dataclass
class Answer:
    """A model's answer to a prompt, without the token or the string that ended it."""

    ids: list[int]
    text: str
    reason: str  # stop | length | string | interrupted


Came = Callable[[int, Answer], None]  # is told of an answer, with the number of its prompt


class Draft:
    """An answer while it is written: which of its text may be shown, and whether it has ended."""

    def __init__(
        self, prompt: Sequence[int], tokenizer: Tokenizer, sampling: Sampling, stop_ids: Collection[int], limit: int
    ):
        self.ids = list(prompt)  # the prompt's tokens, then the answer's
        self.answer = Answer([], "", "interrupted")
        self.ended = False
        self.stop, self.stop_ids, self.limit = sampling.stop, stop_ids, limit
        self.decoder = decoder_for(tokenizer, prompt)
        self.held = ""  # text that may be the beginning of a stop string

    @property
    def left(self) -> int:
        """Returns how many more tokens the answer may have."""
        return self.limit - len(self.answer.ids)

    def add(self, token: int) -> str:
        """Appends the next token; returns the text that can be shown now."""
        if token in self.stop_ids:
            return self.end("stop")
        self.ids.append(token)
        self.answer.ids.append(token)
        shown = self.show(self.decoder.feed(token))
        if not self.ended and not self.left:
            shown += self.end("length")
        return shown

    def end(self, reason: str) -> str:
        """Ends the answer; returns the rest of its text."""
        shown = self.show(self.decoder.flush())
        if self.ended:  # by a stop string in the rest
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
    """Returns the length of the longest end of `text` with which a stop string begins, but does not end."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def answer_budget(model: GPT, prompt: Sequence[int], sampling: Sampling, where: str = "") -> int:
    """Returns how many tokens an answer to `prompt` may have; an error if the prompt leaves none."""
    reach = model.reach
    if not prompt:
        raise DataError("the prompt is empty: there is no token to continue from", where=where)
    if len(prompt) >= reach:
        what = f"the prompt has {len(prompt)} tokens; the model reaches {reach}, answer included"
        raise DataError(what, where=where, hint="shorten the prompt")
    return min(sampling.max_new_tokens, reach - len(prompt))


def decode(
    cache: TokenCache, drafts: Sequence[Draft], sampling: Sampling, seeds: Sequence[int]
) -> Iterator[tuple[int, str]]:
    """Writes all drafts to their ends at once; yields (row, new text) as it comes. Ended rows leave the batch."""
    device = cache.model.embed.weight.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    live, lookup = list(range(len(drafts))), Lookup(sampling.lookup)
    prompts = [len(draft.ids) for draft in drafts]
    while live:
        history = [drafts[row].ids for row in live]
        guess = lookup.guess(history[0], drafts[live[0]].left - 1) if len(live) == 1 else []
        logits = cache.logits([ids + guess for ids in history], len(guess) + 1, [prompts[row] for row in live])
        for right, guessed in enumerate([*guess, None]):  # the next logits count if this token is the guessed one
            after = logits[right :: len(guess) + 1]
            picked = next_tokens(after, history, sampling, [generators[row] for row in live]).tolist()
            for row, token in zip(live, picked, strict=True):
                yield row, drafts[row].add(token)
            if picked != [guessed] or drafts[live[0]].ended:
                break
        if guess:
            lookup.learn(right)
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
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """Returns the answer to each prompt, all written in one batch.

    Row i draws with seed `sampling.seed + i`, or `seeds[i]`. After Ctrl-C the error carries on; nothing is returned.
    """
    drafts = [Draft(p, tokenizer, sampling, stop_ids, answer_budget(model, p, sampling)) for p in prompts]
    seeds = [sampling.seed + row for row in range(len(prompts))] if seeds is None else seeds
    for _ in decode(TokenCache(model), drafts, sampling, seeds):
        pass
    return [draft.answer for draft in drafts]


def stream(
    cache: TokenCache, prompt: Sequence[int], tokenizer: Tokenizer, sampling: Sampling, stop_ids: Collection[int]
) -> tuple[Answer, Iterator[str]]:
    """Returns an answer, which holds all that has come so far, and its text as it comes."""
    draft = Draft(prompt, tokenizer, sampling, stop_ids, answer_budget(cache.model, prompt, sampling))
    pieces = decode(cache, [draft], sampling, [sampling.seed])
    return draft.answer, (text for _, text in pieces if text)


def generate(settings: Generate) -> None:
    """The command. Answers go to stdout, or to `output`; figures to stderr."""
    output = new_file(settings.output, ".jsonl")
    if settings.input is None:
        prompts = [typed_prompt(settings.prompt, settings.raw)]
    else:
        run = None if settings.raw else find_run(Path(settings.model))
        shape = shape_of(settings, run, find_measured(settings.input), to_answer=True)
        prompts = read_prompts(settings.input, settings.raw, **shape)
        if more := unread(prompts):
            tell(f"not read, but copied to the answers: {listed(more)}")
    names, alone = named(settings), settings.input is None and output is None
    key = answer_key(prompts, "answers" if len(names) > 1 else "answer")
    if not alone and key not in ("answer", "answers"):
        tell(f"the rows have answers already; those of the model are called {key}")

    def answered(prompt: Prompt, texts: dict[str, str]) -> dict[str, Any]:
        return prompt.row | {key: texts if len(names) > 1 else next(iter(texts.values()))}

    answers: dict[str, list[Answer]] = {}
    with kept(output) as keep:
        for name, path in names.items():
            loaded = load_one(settings, path)
            write(f"{name}:\n" if alone and len(names) > 1 else "")

            def came(i: int, answer: Answer, name: str = name) -> None:
                keep(answered(prompts[i], {name: answer.text}))

            answers[name] = respond(loaded, prompts, settings, alone, came)
        if alone:
            return
        with nullcontext() if output is None else atomic_file(output) as handle:
            for i, prompt in enumerate(prompts):
                row = answered(prompt, {name: of_one[i].text for name, of_one in answers.items()})
                (write if handle is None else handle.write)(line(row))


def respond(loaded: Loaded, prompts: Sequence[Prompt], settings: Generate, shown: bool, came: Came) -> list[Answer]:
    """Returns a model's answers to all prompts; with `shown`, the only one is written to stdout as it comes."""
    system = loaded.system if settings.system is None else settings.system
    ids = [prompt_ids(loaded, prompt, system) for prompt in prompts]
    for tokens, prompt in zip(ids, prompts, strict=True):
        answer_budget(loaded.model, tokens, settings.sampling, prompt.where)
    stop_ids = loaded.tokenizer.stop_ids if settings.raw else loaded.template.stop_ids
    began = time.perf_counter()
    if shown:
        only, pieces = stream(TokenCache(loaded.model), ids[0], loaded.tokenizer, settings.sampling, stop_ids)
        for text in pieces:
            write(text)
        write("\n")
        answers = [only]
    else:
        answers = answer_all(loaded, ids, settings.batch_size, settings.sampling, stop_ids, came)
    tell(figures(answers, time.perf_counter() - began))
    return answers


def prompt_ids(loaded: Loaded, prompt: Prompt, system: str | None) -> list[int]:
    """Returns the tokens of a prompt, ready to be continued."""
    tokenizer = loaded.tokenizer
    try:
        if not isinstance(prompt.content, str):
            return loaded.template.prompt(with_system(prompt.content, system), prompt.where)
        ids, opening = tokenizer.encode(prompt.content), tokenizer.encode(tokenizer.opening)
        return ids if ids[: len(opening)] == opening else [*opening, *ids]
    except ValueError as error:
        raise DataError(str(error), where=prompt.where) from None


def answer_all(
    loaded: Loaded,
    ids: list[list[int]],
    batch_size: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    came: Came = lambda i, answer: None,
) -> list[Answer]:
    """Returns the answers to all prompts, in their order; those of like length are answered together, longest first.

    `came` is told of each as soon as its batch has ended.
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        seeds = [sampling.seed + i for i in batch]
        done = answer(loaded.model, [ids[i] for i in batch], loaded.tokenizer, sampling, stop_ids, seeds)
        answers |= zip(batch, done, strict=True)
        for i in batch:
            came(i, answers[i])
        tell(f"{len(answers)} of {len(ids)} prompts answered")
    return [answers[i] for i in range(len(ids))]


def figures(answers: list[Answer], seconds: float) -> str:
    """Returns one line on how much was written, how fast, and how much of it was cut."""
    tokens = sum(len(a.ids) for a in answers)
    cut = sum(a.reason == "length" for a in answers)
    speed = f"{counted(tokens, 'token')} in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s)"
    return speed + (f"; {cut} of {len(answers)} answers cut at their longest length" if cut else "")
