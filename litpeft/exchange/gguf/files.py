"""What a GGUF export consists of: model.gguf and a Modelfile for Ollama. `merge` and `convert` share it."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from litpeft.core.terminal import say
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.gguf.encoding import TYPES
from litpeft.exchange.gguf.latent import split_names
from litpeft.exchange.gguf.layout import Layout
from litpeft.exchange.gguf.tokenizer import WITHOUT_MARKS
from litpeft.exchange.gguf.verify import TOLERANCE, Written
from litpeft.exchange.gguf.vocabulary import vocabulary
from litpeft.exchange.gguf.write import Encoder, write_gguf
from litpeft.exchange.modelfile import write_modelfile

MODEL = "model.gguf"
OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass
class GgufFolder:
    """A folder to write a model to, with the texts that belong to it."""

    folder: Path
    layout: Layout
    type: str  # f16, q8_0, …
    tokenizer: Tokenizer
    template: ChatTemplate
    system: str | None
    where: str  # the source, for errors
    has_template: bool = True  # False: a base that has none, and is not for chats
    in_groups: Collection[str] = ()  # our weights that keep their codes

    def __post_init__(self) -> None:
        self.wanted = TYPES[self.type]
        tensors = self.layout.parts.values()
        fits = lambda ours: ours in self.in_groups and not split_names(ours) and not self.layout.moves_inputs(ours)
        self.in_groups = {ours for parts in tensors if all(map(fits, parts)) for ours in parts}
        self.types = self.layout.types(self.wanted, self.in_groups)
        self.encoder = Encoder(self.layout, self.types, self.where)
        self.chat = self.template.render([{"role": "user", "content": "Hello there"}], True)

    @property
    def tolerance(self) -> float:
        """Returns how far logits may be off; the constants of groups are in float16."""
        return max(TOLERANCE[self.wanted], TOLERANCE[Type.F16] if self.in_groups else 0.0)

    def write(self, rows: Iterable[tuple[str, Tensor]]) -> None:
        """Writes the files; `rows` are the bytes of our parameters, as `encoder` gives them."""
        adds_bos = self.tokenizer.adds_bos
        if adds_bos and not self.chat.startswith(self.tokenizer.bos):
            adds_bos = False
            say("add_bos_token is false: llama.cpp would put BOS before each chat, which the chat template does not")
        source = self.template.exported if self.has_template else None
        words = vocabulary(self.tokenizer, source, self.layout.config.vocab_size, self.template.stop_ids, adds_bos)
        write_gguf(self.folder / MODEL, self.layout, self.types, self.wanted, words, rows)
        for line in self._remarks():
            say(line)
        if words.get("tokenizer.ggml.pre") in WITHOUT_MARKS:
            say("llama.cpp cuts words at combining marks (of Hindi or Thai, say), which this tokenizer does not")
        say(write_modelfile(self.folder, MODEL, self.template, self.system, self.has_template))

    def _remarks(self) -> Iterable[str]:
        known = self.layout.gguf
        window, largest = self.layout.config.window, self.layout.config.max_positions
        said = [field for field, _ in map(known.key, known.keys)]
        if window is not None and window < largest and "window" not in said:
            yield f"llama.cpp has no sliding window for this family: its context ends with the window, at {window:,}"
        rope = self.layout.config.main_rope
        scaling = None if rope is None else rope.scaling
        if scaling is not None and not scaling.truncate:
            yield "llama.cpp rounds yarn's bounds to whole dimensions, and this model does not: logits differ slightly"
        if scaling is not None and scaling.kind == "longrope":
            length = f"{scaling.original_positions:,} tokens"
            yield f"llama.cpp takes longrope's long factors if its context (-c) is larger than {length}, not the text"
        other = {name for name, type_ in self.types.items() if type_ == Type.F16 and self.wanted != Type.F16}
        if other:
            yield f"{len(other)} tensors are in f16, since their rows are no multiple of 32: {min(other)}, …"

    def logits(self, prompts: Sequence[list[int]]) -> Tensor:
        """Returns what the written file computes, after checking its header and tokenizer."""
        written = Written(self.folder / MODEL, self.layout)
        written.check_header(self.tokenizer, self.chat)
        return written.logits(prompts)
