"""Weights in few bits: the bytes and the numbers of bitsandbytes."""

import statistics

import pytest
import torch
from packed_layers import KEYS, make

from litpeft.core.errors import ConfigError, ModelError
from litpeft.model.affine import Affine
from litpeft.model.quantize import DOUBLE, STORAGES, storage_class
from litpeft.model.quantize import codes as kernels
from litpeft.model.quantize.bits import pack_bits, unpack_bits
from litpeft.model.slots import Linear

try:
    bnb = kernels.bitsandbytes()
except ImportError as error:
    bnb, reason = None, f"bitsandbytes cannot be imported: {error}"
against_bitsandbytes = pytest.mark.skipif(bnb is None, reason="" if bnb else reason)

SHAPES = [(64, 64), (576, 192), (33, 62), (129, 64), (7, 30), (600, 1000)]  # also blocks that cross rows, or are short
ODD = [(3, 7), (9, 65), (1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(shape: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    holes = torch.randn(shape, dtype=dtype)
    holes.view(-1)[: holes.numel() // 2 + 5] = 0
    plain = [holes, torch.zeros(shape, dtype=dtype), torch.full(shape, 0.3, dtype=dtype)]
    scales = [1, 0.02, 1e-30, 1e-39, 1e4] + ([1e33] if dtype != torch.float16 else [])
    return plain + [(torch.randn(shape) * scale).to(dtype) for scale in scales]


@against_bitsandbytes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bit_bytes_are_those_of_bitsandbytes(name: str, double: bool, dtype: torch.dtype) -> None:
    for shape in SHAPES + ODD:
        for weight in weights(shape, dtype):
            codes, state = bnb.functional.quantize_4bit(
                weight, blocksize=64, compress_statistics=double, quant_type=name
            )
            want = {"weight": codes.flatten(), "absmax": state.absmax}
            if double:
                want |= {"absmax_scale": state.state2.absmax, "absmax_offset": state.offset[None]}
            got = make(name, double, weight).packed()
            assert list(got) == list(want)
            assert all(torch.equal(got[key], want[key]) for key in want), (shape, weight.abs().max())


@pytest.mark.parametrize(("name", "double"), KEYS)
def test_packing_piece_by_piece_gives_the_same_bytes(name: str, double: bool, monkeypatch) -> None:
    weight = torch.randn(129, 62)
    want = make(name, double, weight).packed()
    monkeypatch.setattr(kernels, "CHUNK", 256)
    got = make(name, double, weight).packed()
    assert all(torch.equal(got[key], want[key]) for key in want)


@against_bitsandbytes
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_value_between_two_codes_gets_the_code_that_bitsandbytes_gives_it(name: str) -> None:
    code = torch.tensor(kernels.CODES[name]).sort().values
    middle = (code[1:] + code[:-1]) / 2
    near = [middle]
    for _ in range(3):
        near = [torch.nextafter(near[0], torch.tensor(-2.0)), *near, torch.nextafter(near[-1], torch.tensor(2.0))]
    for scale in (1.0, 0.3, 7e-3, 3.14159):
        weight = torch.ones(len(near), 64)
        weight[:, :15] = torch.stack(near)
        want, _ = bnb.functional.quantize_4bit(weight * scale, blocksize=64, quant_type=name)
        assert torch.equal(kernels.quantize_4bit(weight * scale, name)[0], want.flatten())


@against_bitsandbytes
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_bytes_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    for shape in SHAPES + ODD:
        for weight in weights(shape, dtype):
            if not (weight.abs().amax(1) == 0).any() and weight.abs().max() > 1e-35:  # theirs divides by it
                codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight)
                layer = make("int8", False, weight)
                assert torch.equal(layer.weight, codes)
                assert torch.equal(layer.absmax, absmax)
                assert torch.equal(layer.dense(), torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, absmax))
    assert not make("int8", False, torch.zeros(3, 8)).dense().any()


@against_bitsandbytes
@pytest.mark.parametrize(("name", "double"), [key for key in KEYS if key[0] in DOUBLE])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_torch_unpacks_to_the_same_bits_as_the_kernels(
    name: str, double: bool, dtype: torch.dtype, monkeypatch
) -> None:
    for shape in SHAPES + ODD:
        layer = make(name, double, torch.randn(shape), dtype)
        assert kernels.has_kernels("cpu")
        by_kernel = layer.dense()
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "has_kernels", lambda device: False)
            assert torch.equal(layer.dense(), by_kernel)


@against_bitsandbytes
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_a_weight_comes_back_as_bitsandbytes_gives_it_back(name: str, double: bool) -> None:
    for dtype in DTYPES:
        weight = torch.randn(100, 130).to(dtype)
        codes, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=name)
        want = bnb.functional.dequantize_4bit(codes, state)
        assert torch.equal(make(name, double, weight, dtype).dense(), want)


@against_bitsandbytes
def test_the_codes_of_the_constants_are_the_dynamic_map_of_bitsandbytes() -> None:
    assert torch.equal(kernels.dynamic_codes(torch.device("cpu")), bnb.functional.create_dynamic_map())


@pytest.mark.parametrize(("name", "half"), [("nf4", 8), ("nf3", 4), ("nf2", 2)])
def test_the_codes_of_normal_floats_are_the_quantiles_of_a_normal_distribution(name: str, half: int) -> None:
    inverse, edge = statistics.NormalDist().inv_cdf, 0.9677083  # 1 - (1 / 30 + 1 / 32) / 2, as they rounded it
    above = [inverse(0.5 + (edge - 0.5) * i / half) for i in range(1, half + 1)]
    below = [inverse(1 - edge + (edge - 0.5) * i / (half - 1)) for i in range(half - 1)]
    want = torch.tensor([*below, 0.0, *above], dtype=torch.float64) / above[-1]
    assert (torch.tensor(kernels.CODES[name], dtype=torch.float64) - want).abs().max() < 1.1e-7


@pytest.mark.parametrize(
    ("name", "double", "error"),
    [
        *(("nf4", False, 0.0920), ("nf4", True, 0.0920), ("fp4", False, 0.1219)),
        *(("nf3", False, 0.2015), ("nf2", False, 0.5627), ("nf2", True, 0.5627)),
        *(("int4", False, 0.0783), ("int3", False, 0.1677), ("int2", False, 0.3931)),
    ],
)
def test_the_error_on_normal_weights_is_the_known_one(name: str, double: bool, error: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(2048, 2048)  # reference figures: RMSE / sigma on 4.2 M values
    assert float((make(name, double, weight).dense() - weight).square().mean().sqrt()) == pytest.approx(error, rel=0.01)


def test_packing_what_was_unpacked_gives_the_same_bytes() -> None:
    layer = make("nf4", False, torch.randn(66, 100))
    again = layer.pack(layer.dense())
    assert all(torch.equal(again[key], tensor) for key, tensor in layer.packed().items())


@pytest.mark.parametrize("name", STORAGES)
def test_packing_what_was_unpacked_changes_no_weight(name: str) -> None:  # fp4 has two zeros, int8 divides by 127
    weight = make(name, False, torch.randn(66, 100)).dense()
    assert torch.allclose(make(name, False, weight).dense(), weight, rtol=3e-7, atol=0)


@pytest.mark.parametrize(("double", "bits"), [(False, 0.5), (True, 8 / 64 + 32 / (64 * 256))])
def test_the_constants_cost_as_much_as_the_paper_says(double: bool, bits: float) -> None:
    with torch.device("meta"):
        layer = Linear(4096, 4096)
    layer.__class__ = storage_class("nf4")
    layer.convert(torch.bfloat16, double)
    size = {key: tensor.numel() * tensor.element_size() * 8 for key, tensor in layer.packed().items()}
    assert size.pop("weight") == 4 * 4096 * 4096
    assert size.pop("absmax_offset", 0) in (0, 32)
    assert sum(size.values()) / 4096**2 == bits
    assert bits in (0.5, 0.126953125)


def test_an_unknown_storage_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match='is not one of .*did you mean "nf4"'):
        storage_class("nf44")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(8,), (5, 64), (2, 3, 72)])
def test_codes_of_few_bits_come_back_from_their_bytes(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    assert torch.equal(unpack_bits(packed, bits), codes)
    assert pack_bits(torch.full(shape, (1 << bits) - 1, dtype=torch.uint8), bits).eq(255).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(6, 64), (5, 100)])
def test_groups_of_integers_are_those_of_the_formula(bits: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, top = torch.randn(shape), 2**bits - 1
    layer, dense = make(f"int{bits}", False, weight), torch.empty(shape)
    for row in range(shape[0]):
        for start in range(0, shape[1], 32):
            part = weight[row, start : start + 32]
            shift = part.min().half().float()
            scale = ((part.max() - shift) / top).half().float()
            dense[row, start : start + 32] = ((part - shift) / scale).round().clamp(0, top) * scale + shift
    assert torch.equal(layer.dense(), dense)
    half_step = 0.5 * layer.scale.float().max() + 2**-10 * weight.abs().max()
    assert (layer.dense() - weight).abs().max() <= half_step
    size = sum(tensor.nbytes for tensor in layer.packed().values())
    assert size == shape[0] * -(-shape[1] // 32) * (32 * bits // 8 + 4)  # float16 scale and shift for each group


def test_groups_without_a_spread_and_numbers_beyond_float16() -> None:
    flat = torch.full((3, 64), 0.3)
    assert torch.allclose(make("int2", False, flat).dense(), flat, rtol=2**-11)
    assert not make("int4", False, torch.zeros(3, 64)).dense().any()
    with pytest.raises(ModelError, match="beyond 65504"):
        make("int4", False, torch.full((3, 64), 1e5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_factor_of_outputs_folds_into_groups_and_leaves_their_codes(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, gain = make(f"int{bits}", False, torch.randn(40, 100), dtype), torch.rand(40, dtype=dtype) + 0.5
    packed = layer.folded(Affine(gain=gain))
    want = gain[:, None] * layer.dense()
    assert (layer.unpacked(packed) - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()
    assert packed["weight"] is layer.weight
    assert layer.folded(Affine(A=torch.randn(2, 100), B=torch.randn(40, 2))) is None
    assert make("nf4", False, torch.randn(4, 64)).folded(Affine(gain=torch.ones(4))) is None
