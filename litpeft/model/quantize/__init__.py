"""The registry of weight storages: how the frozen base is held. A storage is one file here and one line in STORAGES."""

from dataclasses import dataclass
from importlib import import_module

from litpeft.core.errors import ConfigError, nearest

STORAGES = {
    "nf4": (
        "litpeft.model.quantize.four_bit:NF4",
        "4 bits a weight, at the quantiles of a normal distribution (QLoRA).",
    ),
    "fp4": ("litpeft.model.quantize.four_bit:FP4", "4 bits a weight: a sign, an exponent and one bit after it."),
    "int8": ("litpeft.model.quantize.int8:Int8", "8 bits a weight: whole numbers, and a scale for each output."),
}


def storage_class(name: str, key: str = "base.quantize") -> type:
    """Returns the Linear of a storage; imports its file, and so torch. `key` is the setting that names it."""
    if name not in STORAGES:
        what = f"{name!r} is not one of {', '.join(STORAGES)}{nearest(name, list(STORAGES))}"
        raise ConfigError(what, where=key)
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
        return f"{self.name}-dq" if self.double_quantize and self.name != "int8" else self.name
