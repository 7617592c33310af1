"""What `litpeft serve` understands of OpenAI's API, https://platform.openai.com/docs/api-reference, and its replies.

A key that would change the answer and that we do not have is refused by name, unless it asks for nothing.
"""

import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from litpeft.core.errors import counted, nearest, quoted
from litpeft.data.formats import FORMATS
from litpeft.data.formats.turn import Turn
from litpeft.generate.settings import Sampling

MOST_CHOICES, MOST_STOPS, LONGEST_STOP = 16, 16, 1000
SAMPLED = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float, "seed": int}
LENGTHS = ("max_tokens", "max_completion_tokens")
READ = ("model", "n", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "echo", *SAMPLED, *LENGTHS)
MOST_TOP = {True: 20, False: 5}  # likeliest tokens beside each, of a chat and of a text
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
NOTHING: dict[str, tuple[Any, ...]] = {  # keys that we do not have, and the values by which they ask for nothing
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
}


class Refused(Exception):
    """A request that gets an error of this HTTP status; `key` is what is wrong in it."""

    def __init__(self, what: str, key: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(what)
        self.what, self.key, self.status, self.code = what, key, status, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.what, "type": kind, "param": self.key, "code": self.code}}


def check_prompt(ids: Sequence[int], key: str, vocabulary: int, most: int, answers: bool) -> None:
    """Raises Refused for tokens that a model does not have, for none, and if they or an answer have no room."""
    if not all(0 <= token < vocabulary for token in ids):
        raise Refused(f"the model's tokens are 0 to {vocabulary - 1:,}", key)
    if not ids:
        raise Refused("the prompt is empty: there is no token to continue from", key)
    if len(ids) + answers > most:
        what = f"the prompt has {counted(len(ids), 'token')}; {most:,} are read here, answer included"
        raise Refused(what, key, code="context_length_exceeded")


def busy() -> Refused:
    return Refused("too many requests wait; try again later", status=429)


@dataclass
class Ask:
    """A request: which model is to continue which prompts, and how the reply is written."""

    model: str
    prompts: list[list[Turn] | str | list[int]]  # one chat, or texts, or tokens
    sampling: Sampling
    choices: int  # answers to each prompt
    stream: bool
    with_usage: bool  # at the end of a stream
    chat: bool
    top: int | None = None  # likeliest tokens that are wanted beside each; None: no log-probabilities
    echo: bool = False  # the reply begins with the prompt
    answers: bool = True  # False: it is the prompt alone
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


def parse(body: bytes, chat: bool, defaults: Sampling) -> Ask:
    """Returns the request of a body; raises Refused, which names the key that is wrong."""
    try:
        record = json.loads(body)
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # no NaN, and no half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(record, dict):
        raise Refused(f"the body must be a JSON object, got {type(record).__name__}")
    record = {key: value for key, value in record.items() if value is not None}
    asked = "messages" if chat else "prompt"
    for key, value in record.items():
        if key in NOTHING and not any(value == nothing and type(value) is type(nothing) for nothing in NOTHING[key]):
            raise Refused(f"{key} is not supported; leave it out, or give {json.dumps(NOTHING[key][0])}", key)
        known = [asked, *READ, *WITHOUT_EFFECT, *NOTHING]
        if key not in known:
            raise Refused(f"{quoted(key)} is no key of this request{nearest(key, known)}", key[:80])
    prompts = [turns(record)] if chat else texts(record)
    options = take(record, "stream_options", dict, {})
    echo = take(record, "echo", bool, False)
    if echo and chat:
        raise Refused("echo is for /v1/completions; leave it out", "echo")
    answers = not (echo and 0 in [take(record, key, int, None) for key in LENGTHS])
    if not answers:
        record = {key: value for key, value in record.items() if key not in LENGTHS}
    return Ask(
        take(record, "model", str, ""),
        prompts,
        sampling(record, defaults),
        within("n", take(record, "n", int, 1), 1, MOST_CHOICES),
        take(record, "stream", bool, False),
        take(options, "include_usage", bool, False, "stream_options."),
        chat,
        likeliest(record, chat),
        echo,
        answers,
    )


def likeliest(record: Mapping[str, Any], chat: bool) -> int | None:
    """Returns how many of the likeliest tokens a request wants beside each; None: no log-probabilities at all."""
    if chat:
        wanted, key = take(record, "logprobs", bool, False), "top_logprobs"
        top = take(record, key, int, 0)
        if top and not wanted:
            raise Refused("top_logprobs goes with logprobs, which must be true", key)
    else:
        if record.get("top_logprobs"):
            raise Refused("top_logprobs is for chats; here logprobs is the number", "top_logprobs")
        given, key = record.get("logprobs"), "logprobs"
        wanted = given is not None and given is not False  # 0 wants those of the tokens themselves
        top = take(record, key, int, 0) if wanted else 0
    return within(key, top, 0, MOST_TOP[chat]) if wanted else None


def take(record: Mapping[str, Any], key: str, kind: type, default: Any, group: str = "") -> Any:
    """Returns a value of a type, or the default if there is none."""
    value = record.get(key)
    if value is None:
        return default
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}
        raise Refused(f"{group}{key} must be {names[kind]}, got {quoted(value)}", f"{group}{key}")
    return value


def within(key: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise Refused(f"{key} must be at least {least} and at most {most:,}, got {quoted(value)}", key)
    return value


def turns(record: Mapping[str, Any]) -> list[Turn]:
    """Returns the chat of a request."""
    try:
        return FORMATS["messages"].asked({"messages": record["messages"]} if "messages" in record else {})
    except ValueError as error:
        raise Refused(str(error), "messages") from None


def texts(record: Mapping[str, Any]) -> list[str | list[int]]:
    """Returns the texts that are to be continued, or their tokens."""
    prompt = record.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) or are_tokens(prompt) else prompt
    good = isinstance(prompts, list) and all((isinstance(one, str) and one) or are_tokens(one) for one in prompts)
    if not good or not prompts:
        what = "prompt must be a string or a list of strings, or of tokens' numbers, none of them empty"
        raise Refused(what, "prompt")
    within("prompt", len(prompts), 1, MOST_CHOICES)
    return prompts


def are_tokens(prompt: Any) -> bool:
    is_list = isinstance(prompt, list) and len(prompt) > 0
    return is_list and all(isinstance(one, int) and not isinstance(one, bool) for one in prompt)


def sampling(record: Mapping[str, Any], defaults: Sampling) -> Sampling:
    """Returns how the next token is chosen."""
    given = {key: take(record, key, kind, None) for key, kind in SAMPLED.items() if key in record}
    lengths = [take(record, key, int, None) for key in LENGTHS if key in record]
    if len(set(lengths)) > 1:
        raise Refused("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    if lengths:
        given["max_new_tokens"] = lengths[0]
    if "stop" in record:
        stop = record["stop"]
        given["stop"] = tuple([stop] if isinstance(stop, str) else stop if isinstance(stop, list) else [None])
        if not all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in given["stop"]):
            raise Refused("stop must be a string or a list of strings, none of them empty", "stop")
        within("stop", len(given["stop"]), 0, MOST_STOPS)
    given.setdefault("seed", secrets.randbits(32))
    try:
        return replace(defaults, **given)
    except ValueError as error:  # it names the key as `litpeft generate` does
        key, _, rest = str(error).removeprefix("sampling.").partition(" ")
        key = next((one for one in LENGTHS if one in record), key) if key == "max_new_tokens" else key
        raise Refused(f"{key} {rest}", key) from None


Logprobs = dict[str, Any] | None  # as generate/logprobs.py writes them
REASONS = {"stop": "stop", "string": "stop", "length": "length", "interrupted": "length"}


def usage(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def reply(ask: Ask, answers: list[tuple[str, str, Logprobs]], used: dict[str, int]) -> dict[str, Any]:
    """Returns the whole reply; answers are a text, the reason of its end and its log-probabilities each."""
    choices = []
    for index, (text, reason, logprobs) in enumerate(answers):
        said = {"message": {"role": "assistant", "content": text}} if ask.chat else {"text": text}
        choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": REASONS[reason]})
    return {**head(ask), "choices": choices, "usage": used}


def piece(
    ask: Ask, index: int, text: str | None, logprobs: Logprobs, reason: str | None = None, first: bool = False
) -> dict[str, Any]:
    """Returns a part of a streamed reply: new text of a choice, or the reason of its end."""
    if ask.chat:
        said = {"delta": ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})}
    else:
        said = {"text": text or ""}
    choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason and REASONS[reason]}
    return {**head(ask, "chunk"), "choices": [choice]}


def last_piece(ask: Ask, used: dict[str, int]) -> dict[str, Any]:
    """Returns the part of a streamed reply that says how many tokens were used."""
    return {**head(ask, "chunk"), "choices": [], "usage": used}


def head(ask: Ask, part: str = "") -> dict[str, Any]:
    """Returns what a reply begins with, or a part of a streamed one."""
    name, kind = ("chatcmpl", "chat.completion") if ask.chat else ("cmpl", "text_completion")
    kind = f"{kind}.{part}" if part and ask.chat else kind
    return {"id": f"{name}-{ask.id}", "object": kind, "created": ask.created, "model": ask.model}


def models(names: Iterable[str], created: int) -> dict[str, Any]:
    """Returns the list of the models."""
    return {"object": "list", "data": [model(name, created) for name in names]}


def model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "litpeft"}
