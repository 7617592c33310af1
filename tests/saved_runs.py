"""Runs of every method on a tiny base, whose deltas are far from their start, saved as a training saves them."""

from pathlib import Path

import pytest
import torch
from conftest import ON_CODES_ONLY, calibrated, make_folder, method_of, storage_of

from litpeft.core.safetensors import Weights
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.identity import config_identity, tokenizer_identity
from litpeft.exchange.run import base_facts, save_result
from litpeft.model.build import build
from litpeft.model.delta import trainable
from litpeft.model.quantize import Storage

HELD = {  # precision, storage and the largest difference from the plain model, relative
    "float64": ("64-true", None, 1e-10),
    "float32": ("32-true", None, 5e-6),
    "bf16": ("bf16-true", None, 3e-2),
    "nf4": ("bf16-true", "nf4", 3e-2),
}
TYPES = {"64-true": torch.float64, "32-true": torch.float32, "bf16-true": torch.bfloat16}


def make_base(folder: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 2}
    return make_folder(folder, seed=7, initializer_range=0.1, num_key_value_heads=1, **sizes)


def base_reads(base: Path) -> tuple[dict, tuple]:
    """Returns what all runs record alike: their chat template, and what identifies their base."""
    template = ChatTemplate(Tokenizer.load(base), is_setting=False)
    identity = Weights(base).fingerprint(), config_identity(base), tokenizer_identity(template)
    return {"name": template.name, "sha256": template.tokenizer.template_hash, "system": None}, identity


def trains_weights(folder: Path, name: str) -> bool:
    """Returns whether the method trains weights of linear layers, which codes cannot."""
    model = build(folder, torch.float32, method_of(name), storage=storage_of(name))
    return any(key in model.base_keys and "norm" not in key for key in trainable(model))


def storage_for(base: Path, name: str, kind: str) -> Storage | None:
    """Returns how the base of a run is held; skips the test if the method wants another."""
    quantize = HELD[kind][1]
    if name in ON_CODES_ONLY and not quantize:
        pytest.skip("wants codes")
    if quantize and trains_weights(base, name):
        pytest.skip("codes cannot train")
    if quantize and name in ON_CODES_ONLY:
        return storage_of(name)
    return quantize and Storage(quantize, cache=False)


def save_run(folder: Path, name: str, kind: str, base: Path, reads: tuple[dict, tuple]) -> Storage | None:
    """Writes a run of a method; returns how its base is held."""
    storage, precision = storage_for(base, name, kind), HELD[kind][0]
    method = calibrated(method_of(name), base)
    torch.manual_seed(1)
    model = build(base, TYPES[precision], method, storage=storage)
    for parameter in trainable(model).values():
        parameter.data += (0.5 / parameter.size(-1) ** 0.5 * torch.randn(parameter.shape)).to(parameter)
    template, identity = reads
    facts = {
        "base": base_facts(base, storage, *identity),
        "template": template,
        "precision": precision,
        **{"step": 1, "finished": True, "steps_done": 1, "steps_planned": 1},
    }
    save_result(folder / "final", model, name, method, base, facts)
    return storage
