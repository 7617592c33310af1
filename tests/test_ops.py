"""The hand-written backward passes against what autograd makes of the plain formulas, values and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litpeft.model import attention, loss
from litpeft.model.attention import Documents
from litpeft.model.kernels import ops
from litpeft.model.kernels.ops import product, rms_norm, rotate, scaled, swiglu
from litpeft.model.loss import summed_cross_entropy
from litpeft.model.slots import Delta, Linear

SHAPES = [(7,), (1, 7), (2, 5, 7), (1, 1, 7)]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(function, *inputs: Tensor) -> list[Tensor]:
    """Returns the value, and the gradient of a random sum of it by each input that is a floating point number."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad((y * random(*y.shape, seed=9).to(y.dtype)).sum(), leaves)]


def same(got: list[Tensor], want: list[Tensor], limit: float = 1e-12) -> bool:
    return all(
        g.dtype == w.dtype and torch.allclose(g, w, rtol=limit, atol=limit) for g, w in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("trains", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (40, 7), (2, 5, 7), (0, 7)])
def test_a_product_in_float32_equals_its_formula(shape: tuple[int, ...], trains: tuple[int, ...]) -> None:
    inputs = random(*shape), random(9, 7, seed=1), random(9, seed=2)

    def of(formula, dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(dtype) for x in inputs]

        def some(*leaves: Tensor) -> Tensor:
            all_ = dict(enumerate(given)) | dict(zip(trains, leaves, strict=True))
            return formula(*all_.values())[..., None].transpose(0, -1)  # so that its gradient comes turned round

        return gradients(some, *(given[i] for i in trains))

    want = [x.float() for x in of(lambda x, weight, bias: x @ weight.T + bias, torch.float64)]
    assert same(of(product, torch.float32), want, 1e-5)


def test_a_product_without_gradients_or_of_other_types_is_torchs() -> None:
    x, weight = random(40, 64, dtype=torch.float32), random(30, 64, dtype=torch.float32, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(product(x, weight), F.linear(x, weight))
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(product(x.to(dtype), weight.to(dtype)), F.linear(x.to(dtype), weight.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, weight).dtype == torch.bfloat16


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


@pytest.mark.parametrize("piece", [8, 1 << 18])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_equals_its_formula(shape: tuple[int, ...], piece: int, monkeypatch) -> None:
    monkeypatch.setattr(ops, "CHUNK", piece)  # one row at a time, or all
    x, weight = random(*shape), random(7, seed=1)
    assert same(gradients(lambda x, w: rms_norm(x, w, 1e-5), x, weight), gradients(plain_rms_norm, x, weight))


def test_rms_norm_of_rows_in_half_precision_is_computed_in_float32() -> None:
    x, weight = random(40, 64, dtype=torch.bfloat16), random(64, seed=1).float()
    y, dx, dweight = gradients(lambda x, w: rms_norm(x, w, 1e-5), x, weight)
    want = gradients(plain_rms_norm, x.double(), weight.double())
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert torch.equal(y, want[0].bfloat16()) or (y - want[0]).abs().max() <= 2**-8 * want[0].abs().max()
    assert (dx - want[1]).abs().max() <= 2**-8 * want[1].abs().max()
    assert (dweight - want[2]).abs().max() <= 1e-2 * want[2].abs().max()  # the random sum is rounded too


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_of_rows_that_do_not_lie_together_equals_its_formula(dtype: torch.dtype) -> None:
    x, weight = random(2, 5, 3, 8, dtype=dtype), random(8, seed=1)
    got = gradients(lambda x, w: rms_norm(x.transpose(1, 2), w, 1e-5), x, weight)  # as of heads in attention
    want = gradients(lambda x, w: plain_rms_norm(x.transpose(1, 2), w), x.double(), weight)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert all((a - b).norm() <= limit * b.norm() for a, b in zip(got, want, strict=True))


def test_swiglu_equals_its_formula() -> None:
    gate, up = random(2, 5, 7), random(2, 5, 7, seed=1)
    assert same(gradients(swiglu, gate, up), gradients(lambda g, u: g * torch.sigmoid(g) * u, gate, up))


@pytest.mark.parametrize("rotary_dim", [2, 6, 8])
def test_a_rotation_is_the_product_with_a_complex_number(rotary_dim: int) -> None:
    x, angle = random(2, 3, 5, 8), random(2, 1, 5, rotary_dim // 2, seed=1)

    def plain(x: Tensor) -> Tensor:
        half = rotary_dim // 2
        z = torch.complex(x[..., :half], x[..., half:rotary_dim]) * torch.exp(1j * angle)
        return torch.cat((z.real, z.imag, x[..., rotary_dim:]), -1)

    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    assert same(gradients(lambda x: rotate(x, cos, sin), x), gradients(plain, x))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("part", [2, 5, 192])
def test_attention_of_short_documents_equals_torchs_own(part: int, window: int | None, monkeypatch) -> None:
    monkeypatch.setattr(attention, "QUERY_CHUNK", part)
    q, k, v = random(2, 6, 7, 4), random(2, 3, 7, 4, seed=1), random(2, 3, 7, 4, seed=2)
    bias = Documents((7,)).bias(7, window, torch.float64)
    got = gradients(lambda q, k, v: attention._products(q, k, v, bias), q, k, v)
    want = gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True), q, k, v)
    assert same(got, want)


class Doubled(Delta):
    """A slot that is filled: such a head's loss goes the way of any module."""

    def forward(self, y: Tensor, *context: object) -> Tensor:
        return 2 * y


@pytest.mark.parametrize("piece", [8, 60, 1 << 21])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_summed_loss_equals_cross_entropy_for_every_head(bias: bool, filled: bool, piece: int, monkeypatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 5)
    monkeypatch.setattr(loss, "SOFTMAX_CHUNK", piece)
    head = Linear(6, 11, bias).double()
    if filled:
        head.slot.add("doubled", Doubled())
    x, targets = random(13, 6), torch.randint(0, 11, (13,), generator=torch.Generator().manual_seed(2))

    def of(function):
        rows = x.clone().requires_grad_()
        total = function(rows)
        return [total.detach(), *torch.autograd.grad(3 * total, [rows, *head.parameters()])]

    want = of(
        lambda x: F.cross_entropy(F.linear(x, head.weight, head.bias) * (2 if filled else 1), targets, reduction="sum")
    )
    assert same(of(lambda x: summed_cross_entropy(head, x, targets)), want)
    with torch.no_grad():
        assert same([summed_cross_entropy(head, x, targets)], want[:1])


@pytest.mark.parametrize("trained", [False, True])
def test_the_summed_loss_in_bfloat16_is_as_near_as_autograds(trained: bool) -> None:
    head = Linear(64, 999)
    head.weight.data = random(999, 64, seed=1).to(torch.float32 if trained else torch.bfloat16)
    head.requires_grad_(trained)
    x, targets = random(600, 64, dtype=torch.bfloat16), torch.arange(600)
    exact = F.linear(x.double(), head.weight.double().bfloat16().double())

    def off(y: Tensor, want: Tensor) -> float:
        return float((y.detach() - want).norm() / want.norm())

    rows, leaves = x.clone().requires_grad_(), ([head.weight] if trained else [])
    total = summed_cross_entropy(head, rows, targets)
    got = torch.autograd.grad(total, [rows, *leaves])
    slope = exact.softmax(-1) - F.one_hot(targets, 999)
    want = [slope @ head.weight.double(), slope.T @ x.double()]
    assert total.dtype == torch.float32
    assert off(total, F.cross_entropy(exact, targets, reduction="sum")) < 1e-3
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32][: len(got)]
    assert all(off(g, w) < 1e-2 for g, w in zip(got, want, strict=False))


@pytest.mark.parametrize("biased", [False, True])
def test_a_product_with_a_narrower_weight_is_that_with_its_wider_copy(biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 3000), torch.randn(800, 3000).bfloat16()  # cast in three parts
    bias = torch.randn(800) if biased else None
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.no_grad():
        got = ops.product(x, weight, bias)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_factor_and_a_shift_learn_as_by_their_formula(shifted: bool, dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    y, weight = (torch.randn(3, 700, 500).to(dtype).requires_grad_(first) for first in (True, False))
    wide = torch.promote_types(dtype, torch.float32)
    gain, shift = (torch.randn(500, dtype=wide).mul_(0.3).add_(first).requires_grad_() for first in (1, 0))
    given = [y, gain, *([shift] if shifted else [])]
    twins = [tensor.detach().double().requires_grad_() for tensor in given]
    got, want = scaled(y, gain, shift if shifted else None), twins[0] * twins[1] + (twins[2] if shifted else 0)
    grads = torch.autograd.grad(got, given, weight), torch.autograd.grad(want, twins, weight.double())
    assert got.dtype == dtype
    for ours, theirs in zip([got, *grads[0]], [want, *grads[1]], strict=True):
        assert (ours - theirs).norm() <= limit * theirs.norm()
