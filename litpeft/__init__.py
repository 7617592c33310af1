"""litpeft: teach a language model something of your own, on the hardware you have.

In Python, see tutorials/python.md: `litpeft.run("finetune lora", ...)` is the command, `litpeft.load(...)` a model that
answers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
IN_PYTHON = {"run": "litpeft.cli.call", "load": "litpeft.generate.llm"}  # imported when they are asked for


def __getattr__(name: str) -> Any:
    if name in IN_PYTHON:
        return getattr(import_module(IN_PYTHON[name]), name)
    raise AttributeError(f"module 'litpeft' has no attribute {name!r}")
