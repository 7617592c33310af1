"""A run's low-rank updates as an adapter of mlx-lm: adapters.safetensors and adapter_config.json.

    NAME.lora_a = A^T (in, r), NAME.lora_b = B^T (r, out); y + scale x lora_a lora_b, with scale 1

mlx-lm has one rank for all layers, and adapts a kind of layer in every block: what is missing is zero.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from litpeft.core.exports import CannotExport
from litpeft.core.json import write_json
from litpeft.core.recognise import ADAPTER
from litpeft.core.safetensors import save_tensors
from litpeft.exchange.chat_template import write_beside
from litpeft.exchange.exports.low_rank import Factors, check_factors, factors_of
from litpeft.exchange.run import Run
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config

TENSORS = "adapters.safetensors"


def write(folder: Path, run: Run, base: Path) -> str:
    """Writes the adapter; returns a line that says what it is."""
    factors, names = factors_of(run, base), NameMap(*read_config(base))
    modules = {name: module_of(names, name) for name in factors}
    rank = max(len(a) for a, _ in factors.values())
    kinds = sorted({re.sub(r".*\.layers\.\d+\.", "", module) for module in modules.values()})
    tensors: dict[str, Tensor] = {}
    for name, shape in names.ours.items():
        ours = name.removesuffix(".weight")
        if name.endswith(".weight") and len(shape) == 2 and names.parts[names.file_name(name)] == [name]:
            module = names.file_name(name).removesuffix(".weight")
            if re.sub(r".*\.layers\.\d+\.", "", module) in kinds:
                a, b = factors.get(ours, (torch.zeros(0, shape[1]), torch.zeros(shape[0], 0)))
                padded = torch.zeros(shape[1], rank), torch.zeros(rank, shape[0])
                padded[0][:, : len(a)], padded[1][: len(a)] = a.T, b.T
                tensors |= {f"{module}.lora_a": padded[0], f"{module}.lora_b": padded[1]}
    save_tensors(tensors, folder / TENSORS)
    parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": kinds}
    layers = names.config.n_layers
    write_json(folder / ADAPTER, {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters})
    _, template = run.tokenizer_and_template(base)
    said = f"an adapter of rank {rank} for mlx-lm; next: mlx_lm.generate --model BASE --adapter-path OUT"
    return said + write_beside(folder, template)


def module_of(names: NameMap, ours: str) -> str:
    """Returns the module of the base's files that is one of our linear layers; raises CannotExport if there is none."""
    theirs = names.file_name(f"{ours}.weight")
    if names.parts[theirs] != [f"{ours}.weight"] or names.transposed(theirs):
        raise CannotExport(f"{ours} is fused or transposed in {theirs}, where mlx-lm has no such layer")
    return theirs.removesuffix(".weight")


def verify(folder: Path, run: Run, base: Path) -> str:
    """Reads the adapter back; raises unless base and adapter compute what the run does."""
    stored, names = load_file(folder / TENSORS), NameMap(*read_config(base))
    ours = {names.file_name(name): name for name in names.ours}
    factors: Factors = {}
    for key, a in stored.items():
        if key.endswith(".lora_a"):
            module = key.removesuffix(".lora_a")
            name = ours[f"{module}.weight"].removesuffix(".weight")
            factors[name] = a.T.contiguous(), stored[f"{module}.lora_b"].T.contiguous()
    return check_factors(factors, run, base, folder)
