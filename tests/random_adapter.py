"""An adapter of peft whose trained tensors are random."""

from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM


def write_adapter(base: Path, folder: Path, config: object) -> torch.nn.Module:
    """Writes one as peft does; returns its model."""
    torch.manual_seed(7)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model
