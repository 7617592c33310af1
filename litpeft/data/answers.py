"""Finds the assistant's answers in the text of a chat, by rendering variants of the chat with its template.

Each function is a task (litpeft/data/sandbox.py): it yields what it wants rendered and is sent the text, or thrown the
template's error. So the texts of many chats are rendered together.
"""

import os
from typing import Any, TypeVar

from litpeft.data.marks import between, marked, unused, without_marks
from litpeft.data.sandbox import Task, Text
from litpeft.data.tokenizer_backends import Span

T = TypeVar("T")
Messages = list[dict[str, Any]]


def ask(messages: Messages, add_generation_prompt: bool = False, marks: tuple[str, ...] = ("", "")) -> Text:
    """Returns what a template is rendered with."""
    return {"messages": messages, "add_generation_prompt": add_generation_prompt}, marks


def beside(more: dict[str, Any], task: Task[T]) -> Task[T]:
    """Does the task with more variables, such as tools, beside all messages that it wants rendered."""
    go_on, reply = task.send, None
    while True:
        try:
            variables, marks = go_on(reply)
        except StopIteration as end:
            return end.value
        try:
            go_on, reply = task.send, (yield variables | more, marks)
        except ValueError as error:
            go_on, reply = task.throw, error


def find_answers(
    full: str, messages: Messages, numbers: list[int], has_generation: bool
) -> Task[tuple[list[Span] | None, bool]]:
    """Returns the span of each answer in the text `full`, and whether each begins where its prompt ends.

    `numbers` are the indices of the assistant's messages. Three ways are tried; None: none of them finds all answers.
    """
    spans = None
    if has_generation:
        marks = tuple(unused(messages, 2))  # the template says it: {% generation %} blocks, one for each answer
        spans = between((yield ask(messages, marks=marks)), full, marks, len(numbers))
    if spans is None:
        spans = yield from _by_prompts(full, messages, numbers)
        if spans is not None:
            return spans, True
        spans = yield from _by_marks(full, messages, numbers)
    return spans, False


def _by_prompts(full: str, messages: Messages, numbers: list[int]) -> Task[list[Span] | None]:
    """An answer is what the chat up to it has after the prompt for it, where both begin the text."""
    spans = []
    for i in numbers:
        try:
            prompt = yield ask(messages[:i], True)
            upto = (yield ask(messages[: i + 1])) if i + 1 < len(messages) else full
        except ValueError:  # the template may refuse a chat that ends here
            return None
        shown = messages[i]["content"].strip() in upto[len(prompt) :]
        if not (shown and full.startswith(upto) and upto.startswith(prompt)):
            return None
        spans.append((len(prompt), len(upto)))
    return spans


def _by_marks(full: str, messages: Messages, numbers: list[int]) -> Task[list[Span] | None]:
    """Marks in the contents: one at the end of each, and, if need be, one where an answer's content begins."""
    if any("tool_calls" in message for message in messages):  # a call is not a text to mark
        return None
    begin, *ends = unused(messages, 1 + len(messages))
    # no mark at the beginning at first: some templates look at how an answer begins; some leave out its thoughts
    for opening, thoughts in (("", ""), (begin, ""), (begin, "</think>")):
        openings = [opening if m["role"] == "assistant" else "" for m in messages]
        variant = [marked(m, first, end, thoughts) for m, first, end in zip(messages, openings, ends, strict=True)]
        try:
            text, places = without_marks((yield ask(variant)), {begin, *ends})
        except ValueError:
            continue
        spans = yield from _marked_spans(full, messages, numbers, places, begin, ends)
        if text == full and spans is not None:
            return spans
    return None


def _marked_spans(
    full: str, messages: Messages, numbers: list[int], places: dict[str, list[int]], begin: str, ends: list[str]
) -> Task[list[Span] | None]:
    """Returns the answers: each from where its prompt ends, or its content begins, to where its content ends."""
    spans, position = [], 0  # position: where the content of the message before ends
    for i, end in enumerate(ends):
        stop = places.get(end, [-1])[0]
        if i in numbers:
            start = yield from _prompt_end(full, messages[:i], position, stop)
            if start is None:
                start = next((place for place in places.get(begin, []) if position <= place <= stop), None)
            if start is None or len(places.get(end, [])) != 1:
                return None
            spans.append((start, stop))
        position = max(position, stop)
    return spans


def _prompt_end(full: str, before: Messages, start: int, stop: int) -> Task[int | None]:
    """Returns where between start and stop the generation prompt ends, if the template has one."""
    try:
        prompt = yield ask(before, True)
        header = prompt.removeprefix((yield ask(before)))
    except ValueError:
        return None
    place = full.find(header, start, stop) if header else -1
    return place + len(header) if place >= 0 else None


def prompt_difference(full: str, before: Messages, start: int) -> Task[str]:
    """Returns how the prompt for an answer differs from the text that is trained before it, up to `start`; or ""."""
    try:
        prompt = yield ask(before, True)
    except ValueError:  # the template refuses it: nobody is going to ask so
        return ""
    if full.startswith(prompt) and start <= len(prompt):
        return ""
    same = len(os.path.commonprefix([prompt, full]))
    asked, learnt = prompt[same : same + 40], full[same : same + 40]
    return f"after {full[max(0, same - 40) : same]!r} the prompt has {asked!r}, the row {learnt!r}"
