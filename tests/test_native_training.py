"""The project's own code for the processor in training: values and gradients against the formulas in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import document_mask
from torch import Tensor

from litpeft.methods.lora import LowRank
from litpeft.model import attention
from litpeft.model import kernels as native
from litpeft.model.attention import Documents, attend
from litpeft.model.kernels.ops import rms_norm, rotate, swiglu
from litpeft.model.loss import summed_cross_entropy
from litpeft.model.slots import Linear, project

pytestmark = pytest.mark.skipif(native.library() is None, reason="this machine has no AVX-512 BF16 or no g++")
HALF = 2**-8  # what rounding to bfloat16 may change, relative


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions of the library that a test has called."""
    names, library = [], native.library()
    for name in [name for name in vars(library) if name.startswith("_")]:
        function = getattr(library, name)
        monkeypatch.setattr(library, name, lambda *args, f=function, n=name[1:]: names.append(n) or f(*args))
    return names


def both(function: Callable[..., Tensor], truth: Callable[..., Tensor], *inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Returns the value and every gradient of a function, each beside that of the truth in float64."""
    out = []
    dy = None
    for formula, dtype in ((function, None), (truth, torch.float64)):
        leaves = [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in inputs]
        y = formula(*leaves)
        dy = torch.randn(y.shape).to(y.dtype) if dy is None else dy.to(y.dtype)
        out.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    return list(zip(*out, strict=True))


def near(pairs: list[tuple[Tensor, Tensor]], limit: float = 2 * HALF) -> bool:
    assert all(got.isfinite().all() for got, _ in pairs)
    return all((got.double() - want).norm() <= limit * want.norm() for got, want in pairs)


def random(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


@pytest.mark.parametrize("window", [None, 1, 5, 70])
@pytest.mark.parametrize("lengths", [(1, 2), (40, 1, 33, 8), (200, 32, 31, 64)])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 32), (4, 4, 128), (9, 3, 64)])
def test_attention_of_documents(lengths: tuple, heads: int, kv_heads: int, size: int, window: int | None, used) -> None:
    torch.manual_seed(0)
    documents, tokens = Documents(lengths), sum(lengths)
    mask = document_mask(lengths, window)
    inputs = [2 * random(1, tokens, count, size).transpose(1, 2) for count in (heads, kv_heads, kv_heads)]
    pairs = both(
        lambda q, k, v: attend(q, k, v, mask=None, documents=documents, window=window),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
        *inputs,
    )
    assert used == ["attention", "attention"]
    if window == 1:  # the only weight is 1, whatever the scores are
        pairs = [(got, want) for got, want in pairs if want.abs().max() > 1e-9]
    assert near(pairs)


def test_attention_of_a_long_document_goes_another_way(monkeypatch, used) -> None:
    monkeypatch.setattr(attention, "LONGEST", 30)
    q = random(1, 2, 62, 32)
    got = attend(q, q, q, mask=None, documents=Documents((31, 31)), window=None)
    assert used == []
    monkeypatch.setattr(attention, "LONGEST", 31)
    want = attend(q, q, q, mask=None, documents=Documents((31, 31)), window=None)
    assert used == ["attention"]
    assert (got - want).norm() < 2 * HALF * want.norm()


def test_swiglu(used) -> None:
    torch.manual_seed(0)
    gate, up = 4 * random(3, 5, 64), random(3, 5, 64)
    gate[0, 0, :4] = torch.tensor([0.0, 80.0, -80.0, -3e38])  # where an exponential has no bounds
    pairs = both(swiglu, lambda gate, up: F.silu(gate) * up, gate, up)
    assert used == ["swiglu", "swiglu_backward"]
    assert near(pairs)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("shape", [(1, 32), (37, 64), (2, 3, 96)])
def test_norm(shape: tuple[int, ...], trains: bool, used) -> None:
    torch.manual_seed(0)
    x, weight = 3 + random(*shape), torch.randn(shape[-1])
    given = (x, weight) if trains else (x,)

    def norm(x: Tensor, w: Tensor = weight) -> Tensor:
        return rms_norm(x, w, 1e-5)

    def truth(x: Tensor, w: Tensor = weight) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.double()

    pairs = both(norm, truth, *given)
    assert used == ["norm", "norm_backward"]
    assert near(pairs)
    assert not trains or pairs[2][0].dtype == torch.float32


@pytest.mark.parametrize("rotary_dim", [32, 64])
def test_rotation(rotary_dim: int, used) -> None:
    torch.manual_seed(0)
    x, angle = random(1, 11, 3, 64).transpose(1, 2), torch.rand(1, 1, 11, rotary_dim // 2) * 6
    cos, sin = torch.cat((angle.cos(),) * 2, -1).bfloat16(), torch.cat((-angle.sin(), angle.sin()), -1).bfloat16()

    def truth(x: Tensor) -> Tensor:
        left, right, rest = x.split((rotary_dim // 2, rotary_dim // 2, 64 - rotary_dim), -1)
        c, s = cos.double()[..., : rotary_dim // 2], sin.double()[..., rotary_dim // 2 :]
        return torch.cat((left * c - right * s, right * c + left * s, rest), -1)

    pairs = both(lambda x: rotate(x, cos, sin), truth, x)
    assert used == ["rotate", "rotate"]
    assert near(pairs)


@pytest.mark.parametrize("count", [1, 300])
def test_loss_and_its_gradient(count: int, used) -> None:
    torch.manual_seed(0)
    head, x, targets = (
        Linear(48, 96).bfloat16().requires_grad_(False),
        3 * random(count, 48),
        torch.randint(96, (count,)),
    )
    pairs = both(
        lambda x: summed_cross_entropy(head, x, targets),
        lambda x: F.cross_entropy((x @ head.weight.t().double()).bfloat16().double(), targets, reduction="sum"),
        x,
    )
    assert used == ["cross_entropy"] * (2 if count > 256 else 1)
    assert (pairs[0][0] - pairs[0][1]).abs() < 1e-5 * pairs[0][1]
    assert near(pairs, 2 * HALF)


def test_a_number_that_is_none_is_not_lost() -> None:
    nan = torch.full((2, 32), torch.nan).bfloat16()
    library = native.library()
    assert library.swiglu(nan, nan).isnan().all()
    assert library.norm(nan, torch.ones(32), 1e-5)[0].isnan().all()
    assert library.cross_entropy(nan, torch.tensor([0, 1])).isnan().all()
    assert (
        library.attention(nan[:, None], nan[:, None], nan[:, None], torch.tensor([0, 1]).int(), None)[0].isnan().all()
    )


def test_tensors_that_it_cannot_take_go_another_way(used) -> None:
    for x in (torch.randn(3, 64), random(3, 63), torch.randn(3, 64, dtype=torch.float64)):
        swiglu(x, x)
        rms_norm(x.requires_grad_(), torch.ones(x.size(-1)), 1e-5)
    assert used == []
    compiled = torch.compile(lambda x: swiglu(x, x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3, 64).bfloat16()), F.silu(torch.ones(3, 64).bfloat16()))
    assert used == []


@pytest.mark.parametrize("frozen", ["", "A", "B", "x"])
@pytest.mark.parametrize("tokens", [1, 7, 64, 203])
@pytest.mark.parametrize("ranks", [(8,), (2, 64), (6, 16, 8)])
def test_low_rank_updates(ranks: tuple[int, ...], tokens: int, frozen: str, used) -> None:
    torch.manual_seed(0)
    layers, deltas = [], [LowRank(96, 32 * (2 + i), rank, 0.5, 0.0) for i, rank in enumerate(ranks)]
    for delta in deltas:
        layers.append(Linear(96, len(delta.B)).bfloat16().requires_grad_(False))
        layers[-1].slot.add("lora", delta)
        torch.nn.init.normal_(delta.A), torch.nn.init.normal_(delta.B)
        delta.A.requires_grad_(frozen != "A"), delta.B.requires_grad_(frozen != "B")
    x = random(1, tokens, 96).requires_grad_(frozen != "x")
    ys = project(x, None, *layers)
    names = [(kind, i) for kind in ("A", "B") if kind != frozen for i in range(len(ranks))]
    leaves = [getattr(deltas[i], kind) for kind, i in names] + ([x] if frozen != "x" else [])
    dys = [random(*y.shape) for y in ys]
    if tokens == 64:  # as they come from a product with a transposed matrix
        dys = [dy.transpose(1, 2).contiguous().transpose(1, 2) for dy in dys]
    got = torch.autograd.grad(ys, leaves, dys)
    assert used == ["low_rank", "low_rank"]
    wide = {
        (kind, i): getattr(d, kind).detach().double().requires_grad_() for i, d in enumerate(deltas) for kind in "AB"
    }
    x64 = x.detach().double().requires_grad_()
    weights = [layer.weight.double() + 0.5 * wide["B", i] @ wide["A", i] for i, layer in enumerate(layers)]
    want = [x64 @ weight.t() for weight in weights]
    assert near(list(zip(ys, want, strict=True)))
    leaves = [wide[name] for name in names] + ([x64] if frozen != "x" else [])
    grads = torch.autograd.grad(want, leaves, [dy.double() for dy in dys])
    assert all(g.dtype == (torch.bfloat16 if g.shape == x.shape else torch.float32) for g in got)
    assert near(list(zip(got, grads, strict=True)), 3 * HALF)


@pytest.mark.parametrize("rank", [3, 66])
def test_an_odd_or_a_thick_update_goes_another_way(rank: int, used) -> None:
    layer = Linear(64, 64).bfloat16()
    layer.slot.add("lora", LowRank(64, 64, rank, 1.0, 0.0))
    layer.slot.lora.reset_parameters()
    layer(random(5, 64)).sum().backward()
    assert used == []
    assert layer.slot.lora.B.grad.isfinite().all()
