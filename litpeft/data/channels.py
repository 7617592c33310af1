"""Answers in channels, as gpt-oss writes them: the header of each message says whether it is thought or said.

<|channel|>analysis<|message|>thoughts<|end|><|start|>assistant<|channel|>final<|message|>answer<|return|>
"""

import re
from collections.abc import Sequence

from litpeft.data.thinking import BEGIN, END
from litpeft.data.tokenizer import StreamDecoder, Tokenizer

MARKS = START, CHANNEL, MESSAGE, CLOSE = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
THOUGHT = re.compile(rf".*{re.escape(CHANNEL)}\s*analysis\b.*", re.DOTALL)
RECIPIENT = re.compile(r"\bto=[^\s<]+")  # of a call: "to=functions.weather"


class ChannelDecoder:
    """Decodes ids one by one into text to print: thoughts as <think>...</think>, like those of other models."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self.tokenizer = tokenizer
        self.body = StreamDecoder(tokenizer)  # of a message
        self.header: list[int] | None = []  # ids of the one that is being written; None: the body is
        self.thinks = False
        self.messages = 0  # that the answer has begun
        opened = len(prompt) - list(reversed(prompt)).index(tokenizer.backend.ids[START])
        for token in prompt[opened:]:  # it may have begun the answer's first message already
            self.feed(token)
        self.messages, self.given = 0, len(self.header or ())

    def feed(self, token: int) -> str:
        """Returns the text that this id completes."""
        name = self.tokenizer.backend.names.get(token, "")
        if self.header is not None and name == MESSAGE:
            return self._begin(self.tokenizer.decode(self.header, skip_special=False))
        if name in (START, CLOSE) or (name == CHANNEL and self.header is None):
            rest = self.body.flush() if self.header is None else ""
            self.header, self.given = [token] if name == CHANNEL else [], 0
            return rest
        if self.header is None:
            return self.body.feed(token)
        self.header.append(token)
        return ""

    def flush(self) -> str:
        """Returns the text that is left at the end; all of it where the answer has no header."""
        if self.header is None:
            return self.body.flush()
        cut = self.messages or self.tokenizer.backend.ids[CHANNEL] in self.header  # within a header
        return "" if cut else self.tokenizer.decode(self.header[self.given :])

    def _begin(self, header: str) -> str:
        """Begins the body of a message; returns what stands before it."""
        thought, thinks = self.thinks, THOUGHT.fullmatch(header) is not None
        self.body, self.header, self.thinks = StreamDecoder(self.tokenizer), None, thinks
        self.messages += 1
        before = f"\n{END}\n\n" if thought and not thinks else "\n\n" if self.messages > 1 else ""
        call = RECIPIENT.search(header)
        return before + (f"{BEGIN}\n" if thinks and not thought else "") + (f"{call[0]} " if call else "")


def decoder_for(tokenizer: Tokenizer, prompt: Sequence[int]) -> StreamDecoder | ChannelDecoder:
    """Returns what decodes the answer to a prompt: by channels, if the prompt's own messages have such headers."""
    ids = [tokenizer.backend.specials.get(mark) for mark in MARKS]
    in_channels = None not in ids and ids[MARKS.index(START)] in prompt and ids[MARKS.index(MESSAGE)] in prompt
    return ChannelDecoder(tokenizer, prompt) if in_channels else StreamDecoder(tokenizer)
