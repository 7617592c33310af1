"""Tensors of safetensors files on a GPU: read by several threads, ahead of their use.

A mapped file goes to a GPU page by page, through one thread. Here threads read the files into pinned buffers, which the
GPU copies meanwhile. What is then checked, cast or packed is on the GPU.
"""

import os
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue

import torch
from torch import Tensor

from litpeft.core.errors import ModelError
from litpeft.core.safetensors import CODES, DTYPES, Weights

THREADS = 8
CHUNK = 1 << 23  # bytes that a thread reads at a time
AHEAD = 1 << 29  # bytes on the device that are read before they are asked for


class OnDevice(Weights):
    """A folder's tensors: those that `uses` names, once for each time that they will be read, come on a device.

    They should be read in the order in which they are named first; each is let go after its last reading. All others
    are read as in `weights`. A context manager: threads and files are closed at its end.
    """

    def __init__(self, weights: Weights, uses: Iterable[str], device: torch.device):
        vars(self).update(vars(weights))
        self.device, self.gpu, self.left = device, device.type == "cuda", Counter(iter(uses))
        self.waiting, self.bytes_ahead = deque(self.left), 0
        self.begun: dict[str, tuple[Tensor, list[Future]]] = {}  # with the parts of which nobody has waited for
        self.handles = {file: os.open(self.folder / file, os.O_RDONLY) for file in self.headers}
        threads = min(THREADS, os.cpu_count() or 1)
        self.pool, self.stream = ThreadPoolExecutor(threads), torch.cuda.Stream(device) if self.gpu else None
        self.buffers: SimpleQueue[tuple[Tensor, torch.cuda.Event | None]] = SimpleQueue()  # each with its last copy
        for _ in range(2 * threads):
            self.buffers.put((torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self.gpu), None))

    def __enter__(self) -> "OnDevice":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        if self.gpu:
            self.stream.synchronize()  # after an error too: nobody else may get the memory that is copied to
        for handle in self.handles.values():
            os.close(handle)

    def read(self, name: str) -> Tensor:
        """Returns a tensor, which what is queued on the current stream from now on finds complete."""
        if not self.left[name]:
            return super().read(name)
        while self.waiting and (name not in self.begun or self.bytes_ahead < AHEAD):
            self._begin(self.waiting.popleft())
        tensor, parts = self.begun[name]
        for part in parts:
            copied = part.result()
            if copied is not None:
                torch.cuda.current_stream(self.device).wait_event(copied)
        self.bytes_ahead -= tensor.nbytes if parts else 0
        self.begun[name] = tensor, []
        self.left[name] -= 1
        if not self.left[name]:
            del self.begun[name]
        return tensor

    def _begin(self, name: str) -> None:
        """Allocates a tensor and has the threads read its parts."""
        file = self.file_of[name]
        first, last = self.headers[file][name]["data_offsets"]
        tensor = torch.empty(self.shape(name), dtype=(DTYPES | CODES)[self.dtype(name)], device=self.device)
        # its memory may have been another tensor's, with which a kernel in the queue still computes
        free = torch.cuda.current_stream(self.device).record_event() if self.gpu else None
        target, starts = tensor.view(-1).view(torch.uint8), range(0, last - first, CHUNK)
        parts = [self.pool.submit(self._copy, file, first + at, target[at : at + CHUNK], free) for at in starts]
        self.begun[name] = tensor, parts
        self.bytes_ahead += tensor.nbytes

    def _copy(self, file: str, start: int, target: Tensor, free: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """Reads a file's bytes from `start` on into `target` once that is `free`; returns when they will be there."""
        buffer, copied = self.buffers.get()
        try:
            if copied is not None:
                copied.synchronize()
            self._fill(file, start, buffer[: len(target)])
            if not self.gpu:
                target.copy_(buffer[: len(target)])
                return None
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(free)
                target.copy_(buffer[: len(target)], non_blocking=True)
                copied = torch.cuda.Event(blocking=True)
                copied.record()
            return copied
        finally:
            self.buffers.put((buffer, copied))

    def _fill(self, file: str, start: int, buffer: Tensor) -> None:
        view = memoryview(buffer.numpy())
        while len(view):
            count = os.preadv(self.handles[file], [view], start)
            if not count:
                what = f"not a whole safetensors file: it ended at byte {start} while it was read"
                hint = "delete it, then download or copy it again"
                raise ModelError(what, where=self.folder / file, hint=hint)
            view, start = view[count:], start + count


def on_device(weights: Weights, uses: Iterable[str], device: torch.device | str) -> AbstractContextManager[Weights]:
    """Returns `OnDevice` for a GPU; for other devices the folder's tensors as they are mapped."""
    device = torch.device(device)
    return OnDevice(weights, uses, device) if device.type == "cuda" else nullcontext(weights)
