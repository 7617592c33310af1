"""The project's own kernels for GPUs: values and gradients against the formulas in float64.

Where there is no GPU, Triton's interpreter computes them on the processor.
"""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from litpeft.model.kernels import fused  # noqa: E402
from litpeft.model.kernels import triton as kernels
from litpeft.model.kernels.ops import rotate, swiglu  # noqa: E402
from litpeft.model.loss import summed_cross_entropy  # noqa: E402
from litpeft.model.quantize.codes import (
    CODES,
    absmax_in_torch,
    dequantize_in_torch,
    dynamic_codes,
    quantize_4bit,
    quantize_absmax,
)
from litpeft.model.slots import Linear  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # what rounding may change, relative


@pytest.fixture(autouse=True)
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the steps of a block take these kernels, also on a processor."""

    def given(*tensors: Tensor) -> ModuleType | None:
        return kernels if not GPU and tensors[0].dtype in HALF else fused(*tensors)

    monkeypatch.setattr("litpeft.model.kernels.ops.fused", given)
    monkeypatch.setattr("litpeft.model.loss.fused", given)


def near(got: Tensor, want: Tensor) -> bool:
    return bool((got.double() - want).norm() <= 2 * HALF[got.dtype] * want.norm())  # Triton's interpreter rounds down


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(1, 3, 40), (1, 100, 320), (7, 1024)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=torch.float64, device=DEVICE) * 3 for _ in range(2)]
    leaves = [x.to(dtype).double().requires_grad_() for x in leaves]
    dy = torch.randn(shape, device=DEVICE).to(dtype)
    gate, up = (x.detach().to(dtype).requires_grad_() for x in leaves)
    want = F.silu(leaves[0]) * leaves[1]
    got = swiglu(gate, up)
    assert near(got, want)
    gradients = torch.autograd.grad(got, (gate, up), dy)
    for gradient, truth in zip(gradients, torch.autograd.grad(want, leaves, dy.double()), strict=True):
        assert near(gradient, truth)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("heads", "tokens", "size", "rotary_dim"), [(9, 5, 64, 64), (3, 40, 48, 48), (32, 7, 128, 32)])
def test_rotate(heads: int, tokens: int, size: int, rotary_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    angle = torch.randn(1, 1, tokens, rotary_dim // 2, device=DEVICE) * 100
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    rope = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    x = torch.randn(1, tokens, heads, size, device=DEVICE).to(dtype).transpose(1, 2).requires_grad_()
    dy = torch.randn(1, heads, tokens, size, device=DEVICE).to(dtype)
    double = x.detach().double().requires_grad_()
    turning, still = double[..., :rotary_dim], double[..., rotary_dim:]
    first, second = turning.chunk(2, -1)
    c, s = cos.double(), sin.double()
    want = torch.cat((first * c - second * s, second * c + first * s, still), -1)
    got = rotate(x, *rope)
    assert near(got, want)
    assert near(torch.autograd.grad(got, x, dy)[0], torch.autograd.grad(want, double, dy.double())[0])


@pytest.mark.parametrize(("rows", "classes"), [(3, 90), (50, 9000)])
def test_cross_entropy(rows: int, classes: int) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(rows, classes, device=DEVICE) * 8).bfloat16()
    targets = torch.randint(0, classes, (rows,), device=DEVICE)
    targets[0] = logits[0].argmax()
    double = logits.double().requires_grad_()
    want = F.cross_entropy(double, targets, reduction="none")
    got = kernels.cross_entropy(logits, targets)
    assert (got.double() - want).abs().max() <= 1e-5 * want.max()
    assert near(logits, torch.autograd.grad(want.sum(), double)[0])  # written over by their gradients


def test_a_number_that_is_none_is_not_lost() -> None:
    nan = torch.full((2, 40), torch.nan, device=DEVICE).bfloat16()
    assert kernels.swiglu(nan, nan).isnan().all()
    nan[:, 1:] = 0
    assert kernels.cross_entropy(nan, torch.tensor([0, 1], device=DEVICE)).isnan().all()


def test_the_loss_takes_it() -> None:
    torch.manual_seed(0)
    head = Linear(32, 90).requires_grad_(False).to(DEVICE, torch.bfloat16)
    x = torch.randn(300, 32, device=DEVICE).bfloat16().requires_grad_()
    targets = torch.randint(0, 90, (300,), device=DEVICE)
    double = x.detach().double().requires_grad_()
    want = F.cross_entropy(double @ head.weight.double().T, targets, reduction="sum")
    got = summed_cross_entropy(head, x, targets)
    assert float(got) == pytest.approx(float(want), rel=1e-3)
    gradient, truth = torch.autograd.grad(got, x)[0].double(), torch.autograd.grad(want, double)[0]
    assert (gradient - truth).norm() <= 2**-6 * truth.norm()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(5, 64), (130, 96), (3, 37)])
def test_unpacking_four_bits(shape: tuple[int, int], kind: str, double: bool) -> None:
    torch.manual_seed(0)
    codes, absmax = quantize_4bit(torch.randn(shape, device=DEVICE), kind)
    packed = quantize_absmax(absmax) if double else (absmax, None, None)
    blocks = absmax_in_torch(*packed) if double else absmax
    for dtype in (torch.float32, *HALF):
        out = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        table = torch.tensor(CODES[kind], device=DEVICE)
        kernels.dequantize_4bit(codes, *packed, table, dynamic_codes(out.device), out)
        want = dequantize_in_torch(codes, blocks, list(shape), kind, torch.float32)
        assert torch.equal(out, want) if dtype == torch.float32 else near(out, want.double())
