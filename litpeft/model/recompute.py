"""What is kept of a block for its backward pass: all of it, no cheap results, its input only, or that in host memory.

`again` marks the cheap results: of norms, activations, dropout and casts. Products and attention are never marked.
"""

import itertools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SCOPE: ContextVar[Optional["Recomputed"]] = ContextVar("the block whose marked results are not kept", default=None)


def again(f: Callable[..., Tensor], *inputs: Any, random: bool = False) -> Tensor:
    """Returns f(*inputs). Within `Recomputed` autograd keeps the inputs, neither the result nor what leads to it.

    A function that draws random numbers is `random`: it draws the same ones again.
    """
    scope = None if torch.compiler.is_compiling() or not torch.is_grad_enabled() else SCOPE.get()
    return f(*inputs) if scope is None else scope.run(f, *inputs, random=random)


def is_marking() -> bool:
    """Returns whether this is within a `Recomputed` for what `again` marks."""
    return SCOPE.get() is not None


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Returns dropout(x), of which nothing is kept where `again` keeps nothing."""
    return again(F.dropout, x, p, training, random=True) if p and training else x


class Result:
    """A result of `again`. It is computed once more when the backward pass first asks for it or for what led to it."""

    def __init__(self, f: Callable[..., Tensor], inputs: tuple[Any, ...], kept: list[Any], random: bool):
        self.f, self.kept = f, kept  # the inputs as autograd keeps them
        self.versions = [x._version if isinstance(x, Tensor) else 0 for x in kept]
        self.trains = [isinstance(x, Tensor) and x.requires_grad for x in inputs]
        self.tensors: list[Tensor] = []  # what autograd would have kept within f, and the result, once asked for
        device = next(x.device for x in inputs if isinstance(x, Tensor))
        self.kind, self.devices = ("cpu" if device.type == "meta" else device.type), [device] * (device.type == "cuda")
        self.autocast = torch.get_autocast_dtype(self.kind), torch.is_autocast_enabled(self.kind)
        self.random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)] if random else []

    def run(self, inputs: Sequence[Any], pack: Callable[[Tensor], Any], pack_input: Callable[[Tensor], Any]) -> Tensor:
        """Returns f(*inputs); `pack` says what is kept in place of a tensor within f."""
        given = {memory(x) for x in inputs if isinstance(x, Tensor)}
        with saved_tensors_hooks(lambda x: pack_input(x) if memory(x) in given else pack(x), unpacked):
            return self.f(*inputs)

    def __getitem__(self, number: int) -> Tensor:
        if not self.tensors:
            if self.versions != [x._version if isinstance(x, Tensor) else 0 for x in self.kept]:
                raise RuntimeError(f"an input of {self.f} was written over: it cannot be computed again")
            made: list[Tensor] = []
            inputs = [
                x.detach().requires_grad_(trains) if isinstance(x, Tensor) else x
                for x, trains in zip(map(unpacked, self.kept), self.trains, strict=True)
            ]
            with (
                torch.random.fork_rng(self.devices, enabled=bool(self.random)),
                torch.autocast(self.kind, *self.autocast),
                torch.enable_grad(),  # so that the same kernels are chosen as before
            ):
                if self.random:
                    torch.set_rng_state(self.random[0])
                    for device, state in zip(self.devices, self.random[1:], strict=True):
                        torch.cuda.set_rng_state(state, device)
                y = self.run(inputs, lambda x: made.append(x.detach()), lambda x: None)
            self.tensors = [*made, y.detach()]
        return self.tensors[number]


@dataclass
class View:
    """What autograd keeps in place of a tensor: how it is made of a result, or of what led to one."""

    result: Result
    number: int  # of the tensor in it
    layout: tuple[torch.Size, tuple[int, ...], int]

    @classmethod
    def of(cls, x: Tensor, result: Result, number: int) -> "View":
        return cls(result, number, (x.size(), x.stride(), x.storage_offset()))

    def tensor(self) -> Tensor:
        return self.result[self.number].as_strided(*self.layout)


def unpacked(kept: Any) -> Any:
    """Returns the tensor of a view, anything else as it is."""
    return kept.tensor() if isinstance(kept, View) else kept


class Recomputed(saved_tensors_hooks):
    """Within the `with` block, which is a block of the model or less, autograd keeps no result of `again`.

    Unless it `marks`, only those of its own `run`.
    """

    def __init__(self, marks: bool = True) -> None:
        super().__init__(self.packed, unpacked)
        self.marks, self.token = marks, None
        self.results: dict[int, tuple[Tensor, int, Result]] = {}  # by memory, which the tensor holds until the end

    def __enter__(self) -> "Recomputed":
        self.token = SCOPE.set(self) if self.marks else None
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self.token is not None:
            SCOPE.reset(self.token)
        self.results.clear()

    def run(self, f: Callable[..., Tensor], *inputs: Any, random: bool = False) -> Tensor:
        """Does what `again` says."""
        kept = [self.packed(x.detach()) if isinstance(x, Tensor) else x for x in inputs]
        result, count = Result(f, inputs, kept, random), itertools.count()
        y = result.run(inputs, lambda x: View.of(x, result, next(count)), self.packed)
        if all(memory(y) != memory(x) for x in inputs if isinstance(x, Tensor)):
            self.results[memory(y)] = y.detach(), y._version, result
        return y

    def packed(self, x: Tensor) -> Tensor | View:
        """Returns what is kept of a tensor. One that was written over since is kept itself."""
        y, version, result = self.results.get(memory(x), (None, 0, None))
        if y is None or x._version != version or x.dtype != y.dtype:
            return x
        return View.of(x, result, -1)


def memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@cache
def copying(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream of a GPU that copies while others compute."""
    return torch.cuda.Stream(device)


def copied(to: Tensor, x: Tensor, device: torch.device) -> torch.cuda.Event:
    """Has x copied after what the GPU was told so far; returns when that is done."""
    stream, done = copying(device), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        to.copy_(x, non_blocking=True)
        done.record()
    return done


class Held:
    """A tensor of a GPU in host memory, and the one that was kept before it.

    Memory of the GPU is allocated and freed in the order of the computing stream, which waits for each copy before it
    goes on: so two blocks are held there at a time, however far the CPU is ahead.
    """

    def __init__(self, x: Tensor, before: Optional["Held"]):
        self.host = torch.empty_like(x, device="cpu", pin_memory=True)
        self.x, self.device, self.before = x.detach(), x.device, before
        self.done = copied(self.host, x, x.device)

    def take(self) -> Tensor:
        """Returns the tensor on the GPU, which is not held any longer."""
        torch.cuda.current_stream(self.device).wait_event(self.done)
        x, self.x = self.x, None
        return x

    def fetch(self) -> None:
        """Begins to copy it back."""
        if self.x is None:
            self.x = torch.empty_like(self.host, device=self.device)
            self.done = copied(self.x, self.host, self.device)

    def tensor(self) -> Tensor:
        """Returns it on the GPU, and begins to copy the one that the backward pass asks for next."""
        self.fetch()
        if self.before is not None:
            self.before.fetch()
        return self.take()


class Offloaded(saved_tensors_hooks):
    """Within the `with` block, autograd keeps tensors of as many numbers as `like` has in pinned host memory.

    They are copied while the GPU computes: there and, one ahead of the backward pass, back. On a CPU nothing is copied.
    """

    def __init__(self, like: Tensor):
        super().__init__(self.packed, lambda kept: kept.tensor() if isinstance(kept, Held) else kept)
        self.size, self.last = like.numel(), None

    def packed(self, x: Tensor) -> Tensor | Held:
        if not x.is_cuda or x.numel() != self.size:
            return x
        if self.last is not None:
            self.last.take()
        self.last = Held(x, self.last)
        return self.last
