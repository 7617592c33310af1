"""A run's low-rank updates as a GGUF adapter, which llama.cpp puts on the base's own GGUF file (`--lora`).

    NAME.lora_a (r, in), NAME.lora_b (out, r) for each tensor NAME of the base's file

The scale is in B: `adapter.lora.alpha` 0 means 1. The parts of a fused tensor are stacked: B is block-diagonal. Those
of experts are (experts, r, in) and (experts, out, r), of the largest rank, with zeros.
"""

from fnmatch import fnmatchcase
from pathlib import Path

import gguf
import torch
from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.exchange.exports.low_rank import Factors, check_factors, factors_of
from litpeft.exchange.gguf.layout import Layout, of_expert
from litpeft.exchange.gguf.weights import BoundedReader
from litpeft.exchange.modelfile import write_modelfile
from litpeft.exchange.run import Run
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config

ADAPTER, MODEL = "adapter.gguf", "base.gguf"


def write(folder: Path, run: Run, base: Path) -> str:
    """Writes the adapter and a Modelfile; returns a line that says what they are."""
    factors, layout = factors_of(run, base), Layout(NameMap(*read_config(base)))
    writer = gguf.GGUFWriter(folder / ADAPTER, layout.gguf.arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    count = 0
    for name, parts in layout.parts.items():
        given = [factors.get(part.removesuffix(".weight")) for part in parts]
        if any(given):
            check_taken(layout, name)
            a, b = (of_experts if of_expert(parts[0]) else joined)(layout, name, given)
            writer.add_tensor(f"{name}.lora_a", a.contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", b.contiguous().numpy())
            count += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, template = run.tokenizer_and_template(base)
    said = write_modelfile(folder, MODEL, template, run.system, adapter=ADAPTER)
    return f"{ADAPTER}, updates of {count} tensors; {said}; it goes with the base as {MODEL}"


def check_taken(layout: Layout, name: str) -> None:
    """Raises if llama.cpp would leave out an update of a tensor, without a word."""
    ours = {part.removesuffix(".weight") for part in layout.parts[name]}
    if any(fnmatchcase(part, glob) for part in ours for glob in layout.gguf.ignores):
        what = f"the run changes {min(ours)} ({name}), and llama.cpp's {layout.gguf.arch} adds no adapter to it"
        raise ConfigError(what, where="to", hint="`--to gguf` merges the run")


def of_experts(layout: Layout, name: str, given: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """Returns A and B of a tensor of the file that holds all experts."""
    parts = layout.parts[name]
    rank = max(len(pair[0]) for pair in given if pair is not None)
    out, width = layout.names.ours[parts[0]]
    a, b = torch.zeros(len(parts), rank, width), torch.zeros(len(parts), out, rank)
    for number, pair in enumerate(given):
        if pair is not None:
            a[number, : len(pair[0])], b[number, :, : len(pair[0])] = pair
    return a, b


def joined(layout: Layout, name: str, given: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """Returns A and B of a tensor of the file, of those of its parts; None for a part that did not learn."""
    a = torch.cat([pair[0] for pair in given if pair is not None])
    b, at = a.new_zeros(layout.shape(name)[0], len(a)), 0
    for part, pair in zip(layout.parts[name], given, strict=True):
        if pair is not None:
            for row, piece in layout.pieces(name, part, layout.stored(part, pair[1])):
                b[row : row + len(piece), at : at + len(pair[0])] = piece
            at += len(pair[0])
    return layout.computed(name, a), b


def verify(folder: Path, run: Run, base: Path) -> str:
    """Reads the adapter back; raises unless base and adapter compute what the run does."""
    layout = Layout(NameMap(*read_config(base)))
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in BoundedReader(folder / ADAPTER).tensors}
    factors: Factors = {}
    for name in layout.parts:
        if f"{name}.lora_a" in stored:
            rows = layout.ours(name, lambda name: stored[f"{name}.lora_b"])
            a = layout.restored(name, stored[f"{name}.lora_a"])
            each = a if a.dim() == 3 else a.expand(len(rows), *a.shape)
            for own, (part, b) in zip(each, rows.items(), strict=True):
                factors[part.removesuffix(".weight")] = own, b
    return check_factors(factors, run, base, folder)
