"""Each product of an answering block at Llama-3.1-8B's shapes, by itself: its time, and the rate at which weights move.

A line of JSON for each, with the tile in use and with others, so that one run on a GPU tells which are best. Called by
scripts/bench_gpu.sh; without a GPU tiny shapes show that every row starts.
"""

import json
from collections.abc import Callable, Iterator

import torch
from gpu_kernels import DEVICE, GPU, random, seconds  # first, as it chooses Triton's interpreter

from litpeft.model.kernels import triton_decode as decode
from litpeft.model.quantize.codes import code_table, dynamic_codes

HALF = torch.bfloat16 if GPU else torch.float32
D, F, HEADS, KV_HEADS, HEAD, LENGTH = (4096, 14336, 32, 8, 128, 512) if GPU else (128, 192, 2, 1, 32, 64)
COPIES = 4 if GPU else 1  # of a weight, read in turn: more than the cache of a GPU holds
Tile = decode.Tile
# of one token's sums, then of several tokens' products; `outputs` are pairs in qkv and gate_up
DENSE = (
    (Tile(2, 1024, 4, 3), Tile(4, 1024, 4, 1), Tile(4, 512, 2, 1), Tile(8, 512, 4, 1), Tile(2, 2048, 4, 1)),
    (Tile(8, 256, 2, 5), Tile(16, 256, 4, 5), Tile(32, 256, 4, 5), Tile(32, 128, 4, 5), Tile(64, 128, 4, 5)),
)
CODED = (
    (Tile(1, 1024, 1, 1), Tile(2, 1024, 1, 1), Tile(4, 1024, 1, 1), Tile(2, 2048, 2, 1), Tile(2, 1024, 1, 2)),
    (Tile(16, 128, 2, 3), Tile(32, 128, 4, 3), Tile(32, 128, 2, 3), Tile(64, 128, 4, 3), Tile(32, 256, 4, 3)),
)


def weight(outputs: int, inputs: int, coded: bool) -> decode.Weight:
    if not coded:
        return decode.Weight(random(outputs, inputs, dtype=HALF))
    blocks = outputs * inputs // 64
    codes = [torch.randint(0, 256, (size,), dtype=torch.uint8, device=DEVICE) for size in (32 * blocks, blocks)]
    scale, offset = (torch.rand(size, device=DEVICE) for size in (-(-blocks // 256), 1))
    return decode.Weight(*codes, scale, offset)


def products(rows: int, coded: bool) -> Iterator[tuple[str, int, Callable[[int], object]]]:
    """Yields the name of each product, the bytes of its weights, and a call that reads the n-th copy of them."""
    x, norm, pos = random(rows, 1, D, dtype=HALF), random(D, dtype=HALF), torch.full((rows, 1), 5, device=DEVICE)
    rope = tuple(random(rows, 1, 1, HEAD, dtype=HALF) for _ in range(2))
    cache = tuple(random(rows, KV_HEADS, LENGTH, HEAD, dtype=HALF) for _ in range(2))
    tables = decode.Tables(code_table("nf4", x.device), dynamic_codes(x.device)) if coded else None
    no_bias, q, k = (None, None, None), HEADS * HEAD, KV_HEADS * HEAD
    qkv, gate_up, o, down = (
        [tuple(weight(*shape, coded) for shape in shapes) for _ in range(COPIES)]
        for shapes in (((q, D), (k, D), (k, D)), ((F, D), (F, D)), ((D, q),), ((D, F),))
    )
    y, z = random(rows, q, dtype=HALF), random(rows, F, dtype=HALF)
    calls = {
        "qkv": (qkv, lambda n: decode.queries(x, norm, 1e-5, HEADS, qkv[n], no_bias, rope, pos, cache, tables)),
        "gate_up": (gate_up, lambda n: decode.swiglu(x, norm, 1e-5, *gate_up[n], F, tables)),
        "o": (o, lambda n: decode.added(x, y, *o[n], "o", tables)),
        "down": (down, lambda n: decode.added(x, z, *down[n], "down", tables)),
    }
    for name, (copies, call) in calls.items():
        yield name, sum(t.nbytes for one in copies[0] for t in one if t is not None), call


def main() -> None:
    card = torch.cuda.get_device_name() if GPU else "no GPU, a dry run of tiny shapes"
    for coded, rows in ((True, 1), (False, 16), (True, 16), (False, 1)):
        tiles, others = (decode.CODED_TILES, CODED) if coded else (decode.TILES, DENSE)
        for name, size, call in products(rows, coded):
            kept, turn = tiles[name], 0

            def run(call: Callable[[int], object] = call) -> None:
                nonlocal turn
                turn = (turn + 1) % COPIES
                call(turn)

            mine = kept[rows > 1]
            for tile in (mine, *(other for other in others[rows > 1] if other != mine))[: None if GPU else 1]:
                if not GPU:
                    tile = tile._replace(outputs=16 if rows == 1 else 32, inputs=64)
                tiles[name] = (tile, tile)
                row = f"decode {'nf4' if coded else 'bf16'} {rows} {name} {tuple(tile)}{' *' if tile is mine else ''}"
                try:
                    took = seconds(run)
                except (RuntimeError, torch.cuda.OutOfMemoryError) as error:  # a tile that the card has no room for
                    print(json.dumps({"row": row, "failed": str(error)[:120]}), flush=True)
                    continue
                figures = {"us": round(1e6 * took, 1), "weights_tb_per_s": round(size / took / 1e12, 2)}
                print(json.dumps({"row": row, **figures, "card": card, "torch": torch.__version__}), flush=True)
            tiles[name] = kept


if __name__ == "__main__":
    main()
