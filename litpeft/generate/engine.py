"""Answers to prompts, many at once or one as it comes; and the command `litpeft generate`."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from litpeft.core.errors import DataError, counted
from litpeft.core.folders import atomic_file
from litpeft.core.terminal import tell, write
from litpeft.data.formats.keys import listed
from litpeft.data.prompts import Prompt, answer_key, new_file, read_prompts, typed_prompt, unread
from litpeft.data.sources import find_measured
from litpeft.data.templates import with_system
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.run import find_run
from litpeft.exchange.trained_rows import shape_of
from litpeft.generate.batch import Batch, Request, raised
from litpeft.generate.draft import Answer, Draft
from litpeft.generate.kept import Kept, kept, line, marks
from litpeft.generate.load import Loaded, load_one, named
from litpeft.generate.settings import Generate, Sampling
from litpeft.model.gpt import GPT

Came = Callable[[int, Answer], None]  # is told of an answer, with the number of its prompt


def answer_budget(model: GPT, prompt: Sequence[int], sampling: Sampling, where: str = "") -> int:
    """Returns how many tokens an answer to `prompt` may have; an error if the prompt leaves none."""
    reach = model.reach
    if not prompt:
        raise DataError("the prompt is empty: there is no token to continue from", where=where)
    if len(prompt) >= reach:
        what = f"the prompt has {len(prompt)} tokens; the model reaches {reach}, answer included"
        raise DataError(what, where=where, hint="shorten the prompt")
    return min(sampling.max_new_tokens, reach - len(prompt))


def answer(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    sampling: Sampling,
    stop_ids: Collection[int],
    seeds: Sequence[int] | None = None,
    came: Came = lambda i, answer: None,
    rows: int | None = None,
) -> list[Answer]:
    """Returns the answer to each prompt; `rows` of them are written at once, or all.

    Row i draws with seed `sampling.seed + i`, or `seeds[i]`. `came` is told of each answer as soon as it has ended.
    After Ctrl-C the error carries on; nothing is returned.
    """
    seeds = [sampling.seed + row for row in range(len(prompts))] if seeds is None else seeds
    batch, answers = Batch(model, rows or len(prompts), keeps=False), []
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        draft = Draft(prompt, tokenizer, sampling, stop_ids, answer_budget(model, prompt, sampling))
        answers.append(draft.answer)
        batch.waiting.append(Request(draft, replace(sampling, seed=seed), ended=partial(told, came, i, draft.answer)))
    while batch.count:
        batch.step()
    return answers


def told(came: Came, i: int, answer: Answer, error: Exception | None) -> None:
    """Tells of an answer; raises the error if it failed."""
    raised(error)
    came(i, answer)


def stream(
    batch: Batch, prompt: Sequence[int], tokenizer: Tokenizer, sampling: Sampling, stop_ids: Collection[int]
) -> tuple[Answer, Iterator[str]]:
    """Returns an answer, which holds all that has come so far, and its text as it comes."""
    draft = Draft(prompt, tokenizer, sampling, stop_ids, answer_budget(batch.model, prompt, sampling))
    texts: list[str] = []
    request = Request(draft, sampling, came=texts.append)

    def pieces() -> Iterator[str]:
        batch.waiting.append(request)
        try:
            while not draft.ended:
                batch.step()
                yield from texts
                texts.clear()
        finally:
            request.cancelled = True  # after Ctrl-C, say

    return draft.answer, pieces()


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
    with kept(output, settings.resume) as keep:
        for name, path in names.items():
            loaded = load_one(settings, path)
            write(f"{name}:\n" if alone and len(names) > 1 else "")

            def came(i: int, mark: str, answer: Answer, name: str = name) -> None:
                keep.add(answered(prompts[i], {name: answer.text}), mark, answer)

            answers[name] = respond(loaded, prompts, replace(settings, model=path), alone, keep, came)
        if alone:
            return
        with nullcontext() if output is None else atomic_file(output) as handle:
            for i, prompt in enumerate(prompts):
                row = answered(prompt, {name: of_one[i].text for name, of_one in answers.items()})
                (write if handle is None else handle.write)(line(row))


def respond(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    settings: Generate,
    shown: bool,
    keep: Kept,
    came: Callable[[int, str, Answer], None],
) -> list[Answer]:
    """Returns a model's answers to all prompts; with `shown`, the only one is written to stdout as it comes.

    `came` is told of each that `keep` does not have, with its mark there.
    """
    system = loaded.system if settings.system is None else settings.system
    ids = [prompt_ids(loaded, prompt, system) for prompt in prompts]
    for tokens, prompt in zip(ids, prompts, strict=True):
        answer_budget(loaded.model, tokens, settings.sampling, prompt.where)
    stop_ids = loaded.tokenizer.stop_ids if settings.raw else loaded.template.stop_ids
    began = time.perf_counter()
    if shown:
        only, pieces = stream(Batch(loaded.model, 1), ids[0], loaded.tokenizer, settings.sampling, stop_ids)
        for text in pieces:
            write(text)
        write("\n")
        new = answers = [only]
    else:
        of = marks(settings, "raw" if settings.raw else "", loaded, ids, settings.sampling)
        done = keep.done(of)
        answers = answer_all(
            loaded, ids, settings.batch_size, settings.sampling, stop_ids, lambda i, one: came(i, of[i], one), done
        )
        new = [one for i, one in enumerate(answers) if i not in done]
    if new:
        tell(figures(new, time.perf_counter() - began))
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
    done: Mapping[int, Answer] | None = None,
) -> list[Answer]:
    """Returns the answers to all prompts, in their order; `batch_size` are written at once, the longest prompts first.

    `came` is told of each as soon as it has ended. Those that are `done`, by the numbers of their prompts, stay.
    """
    done = done or {}
    order = sorted((i for i in range(len(ids)) if i not in done), key=lambda i: len(ids[i]), reverse=True)
    ended = len(done)

    def ended_one(number: int, answer: Answer) -> None:
        nonlocal ended
        ended += 1
        came(order[number], answer)
        if ended % batch_size == 0 or ended == len(ids):
            tell(f"{ended} of {len(ids)} prompts answered")

    prompts, seeds = [ids[i] for i in order], [sampling.seed + i for i in order]
    rows = max(1, min(batch_size, len(order)))
    answers = answer(loaded.model, prompts, loaded.tokenizer, sampling, stop_ids, seeds, ended_one, rows)
    found = dict(done) | dict(zip(order, answers, strict=True))
    return [found[i] for i in range(len(ids))]


def figures(answers: list[Answer], seconds: float) -> str:
    """Returns one line on how much was written, how fast, and how much of it was cut."""
    tokens = sum(len(a.ids) for a in answers)
    cut = sum(a.reason == "length" for a in answers)
    speed = f"{counted(tokens, 'token')} in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s)"
    return speed + (f"; {cut} of {len(answers)} answers cut at their longest length" if cut else "")
