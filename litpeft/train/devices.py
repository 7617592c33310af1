"""The devices of a run: one, or several with DDP or FSDP2."""

import logging
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from litpeft.core.errors import ConfigError
from litpeft.core.precision import Precision
from litpeft.model.gpt import GPT
from litpeft.model.quantize import storage_class
from litpeft.train.settings import Finetune

if TYPE_CHECKING:
    from litpeft.train.fabric import Fabric


def check_devices(settings: Finetune, precision: Precision, device: torch.device) -> None:
    """Raises if this machine lacks the devices of the settings, or cannot train with this strategy."""
    if device.type == "cuda" and settings.devices > torch.cuda.device_count():
        what = f"{settings.devices} are asked for, this machine has {torch.cuda.device_count()} GPUs"
        raise ConfigError(what, where="devices")
    storage = settings.base.quantize
    if storage is not None and (reason := storage_class(storage).why_not(device)) is not None:
        raise ConfigError(reason, where="base.quantize", hint="take int8 or nf4")
    if settings.strategy == "fsdp" and precision.fabric == "16-mixed":
        hint = "take bf16-true or bf16-mixed, or strategy ddp"
        what = "16-mixed scales its gradients, which Fabric does not do over sharded ones"
        raise ConfigError(what, where="base.precision", hint=hint)


def make_fabric(settings: Finetune, precision: Precision, device: torch.device, idle_parts: bool = False) -> "Fabric":
    """Returns Fabric on the devices of the settings, with the run's processes connected.

    With `idle_parts` a step may leave some of what trains without a gradient, on all ranks.
    """
    from litpeft.train.fabric import DDPStrategy, Fabric, ModelParallelStrategy

    world, timeout = settings.devices * settings.num_nodes, timedelta(seconds=settings.timeout)
    strategy: Any = "auto"
    if settings.strategy == "fsdp":  # model/build.py shards the model, Fabric does not
        strategy = ModelParallelStrategy(lambda model, mesh: model, world, 1, timeout=timeout)
    elif world > 1:  # the ranks build the same model from the same files and seed: no initial broadcast,
        # and none of buffers, which do not change
        strategy = DDPStrategy(
            timeout=timeout,
            init_sync=False,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
            find_unused_parameters=idle_parts,
        )
    for name in ("lightning.fabric", "lightning.pytorch"):  # which one logs depends on what was imported
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


def check_agreement(fabric: "Fabric", facts: dict[str, Any]) -> None:
    """Raises on every rank if these facts differ between ranks, as files on different machines may."""
    if fabric.world_size == 1:
        return
    everyones: list[dict[str, Any]] = [{}] * fabric.world_size
    torch.distributed.all_gather_object(everyones, facts)
    differ = [key for key in facts if any(one[key] != facts[key] for one in everyones)]
    if differ:
        hint = "give every machine the same files and start it with the same command"
        raise ConfigError(f"the ranks differ in {', '.join(differ)}", where="devices", hint=hint)


def sharder(settings: Finetune, precision: Precision, fabric: "Fabric") -> Callable[[GPT], None] | None:
    """Returns a function that shards a model while it is built, or None if every rank holds all of it."""
    if settings.strategy != "fsdp":
        return None
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    mixed = precision.fabric == "bf16-mixed" and settings.base.quantize is None  # constants of 4 bits stay float32
    half = torch.bfloat16 if mixed else None
    policy = MixedPrecisionPolicy(half, torch.float32 if mixed else None, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=fabric.device.type == "cuda") if settings.cpu_offload else OffloadPolicy()
    mesh = fabric.strategy.device_mesh["data_parallel"]
    device = torch.device("cpu") if settings.cpu_offload else fabric.device

    def shard(model: GPT) -> None:
        """Shards every parameter over the ranks, block by block, and allocates what is on the meta device."""
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=offload)
        model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)

    return shard
