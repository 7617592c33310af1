"""Measures what this machine can do on a model's own shapes, and prints it as JSON.

    python -m scripts.bench.roof MODEL [DEVICE DTYPE]

flops_per_second: the matrix products of one forward pass and one input gradient through all linear layers, each shape
as often as the model has it, for 2,048 tokens, and the head for 256 positions at a time. bytes_per_second: reading
512 MB. Each is the best of several tries, for it is a roof.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from scripts.bench.shapes import Shapes

TOKENS, CHUNK = 2048, 256  # of a packed micro-batch; positions of which the logits are held
TRIES = 7


def best(work: Callable[[], object], device: str) -> float:
    """Returns the shortest time of a few tries, in seconds."""
    times = []
    for _ in range(TRIES):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


@torch.no_grad()
def product_rate(shapes: Shapes, device: str, dtype: torch.dtype) -> float:
    """Returns FLOPs a second."""
    layers = [(TOKENS, i, o, shapes.layers) for i, o in shapes.linears().values()]
    flops = seconds = 0.0
    for tokens, inputs, outputs, times in [*layers, (CHUNK, shapes.width, shapes.vocab, TOKENS // CHUNK)]:
        weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
        x, grad = (torch.randn(tokens, size, dtype=dtype, device=device) for size in (inputs, outputs))
        forward, backward = partial(F.linear, x, weight), partial(torch.matmul, grad, weight)
        seconds += times * (best(forward, device) + best(backward, device))
        flops += times * 4 * tokens * inputs * outputs
    return flops / seconds


@torch.no_grad()
def read_rate(device: str) -> float:
    """Returns bytes a second."""
    block = torch.ones(128 * 1024 * 1024, dtype=torch.float32, device=device)
    return block.numel() * 4 / best(block.sum, device)


def main(model: str, device: str = "cpu", dtype: str = "bfloat16") -> None:
    rate = product_rate(Shapes.read(Path(model)), device, getattr(torch, dtype))
    facts = {"flops_per_second": rate, "bytes_per_second": read_rate(device), "threads": torch.get_num_threads()}
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
