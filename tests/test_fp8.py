"""FP8: products with inputs and gradients rounded to e4m3, as a GPU makes them.

torch multiplies e4m3 on a CPU too, so that all but the GPU's own units is compared here; Triton's interpreter computes
the kernels for GPUs.
"""

import math
from pathlib import Path

import pytest
import torch
from conftest import make_folder
from packed_layers import make
from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.core.precision import pick_precision
from litpeft.data.settings import Data
from litpeft.model.quantize import Storage
from litpeft.model.quantize.fp8 import E4M3, FP8, MULTIPLE, quantize_rows, transposed
from litpeft.train.devices import check_devices
from litpeft.train.settings import Base, Finetune

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BF16 = 2**-8


@pytest.fixture
def _units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has layers multiply in e4m3 on a CPU as well."""

    def has_product(x: Tensor, shape: tuple[int, int]) -> bool:
        return x.dtype.itemsize == 2 and shape[0] % MULTIPLE == shape[1] % MULTIPLE == 0

    monkeypatch.setattr(FP8, "has_product", staticmethod(has_product))


def rounded(x: Tensor) -> Tensor:
    """Returns x (n, d) rounded to e4m3, with a scale for each row, in float64: by the formula of its numbers."""
    x = x.double()
    scale = x.abs().amax(1, keepdim=True) / 448
    exponent = torch.floor(torch.log2((x / scale).abs())).clamp(-6, 8)  # below 2^-6 numbers are as far apart as there
    step = 2 ** (exponent - 3)
    return (x / scale / step).round() * step * scale  # to the nearest, halves to the even one


@pytest.mark.parametrize("spread", [0.02, 1.0, 1e4])
def test_numbers_are_rounded_as_the_format_says(spread: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 300) * spread * torch.logspace(-3, 0, 300)
    codes, scale = quantize_rows(x)
    gap = (codes.double() * scale - rounded(x)).abs()
    assert (gap > 1e-6 * x.abs().amax(1, keepdim=True)).float().mean() < 1e-3  # a scale in float32 may tip a half
    assert not quantize_rows(torch.zeros(3, 16))[0].float().any()


def test_the_error_on_normal_weights_is_that_of_three_bits_of_mantissa() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024)
    error = float((make("fp8", False, weight).dense() - weight).norm() / weight.norm())
    assert error == pytest.approx(math.sqrt(1 / 12 / 64 / (7 / 3)), rel=0.15)  # m in [1, 2) in steps of 1/8


@pytest.mark.usefixtures("_units")
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_the_rounded_factors(bias: bool) -> None:
    torch.manual_seed(0)
    layer = make("fp8", False, torch.randn(48, 96), torch.bfloat16, bias).to(DEVICE)
    weight = layer.unpacked(layer.packed()).double()
    exact = layer.weight.view(E4M3).double() * layer.scale.double()[:, None]
    x = torch.randn(2, 37, 96, device=DEVICE).bfloat16().requires_grad_()
    y = layer(x)
    want = rounded(x.detach().view(-1, 96)) @ exact.T + (layer.bias.double() if bias else 0)
    assert (y.view(-1, 48) - want).norm() <= BF16 * want.norm()
    dy = torch.randn_like(y)
    y.backward(dy)
    scaled = rounded(dy.view(-1, 48).double() * layer.scale.double())
    want = scaled @ layer.weight.view(E4M3).double()
    assert (x.grad.view(-1, 96) - want).norm() <= BF16 * want.norm()
    assert not bias or torch.allclose(layer.bias.grad, dy.view(-1, 48).float().sum(0), atol=0.1)
    plain = x.detach().double() @ weight.T + (layer.bias.double() if bias else 0)
    assert (y - plain).norm() <= 0.04 * plain.norm()
    with torch.inference_mode():
        assert torch.equal(layer(x), y)


@pytest.mark.usefixtures("_units")
def test_a_row_gives_the_same_bits_whatever_comes_with_it() -> None:
    torch.manual_seed(0)
    layer, x = make("fp8", False, torch.randn(64, 128), torch.bfloat16), torch.randn(9, 128).bfloat16()
    whole = layer(x)
    assert all(torch.equal(layer(x[i : i + 1])[0], whole[i]) for i in range(len(x)))


@pytest.mark.parametrize("given", [(3, 40), (2, 5000)])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_gpus_kernel_rounds_as_torch_does(given: tuple[int, int], scaled: bool) -> None:
    kernels = pytest.importorskip("litpeft.model.kernels.triton", reason="Triton is not installed")
    torch.manual_seed(0)
    x = torch.randn(given[1], given[0], device=DEVICE).T * 3  # columns are contiguous, rows are not
    x[0] = 0
    factors = torch.rand(given[1], device=DEVICE) + 0.5 if scaled else None
    codes, scale = kernels.quantize_rows(x, factors)
    want, want_scale = quantize_rows(x.cpu(), None if factors is None else factors.cpu())
    assert torch.equal(scale.cpu(), want_scale)
    got, want = codes.cpu().float(), want.float()
    differ = (got != want) & (GPU | (want != 2 * got))  # the interpreter rounds 127 to 64: it loses the carry
    assert differ.float().mean() < 1e-3  # a GPU divides with another last bit, which tips a half
    assert (got - want)[differ].abs().le(want[differ].abs() / 8 + 2**-9).all()


@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (130, 200)])
def test_the_gpus_kernel_transposes(shape: tuple[int, int]) -> None:
    kernels = pytest.importorskip("litpeft.model.kernels.triton", reason="Triton is not installed")
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    assert torch.equal(kernels.transposed(codes), codes.T)
    assert torch.equal(transposed(codes), codes.T)
    assert transposed(codes).is_contiguous()


@pytest.mark.usefixtures("_units")
def test_the_fused_block_learns_what_the_plain_block_learns(tmp_path: Path) -> None:
    fused_training = pytest.importorskip("test_fused_training", reason="Triton is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder, method = make_folder(tmp_path / "model", **sizes, head_dim=32), fused_training.METHODS["all layers"]
    plain, fused = (
        fused_training.learned(fused_training.made(folder, fused_training.HALF, fused, method, Storage("fp8")))
        for fused in (False, True)
    )
    for key, want in plain.items():
        assert (fused[key] - want).norm() <= 0.08 * want.norm(), key  # both round to e4m3, at other places


def test_a_gpu_without_such_products_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device = torch.device("cuda")
    said = r"base\.quantize: fp8 needs a GPU of compute capability 8\.9 or later, NVIDIA A100 has 8\.0"
    settings = Finetune(Base("model", quantize="fp8"), Data("rows.jsonl"), "out")
    with pytest.raises(ConfigError, match=said):
        check_devices(settings, pick_precision("bf16-true", torch.device("cpu")), device)
    assert FP8.why_not(torch.device("cpu")) is None
