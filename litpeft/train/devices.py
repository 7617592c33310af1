"""Where a run computes: one device, or several that each hold the model (DDP) or share it between them (FSDP2)."""

import logging
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from litpeft.core.errors import ConfigError
from litpeft.core.precision import Precision
from litpeft.model.gpt import GPT
from litpeft.train.settings import Finetune


def check_devices(settings: Finetune, precision: Precision, device: torch.device) -> None:
    """Raises if this machine has not the devices that the settings name, or they cannot train so."""
    if device.type == "cuda" and settings.devices > torch.cuda.device_count():
        what = f"{settings.devices} are asked for, this machine has {torch.cuda.device_count()} GPUs"
        raise ConfigError(what, where="devices")
    if settings.strategy == "fsdp" and precision.fabric == "16-mixed":
        hint = "take bf16-true or bf16-mixed, or strategy ddp"
        what = "16-mixed scales its gradients, which Fabric does not do over sharded ones"
        raise ConfigError(what, where="base.precision", hint=hint)


def make_fabric(settings: Finetune, precision: Precision, device: torch.device) -> Fabric:
    """Returns Fabric on the devices that the settings name, with the processes of the run connected."""
    world, timeout = settings.devices * settings.num_nodes, timedelta(seconds=settings.timeout)
    strategy: Strategy | str = "auto"
    if (
        settings.strategy == "fsdp"
    ):  # the model is sharded where it is built (see build.py), so there is nothing left for Fabric to do
        strategy = ModelParallelStrategy(lambda model, mesh: model, world, 1, timeout=timeout)
    elif world > 1:  # the ranks build the same model from the same files and seed: nothing to send at the start
        # and no buffer changes
        strategy = DDPStrategy(timeout=timeout, init_sync=False, gradient_as_bucket_view=True, broadcast_buffers=False)
    for name in ("lightning.fabric", "lightning.pytorch"):  # which of the two speaks depends on what was imported
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*experimental.*")
        fabric = Fabric(
            accelerator=device.type,
            devices=settings.devices if world > 1 or device.index is None else [device.index],
            num_nodes=settings.num_nodes,
            strategy=strategy,
            precision=precision.fabric,
        )
        fabric.launch()
    return fabric


def check_agreement(fabric: Fabric, facts: dict[str, Any]) -> None:
    """Raises on every rank if they are about to do different work: files may differ from one machine to another."""
    if fabric.world_size == 1:
        return
    everyones: list[dict[str, Any]] = [{}] * fabric.world_size
    torch.distributed.all_gather_object(everyones, facts)
    differ = [key for key in facts if any(one[key] != facts[key] for one in everyones)]
    if differ:
        hint = "give every machine the same files and start it with the same command"
        raise ConfigError(f"the ranks differ in {', '.join(differ)}", where="devices", hint=hint)


def sharder(settings: Finetune, precision: Precision, fabric: Fabric) -> Callable[[GPT], None] | None:
    """Returns what spreads a model over the ranks while it is built, or None where each holds all of it."""
    if settings.strategy != "fsdp":
        return None
    mixed = precision.fabric == "bf16-mixed" and settings.base.quantize is None  # constants of 4 bits stay float32
    half = torch.bfloat16 if mixed else None
    policy = MixedPrecisionPolicy(half, torch.float32 if mixed else None, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=fabric.device.type == "cuda") if settings.cpu_offload else OffloadPolicy()
    mesh = fabric.strategy.device_mesh["data_parallel"]
    device = torch.device("cpu") if settings.cpu_offload else fabric.device
    return partial(shard, mesh=mesh, policy=policy, offload=offload, device=device)


def shard(
    model: GPT, mesh: DeviceMesh, policy: MixedPrecisionPolicy, offload: OffloadPolicy, device: torch.device
) -> None:
    """Leaves each rank its share of every parameter, block by block; what was on the meta device gets its memory."""
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=offload)
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
