"""Held-out rows as questions: sample answers during a run, and the share that is answered exactly."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from litpeft.data.rows import Row
from litpeft.data.templates import ChatTemplate
from litpeft.generate.engine import answer
from litpeft.generate.evaluate import Exchange, exactly
from litpeft.generate.load import Loaded
from litpeft.generate.settings import Sampling
from litpeft.train.log import Log
from litpeft.train.progress import Progress
from litpeft.train.report import Sample

if TYPE_CHECKING:
    from litpeft.train.fabric import Fabric

ANSWERED_AT_ONCE = 16
SHOWN = 2  # questions whose answers the report shows
Question = tuple[Exchange, list[int]]  # with the ids of its prompt


@torch.no_grad()
def show_sample(
    fabric: "Fabric", loaded: Loaded, questions: list[Question], tokens: int, log: Log, progress: Progress
) -> None:
    """Answers the first two questions and shows the first; `progress.samples` keeps the first and last answers."""
    if not tokens or not questions:
        return
    exchanges, prompts = zip(*questions[:SHOWN], strict=True)
    loaded.model.eval()
    with fabric.autocast():
        answers = answer(
            loaded.model, prompts, loaded.tokenizer, Sampling(max_new_tokens=tokens), loaded.template.stop_ids
        )
    loaded.model.train()
    if not progress.samples:
        log.message(f"  asked:    {exchanges[0].asked}")
        log.message(f"  expected: {exchanges[0].expected}")
    log.message(f"  answered: {answers[0].text}")
    samples, start = progress.samples, progress.step == 0
    for i, exchange in enumerate(exchanges):
        first = samples[i].before if len(samples) > i else answers[i].text if start else None
        samples[i : i + 1] = [Sample(exchange.asked, exchange.expected, before=first, after=answers[i].text)]


@torch.no_grad()
def exact_share(fabric: "Fabric", loaded: Loaded, questions: list[Question]) -> float:
    """Returns the share of the questions whose greedy answer is exactly the expected one."""
    expected = [exchange.expected for exchange, _ in questions]
    longest = max(len(loaded.tokenizer.encode(one.whole)) for one, _ in questions)
    loaded.model.eval()
    with fabric.autocast():
        _, exact = exactly(loaded, [prompt for _, prompt in questions], expected, longest + 8, ANSWERED_AT_ONCE)
    loaded.model.train()
    return sum(exact) / len(exact)


def askable(template: ChatTemplate, reach: int, rows: Sequence[Row], most: int | None = None) -> list[Question]:
    """Returns the rows as questions, at most so many of them.

    Rows that the template refuses or that leave no room for an answer are left out.
    """
    found = []
    for row in rows:
        if len(found) == most:
            break
        exchange = Exchange.of(row)
        if not exchange.before or not exchange.expected:  # a document, or a call of a tool
            continue
        try:
            prompt = template.prompt(exchange.before)
        except ValueError:  # the assistant begins the chat, say
            continue
        if 0 < len(prompt) < reach:
            found.append((exchange, prompt))
    return found
