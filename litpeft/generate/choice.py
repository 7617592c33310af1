"""The choices of a reply to a request: what stands before each answer, and the log-probabilities of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from litpeft.data.tokenizer import Tokenizer
from litpeft.generate.batch import Request
from litpeft.generate.logprobs import Spelling, TokenScore
from litpeft.generate.protocol import Ask


@dataclass
class Choice:
    """A choice of a reply: its prompt, if that is repeated, and the request for its answer."""

    echo: str
    before: list[TokenScore]  # of the prompt's tokens, until they were told
    spelling: Spelling | None  # None: no log-probabilities are wanted
    request: Request | None = None
    told: int = 0  # tokens of the answer whose scores were told

    @property
    def reason(self) -> str:
        """Returns the reason of its end."""
        return self.request.draft.answer.reason

    def logprobs(self, end: int | None = None) -> dict[str, Any] | None:
        """Returns those of all tokens that were not told yet, before number `end` of the answer; None: of none.

        A text's are of the token that ended it, too: what measures over HTTP counts on the one token that it asks for.
        """
        if self.spelling is None:
            return None
        answer = self.request.scores
        if self.spelling.chat:
            answer = answer[: len(self.request.draft.answer.ids)]
        scores = [*self.before, *answer[self.told : end]]
        if end is not None and not scores:  # a part of a stream
            return None
        self.before, self.told = [], len(self.request.scores) if end is None else end
        return self.spelling.report(scores)


def choices(
    ask: Ask, tokenizer: Tokenizer, prompts: Sequence[list[int]], scores: Sequence[list[TokenScore]]
) -> list[Choice]:
    """Returns the choices of a reply, `ask.choices` for each prompt; `scores` are those of its tokens, if any."""
    found = []
    for content, ids, of_prompt in zip(ask.prompts, prompts, scores, strict=True):
        text, unseen = "", 0
        if ask.echo:
            text = content if isinstance(content, str) else tokenizer.decode(ids, skip_special=False)
            unseen = 0 if text.startswith(tokenizer.opening) else len(tokenizer.encode(tokenizer.opening))
        for _ in range(ask.choices):
            spelling = None if ask.top is None else Spelling(tokenizer, ask.chat, unseen)
            found.append(Choice(text, list(of_prompt), spelling))
    return found
