"""A folder of Meta's own layout, of Llama 1 to 3.2: params.json, consolidated.00.pth, … and tokenizer.model.

Each file holds a part of every matrix, as one of so many processes had it: rows of wq, wk, wv, w1, w3 and output,
columns of wo and w2; of tok_embeddings columns, with Llama 3 rows. Vectors are whole in each. Queries and keys rotate
neighbouring dimensions, and have their rows in that order.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litpeft.core.errors import ModelError, counted, some
from litpeft.core.json import read_json, write_json
from litpeft.core.safetensors import check_room, write_safetensors
from litpeft.core.terminal import say
from litpeft.exchange.bin import check_numbers, read_bin
from litpeft.exchange.gguf.layout import rows_in_halves
from litpeft.exchange.imports.meta_tokenizer import write_tokenizer
from litpeft.model.config import checked
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.model.rope import spell_twice

PARAMS, FILES = "params.json", "consolidated.*.pth"
# module of a Hugging Face folder -> Meta's, and the axis along which the files' parts are joined; None: any has it all
NAMES = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "norm": ("norm", None),
    "lm_head": ("output", 0),
}
EMBEDDING = "tok_embeddings.weight"
BUFFERS = ("rope.freqs",)
WIDE = 4096  # Llama 3.2 is narrower, and its positions are scaled by another factor


@dataclass(frozen=True)
class Params:
    """The keys of params.json. The last two say nothing of the model."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    vocab_size: Any = -1  # -1: as many as the embedding has
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False
    max_seq_len: int | None = None
    max_batch_size: int | None = None

    @classmethod
    def read(cls, path: Path) -> "Params":
        given = read_json(path, f"{PARAMS} of a model in Meta's layout")
        given = inner if isinstance(inner := given.get("model"), dict) else given  # as some of its releases have it
        kinds = {field.name: field.type for field in fields(cls)}
        if odd := sorted(given.keys() - kinds.keys()):
            hint = "take the Hugging Face edition of the model"
            raise ModelError(f"{some(odd)} is no key of a Llama 1 to 3.2", where=path, hint=hint)
        if missing := [key for key in ("dim", "n_layers", "n_heads") if key not in given]:
            raise ModelError(f"the key {missing[0]} is missing", where=path)
        try:
            return cls(**{key: v if key == "vocab_size" else checked(key, v, kinds[key]) for key, v in given.items()})
        except ValueError as error:
            raise ModelError(str(error), where=path) from None

    def d_ff(self) -> int:
        """Returns the inner size of an MLP: two thirds of 4 dim, scaled and rounded up."""
        size = int(8 * self.dim / 3)
        size = size if self.ffn_dim_multiplier is None else int(self.ffn_dim_multiplier * size)
        return self.multiple_of * math.ceil(size / self.multiple_of)

    def context(self) -> int:
        """Returns the length that models of these settings are for, which no key says."""
        if self.use_scaled_rope:
            return 131072
        known = {500_000.0: 8192, 1_000_000.0: 16384}  # Llama 3, Code Llama
        first = self.norm_eps == 1e-6 or (self.dim == 8192 and self.n_kv_heads is None)  # Llama 1; its 65B
        return known.get(self.rope_theta, 2048 if first else 4096)

    def scaling(self) -> dict[str, Any] | None:
        if not self.use_scaled_rope:
            return None
        factor = 8.0 if self.dim >= WIDE else 32.0
        llama3 = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return llama3 | {"original_max_position_embeddings": 8192}


def is_meta(folder: Path) -> bool:
    """Returns whether a folder holds weights in Meta's layout."""
    return folder.is_dir() and any(folder.glob(FILES)) and not any(folder.glob("pytorch_model*.bin"))


class MetaFolder:
    """Such a folder. Opening it reads the names of its tensors, which stay in the files."""

    def __init__(self, folder: Path):
        self.folder, self.paths = folder, sorted(folder.glob(FILES))
        expected = [f"consolidated.{number:02}.pth" for number in range(len(self.paths))]
        if [path.name for path in self.paths] != expected:
            found = some([path.name for path in self.paths])
            raise ModelError(f"the files are {found}: one between them is missing", where=folder)
        if not (folder / PARAMS).is_file():
            raise ModelError(f"there is no {PARAMS} beside {self.paths[0].name}", where=folder)
        self.params = Params.read(folder / PARAMS)
        self.states = [read_bin(path) for path in self.paths]
        odd = {name for state in self.states[1:] for name in state.keys() ^ self.states[0].keys()}
        if odd:
            raise ModelError(f"the files disagree on {some(sorted(odd))}", where=folder)
        self.config = self._config()

    def summary(self) -> str:
        layers, parts = counted(self.params.n_layers, "layer"), counted(len(self.paths), "file")
        return f"Llama in Meta's layout, {layers}, {parts}"

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the model as a Hugging Face folder."""
        name = str(dtype or self.states[0][EMBEDDING].dtype).removeprefix("torch.")
        ids = write_tokenizer(self.folder, folder, self.config["vocab_size"])
        write_json(folder / "config.json", self.config | ids | {"dtype": name, "torch_dtype": name})
        length, scaling = self.params.context(), self.params.scaling()
        rope = "" if scaling is None else f"; rope_parameters.factor {scaling['factor']:g}"
        guess = f"{PARAMS} does not say it, models of these sizes have it"
        say(f"config.json: max_position_embeddings {length:,}{rope}: {guess}")
        names = NameMap(*read_config(folder))
        check_room(folder, names.shapes.values(), dtype or self.states[0][EMBEDDING].dtype)
        write_safetensors(folder, self.tensors(names, dtype))

    def tensors(self, names: NameMap, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor under its Hugging Face name; one is in memory at a time."""
        places = {name: self._place(name) for name in names.shapes}
        tied = {"output.weight"} if self.config["tie_word_embeddings"] else set()
        wanted = {theirs for theirs, _ in places.values()} | tied
        odd = sorted(self.states[0].keys() - wanted - set(BUFFERS))
        missing = sorted(wanted - self.states[0].keys() - tied)
        if odd or missing:
            what = f"{len(missing)} tensors missing ({some(missing)}), {len(odd)} unknown ({some(odd)})"
            hint = f"{PARAMS} and the files disagree, or the model is no Llama 1 to 3.2"
            raise ModelError(what, where=self.folder, hint=hint)
        for name, (theirs, axis) in places.items():
            parts = [state[theirs] for state in self.states]
            for part, path in zip(parts, self.paths, strict=True):
                check_numbers(theirs, part, path)
            tensor = torch.cat(parts, axis) if axis is not None and len(parts) > 1 else parts[0]
            if tensor.shape != names.shapes[name]:
                what = (
                    f"{theirs} of {counted(len(parts), 'file')} is {tuple(tensor.shape)}, expected {names.shapes[name]}"
                )
                raise ModelError(what, where=self.folder, hint=f"{PARAMS} and the files disagree, or a file is missing")
            if ".q_proj" in name or ".k_proj" in name:
                tensor = rows_in_halves(tensor, self.params.dim // self.params.n_heads)
            yield name, (tensor if dtype is None else tensor.to(dtype)).contiguous()

    def _place(self, name: str) -> tuple[str, int | None]:
        """Returns Meta's name for a tensor of a Hugging Face folder, and the axis of its parts."""
        if name == "model.embed_tokens.weight":
            by_rows = self.states[0][EMBEDDING].size(1) == self.params.dim
            return EMBEDDING, 0 if by_rows else 1
        module, _, leaf = name.removeprefix("model.").rpartition(".")
        parts = module.split(".", 2)  # layers, a number, the module in it
        theirs, axis = NAMES[parts[-1]]
        return ".".join([*parts[:-1], theirs, leaf]), axis

    def _config(self) -> dict[str, Any]:
        """Returns config.json without dtype and special tokens."""
        params, state = self.params, self.states[0]
        if EMBEDDING not in state or state[EMBEDDING].dim() != 2:
            raise ModelError(f"there is no matrix {EMBEDDING}", where=self.paths[0])
        rows, width = state[EMBEDDING].shape
        rows = rows * len(self.states) if width == params.dim and len(self.states) > 1 else rows
        if params.vocab_size not in (-1, rows):
            what = f"vocab_size {params.vocab_size}, and {EMBEDDING} has {rows} rows"
            raise ModelError(what, where=self.folder / PARAMS)
        head = state.get("output.weight")
        hf = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": rows,
            "hidden_size": params.dim,
            "intermediate_size": params.d_ff(),
            "num_hidden_layers": params.n_layers,
            "num_attention_heads": params.n_heads,
            "num_key_value_heads": params.n_kv_heads or params.n_heads,
            "max_position_embeddings": params.context(),
            "rms_norm_eps": params.norm_eps,
            "rope_parameters": {"rope_theta": params.rope_theta} | (params.scaling() or {"rope_type": "default"}),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": head is None or torch.equal(head, state[EMBEDDING]),
        }
        spell_twice(hf, {})
        return hf
