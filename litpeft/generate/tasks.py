"""A model as programs that measure one ask it: how likely are texts, and what does it write? All is text.

The names are those of lm-evaluation-harness, https://github.com/EleutherAI/lm-evaluation-harness, whose tasks ask like
this; a request is any object with `args`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

from litpeft.core.errors import ConfigError, DataError, quoted
from litpeft.core.terminal import tell
from litpeft.generate.engine import answer_all
from litpeft.generate.likelihood import Likelihood, Pair, likelihoods, windows
from litpeft.generate.load import Loaded
from litpeft.generate.settings import Sampling

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is there counts
LONGEST = 256  # tokens of an answer, where a task does not say it
WITHOUT_EFFECT = {"num_beams": 1, "use_cache": True}  # keys of transformers, and the values by which they ask nothing
Message = Mapping[str, str]  # role, content


class Asked(Protocol):
    """A request: a context and its continuation; a text; or a prompt and how its answer is generated."""

    args: tuple[Any, ...]


class TaskModel:
    """A loaded model that answers such requests."""

    def __init__(self, loaded: Loaded, batch_size: int, as_chat: bool = False):
        """`batch_size` answers are written at once; `as_chat`: prompts come from `apply_chat_template`."""
        super().__init__()
        self.loaded, self.batch_rows, self.as_chat = loaded, batch_size, as_chat
        tokenizer = loaded.tokenizer
        first = tokenizer.bos or tokenizer.eos or loaded.template.end_of_turn
        self.first: int = tokenizer.token_id(first)  # is given where a text has nothing before it
        self.opening = tokenizer.encode(tokenizer.opening)

    def encode(self, texts: Sequence[str], opening: bool = True) -> list[list[int]]:
        """Returns the tokens of texts; before those that do not begin with it stands the `opening`."""
        try:
            found = [one.ids for one in self.loaded.tokenizer.encode_batch(list(texts), [[]] * len(texts))]
        except ValueError as error:
            raise DataError(f"a text of the task cannot be read: {error}") from None
        begin = self.opening if opening else []
        return [ids if ids[: len(begin)] == begin else [*begin, *ids] for ids in found]

    def pairs(self, requests: Sequence[Asked]) -> list[Pair]:
        """Returns the tokens of contexts and of their continuations.

        Spaces at the end of a context belong to the continuation, and both are encoded as one text.
        """
        texts: list[tuple[str, str]] = []
        for context, continuation in (one.args for one in requests):
            kept = context.rstrip()
            texts.append((kept, context[len(kept) :] + continuation) if kept else (context, continuation))
        unique = list({text for context, rest in texts if context for text in (context, context + rest)})
        ids = dict(zip(unique, self.encode(unique), strict=True))
        alone = list({rest for context, rest in texts if not context})
        bare = dict(zip(alone, self.encode(alone, opening=False), strict=True))
        found: list[Pair] = []
        for context, rest in texts:
            if context:
                found.append((ids[context], ids[context + rest][len(ids[context]) :]))
            elif bare[rest][:1] == [self.first]:
                found.append((bare[rest][:1], bare[rest][1:]))
            else:
                found.append(([self.first], bare[rest]))
        for (_, scored), request in zip(found, requests, strict=True):
            if not scored:
                raise DataError(f"the task scores no token after {quoted(request.args[0][-40:])}")
        return found

    def loglikelihood(self, requests: Sequence[Asked]) -> list[tuple[float, bool]]:
        """Returns log p of each request's continuation after its context, and whether greedy decoding gives it."""
        pairs = self.pairs(requests)
        return [(one.log_p, one.greedy) for one in self.likelihoods(pairs, "continuations")]

    def loglikelihood_rolling(self, requests: Sequence[Asked]) -> list[float]:
        """Returns log p of each request's text, of any length."""
        texts = self.encode([one.args[0] for one in requests])
        pieces = [list(windows(text, self.first, self.loaded.model.reach)) for text in texts]
        found = iter(self.likelihoods([pair for of_one in pieces for pair in of_one], "pieces of texts"))
        return [sum(next(found).log_p for _ in of_one) for of_one in pieces]

    def likelihoods(self, pairs: Sequence[Pair], what: str) -> list[Likelihood]:
        return likelihoods(self.loaded.model, pairs, Told(len(pairs), what))

    def generate_until(self, requests: Sequence[Asked]) -> list[str]:
        """Returns the answer to each request's prompt, without the string that ended it."""
        wanted = [sampling_of(one.args[1]) for one in requests]
        loaded, ids = self.loaded, self.encode([one.args[0] for one in requests])
        stop_ids = loaded.template.stop_ids if self.as_chat else loaded.tokenizer.stop_ids
        found: dict[int, str] = {}
        for sampling in [one for i, one in enumerate(wanted) if one not in wanted[:i]]:
            room = loaded.model.reach - sampling.max_new_tokens
            if room < 1:
                what = f"the task wants answers of {sampling.max_new_tokens} tokens; the model reaches"
                raise ConfigError(f"{what} {loaded.model.reach}, prompt included")
            same = [i for i, one in enumerate(wanted) if one == sampling]
            prompts = [(ids[i] or [self.first])[-room:] for i in same]
            answers = answer_all(loaded, prompts, self.batch_rows, sampling, stop_ids)
            found |= {i: one.text for i, one in zip(same, answers, strict=True)}
        return [found[i] for i in range(len(requests))]

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Returns a chat as text, which ends where the model's answer begins, or goes on.

        A template that takes no system message gets the chat without it.
        """
        try:
            text = self.loaded.template.render(chat_history, add_generation_prompt)
        except ValueError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise DataError(f"the chat template refuses a chat of the task: {error}") from None
            return self.apply_chat_template(others, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        at = text.rfind(last.strip())
        if at < 0:
            raise DataError("the chat template changes the beginning of an answer that the task gives")
        whole = text[at:].startswith(last.lstrip())  # a template may trim a message
        return text[:at] + (last.lstrip() if whole else last.strip())


class Told:
    """Tells the user how many of many requests are done: at every tenth of them."""

    def __init__(self, number: int, what: str):
        self.number, self.what, self.done = number, what, 0

    def __call__(self, more: int) -> None:
        before, self.done = self.done, self.done + more
        if before * 10 // self.number != self.done * 10 // self.number:
            tell(f"{self.done:,} of {self.number:,} {self.what} scored")


def sampling_of(keys: Mapping[str, Any]) -> Sampling:
    """Returns how an answer is generated, from a task's `generation_kwargs`."""
    keys = dict(keys)
    lengths = [value for value in [keys.pop(name, None) for name in LENGTHS] if value is not None]
    until = keys.pop("until", None) or ()
    stop = tuple(one for one in ([until] if isinstance(until, str) else until) if one)
    sampled = keys.pop("do_sample", None)
    temperature = float(keys.pop("temperature", None) or 0.0)
    if sampled is False:
        temperature = 0.0
    elif sampled and not temperature:
        temperature = 1.0
    known = {field.name for field in fields(Sampling)}
    for name in [name for name, value in keys.items() if WITHOUT_EFFECT.get(name) == value]:
        del keys[name]
    if unknown := sorted(keys.keys() - known):
        raise ConfigError(f"the task generates answers with {quoted(unknown[0])}, which litpeft does not have")
    try:
        most = int(lengths[0]) if lengths else LONGEST
        return Sampling(**{**keys, "temperature": temperature, "stop": stop, "max_new_tokens": most})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the task's generation_kwargs: {error}") from None
