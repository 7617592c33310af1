"""Prints the loss of a training result on the held-out rows, in float32 and with the same code for every tool.

    python -m scripts.bench.losses MODEL TOKENS.json KIND RESULT [nf4]

KIND: base; litpeft (a run); peft (an adapter); litgpt (lit_model.pth.lora); folder (a Hugging Face folder); litgpt_full
(lit_model.pth). LoRA tensors are put beside the base as they are, not merged: merging rounds them. nf4: the base is
held so, double-quantised, as it was in training.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from litpeft.core.precision import pick_device
from litpeft.core.safetensors import copy_companions, save_tensors
from litpeft.data.rows import Row
from litpeft.generate.load import load_model
from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.delta import load_delta
from litpeft.model.families.llama import NAMES
from litpeft.model.gpt import GPT
from litpeft.model.objective import mean_loss
from litpeft.model.quantize import Storage
from scripts.bench.shapes import ALPHA, RANK, Shapes

MICRO_TOKENS = 2048
LITGPT = {"attn.o": "attn.proj", "mlp.gate": "mlp.fc_1", "mlp.up": "mlp.fc_2", "mlp.down": "mlp.proj"}


def from_peft(folder: Path, shapes: Shapes) -> dict[str, Tensor]:
    """Returns the tensors of a PEFT adapter under litpeft's names."""
    saved, found = load_file(folder / "adapter_model.safetensors"), {}
    for layer in range(shapes.layers):
        for name in linear_names():
            theirs = f"base_model.model.{NAMES['blocks.{}.' + name]}".format(layer)
            found |= {f"blocks.{layer}.{name}.slot.lora.{x}": saved[f"{theirs}.lora_{x}.weight"].float() for x in "AB"}
    return found


def from_litgpt(path: Path, shapes: Shapes, rank: int) -> dict[str, Tensor]:
    """Returns the tensors of a Lit-GPT LoRA under litpeft's names; its q, k and v lie in one tensor, in that order."""
    saved = torch.load(path, weights_only=True)["model"]
    sizes, found = [shapes.linears()[name][1] for name in "qkv"], {}
    for layer in range(shapes.layers):
        theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
        downs = saved[f"{theirs}.attn.qkv.lora_A"].float().split(rank)
        ups = saved[f"{theirs}.attn.qkv.lora_B"].float().split(sizes)
        for name, A, B in zip("qkv", downs, ups, strict=True):
            found |= {f"{ours}.attn.{name}.slot.lora.A": A, f"{ours}.attn.{name}.slot.lora.B": B}
        for name, other in LITGPT.items():
            found |= {f"{ours}.{name}.slot.lora.{x}": saved[f"{theirs}.{other}.lora_{x}"].float() for x in "AB"}
    return found


def linear_names() -> list[str]:
    """Returns the linear layers of a block, as litpeft calls them."""
    return [*(f"attn.{name}" for name in "qkvo"), "mlp.gate", "mlp.up", "mlp.down"]


def write_folder(path: Path, base: Path, folder: Path, shapes: Shapes) -> Path:
    """Writes Lit-GPT's lit_model.pth as a Hugging Face folder; its head is never tied. Returns the folder."""
    saved = torch.load(path, weights_only=True)
    saved = saved.get("model", saved)
    hf = {
        "model.embed_tokens.weight": saved["transformer.wte.weight"],
        "model.norm.weight": saved["transformer.ln_f.weight"],
    }
    hf["lm_head.weight"] = saved["lm_head.weight"]
    for layer in range(shapes.layers):
        theirs = f"transformer.h.{layer}"
        parts = saved[f"{theirs}.attn.qkv.weight"].split([shapes.linears()[name][1] for name in "qkv"])
        own = {f"attn.{name}": part for name, part in zip("qkv", parts, strict=True)}
        others = LITGPT | {"norm1": "norm_1", "norm2": "norm_2"}
        own |= {name: saved[f"{theirs}.{other}.weight"] for name, other in others.items()}
        hf |= {f"{NAMES['blocks.{}.' + name].format(layer)}.weight": tensor for name, tensor in own.items()}
    copy_companions(base, folder)
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_tensors({name: tensor.contiguous() for name, tensor in hf.items()}, folder / "model.safetensors")
    return folder


def result(base: Path, kind: str, path: Path, storage: Storage | None, scratch: Path) -> GPT:
    """Returns the model that a tool ended with, in float32."""
    shapes, dtype, device = Shapes.read(base), torch.float32, pick_device()
    if kind == "litpeft":
        return load_model(str(path), precision="32-true").model
    if kind == "base":
        return build(base, dtype, None, device, storage)
    if kind in ("folder", "litgpt_full"):
        return build(path if kind == "folder" else write_folder(path, base, scratch, shapes), dtype, device=device)
    if kind == "peft":
        settings = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        rank, alpha = settings["r"], settings["lora_alpha"]
        state = from_peft(path, shapes)
    else:
        rank, alpha = RANK, ALPHA
        state = from_litgpt(path, shapes, rank)
    model = build(base, dtype, LoRA(rank=rank, alpha=alpha), device, storage)
    load_delta(model, state, str(path))
    return model


def main(base: str, tokens: str, kind: str, path: str, quantize: str = "") -> None:
    part = json.loads(Path(tokens).read_text(encoding="utf-8"))["val"]
    rows = [Row(row["ids"], list(map(bool, row["trained"])), row["trained"].index(1), "", []) for row in part]
    with tempfile.TemporaryDirectory() as scratch:
        model = result(Path(base), kind, Path(path), Storage(quantize) if quantize else None, Path(scratch))
        print(json.dumps({"loss": mean_loss(model, rows, MICRO_TOKENS, pick_device())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
