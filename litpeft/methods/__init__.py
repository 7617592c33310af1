"""The registry of finetuning methods: a method is one file here and one line in METHODS."""

from importlib import import_module

METHODS = {
    "lora": ("litpeft.methods.lora:LoRA", "Low-rank updates beside frozen linear layers."),
}


def method_class(name: str) -> type:
    """Returns the dataclass of a method; imports its file, and so torch."""
    module, _, cls = METHODS[name][0].partition(":")
    return getattr(import_module(module), cls)
