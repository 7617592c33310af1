"""Chat templates: a chat as the text that the model reads, and the spans of it that are trained."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, TypeVar

from litpeft.core.errors import ConfigError, ModelError, quoted, some
from litpeft.data.answers import Messages, ask, beside, find_answers, prompt_difference
from litpeft.data.builtin import BUILT_IN, GENERATION, with_defaults
from litpeft.data.formats.turn import PLAIN, Turn, unknown_call
from litpeft.data.marks import restore, shield, texts
from litpeft.data.sandbox import LimitError, Task, Template, TooLong
from litpeft.data.thinking import MESSAGE_KEYS, after_prompt, split_message, thoughts_of, with_thoughts
from litpeft.data.tokenizer import Tokenizer
from litpeft.data.tokenizer_backends import Span


@dataclass(frozen=True)
class Rendered:
    """A chat as text; spans are in characters."""

    text: str
    trained: list[Span]  # the answers, each with its end-of-turn token
    literal: list[Span]  # where a message spells a special token, which must be read as plain text
    difference: str = ""  # how the prompt for the last answer differs from the text before that answer
    dropped: tuple[int, ...] = ()  # numbers of the trained turns whose thoughts are not trained


MOST = 1 << 29  # characters of a chat, times its answers: finding the answers takes that long
KNOWN_OPTIONS = ("enable_thinking", "thinking", "reasoning_effort", "preserve_thinking")  # for hints
T = TypeVar("T")
Message = Turn | Mapping[str, Any]  # role, content and, of an alpaca row, input


class ChatTemplate:
    """A Jinja template with the special tokens of a model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        name: str = "auto",
        now: datetime | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        is_setting: bool = True,
        group: str = "data.",
    ):
        """`name` is data.template; `now` is the date that a template may print, the same for every text.

        `options` are what else the template is told. `is_setting`: the command has the setting template in this
        `group`, which errors may then suggest.
        """
        self.is_setting, self.setting = is_setting, f"{group}template"
        if name == "model" and tokenizer.chat_template is None:
            if not is_setting:
                what = "the run was trained with the model's chat template, which is not there any more"
                raise ModelError(what, where=tokenizer.where, hint="put it back: chat_template.jinja")
            hint = f"choose {self.setting} auto, or one of {', '.join(BUILT_IN)}"
            raise ConfigError("the model has no chat template", where=self.setting, hint=hint)
        own = name in ("auto", "model") and tokenizer.chat_template is not None
        self.now = now or datetime.now()
        self.tokenizer, self.name = tokenizer, "model" if own else "alpaca" if name == "auto" else name
        try:
            self.source: str = tokenizer.chat_template if own else BUILT_IN[self.name].source_for(tokenizer)
        except ValueError as error:
            fits = [other for other, one in BUILT_IN.items() if one.fits(tokenizer)]
            what, hint = f"the template {name} is not for this model: {error}", f"these are: {', '.join(fits)}"
            raise ConfigError(what, where=self.setting, hint=hint) from None
        self.where = tokenizer.template_where if own else tokenizer.where
        self.hash = hashlib.sha256(self.source.encode()).hexdigest()
        self.options = dict(options or {})
        if problem := self._unknown_option(self.options):
            known = [name for name in KNOWN_OPTIONS if re.search(rf"\b{name}\b", self.source)]
            hint = f"it reads {some(known)}" if known else "leave it out"
            raise ConfigError(problem, where=f"{self.setting}_options" if is_setting else "template_options", hint=hint)
        constants = dict(tokenizer.special_tokens, tools=None, documents=None) | self.options
        try:
            self._template = Template(self.source, self.now, constants)
            self.end_of_turn = self._find_end_of_turn()
        except (LimitError, ValueError) as error:
            hint = f"{self.setting} alpaca does without the model's template" if is_setting else ""
            raise ModelError(f"the chat template cannot be used: {error}", where=self.where, hint=hint) from None
        if self.end_of_turn is None and tokenizer.eos is None:
            what = "neither the chat template nor the tokenizer has a token that ends an answer"
            raise ModelError(what, where=tokenizer.where, hint="set eos_token in tokenizer_config.json")

    @property
    def exported(self) -> str:
        """Returns the template as a model's files hold it: what it was told in training it is told by default."""
        source = self.source if self.name == "model" else GENERATION.sub("", self.source)
        return with_defaults(source, self.options)

    @property
    def exported_hash(self) -> str:
        """Returns the sha256 of that text."""
        return hashlib.sha256(self.exported.encode()).hexdigest()

    @property
    def is_models_own(self) -> bool:
        """Whether the model's files say all of it."""
        return self.name == "model" and not self.options

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Returns all ids that end an answer."""
        end = self.tokenizer.token_id(self.end_of_turn)
        return tuple(sorted({*self.tokenizer.stop_ids, *([] if end is None else [end])}))

    def render(self, turns: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns the text of a chat; raises ValueError if the template refuses it."""
        return self._one(self._text(self.messages(turns), add_generation_prompt))

    def spans(self, turns: Sequence[Turn]) -> Rendered:
        """Returns the text of a chat and what of it is trained; raises ValueError if that cannot be found."""
        return self._one(self._spans(turns))

    def spans_of(
        self, chats: Sequence[Sequence[Turn]], places: Sequence[str], keep: bool = False
    ) -> list[Rendered | ValueError]:
        """Does the same for many chats, with errors in place of results; `places` are their files and lines.

        With `keep` a chat is trained on its last answer alone, with its thoughts even where the template drops them.
        """
        return self._all([self._spans(turns, keep) for turns in chats], places)

    def prompt(self, turns: Sequence[Message], place: str = "") -> list[int]:
        """Returns the ids of the prompt for the next answer; raises ValueError if the template refuses the chat."""
        text, literal = self._one(self._offering(turns, self._prompt(turns)), place)
        return self.tokenizer.encode(text, literal)

    @cached_property
    def thinking_key(self) -> str | None:
        """The key of a message under which the template reads thoughts; None: they can only stand in the content."""
        for key in MESSAGE_KEYS:
            answer = {"role": "assistant", "content": "A1", key: "T1"}
            try:
                if "T1" in self._one(self._text([{"role": "user", "content": "Q1"}, answer])):
                    return key
            except ValueError:  # it refuses such a message
                continue
        return None

    def _spans(self, turns: Sequence[Turn], keep: bool = False) -> Task[Rendered]:
        if turns and turns[0].role == PLAIN:
            return self._document(turns[0].content)
        return (yield from self._offering(turns, self._chat(turns, keep)))

    def _chat(self, turns: Sequence[Turn], keep: bool) -> Task[Rendered]:
        messages = self.messages(turns)
        answers = sum(message["role"] == "assistant" for message in messages)
        if answers * sum(64 + len(message["content"]) for message in messages) > MOST:
            raise TooLong(f"its {answers:,} answers in {len(messages):,} messages are too much for the chat template")
        shielded, words = shield(messages, self.tokenizer.special_pattern)
        find = self._kept if keep else self._answers
        text, found, difference = yield from find(shielded)
        text, answers, literal = restore(text, found, words)
        for character, word in words.items():
            difference = difference.replace(repr(character)[1:-1], word)
        if words and text != ((yield from self._kept(messages))[0] if keep else (yield ask(messages))):
            raise ValueError("the chat template acts on a special token that the row spells out")
        numbers = [i for i, turn in enumerate(turns) if turn.role == "assistant"][-1 if keep else 0 :]
        if self.end_of_turn is None and numbers and numbers[-1] == len(turns) - 1:
            text = text[: answers[-1][1]] + (self.tokenizer.eos or "")
            answers[-1] = (answers[-1][0], len(text))
        for i, (start, stop) in zip(numbers, answers, strict=True):
            if any(call["function"]["name"] not in text[start:stop] for call in turns[i].calls):
                raise ValueError("the assistant calls tools, and the chat template does not write the calls")
        trained = {i: span for i, span in zip(numbers, answers, strict=True) if turns[i].trained}
        dropped = tuple(i for i, (a, b) in trained.items() if thoughts_of(turns[i]) not in text[a:b])
        return Rendered(text, [*trained.values()], literal, difference, dropped)

    def _document(self, content: str) -> Rendered:
        """Returns a document between the tokens that begin and end a text, all of it trained."""
        begin = self.tokenizer.opening
        words = [match.span() for match in self.tokenizer.special_pattern.finditer(content)]
        text = begin + content + (self.tokenizer.eos or self.end_of_turn)
        return Rendered(text, [(len(begin), len(text))], [(len(begin) + a, len(begin) + b) for a, b in words])

    def _offering(self, turns: Sequence[Message], task: Task[T]) -> Task[T]:
        """Does a task with what the chat tells the template, tools too; raises ValueError if that leaves tools out."""
        own = [turn for turn in turns if isinstance(turn, Turn)]
        told = dict(next((turn.told for turn in own if turn.told), ()))
        tools = next((turn.tools for turn in own if turn.tools), ())
        if problem := self._unknown_option(told):
            raise ValueError(problem)
        for what, value in (("a tool's description", tools), ("what the row tells the template", told)):
            if any(self.tokenizer.special_pattern.search(text) for text in texts(value)):
                raise ValueError(f"{what} spells a special token")
        if tools and not told and (unknown := unknown_call(own, tools)):  # it may be told of tools of its own
            raise ValueError(f"the assistant calls {quoted(unknown)}, which is not among the row's tools")
        if tools:
            messages, told = self.messages(turns), told | {"tools": tools}
            if (yield from beside(told | {"tools": None}, self._text(messages))) == (
                yield from beside(told, self._text(messages))
            ):
                raise ValueError("the row has tools, and the chat template does not write them")
        return (yield from beside(told, task) if told else task)

    def _answers(self, messages: Messages) -> Task[tuple[str, list[Span], str]]:
        """Returns the text, the span of every answer in it, and how the last one's prompt differs from it."""
        full = yield ask(messages)
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans, by_prompts = yield from find_answers(full, messages, numbers, self._template.has_generation)
        if spans is None:
            what = "the chat template rewrites the chat so that the answers cannot be told from the rest"
            other = f"{self.setting} alpaca does without it; " if self.is_setting else ""
            raise ValueError(f"{what} ({other}{{% generation %}} blocks in it would show them)")
        difference = ""
        if not by_prompts and self.name == "model" and numbers:
            difference = yield from prompt_difference(full, messages[: numbers[-1]], spans[-1][0])
        return full, [self._close(full, span) for span in spans], difference

    def _kept(self, messages: Messages) -> Task[tuple[str, list[Span], str]]:
        """Returns the chat with its last answer after the prompt for it, thoughts and all; and that answer's span."""
        *before, last = messages
        thoughts, bare = split_message(last, self.thinking_key)
        text, prompt = (yield ask(messages)), (yield ask(before, True))
        if not (text.startswith(prompt) and thoughts in text[len(prompt) :]):
            plain, spans, _ = yield from self._answers([*before, bare])
            text = prompt + after_prompt(prompt, thoughts, plain[spans[-1][0] :].lstrip())
        return text, [self._close(text, (len(prompt), len(text)))], ""

    def _prompt(self, turns: Sequence[Message]) -> Task[tuple[str, list[Span]]]:
        messages = self.messages(turns)
        shielded, words = shield(messages, self.tokenizer.special_pattern)
        text, _, literal = restore((yield ask(shielded, True)), [], words)
        if words and text != (yield ask(messages, True)):
            raise ValueError("the chat template acts on a special token that a message spells out")
        return text, literal

    def messages(self, turns: Sequence[Message]) -> Messages:
        """Returns the turns as the template takes them; few templates know `input` apart from a message."""
        messages = [dict(turn.message if isinstance(turn, Turn) else turn) for turn in turns]
        for i, turn in enumerate(turns):
            if isinstance(turn, Turn) and thoughts_of(turn):
                messages[i] = with_thoughts(messages[i], turn, self.thinking_key)
        for message in messages:
            if message["role"] == "developer" and "developer" not in self.source:
                message["role"] = "system"
            if "message.input" not in self.source:
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

    def _unknown_option(self, options: Mapping[str, Any]) -> str:
        """Returns why one of the options is refused: the template does not read it, or litpeft sets it. "": none is."""
        given = {"messages", "tools", "documents", "add_generation_prompt", *self.tokenizer.special_tokens}
        for key in options:
            read = key.isidentifier() and re.search(rf"\b{key}\b", self.source) is not None
            if not read or key in given:
                reads = "is not to be set" if key in given else "is nothing that the chat template reads"
                return f"{quoted(key)} {reads}"
        return ""

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
