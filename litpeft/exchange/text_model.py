"""Takes the text model out of a folder of a model that also reads images, such as Gemma 3 of 4B or Qwen3.5."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from litpeft.core.errors import ModelError, counted, some
from litpeft.core.json import read_json, read_optional, write_json
from litpeft.core.recognise import refuse_other
from litpeft.core.safetensors import DTYPES, Weights, check_room, copy_companions, write_safetensors
from litpeft.data.tokenizer_classes import REGISTERED
from litpeft.exchange.run import write_config
from litpeft.model.families import FAMILIES
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import config_of

PREFIXES = ("language_model.model.", "model.language_model.")  # of the text model's tensors; here "model."
HEADS = ("language_model.lm_head.", "lm_head.")
# Their class of tokenizers is that of the whole model's model_type, whatever tokenizer_config.json says.
SURE_OF_WHOLE = ("qwen3_5_text", "qwen3_5_moe_text")
STACKED = {  # a tensor of all experts, of Qwen3.5's files, and what it holds of each
    ".mlp.experts.gate_up_proj": ("gate_proj", "up_proj"),
    ".mlp.experts.down_proj": ("down_proj",),
}


def holds_text_model(folder: Path) -> bool:
    """Returns whether a folder's config.json has the config of a text model that litpeft reads."""
    text = read_optional(folder / "config.json").get("text_config")
    return isinstance(text, dict) and text.get("model_type") in FAMILIES


class TextModel:
    """A folder of safetensors whose config.json has a `text_config`."""

    def __init__(self, folder: Path):
        refuse_other(folder)
        self.folder, self.weights = folder, Weights(folder)
        whole = read_json(folder / "config.json", "config.json of a model")
        text = whole["text_config"]
        shared = {key: whole[key] for key in ("tie_word_embeddings", "dtype", "torch_dtype") if key in whole}
        self.hf = text | shared
        self.family, self.config = config_of(self.hf, f"{folder / 'config.json'}: text_config")
        self.names = NameMap(self.family, self.config)

    def summary(self) -> str:
        left = len(self.weights.file_of) - len(dict(self.places()))
        parts = "for images and other ends left out"
        return f"{self.family}, {counted(self.config.n_layers, 'layer')}; {counted(left, 'tensor')} {parts}"

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the text model's config.json and weights, and copies the tokenizer."""
        copy_companions(self.folder, folder)
        if self.family in SURE_OF_WHOLE:
            tokenizer = read_optional(folder / "tokenizer_config.json")
            write_json(folder / "tokenizer_config.json", tokenizer | {"tokenizer_class": REGISTERED[self.family]})
        write_json(folder / "config.json", self.hf)
        if dtype is not None:
            write_config(folder, dtype)
        check_room(folder, self.names.shapes.values(), dtype or DTYPES[self.weights.dtype(next(self.places())[0])])
        write_safetensors(folder, self.tensors(dtype))

    def places(self) -> Iterator[tuple[str, str]]:
        """Yields the text model's tensors: their names in this folder, and as the family has them."""
        for name in self.weights.file_of:
            spelt = [f"model.{name.removeprefix(prefix)}" for prefix in PREFIXES if name.startswith(prefix)]
            spelt += [f"lm_head.{name.removeprefix(prefix)}" for prefix in HEADS if name.startswith(prefix)]
            if spelt and not (spelt[0] == "lm_head.weight" and self.config.tie_embeddings):
                yield name, spelt[0]

    def tensors(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Yields the text model's tensors."""
        places = {name: self.of_experts(spelt) for name, spelt in self.places()}
        held = {one for parts in places.values() for one in parts}
        if lost := self.names.shapes.keys() - held:
            raise ModelError(f"the text model's weights are not all there: {some(sorted(lost))}", where=self.folder)
        for name, parts in places.items():
            for spelt, tensor in zip(parts, self.apart(name, len(parts)), strict=True):
                yield spelt, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor.contiguous()

    def apart(self, name: str, count: int) -> list[Tensor]:
        """Returns the tensor of that name, or the `count` tensors that one of all experts holds."""
        whole = self.weights.read(name)
        if count == 1:
            return [whole]
        if len(whole) != self.config.experts.number:
            what = f"{name} holds {len(whole)} experts, config.json says {self.config.experts.number}"
            raise ModelError(what, where=self.folder)
        return [part for expert in whole for part in expert.tensor_split(count // len(whole))]

    def of_experts(self, spelt: str) -> list[str]:
        """Returns the names of the tensors of each expert that one of all holds; else the name as it is."""
        for stacked, leaves in STACKED.items():
            layer = spelt.removesuffix(stacked)
            if layer != spelt and self.config.experts is not None:
                number = self.config.experts.number
                return [f"{layer}.mlp.experts.{i}.{leaf}.weight" for i in range(number) for leaf in leaves]
        return [spelt]
