"""Each Triton kernel at the shapes of Llama-3.1-8B and 8,192 tokens: its time, and the rate at which bytes move.

A line of JSON for each, and for other tiles of a kernel or other chunks of the loss, so that one run on a GPU tells
which are best. Called by scripts/bench_gpu.sh; without a GPU tiny shapes show that every row starts.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from litpeft.model import loss  # noqa: E402
from litpeft.model.kernels import triton as kernels  # noqa: E402
from litpeft.model.kernels import triton_block as block  # noqa: E402
from litpeft.model.slots import Linear  # noqa: E402

DEVICE, HALF = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float16)  # the interpreter has no bfloat16 products
N, D, F, V, RANK = (8192, 4096, 14336, 128256, 8) if GPU else (32, 64, 96, 512, 8)
TILES = ((32, 64), (32, 128), (64, 64), (64, 128), (16, 256)) if GPU else ((32, 64),)
SUMS = ((4, 512, 2), (4, 1024, 4), (4, 256, 1), (2, 512, 2)) if GPU else ((4, 64, 2),)  # and warps
CHUNKS = (256, 512, 1024, 2048) if GPU else (16,)


def random(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def seconds(run: Callable[[], object]) -> float:
    """Returns the median of ten calls after two."""
    if not GPU:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    times = []
    for _ in range(12):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / 1000)
    return statistics.median(times[2:])


def cases() -> Iterator[tuple[str, float, Callable[[], object]]]:
    """Yields the name of each row, the bytes that must be read and written, and what is measured."""
    x, y, weight, scale = random(N, D), random(N, D), random(D), torch.rand(N, device=DEVICE)
    large, thin = 2 * N * F, 2 * N * D  # bytes of a tensor in half precision
    yield "copy", 2 * thin, lambda: y.copy_(x)
    yield "rms_norm", 2 * thin, lambda: block.rms_norm(x, weight, 1e-5)
    yield "rms_norm_backward", 4 * thin, lambda: block.rms_norm_backward(y, x, weight, scale, x)
    t, b, bf, af = random(N, RANK), random(D, RANK), random(F, RANK), random(RANK, F)
    cos, sin = (random(1, 1, N, 128 if GPU else 16) for _ in range(2))
    yield "rotate", 2 * thin, lambda: block.rotate(y, (t, b), cos, sin)
    gate, up, dy = (random(N, F) for _ in range(3))
    both = (t, bf), (t, bf)
    few, block.FEW = block.FEW, 0  # first without sums for small ranks
    for rows, columns in TILES:
        block.ROWS, block.COLUMNS = rows, columns
        tile = f"{rows} x {columns}"
        yield f"updated {tile}", 2 * thin, lambda: block.updated(x, t, b)
        yield f"swiglu {tile}", 3 * large, lambda: block.swiglu(gate, up, both)
        yield f"swiglu_backward {tile}", 6 * large, lambda: block.swiglu_backward(dy, gate, up, both, (t, af))
    block.ROWS, block.COLUMNS = TILES[0]
    block.FEW = few
    for tile in SUMS:
        block.FEW_TILE = tile
        yield f"swiglu_backward by sums {tile}", 6 * large, lambda: block.swiglu_backward(dy, gate, up, both, (t, af))
    yield "A x", thin, lambda: x @ b
    yield "dy B and dy^T t", large, lambda: (dy @ bf, dy.T @ t)  # each reads dy: twice the bytes of one pass
    codes, absmax = torch.zeros(F * D // 2, dtype=torch.uint8, device=DEVICE), torch.rand(F * D // 64, device=DEVICE)
    table, dense = torch.rand(16, device=DEVICE), torch.empty(F, D, dtype=HALF, device=DEVICE)
    given = (codes, absmax, None, None, table, table, dense)
    for size in (512, 1024, 2048):
        kernels.SIZE = size
        yield f"dequantize_4bit {size}", 2.56 * F * D, lambda: kernels.dequantize_4bit(*given)
    kernels.SIZE = 1024
    head, targets = (
        Linear(D, V).to(DEVICE, HALF).requires_grad_(False),
        torch.zeros(N, dtype=torch.int64, device=DEVICE),
    )
    hidden = x.float() if not GPU else x.clone().requires_grad_()
    head = head if GPU else head.float()
    for chunk in CHUNKS:
        loss.CHUNK = loss.GPU_CHUNK = chunk
        yield (
            f"loss in chunks of {chunk}",
            4 * V * D * N / chunk,
            lambda: loss.summed_cross_entropy(head, hidden, targets),
        )


def main() -> None:
    card = torch.cuda.get_device_name() if GPU else "no GPU, a dry run of tiny shapes"
    for name, size, run in cases():
        try:
            took = seconds(run)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:  # a tile that the card has no room for
            print(json.dumps({"row": f"kernel {name}", "failed": str(error)[:120]}), flush=True)
            continue
        figures = {"ms": round(1000 * took, 3), "tb_per_s": round(size / took / 1e12, 2)}
        print(json.dumps({"row": f"kernel {name}", **figures, "card": card, "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
