"""Packages that are needed for one thing only, and are not installed with litpeft."""

from importlib import import_module
from types import ModuleType

from litpeft.core.errors import DataError


def extra(module: str) -> ModuleType:
    """Returns a module of an optional package; raises DataError with the line that installs it."""
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError:
        what = f"reading it needs the package {package}, which is not installed"
        raise DataError(what, hint=f"pip install {package}") from None
