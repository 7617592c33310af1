"""Builds a model from a folder. Training, generation and merging all use this one order of steps."""

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.core.checksums import has_checksums
from litpeft.core.distributed import copy_shard
from litpeft.core.errors import ModelError
from litpeft.core.safetensors import Weights, is_finite
from litpeft.core.terminal import is_first
from litpeft.core.to_device import on_device
from litpeft.model.added_rows import TABLES, with_rows
from litpeft.model.added_tokens import grown
from litpeft.model.config import ModelConfig
from litpeft.model.delta import Method, attach, load_delta
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import left_out, read_config
from litpeft.model.gpt import GPT
from litpeft.model.quantize import Storage
from litpeft.model.quantize.cache import Cache
from litpeft.model.quantize.quantized import Quantized, store
from litpeft.model.slots import Bank, Delta, Linear


def checked_files(folder: Path) -> tuple[ModelConfig, Weights, NameMap]:
    """Returns config, weights and name map of a Hugging Face folder, whose config.json fits the files' headers."""
    name, config = read_config(folder)
    weights = Weights(folder)
    if config.n_layers > len(weights.file_of):  # before that many layers are created
        what = f"config.json{left_out(folder)} says {config.n_layers} layers"
        raise ModelError(f"{what}, the files hold {len(weights.file_of)} tensors", where=str(folder))
    names = NameMap(name, config)
    names.check(weights)
    return config, weights, names


def build(
    folder: Path,
    dtype: torch.dtype,
    method: Method | None = None,
    device: torch.device | str = "cpu",
    storage: Storage | None = None,
    shard: Callable[[GPT], None] | None = None,
    delta: dict[str, Tensor] | None = None,
) -> GPT:
    """Returns the model of a Hugging Face folder in `dtype`, with `method` at its start, or frozen without a method.

    `storage` says how the linear layers are held. `shard` spreads the model over the ranks. Only the first rank
    verifies the files' checksums, and writes the quantised weights to disk if `storage` wants them cached.
    `delta` is what a run saved: the caller loads it afterwards, and the method restores here what it does not hold.
    """
    config, weights, names = checked_files(folder)
    if is_first() and has_checksums(folder):
        weights.begin_sums()  # beside what follows
    with torch.device("meta"):  # 1. shapes
        model = GPT(grown(config, method))
    model.dtype, model.files = dtype, weights
    others: dict[str, str] = {}  # 2. storages; of some layers others than the rest's
    if storage is not None:
        if method is not None:
            read = lambda name: read_finite(names, weights, f"{name}.weight").to(device)
            others = method.choose(model, storage, read, delta)
        store(model, storage.name, storage.double_quantize, dtype, others)
    if method is None:
        model.requires_grad_(False)  # so that no parameter is copied out of its file
    else:  # 3. slots filled; names of the base stay as they are
        if delta is not None:
            method.restore(delta)
        attach(model, method)
    method = method or Method()  # whose hooks change nothing
    wide = method.trained_dtype(dtype)
    for key, parameter in model.named_parameters():
        if parameter.is_floating_point() and key in names.ours:
            parameter.data = parameter.data.to(wide if parameter.requires_grad else dtype)
    for module in model.modules():  # 4. the deltas at their start: drawn on the CPU, the same on every device
        if isinstance(module, Delta | Bank):
            module.to_empty(device="cpu").reset_parameters()
            module.to(device, wide)
    if shard is not None:  # 5. each rank has memory for its share
        shard(model)
    cache = Cache(folder, storage.key, weights.fingerprint()) if storage is not None and storage.cache else None
    try:
        _fill(model, names, method, device, cache, delta, others)  # 6. the base's weights
    except ModelError:
        weights.verify()  # damage may be the cause
        raise
    if is_first():
        weights.verify()
    return model


def deltas_alone(config: ModelConfig, method: Method, storage: Storage | None, delta: dict[str, Tensor]) -> GPT:
    """Returns a model with a run's deltas. Its base is on the meta device, so none of the base's files is read."""
    with torch.device("meta"):
        model = GPT(config)
    if storage is not None:
        store(model, storage.name, storage.double_quantize, torch.float32)
    method.restore(delta)
    attach(model, method)
    with torch.random.fork_rng(devices=[]):
        for module in model.modules():
            if isinstance(module, Delta | Bank):
                module.to_empty(device="cpu").reset_parameters()
                module.to(next(iter(delta.values())).dtype)
    load_delta(model, delta, "delta")
    return model


def _fill(
    model: GPT,
    names: NameMap,
    method: Method,
    device: torch.device | str,
    cache: Cache | None,
    delta: dict[str, Tensor] | None,
    others: Container[str],
) -> None:
    """Gives `model` the weights of its files, tensor by tensor, or what `method` gives in their place.

    Packed weights are read from the `cache`, if it has them; else the first rank writes them there. The layers named
    `others` are not in it.
    """
    cached, packed = None if cache is None else cache.tensors(), {}
    writes, starts = cache is not None and cached is None and is_first(), method.defines("start")
    changed = False  # whether the method has given another weight than that of the base
    in_cache: set[str] = set()
    if cached is not None:
        layers = (name for name, layer in model.named_modules() if isinstance(layer, Quantized))
        in_cache = {f"{name}.weight" for name in layers if name not in others}
    read = [ours for ours in names.ours if starts or ours not in in_cache]
    with on_device(model.files, names.plain(model.files, read), device) as files:
        for ours in names.ours:
            module, _, leaf = ours.rpartition(".")
            layer = model.get_submodule(module)
            codes = None
            if ours in in_cache:
                codes = {key: cached.get_tensor(f"{module}.{key}").to(device) for key in layer.packed_names}
            tensor = _alone(read_finite(names, files, ours).to(device)) if codes is None or starts else None
            if ours in TABLES:
                tensor = with_rows(tensor, model.config.vocab_size)
            values = {leaf: tensor}
            if leaf == "weight" and isinstance(layer, Linear):
                packing = Packing(layer, tensor, codes)
                mine = method.start(module, layer, tensor, packing.held, delta)
                values, changed = packing.pack(mine), changed or mine is not tensor
            elif layer is model.embed:
                method.start_embedding(model, tensor)
            values = {f"{module}.{key}": value for key, value in values.items()}
            for key, value in values.items():
                _place(model, key, value)
            if writes and leaf == "weight" and isinstance(layer, Quantized):
                packed |= values
            model.files.drop_pages(sum(value.nbytes for value in values.values()))  # each is read once
    if packed and not changed and not others:
        cache.write(packed)


@dataclass
class Packing:
    """Packs weights (out, in) for a linear layer; `packed`, if known, are the packed tensors of `weight`."""

    layer: Linear
    weight: Tensor | None
    packed: dict[str, Tensor] | None

    def pack(self, weight: Tensor | None) -> dict[str, Tensor]:
        """Returns the packed tensors of a weight, by their names in the layer."""
        if self.packed is None or weight is not self.weight:
            self.weight, self.packed = weight, self.layer.pack(weight)
        return self.packed

    def held(self, weight: Tensor) -> Tensor:
        """Returns the weight that the layer would multiply with: `weight`, rounded to the layer's type or codes."""
        return self.layer.unpacked(self.pack(weight))


def read_finite(names: NameMap, weights: Weights, ours: str) -> Tensor:
    """Returns a tensor of the base's files, whose numbers are finite."""
    tensor = names.read(weights, ours)
    if not is_finite(tensor):
        file, name = names.found(weights, ours)
        hint = "take the model's files again, or another precision"
        raise ModelError(f"{name} holds numbers that are not finite", where=str(file), hint=hint)
    return tensor


def _alone(tensor: Tensor) -> Tensor:
    """Returns a tensor on a GPU that holds no more of its memory than itself; one of a mapped file as it is."""
    return tensor.clone() if tensor.is_cuda and tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _place(model: GPT, name: str, tensor: Tensor) -> None:
    """Gives a parameter its value: the tensor itself for one on the meta device, else a copy, or a copy of a shard."""
    module, _, leaf = name.rpartition(".")
    if leaf in model.get_submodule(module)._buffers:  # it never trains, and keeps the type that it has in the file
        setattr(model.get_submodule(module), leaf, tensor.clone())
        return
    own = model.get_parameter(name)
    if not own.is_meta:
        copy_shard(own, tensor)
        return
    tensor = tensor.to(own.dtype)
    tensor = tensor.clone() if own.requires_grad else tensor  # an optimizer must not write into the file's pages
    setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=own.requires_grad))
