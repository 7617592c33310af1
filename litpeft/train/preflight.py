"""Checks before a run begins, from shapes and headers alone, so that a dry run finds the errors of the run."""

from pathlib import Path

import torch

from litpeft.core.errors import ConfigError
from litpeft.core.precision import Precision
from litpeft.core.safetensors import Weights
from litpeft.model.build import checked_files
from litpeft.model.delta import Method, attach
from litpeft.model.gpt import GPT
from litpeft.model.quantize.quantized import store
from litpeft.train.compiled import check_compiler
from litpeft.train.devices import check_devices
from litpeft.train.log import summary_writer_class
from litpeft.train.optim import check_optimizer
from litpeft.train.settings import Finetune, Validation


def check_run(settings: Finetune, method: Method, precision: Precision, device: torch.device) -> tuple[Weights, GPT]:
    """Returns the base's weights, unread, and the model with its method on the meta device; raises for any error."""
    check_devices(settings, precision, device)
    if settings.train.compile:
        check_compiler(device)
    if settings.tensorboard:
        summary_writer_class()
    config, weights, _ = checked_files(Path(settings.base.dir))
    with torch.device("meta"):
        model = GPT(config)
        if settings.base.quantize is not None:
            store(model, settings.base.quantize, settings.base.double_quantize, precision.weights)
        attach(model, method)
    scaled = precision.fabric == "16-mixed"
    check_optimizer(settings.train, model, method.trained_dtype(precision.weights), device, scaled)
    return weights, model


def check_held_out(settings: Finetune, held_out: int, askable: int) -> None:
    """Raises if settings need held-out rows and there are none, or none with a prompt to answer."""
    validation = settings.validation
    if held_out:
        if validation.metric == "exact" and not askable:
            what = "no held-out row can be asked, so there are no answers to compare"
            raise ConfigError(what, where="validation.metric", hint="take validation.metric loss")
        return
    for key in ("patience", "metric", "final", "interval", "max_rows"):
        value = getattr(validation, key)
        if value != getattr(Validation(), key):
            what = f"{value} is of no use: no row is held out, so nothing is measured"
            hint = "name rows with data.validation_path or raise data.validation_split, or leave it out"
            raise ConfigError(what, where=f"validation.{key}", hint=hint)
