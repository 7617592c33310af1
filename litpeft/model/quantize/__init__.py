"""The registry of weight storages: how the frozen base is held. A storage is one file here and one line in STORAGES."""

from dataclasses import dataclass
from importlib import import_module

from litpeft.core.errors import ConfigError, nearest

STORAGES = {  # module:class, and whether double quantisation packs its constants, too
    "nf4": ("litpeft.model.quantize.four_bit:NF4", True),
    "fp4": ("litpeft.model.quantize.four_bit:FP4", True),
    "nf3": ("litpeft.model.quantize.few_bits:NF3", True),
    "nf2": ("litpeft.model.quantize.few_bits:NF2", True),
    "fp8": ("litpeft.model.quantize.fp8:FP8", False),
    "int8": ("litpeft.model.quantize.int8:Int8", False),
    "int4": ("litpeft.model.quantize.grouped:Int4", False),
    "int3": ("litpeft.model.quantize.grouped:Int3", False),
    "int2": ("litpeft.model.quantize.grouped:Int2", False),
}
DOUBLE = [name for name, (_, double) in STORAGES.items() if double]


def storage_class(name: str, key: str = "base.quantize") -> type:
    """Returns the Linear of a storage; imports its file, and so torch. `key` is the setting that names it."""
    if name not in STORAGES:
        raise ConfigError(f"{name!r} is not one of {', '.join(STORAGES)}{nearest(name, list(STORAGES))}", where=key)
    module, _, cls = STORAGES[name][0].partition(":")
    return getattr(import_module(module), cls)


@dataclass(frozen=True)
class Storage:
    """How the linear layers of a frozen base are quantised: see litpeft/model/quantize."""

    name: str
    double_quantize: bool = True
    cache: bool = False  # keep the quantised weights on disk, beside the base's

    @property
    def key(self) -> str:
        """Returns the name of such weights in a cache on disk."""
        return f"{self.name}-dq" if self.double_quantize and self.name in DOUBLE else self.name
