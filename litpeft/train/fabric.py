"""Lightning's Fabric, without what the import of Lightning loads beside it: seconds, before a run can begin.

The package `lightning` imports its Trainer, and that torchmetrics, with scipy, matplotlib and transformers where they
are installed. Fabric needs none of them: it asks for the version of torchmetrics only.
"""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType

PACKAGE, UNUSED = "lightning", "torchmetrics"


class Package(ModuleType):
    """A package whose own contents are imported when they are used first; its submodules need not wait for them."""

    def __getattr__(self, attribute: str) -> object:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if (
            submodule := sys.modules.get(f"{self.__name__}.{attribute}")
        ) is not None:  # one that is still being imported
            return submodule
        self.__class__ = ModuleType
        self.__spec__.loader.exec_module(self)
        return getattr(self, attribute)


def import_fabric() -> None:
    """Imports lightning.fabric, which finds no torchmetrics, unless one of the packages is imported already."""
    spec = find_spec(PACKAGE)
    if spec is None or PACKAGE in sys.modules or UNUSED in sys.modules:
        return
    package = module_from_spec(spec)
    package.__class__ = Package
    sys.modules |= {PACKAGE: package, UNUSED: None}  # None: as if it were not installed
    try:
        import_module(f"{PACKAGE}.fabric")
    finally:
        del sys.modules[UNUSED]


import_fabric()

from lightning.fabric import Fabric  # noqa: E402
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy  # noqa: E402

__all__ = ["DDPStrategy", "Fabric", "ModelParallelStrategy", "Strategy"]
