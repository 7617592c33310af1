"""The dtypes of the frozen weights and of the computation. Trained parameters are float32."""

import os
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread

import torch

from litpeft.core.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    name: str
    weights: torch.dtype  # of the frozen base
    fabric: str  # Fabric's plugin; its -true ones would also cast trained parameters, so `build` sets dtypes itself


PRECISIONS = {
    "bf16-true": Precision("bf16-true", torch.bfloat16, "32-true"),
    "16-true": Precision("16-true", torch.float16, "32-true"),
    "bf16-mixed": Precision("bf16-mixed", torch.float32, "bf16-mixed"),
    "16-mixed": Precision("16-mixed", torch.float32, "16-mixed"),
    "32-true": Precision("32-true", torch.float32, "32-true"),
    "64-true": Precision("64-true", torch.float64, "32-true"),
}


def pick_precision(name: str, device: torch.device, key: str = "precision") -> Precision:
    """Returns the precision of that name; `auto` is bf16-true where the device computes in bfloat16, else 32-true.

    `key` is the setting that names it, for errors.
    """
    if name == "auto":
        native = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else torch.cpu._is_avx512_bf16_supported()
        )
        name = "bf16-true" if native else "32-true"
    if name not in PRECISIONS:
        raise ConfigError(f"{name!r} is not one of auto, {', '.join(PRECISIONS)}", where=key)
    if name == "16-mixed" and device.type == "cpu":
        raise ConfigError("16-mixed needs a GPU; this machine's CPU has bf16-true, bf16-mixed and 32-true", where=key)
    return PRECISIONS[name]


def pick_device() -> torch.device:
    """Returns this process's GPU if there are GPUs, else the CPU."""
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return torch.device("cuda", int(rank)) if torch.cuda.is_available() else torch.device("cpu")


def start_device() -> None:
    """Begins to start this process's GPU, if it has one, in a thread: its driver needs no lock of Python's for that."""
    device = pick_device()
    if device.type == "cuda":
        Thread(target=_touch, args=(device,), daemon=True).start()


def _touch(device: torch.device) -> None:
    with suppress(Exception):  # whoever uses the device next meets the same error
        torch.zeros(1, device=device)
