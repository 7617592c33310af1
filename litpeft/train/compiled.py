"""Compiles blocks with torch.compile, which fuses operations to make fewer passes over memory."""

import os
import shutil

import torch

from litpeft.core.errors import ConfigError
from litpeft.model.gpt import GPT, run_block


def check_compiler(device: torch.device) -> None:
    """Raises if torch cannot compile for this device."""
    if not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")):
        hint = "install one (Debian and Ubuntu: apt install g++), or set train.compile false"
        what = f"true needs a C++ compiler on {device.type}, and this machine has neither g++ nor clang++"
        raise ConfigError(what, where="train.compile", hint=hint)


def compile_blocks(model: GPT, device: torch.device) -> None:
    """Lets `model` compile its blocks at the first training pass; blocks of equal structure share the compiled code.

    The attention core is not compiled: the lengths of documents are Python numbers that change at every step.
    """
    check_compiler(device)
    for core in (core for module in model.blocks.modules() if (core := getattr(module, "core", None)) is not None):
        core.forward = torch.compiler.disable(core.forward)
    # A block's floats stay as they are. As variables they are traced first, and most of them as constants once more.
    torch._dynamo.config.specialize_float = True
    model.fused = None
    model.compiled = torch.compile(run_block, dynamic=True)
