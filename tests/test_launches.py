"""What a fused block of training costs a GPU beside its products: kernels that are launched, and memory that is kept.

Counted on its twin on the processor, where Triton's interpreter computes the kernels and torch's operators are watched.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the twin on the processor")

from litpeft.data.batches import collate  # noqa: E402
from litpeft.data.rows import Row  # noqa: E402
from litpeft.methods.lora import LoRA  # noqa: E402
from litpeft.model import attention  # noqa: E402
from litpeft.model.attention import Documents  # noqa: E402
from litpeft.model.config import ModelConfig  # noqa: E402
from litpeft.model.context import Context  # noqa: E402
from litpeft.model.delta import attach, trainable  # noqa: E402
from litpeft.model.gpt import GPT, Block  # noqa: E402
from litpeft.model.kernels import triton as kernels  # noqa: E402
from litpeft.model.kernels import triton_block  # noqa: E402, F401 (its kernels are made before operators are watched)
from litpeft.train.fused_block import FusedStep, lay_together, run  # noqa: E402
from litpeft.train.recorded_pass import RecordedPass, Size  # noqa: E402

HALF = torch.float16  # Triton's interpreter takes the bits of a bfloat16 in tl.dot for a whole number
D, HEADS, HEAD, WIDTH, RANK, TOKENS = 64, 4, 16, 96, 4, 16
CONFIG = ModelConfig(320, D, 1, HEADS, HEADS, HEAD, d_ff=WIDTH, max_positions=64)

# Of one block with LoRA on its seven layers. Products with frozen weights, of the layers that read the same input in
# one, two of the four added to the residual stream; with the A of four inputs; with the B of v. Then our kernels, and
# what is small: scale times B, and one cast of all A and B of all blocks.
FORWARD = Counter(mm=2 + 4, addmm_=2 + 1, _rms_norm=2, _rotate=2, _swiglu=1, _add=2, attention=1)
FORWARD += Counter(mul=7, _foreach_copy_=1)
# Products for the gradient of down's input, of A x and B in seven layers, and of A of four inputs; the gradients of the
# other three inputs begin with that of A x, to which a product is added. That of v is copied beside those of q and k.
BACKWARD = Counter(mm=1 + 7 + 7 + 4 + 3, addmm_=3, _rms_norm_backward=2, _rotate=2, _swiglu_backward=1, attention=1)
BACKWARD += Counter(mul=7 + 4, cat=2, copy_=1, clone=1, _to_copy=2, _foreach_copy_=1, _transpose=2)

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "bincount", "item"}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "_unsafe_view"}


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given, by name; raises at what would make the processor wait for it."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, returned = func.overloadpacket.__name__, func._schema.returns
        indices = args[1] if name.startswith(("index", "_index")) and isinstance(args[1], list) else []
        assert name not in WAITS, f"{func} waits for the GPU"
        assert not any(x is not None and x.dtype == torch.bool for x in indices), f"{func} by a mask waits for the GPU"
        a_view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        if not (a_view or name in FREE):
            self.counts["attention" if "scaled_dot_product" in name else name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts launches within the block; a kernel of Triton is one, whatever its interpreter does."""
    mode, launch = Launches(), interpreter.GridExecutor.__call__

    def watched(self, *args, **kwargs):
        mode.counts[self.fn.__name__] += 1
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    with monkeypatch.context() as patch, mode:
        patch.setattr(interpreter.GridExecutor, "__call__", watched)
        yield mode.counts


class Anywhere(FusedStep):
    def __call__(self, block: Block, x: Tensor, ctx: Context) -> Tensor:
        return run(block, x, ctx, self.groups(block, x.dtype, ctx.shared))


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG).to(HALF)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.dtype, model.fused = HALF, Anywhere(model)
    attach(model, LoRA(rank=RANK))
    for parameter in trainable(model).values():
        parameter.data = 0.1 * torch.randn(parameter.shape)
    lay_together(model)
    return model.train()


def test_a_block_launches_no_more_kernels_than_these(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = Context(torch.arange(TOKENS)[None], Documents((TOKENS,)))
    x = torch.randn(1, TOKENS, D, dtype=HALF, requires_grad=True)
    model.complete(ctx, model.kinds[0], x)
    with counted(monkeypatch) as forward:
        y = model.fused(model.blocks[0], x, ctx)
    dy = torch.ones_like(y)
    with counted(monkeypatch) as backward:
        y.backward(dy)
    assert dict(forward - FORWARD) == {}
    assert dict(backward - BACKWARD) == {}


def test_a_block_keeps_these_numbers_of_each_token(model: GPT) -> None:
    ctx = Context(torch.arange(TOKENS)[None], Documents((TOKENS,)))
    x = torch.randn(1, TOKENS, D, dtype=HALF, requires_grad=True)
    model.complete(ctx, model.kinds[0], x)
    shared = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *ctx.rope)}
    held: dict[int, int] = {}

    def note(kept: Tensor) -> Tensor:
        if kept.size(0) == TOKENS or kept.dim() > 2:  # no matrix of LoRA
            held[kept.untyped_storage().data_ptr()] = kept.untyped_storage().nbytes()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        y = model.fused(model.blocks[0], x, ctx)
    y.sum().backward()
    halves = 2 * D + 4 * HEADS * HEAD + 2 * WIDTH + 7 * RANK  # x and the sum after attention; q, k, v, y; gate, up; A x
    singles = 2 + HEADS  # of both norms; the logarithm of attention's sums
    assert sum(size for place, size in held.items() if place not in shared) == TOKENS * (2 * halves + 4 * singles)


def by_starts(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Attention of documents that are known by where they begin only, as the GPU's kernel knows them."""
    place = torch.arange(q.size(2))
    number = torch.bucketize(place, documents.starts(q.device)[1:].long(), right=True)
    mask = (number[:, None] == number) & (place[:, None] >= place)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def test_a_recorded_pass_waits_for_no_number_and_launches_the_same_for_every_batch(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_by_length", by_starts)
    monkeypatch.setattr("litpeft.model.loss.fused", lambda *tensors: kernels)
    recorded, launched = RecordedPass(model, Size(24, 16, 8)), []
    for parameter in trainable(model).values():
        parameter.grad = torch.zeros_like(parameter)
    for lengths in ((10, 9), (3, 8, 5, 1, 6)):
        trained = [[False, *(at % 3 > 0 for at in range(1, n))] for n in lengths]
        rows = [Row(list(range(2, 2 + len(one))), one, 1, "a row", []) for one in trained]
        recorded.fill(collate(rows), 1.0)
        with counted(monkeypatch) as counts:
            recorded.step()
        launched.append(counts)
    assert launched[0] == launched[1]
    assert torch.isfinite(recorded.loss)
