"""Chat templates: a chat as the text that the model reads, and the parts of it that the model is to learn to write."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from litpeft.core.errors import UserError
from litpeft.data.formats.turn import Turn
from litpeft.data.sandbox import LimitError, Task, Template, Text, TooLong
from litpeft.data.tokenizer import Tokenizer
from litpeft.data.tokenizer_backends import Span

# The text of the Alpaca data set, as Lit-GPT writes it: with a line break after "### Response:", so that no token spans
# prompt and answer. A system message takes the place of the first sentences; further turns repeat the headings.
ALPACA = """\
{%- if messages[0].role == 'system' -%}{{ messages[0].content }}{%- set messages = messages[1:] -%}
{%- elif messages[0].input -%}
{{ 'Below is an instruction that describes a task, paired with an input that provides further context. ' }}
{{- 'Write a response that appropriately completes the request.' }}
{%- else -%}
{{ 'Below is an instruction that describes a task. ' }}
{{- 'Write a response that appropriately completes the request.' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
{{ raise_exception('the alpaca template takes turns of user and assistant only') }}
{%- elif message.role == 'user' -%}
{{ '\\n\\n### Instruction:\\n' + message.content }}
{{- '\\n\\n### Input:\\n' + message.input if message.input }}
{{- '\\n\\n### Response:\\n' }}
{%- else -%}
{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}"""


@dataclass(frozen=True)
class Rendered:
    """A chat as text; spans are in characters."""

    text: str
    trained: list[Span]  # what the model is to write: the answers, each with its end-of-turn token
    plain: list[Span]  # where somebody's content spells a special token, which must stay plain text
    difference: str = ""  # how the prompt that asks for the last answer differs from what stands before it here


FIRST_PRIVATE = "\U000f0000"  # characters from here on mean nothing by themselves: they mark places
MOST = 1 << 29  # characters of a row's messages, times its answers: each is sought in all that is before it
T = TypeVar("T")
Message = Turn | Mapping[str, str]  # role, content and, of an alpaca row, input


class ChatTemplate:
    """A Jinja template with the special tokens of a model."""

    def __init__(
        self, tokenizer: Tokenizer, name: str = "auto", now: datetime | None = None, *, is_setting: bool = True
    ):
        """`name` is data.template; `now` the date that a template may print, the same for all that is rendered.

        `is_setting` says that the command has data.template: where a run's template is used, errors do not offer it.
        """
        self.is_setting = is_setting
        if name == "model" and tokenizer.chat_template is None:
            if not is_setting:
                what = "the run was trained with the model's chat template, which is not there any more"
                raise UserError("MODEL-322", what, where=tokenizer.where, hint="put it back: chat_template.jinja")
            hint = "choose data.template alpaca, or auto"
            raise UserError("CONFIG-300", "the model has no chat template", where="data.template", hint=hint)
        own = name != "alpaca" and tokenizer.chat_template is not None
        self.tokenizer, self.name = tokenizer, "model" if own else "alpaca"
        alpaca = ("{{ bos_token }}" if tokenizer.adds_bos else "") + ALPACA
        self.source: str = tokenizer.chat_template if own else alpaca
        self.where = tokenizer.template_where if own else tokenizer.where
        self.hash = hashlib.sha256(self.source.encode()).hexdigest()
        constants = dict(tokenizer.special_tokens, tools=None, documents=None)
        try:
            self._template = Template(self.source, now or datetime.now(), constants)
            self.end_of_turn = self._find_end_of_turn()
        except (LimitError, ValueError) as error:
            hint = "data.template alpaca does without the model's template" if is_setting else ""
            what = f"the chat template cannot be used: {error}"
            raise UserError("MODEL-320", what, where=self.where, hint=hint) from None
        if self.end_of_turn is None and tokenizer.eos is None:
            what = "neither the chat template nor the tokenizer has a token that ends an answer"
            raise UserError("MODEL-321", what, where=tokenizer.where, hint="set eos_token in tokenizer_config.json")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Returns all ids that end an answer."""
        end = self.tokenizer.token_id(self.end_of_turn)
        return tuple(sorted({*self.tokenizer.stop_ids, *([] if end is None else [end])}))

    def render(self, turns: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns the text of a chat; raises ValueError if the template refuses it."""
        return self._one(self._text(self._messages(turns), add_generation_prompt))

    def spans(self, turns: Sequence[Turn]) -> Rendered:
        """Returns the text of a chat to learn from; raises ValueError if the template refuses it or hides answers."""
        return self._one(self._spans(turns))

    def spans_of(self, chats: Sequence[Sequence[Turn]], places: Sequence[str]) -> list[Rendered | ValueError]:
        """Returns for each chat what `spans` does, or its error; `places` are the files and lines of the chats."""
        return self._all([self._spans(turns) for turns in chats], places)

    def prompt(self, turns: Sequence[Message], place: str = "") -> list[int]:
        """Returns the ids after which the model writes its answer; raises ValueError if the template refuses them."""
        text, plain = self._one(self._prompt(turns), place)
        return self.tokenizer.encode_with_offsets(text, plain)[0]

    def _spans(self, turns: Sequence[Turn]) -> Task[Rendered]:
        messages = self._messages(turns)
        answers = sum(message["role"] == "assistant" for message in messages)
        if answers * sum(64 + len(message["content"]) for message in messages) > MOST:
            raise TooLong(f"its {answers:,} answers in {len(messages):,} messages are too much for the chat template")
        shielded, specials = self._shield(messages)
        text, found, difference = yield from self._answers(shielded)
        text, answers, plain = self._restore(text, found, specials)
        for character, word in specials.items():
            difference = difference.replace(repr(character)[1:-1], word)
        if specials and text != (yield self._asked(messages)):
            raise ValueError("the chat template acts on a special token that the row spells out")
        numbers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if self.end_of_turn is None and numbers and numbers[-1] == len(turns) - 1:
            text = text[: answers[-1][1]] + (self.tokenizer.eos or "")
            answers[-1] = (answers[-1][0], len(text))
        trained = [span for i, span in zip(numbers, answers, strict=True) if turns[i].trained]
        return Rendered(text, trained, plain, difference)

    def _prompt(self, turns: Sequence[Message]) -> Task[tuple[str, list[Span]]]:
        messages = self._messages(turns)
        shielded, specials = self._shield(messages)
        text, _, plain = self._restore((yield self._asked(shielded, True)), [], specials)
        if specials and text != (yield self._asked(messages, True)):
            raise ValueError("the chat template acts on a special token that a message spells out")
        return text, plain

    def _messages(self, turns: Sequence[Message]) -> list[dict[str, str]]:
        """Returns what the template is given: role and content, and input where it is the alpaca template."""
        messages = [dict(turn.message if isinstance(turn, Turn) else turn) for turn in turns]
        if self.name == "model":
            for message in messages:
                message["content"] = "\n\n".join(filter(None, (message["content"], message.pop("input", ""))))
        return messages

    # Whatever needs texts is a task: it yields what it wants rendered and is sent the text, or thrown the template's
    # error. So the texts of many chats are rendered together.

    def _asked(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = False, marks: tuple[str, ...] = ("", "")
    ) -> Text:
        """Returns what the template is given."""
        return {"messages": messages, "add_generation_prompt": add_generation_prompt}, marks

    def _text(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> Task[str]:
        return (yield self._asked(messages, add_generation_prompt))

    def _all(self, tasks: list[Task[T]], places: Sequence[str]) -> list[T | ValueError]:
        try:
            return self._template.run(tasks)
        except LimitError as error:
            place = f", with {places[error.number]}" if places[error.number] else ""
            what = f"the chat template costs more than it may{place}: {error}"
            raise UserError("MODEL-323", what, where=self.where) from None

    def _one(self, task: Task[T], place: str = "") -> T:
        [result] = self._all([task], [place])
        if isinstance(result, ValueError):
            raise result
        return result

    def _find_end_of_turn(self) -> str | None:
        """Returns the special token with which the template ends an assistant's turn, looking at a small chat."""
        question, answer = {"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}
        _, _, tail = self._one(self._text([question, answer])).rpartition("A1")
        match = self.tokenizer.special_pattern.search(tail)
        return match[0] if match else None

    # Content that spells a special token is shielded: each such string becomes one private-use character while the
    # template runs, so that it can be told from the tokens that the template writes.

    def _shield(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], dict[str, str]]:
        """Returns the messages with every special token in them replaced, and what the replacements stand for."""
        pattern = self.tokenizer.special_pattern
        words = sorted({word for m in messages for text in m.values() for word in pattern.findall(text)})
        if not words:
            return messages, {}
        characters = dict(zip(words, _unused(messages, len(words)), strict=True))
        shielded = [{k: pattern.sub(lambda m: characters[m[0]], text) for k, text in m.items()} for m in messages]
        return shielded, {character: word for word, character in characters.items()}

    def _restore(self, text: str, spans: list[Span], specials: dict[str, str]) -> tuple[str, list[Span], list[Span]]:
        """Returns the text as it was meant, the spans in it, and where a special token is plain text."""
        if not specials:
            return text, spans, []
        pieces, plain, moved, position, length = [], [], {}, 0, 0
        edges = {edge for span in spans for edge in span}
        for match in re.finditer(f"[{''.join(specials)}]", text):
            moved |= {edge: edge - position + length for edge in edges if position <= edge <= match.start()}
            word = specials[match[0]]
            pieces += [text[position : match.start()], word]
            start = length + match.start() - position
            plain.append((start, start + len(word)))
            position, length = match.end(), start + len(word)
        moved |= {edge: edge - position + length for edge in edges if position <= edge}
        return "".join([*pieces, text[position:]]), [(moved[a], moved[b]) for a, b in spans], plain

    # Where the answers lie is asked of the template itself, in one of three ways.

    def _answers(self, messages: list[dict[str, str]]) -> Task[tuple[str, list[Span], str]]:
        """Returns the text; for every assistant message, what of it the model is to write; and the difference."""
        full = yield self._asked(messages)
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for way in (self._by_blocks, self._by_prefixes, self._by_marks):
            spans = yield from way(full, messages, numbers)
            if spans is not None:
                difference = ""
                if way != self._by_prefixes and self.name != "alpaca" and numbers:
                    difference = yield from self._difference(full, messages[: numbers[-1]], spans[-1][0])
                return full, [self._close(full, span) for span in spans], difference
        raise ValueError(
            "the chat template rewrites the chat so that the answers cannot be told from the rest ("
            + ("data.template alpaca does without it; " if self.is_setting else "")
            + "{% generation %} blocks in it would show them)"
        )

    def _by_blocks(self, full: str, messages: list[dict[str, str]], numbers: list[int]) -> Task[list[Span] | None]:
        """{% generation %} blocks in the template, one for each assistant message."""
        if not self._template.has_generation:
            return None
        marks = tuple(_unused(messages, 2))
        return _between((yield self._asked(messages, marks=marks)), full, marks, len(numbers))

    def _by_prefixes(self, full: str, messages: list[dict[str, str]], numbers: list[int]) -> Task[list[Span] | None]:
        """An answer reaches from the end of the prompt for it to the end of the chat so far, if both start the text."""
        spans = []
        for i in numbers:
            try:
                prompt = yield self._asked(messages[:i], True)
                upto = (yield self._asked(messages[: i + 1])) if i + 1 < len(messages) else full
            except ValueError:  # the template may refuse a chat that ends here
                return None
            shown = messages[i]["content"].strip() in upto[len(prompt) :]
            if not (shown and full.startswith(upto) and upto.startswith(prompt)):
                return None
            spans.append((len(prompt), len(upto)))
        return spans

    def _by_marks(self, full: str, messages: list[dict[str, str]], numbers: list[int]) -> Task[list[Span] | None]:
        """Private-use characters in the contents: one at the end of each, and one where an answer's content begins."""
        begin, *ends = _unused(messages, 1 + len(messages))
        # some templates look at how an answer begins, so it is left alone at first; some leave out its thoughts
        for opening, thoughts in (("", ""), (begin, ""), (begin, "</think>")):
            opened = [opening if m["role"] == "assistant" else "" for m in messages]
            marked = [_mark(m, first, end, thoughts) for m, first, end in zip(messages, opened, ends, strict=True)]
            try:
                text, places = _without_marks((yield self._asked(marked)), {begin, *ends})
            except ValueError:
                continue
            spans = yield from self._marked_spans(full, messages, numbers, places, (begin, *ends))
            if text == full and spans is not None:
                return spans
        return None

    def _marked_spans(
        self,
        full: str,
        messages: list[dict[str, str]],
        numbers: list[int],
        places: dict[str, list[int]],
        marks: tuple[str, ...],
    ) -> Task[list[Span] | None]:
        """Returns the answers: each from where its prompt ends, or its content begins, to where its content ends."""
        begin, *ends = marks
        spans, position = [], 0  # position: where the content of the message before ends
        for i, end in enumerate(ends):
            stop = places.get(end, [-1])[0]
            if i in numbers:
                start = yield from self._prompt_end(full, messages[:i], position, stop)
                if start is None:
                    start = next((place for place in places.get(begin, []) if position <= place <= stop), None)
                if start is None or len(places.get(end, [])) != 1:
                    return None
                spans.append((start, stop))
            position = max(position, stop)
        return spans

    def _prompt_end(self, full: str, before: list[dict[str, str]], start: int, stop: int) -> Task[int | None]:
        """Returns where between start and stop the generation prompt ends, if the template has one."""
        try:
            prompt = yield self._asked(before, True)
            header = prompt.removeprefix((yield self._asked(before)))
        except ValueError:
            return None
        place = full.find(header, start, stop) if header else -1
        return place + len(header) if place >= 0 else None

    def _difference(self, full: str, before: list[dict[str, str]], start: int) -> Task[str]:
        """Returns how the prompt for an answer differs from the text up to `start`, where it is trained; or ""."""
        try:
            prompt = yield self._asked(before, True)
        except ValueError:  # never asked then
            return ""
        if full.startswith(prompt) and start <= len(prompt):
            return ""
        same = len(os.path.commonprefix([prompt, full]))
        asked, learnt = prompt[same : same + 40], full[same : same + 40]
        return f"after {full[max(0, same - 40) : same]!r} the prompt has {asked!r}, the row {learnt!r}"

    def _close(self, text: str, span: Span) -> Span:
        """Returns the span up to and with its end-of-turn token, if the template writes one here."""
        start, end = span
        if self.end_of_turn is None:
            return span
        place = text.rfind(self.end_of_turn, start, end)
        if place >= 0:
            return start, place + len(self.end_of_turn)
        follows = re.compile(rf"\s*{re.escape(self.end_of_turn)}").match(text, end)
        return (start, follows.end()) if follows else span


def _unused(messages: list[dict[str, str]], count: int) -> list[str]:
    """Returns private-use characters that no message holds."""
    held = {c for m in messages for text in m.values() for c in text if c >= FIRST_PRIVATE}
    first = ord(FIRST_PRIVATE)
    return [chr(c) for c in range(first, first + count + len(held)) if chr(c) not in held][:count]


def _mark(message: dict[str, str], begin: str, end: str, thoughts: str) -> dict[str, str]:
    """Returns the message with marks around what follows its `thoughts`, within the spaces that a template may trim."""
    content = message["content"]
    core = content.rpartition(thoughts)[2].strip() if thoughts else content.strip()
    first = content.rindex(core) if core else len(content)
    return {**message, "content": f"{content[:first]}{begin}{core}{end}{content[first + len(core) :]}"}


def _without_marks(text: str, marks: set[str]) -> tuple[str, dict[str, list[int]]]:
    """Returns the text without its marks, and where in it each of them was."""
    places: dict[str, list[int]] = {}
    for count, match in enumerate(re.finditer(f"[{''.join(marks)}]", text)):
        places.setdefault(match[0], []).append(match.start() - count)
    return "".join(c for c in text if c not in marks) if places else text, places


def _between(marked: str, full: str, marks: tuple[str, ...], count: int) -> list[Span] | None:
    """Returns the spans between pairs of marks, in the text without them, if there are `count` pairs."""
    parts = re.split(f"([{''.join(marks)}])", marked)
    if parts[1::2] != list(marks) * count or "".join(parts[::2]) != full:
        return None
    ends = [0]
    for part in parts[::2]:
        ends.append(ends[-1] + len(part))
    return [(ends[2 * i + 1], ends[2 * i + 2]) for i in range(count)]


def with_system(turns: list[Turn], system: str | None) -> list[Turn]:
    """Returns the turns with the system message before them, unless they have one."""
    if not system or (turns and turns[0].role == "system"):
        return turns
    return [Turn("system", system), *turns]
