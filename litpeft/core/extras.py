"""Packages that are needed for one thing only, and are not installed with litpeft."""

from importlib import import_module
from types import ModuleType

from litpeft.core.errors import DataError


def extra(module: str, what: str = "reading it", name: str | None = None) -> ModuleType:
    """Returns a module of an optional package; raises DataError with the line that installs it.

    `what` needs it; `name` is that of our extra, if the package has more beside it.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError:
        wanted = package if name is None else f"'litpeft[{name}]'"
        what = f"{what} needs the package {package}, which is not installed"
        raise DataError(what, hint=f"pip install {wanted}") from None
