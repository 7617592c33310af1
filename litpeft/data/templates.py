"""Chat templates: a chat as the text that the model reads, and the spans of it that are trained."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from litpeft.core.errors import ConfigError, ModelError
from litpeft.data.answers import Messages, ask, find_answers, offering, prompt_difference
from litpeft.data.formats.turn import PLAIN, Turn
from litpeft.data.marks import restore, shield, texts
from litpeft.data.sandbox import LimitError, Task, Template, TooLong
from litpeft.data.tokenizer import Tokenizer
from litpeft.data.tokenizer_backends import Span

# The prompt of the Alpaca data set, as Lit-GPT writes it: with a line break after "### Response:", so that no token
# spans prompt and answer. A system message replaces the first sentences; further turns repeat the headings.
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
    trained: list[Span]  # the answers, each with its end-of-turn token
    literal: list[Span]  # where a message spells a special token, which must be read as plain text
    difference: str = ""  # how the prompt for the last answer differs from the text before that answer


MOST = 1 << 29  # characters of a chat, times its answers: finding the answers takes that long
T = TypeVar("T")
Message = Turn | Mapping[str, Any]  # role, content and, of an alpaca row, input


class ChatTemplate:
    """A Jinja template with the special tokens of a model."""

    def __init__(
        self, tokenizer: Tokenizer, name: str = "auto", now: datetime | None = None, *, is_setting: bool = True
    ):
        """`name` is data.template; `now` is the date that a template may print, the same for every text.

        `is_setting`: the command has the setting data.template, which errors may then suggest.
        """
        self.is_setting = is_setting
        if name == "model" and tokenizer.chat_template is None:
            if not is_setting:
                what = "the run was trained with the model's chat template, which is not there any more"
                raise ModelError(what, where=tokenizer.where, hint="put it back: chat_template.jinja")
            hint = "choose data.template alpaca, or auto"
            raise ConfigError("the model has no chat template", where="data.template", hint=hint)
        own = name != "alpaca" and tokenizer.chat_template is not None
        self.now = now or datetime.now()
        self.tokenizer, self.name = tokenizer, "model" if own else "alpaca"
        alpaca = ("{{ bos_token }}" if tokenizer.adds_bos else "") + ALPACA
        self.source: str = tokenizer.chat_template if own else alpaca
        self.where = tokenizer.template_where if own else tokenizer.where
        self.hash = hashlib.sha256(self.source.encode()).hexdigest()
        constants = dict(tokenizer.special_tokens, tools=None, documents=None)
        try:
            self._template = Template(self.source, self.now, constants)
            self.end_of_turn = self._find_end_of_turn()
        except (LimitError, ValueError) as error:
            hint = "data.template alpaca does without the model's template" if is_setting else ""
            raise ModelError(f"the chat template cannot be used: {error}", where=self.where, hint=hint) from None
        if self.end_of_turn is None and tokenizer.eos is None:
            what = "neither the chat template nor the tokenizer has a token that ends an answer"
            raise ModelError(what, where=tokenizer.where, hint="set eos_token in tokenizer_config.json")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Returns all ids that end an answer."""
        end = self.tokenizer.token_id(self.end_of_turn)
        return tuple(sorted({*self.tokenizer.stop_ids, *([] if end is None else [end])}))

    def render(self, turns: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns the text of a chat; raises ValueError if the template refuses it."""
        return self._one(self._text(self._messages(turns), add_generation_prompt))

    def spans(self, turns: Sequence[Turn]) -> Rendered:
        """Returns the text of a chat and what of it is trained; raises ValueError if that cannot be found."""
        return self._one(self._spans(turns))

    def spans_of(self, chats: Sequence[Sequence[Turn]], places: Sequence[str]) -> list[Rendered | ValueError]:
        """Does the same for many chats, with errors in place of results; `places` are their files and lines."""
        return self._all([self._spans(turns) for turns in chats], places)

    def prompt(self, turns: Sequence[Message], place: str = "") -> list[int]:
        """Returns the ids of the prompt for the next answer; raises ValueError if the template refuses the chat."""
        text, literal = self._one(self._offering(turns, self._prompt(turns)), place)
        return self.tokenizer.encode(text, literal)

    def _spans(self, turns: Sequence[Turn]) -> Task[Rendered]:
        if turns and turns[0].role == PLAIN:
            return self._document(turns[0].content)
        return (yield from self._offering(turns, self._chat(turns)))

    def _chat(self, turns: Sequence[Turn]) -> Task[Rendered]:
        messages = self._messages(turns)
        answers = sum(message["role"] == "assistant" for message in messages)
        if answers * sum(64 + len(message["content"]) for message in messages) > MOST:
            raise TooLong(f"its {answers:,} answers in {len(messages):,} messages are too much for the chat template")
        shielded, words = shield(messages, self.tokenizer.special_pattern)
        text, found, difference = yield from self._answers(shielded)
        text, answers, literal = restore(text, found, words)
        for character, word in words.items():
            difference = difference.replace(repr(character)[1:-1], word)
        if words and text != (yield ask(messages)):
            raise ValueError("the chat template acts on a special token that the row spells out")
        numbers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if self.end_of_turn is None and numbers and numbers[-1] == len(turns) - 1:
            text = text[: answers[-1][1]] + (self.tokenizer.eos or "")
            answers[-1] = (answers[-1][0], len(text))
        for i, (start, stop) in zip(numbers, answers, strict=True):
            if any(call["function"]["name"] not in text[start:stop] for call in turns[i].calls):
                raise ValueError("the assistant calls tools, and the chat template does not write the calls")
        trained = [span for i, span in zip(numbers, answers, strict=True) if turns[i].trained]
        return Rendered(text, trained, literal, difference)

    def _document(self, content: str) -> Rendered:
        """Returns a document between the tokens that begin and end a text, all of it trained."""
        begin = (self.tokenizer.bos or "") if self.tokenizer.adds_bos else ""
        words = [match.span() for match in self.tokenizer.special_pattern.finditer(content)]
        text = begin + content + (self.tokenizer.eos or self.end_of_turn)
        return Rendered(text, [(len(begin), len(text))], [(len(begin) + a, len(begin) + b) for a, b in words])

    def _offering(self, turns: Sequence[Message], task: Task[T]) -> Task[T]:
        """Does a task with the tools of the chat, if it has any; raises ValueError if the template leaves them out."""
        tools = next((turn.tools for turn in turns if isinstance(turn, Turn) and turn.tools), ())
        if not tools:
            return (yield from task)
        if any(self.tokenizer.special_pattern.search(text) for text in texts(tools)):
            raise ValueError("a tool's description spells a special token")
        messages = self._messages(turns)
        if (yield ask(messages)) == (yield from offering(tools, self._text(messages))):
            raise ValueError("the row has tools, and the chat template does not write them")
        return (yield from offering(tools, task))

    def _answers(self, messages: Messages) -> Task[tuple[str, list[Span], str]]:
        """Returns the text, the span of every answer in it, and how the last one's prompt differs from it."""
        full = yield ask(messages)
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans, by_prompts = yield from find_answers(full, messages, numbers, self._template.has_generation)
        if spans is None:
            what = "the chat template rewrites the chat so that the answers cannot be told from the rest"
            other = "data.template alpaca does without it; " if self.is_setting else ""
            raise ValueError(f"{what} ({other}{{% generation %}} blocks in it would show them)")
        difference = ""
        if not by_prompts and self.name != "alpaca" and numbers:
            difference = yield from prompt_difference(full, messages[: numbers[-1]], spans[-1][0])
        return full, [self._close(full, span) for span in spans], difference

    def _prompt(self, turns: Sequence[Message]) -> Task[tuple[str, list[Span]]]:
        messages = self._messages(turns)
        shielded, words = shield(messages, self.tokenizer.special_pattern)
        text, _, literal = restore((yield ask(shielded, True)), [], words)
        if words and text != (yield ask(messages, True)):
            raise ValueError("the chat template acts on a special token that a message spells out")
        return text, literal

    def _messages(self, turns: Sequence[Message]) -> Messages:
        """Returns the turns as the template takes them; only the alpaca template knows `input`."""
        messages = [dict(turn.message if isinstance(turn, Turn) else turn) for turn in turns]
        for message in messages:
            if message["role"] == "developer" and "developer" not in self.source:
                message["role"] = "system"
            if self.name == "model":
                message["content"] = "\n\n".join(filter(None, (message["content"], message.pop("input", ""))))
        return messages

    def _text(self, messages: Messages, add_generation_prompt: bool = False) -> Task[str]:
        return (yield ask(messages, add_generation_prompt))

    def _all(self, tasks: list[Task[T]], places: Sequence[str]) -> list[T | ValueError]:
        try:
            return self._template.run(tasks)
        except LimitError as error:
            place = f", with {places[error.number]}" if places[error.number] else ""
            raise ModelError(f"the chat template costs more than it may{place}: {error}", where=self.where) from None

    def _one(self, task: Task[T], place: str = "") -> T:
        [result] = self._all([task], [place])
        if isinstance(result, ValueError):
            raise result
        return result

    def _find_end_of_turn(self) -> str | None:
        """Returns the special token that ends an assistant's turn in a small chat."""
        question, answer = {"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}
        _, _, tail = self._one(self._text([question, answer])).rpartition("A1")
        match = self.tokenizer.special_pattern.search(tail)
        return match[0] if match else None

    def _close(self, text: str, span: Span) -> Span:
        """Returns the span extended, or cut, to its end-of-turn token, if the template writes one."""
        start, end = span
        if self.end_of_turn is None:
            return span
        place = text.rfind(self.end_of_turn, start, end)
        if place >= 0:
            return start, place + len(self.end_of_turn)
        follows = re.compile(rf"\s*{re.escape(self.end_of_turn)}").match(text, end)
        return (start, follows.end()) if follows else span


def with_system(turns: list[Turn], system: str | None) -> list[Turn]:
    """Returns the turns with the system message first, unless they have one or are a document."""
    if not system or (turns and turns[0].role in ("system", "developer", PLAIN)):
        return turns
    return [Turn("system", system), *turns]
