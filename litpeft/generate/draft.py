"""An answer while it is written, token by token: what of its text may be shown, and whether it has ended."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from litpeft.data.channels import decoder_for
from litpeft.data.tokenizer import Tokenizer
from litpeft.generate.settings import Sampling


@dataclass
class Answer:
    """A model's answer to a prompt, without the token or the string that ended it."""

    ids: list[int]
    text: str
    reason: str  # stop | length | string | interrupted


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
