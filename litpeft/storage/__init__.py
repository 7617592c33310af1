"""The registry of weight storages: how the frozen base is held. A storage is one file here and one line in STORAGES."""

from importlib import import_module

from litpeft.errors import UserError, nearest

STORAGES = {
    "nf4": ("litpeft.storage.four_bit:NF4", "4 bits a weight, at the quantiles of a normal distribution (QLoRA)."),
    "fp4": ("litpeft.storage.four_bit:FP4", "4 bits a weight: a sign, an exponent and one bit after it."),
    "int8": ("litpeft.storage.int8:Int8", "8 bits a weight: whole numbers, and a scale for each output."),
}


def storage_class(name: str, key: str = "base.quantize") -> type:
    """Returns the Linear of a storage; imports its file, and so torch. `key` is the setting that names it."""
    if name not in STORAGES:
        what = f"{name!r} is not one of {', '.join(STORAGES)}{nearest(name, list(STORAGES))}"
        raise UserError("CONFIG-600", what, where=key)
    module, _, cls = STORAGES[name][0].partition(":")
    return getattr(import_module(module), cls)
