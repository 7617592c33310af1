"""Methods in other models than ours: any torch module with linear layers can learn by LoRA and its relatives."""

import torch.nn as nn
from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.model.delta import Method, attach, load_delta, trainable
from litpeft.model.slots import Bank, Delta, Linear, Slot


class Banks(nn.ModuleDict):
    """What several deltas share; in an nn.Sequential, which calls all its modules, it changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def adopt(module: nn.Module, method: Method, saved: dict[str, Tensor] | None = None) -> nn.Module:
    """Puts a method into a module, in place, and freezes the rest of it; returns the module.

    Each nn.Linear gets a slot and computes the same as before. The method starts as it does in a language model, or as
    `saved`, what `delta_state` gave for a module like this one. `folds` gives the weights without deltas.

    Raises ConfigError if the method acts elsewhere than in linear layers, norms and parameters.
    """
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__, layer.slot = Linear, Slot()
    module.banks = Banks()
    try:
        attach(module, method)
    except AttributeError as error:
        what = f"{type(method).__name__} acts in the blocks of a language model, and this one has no {error.name}"
        raise ConfigError(what, where="method") from error
    if not module.banks:
        del module.banks
    wide = method.trained_dtype(next(module.parameters()).dtype)
    for part in module.modules():
        if isinstance(part, Delta | Bank):
            part.reset_parameters()
            part.to(wide)
    for name, layer in module.named_modules():
        if isinstance(layer, Linear):
            weight = layer.weight.detach()
            mine = method.start(name, layer, weight, lambda new, dtype=weight.dtype: new.to(dtype), saved)
            if mine is not weight:
                layer.weight.data = mine.to(weight.dtype)
    for parameter in trainable(module).values():
        parameter.data = parameter.data.to(wide)
    if saved is not None:
        load_delta(module, saved, "saved")
    return module
