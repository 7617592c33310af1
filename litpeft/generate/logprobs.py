"""How likely tokens were: `logprobs` of OpenAI's API, for the tokens of an answer and those of a prompt.

They are log p of the model's own distribution, before temperature, penalties and cuts.
Letters: N tokens, V vocabulary, d model width.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from litpeft.data.batches import framed, lay_out
from litpeft.data.tokenizer import BYTE, Tokenizer
from litpeft.model.context import Context
from litpeft.model.gpt import GPT
from litpeft.model.loss import chunk
from litpeft.model.objective import MICRO_TOKENS

# byte-level tokenizers write each byte as a character: itself if it is visible, else one from 256 on
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(byte): byte for byte in VISIBLE}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(VISIBLE)))}


@dataclass(frozen=True)
class TokenScore:
    """A token, how likely it was, and which were the likeliest in its place."""

    token: int
    log_p: float | None  # in nats; None: nothing is before it
    top: tuple[tuple[int, float], ...] = ()  # tokens with their log p, the likeliest first


def scored(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Returns the scores of tokens (N) whose logits are (N, V), each with so many of the likeliest."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    own = log_p.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = (part.tolist() for part in log_p.topk(min(top, log_p.size(1))))
    pairs = (tuple(zip(*row, strict=True)) for row in zip(ids, values, strict=True))
    return [TokenScore(*one) for one in zip(tokens, own, pairs, strict=True)]


def passes(model: GPT, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Returns the numbers of the prompts that are read in one pass, for each pass."""
    lengths = [sum(model.frame) + len(prompt) for prompt in prompts]
    return lay_out(range(len(prompts)), lengths, 1, MICRO_TOKENS, None)[0]


@torch.inference_mode()
def prompt_scores(model: GPT, prompts: Sequence[Sequence[int]], top: int, adapter: int = 0) -> list[list[TokenScore]]:
    """Returns the scores of all tokens of prompts, none of which is empty, from one pass over them.

    `adapter` is the number of a run that is beside its base. For methods that act at a prompt's last tokens, all of it
    is the prompt.
    """
    device, (before, after) = model.embed.weight.device, model.frame
    found = [[TokenScore(prompt[0], None)] for prompt in prompts]
    ids = [i for prompt in prompts for i in framed(prompt, len(prompt), before, after)]
    lengths = tuple(before + len(prompt) + after for prompt in prompts)
    ctx = Context.packed(lengths, device, lengths)
    ctx.adapter = torch.tensor([adapter], device=device)
    starts = [before + start for start in [0, *accumulate(lengths)][:-1]]
    # each token but a prompt's first: that prompt, and the position before it, whose state it is scored by
    asked = [(number, at) for number, prompt in enumerate(prompts) for at in range(len(prompt) - 1)]
    at = torch.tensor([starts[number] + at for number, at in asked], dtype=torch.long, device=device)
    x, size = model(torch.tensor([ids], device=device), ctx, at=at, headless=True), chunk(device)
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        tokens = [prompts[number][at + 1] for number, at in part]
        scores = scored(model.logits(x[start : start + size]), tokens, top)
        for (number, _), score in zip(part, scores, strict=True):
            found[number].append(score)
    return found


class Spelling:
    """What each token of a choice spells, and where in its text that begins."""

    def __init__(self, tokenizer: Tokenizer, chat: bool, unseen: int = 0):
        """The first `unseen` tokens are not in the text, as one that begins every text."""
        self.tokenizer, self.chat, self.unseen = tokenizer, chat, unseen
        self.beside = tokenizer.encode("a")[-1:]  # a token loses its space at the beginning of a text
        self.begin = len(tokenizer.decode(self.beside))
        self.decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self.offset = 0  # characters

    def bytes_of(self, token: int) -> bytes:
        """Returns what a token adds to a text, which may be a part of a character."""
        text = self.tokenizer.decode([*self.beside, token], skip_special=False)[self.begin :]
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text.encode()
        name = self.tokenizer.backend.names.get(token, "")
        if BYTE.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        return bytes(BYTE_OF[character] for character in name) if set(name) <= BYTE_OF.keys() else text.encode()

    def text(self, token: int) -> str:
        return self.bytes_of(token).decode(errors="replace")

    def report(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """Returns `logprobs` of the next tokens of the choice, as OpenAI's API writes them."""
        return self.of_chat(scores) if self.chat else self.of_text(scores)

    def of_chat(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        def entry(token: int, log_p: float | None) -> dict[str, Any]:
            return {"token": self.text(token), "logprob": log_p, "bytes": list(self.bytes_of(token))}

        content = [entry(one.token, one.log_p) | {"top_logprobs": [entry(*pair) for pair in one.top]} for one in scores]
        return {"content": content, "refusal": None}

    def of_text(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        offsets = []
        for one in scores:
            offsets.append(self.offset)
            if self.unseen:
                self.unseen -= 1
            else:
                self.offset += len(self.decoder.decode(self.bytes_of(one.token)))
        return {
            "tokens": [self.text(one.token) for one in scores],
            "token_logprobs": [one.log_p for one in scores],
            "top_logprobs": [self.top(one) for one in scores],
            "text_offset": offsets,
        }

    def top(self, score: TokenScore) -> dict[str, float] | None:
        """Returns the likeliest tokens and the one itself; of several that spell the same the likeliest."""
        if not score.top:
            return None
        found: dict[str, float] = {}
        for token, log_p in (*score.top, (score.token, score.log_p)):
            found.setdefault(self.text(token), log_p)
        return found
