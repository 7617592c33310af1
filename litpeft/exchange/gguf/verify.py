"""Reads a GGUF file that was written again: its tokenizer gives the same ids, and its tensors the same logits."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from litpeft.core.errors import ModelError
from litpeft.core.heap import give_back
from litpeft.core.terminal import say
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.compare import PROMPTS, logits_of
from litpeft.exchange.gguf.alike import same_model
from litpeft.exchange.gguf.config import hf_config
from litpeft.exchange.gguf.encoding import decode
from litpeft.exchange.gguf.layout import Layout
from litpeft.exchange.gguf.tokenizer import GgufTokenizer
from litpeft.exchange.gguf.weights import BoundedReader
from litpeft.model.families.read import config_of
from litpeft.model.gpt import GPT

# The largest difference of a logit that is allowed, relative to the largest logit.
TOLERANCE = {Type.F32: 5e-5, Type.F16: 1e-2, Type.BF16: 5e-2, Type.Q8_0: 5e-2, Type.Q4_0: 5e-1}
CHUNK = 1 << 22  # bytes of a tensor that are read together
TEXTS = (*PROMPTS, "x = 1234567.89 % 3  # naïve 日本語\n\n\tend", "I'm  sure\r\nYOU'LL  see…")


class Written:
    """A file that was written; `layout` says what it must hold."""

    def __init__(self, path: Path, layout: Layout):
        self.path, self.layout = path, layout
        self.reader = BoundedReader(path)
        self.values = {name: field.contents() for name, field in self.reader.fields.items()}
        self.stored = {tensor.name: tensor for tensor in self.reader.tensors}

    def check_header(self, tokenizer: Tokenizer, chat: str) -> None:
        """Raises if sizes are not the model's, or a text's ids not the tokenizer's; says so if only the chat's are."""
        _, read = config_of(hf_config(self.values, self.stored), str(self.path))
        if not same_model(read, self.layout.config, self.layout.gguf):
            raise ModelError(f"the header says {read}, the model is {self.layout.config}", where=self.path)
        inner = GgufTokenizer(self.values, self.layout.config.vocab_size).tokenizer
        for text in TEXTS:
            if inner.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
                hint = "write safetensors, and convert them with llama.cpp's own script"
                raise ModelError(f"the file's tokenizer gives other ids for {text!r}", where=self.path, hint=hint)
        if inner.encode(chat, add_special_tokens=False).ids != tokenizer.encode(chat):
            say("warning: in a chat llama.cpp puts a space after each special token, as this tokenizer does not")

    def logits(self, prompts: Sequence[list[int]]) -> Tensor:
        """Returns the logits in float32; the weights of one block are in memory at a time."""
        with torch.device("meta"):
            model = GPT(self.layout.config)
        model.requires_grad_(False).dtype = torch.float32
        parts = {name: child for name, child in model.named_children() if name != "blocks"}
        parts |= {f"blocks.{number}": block for number, block in enumerate(model.blocks)}
        for place, part in parts.items():
            part.register_forward_pre_hook(lambda _, __, place=place: self._fill(model, f"{place}."))
            if place != "embed":  # it may be the head, too
                part.register_forward_hook(_empty)
        return logits_of(model.eval(), list(prompts))

    def _fill(self, model: GPT, prefix: str) -> None:
        for name, parts in self.layout.parts.items():
            if parts[0].startswith(prefix):
                for ours, own in self.layout.ours(name, self._values).items():
                    module, _, leaf = ours.rpartition(".")
                    setattr(model.get_submodule(module), leaf, nn.Parameter(own, requires_grad=False))

    def _values(self, name: str) -> Tensor:
        """Returns a tensor's numbers, read a few rows at a time: pages of a mapped file would stay in memory."""
        tensor, values = self.stored[name], torch.empty(self.layout.shape(name))
        width = int(tensor.n_bytes) // len(values)
        with self.path.open("rb") as file:
            file.seek(int(tensor.data_offset))
            for rows in values.split(max(1, CHUNK // width)):
                read = torch.frombuffer(bytearray(file.read(len(rows) * width)), dtype=torch.uint8)
                rows.copy_(decode(read.view(len(rows), width), tensor.tensor_type, rows.shape))
        return self.layout.restored(name, values)


def _empty(part: nn.Module, *_: object) -> None:
    """Frees the weights of a part of the model."""
    part.to("meta")
    give_back()
