"""The project's own code for the processor: against torch in float64, against the modules, and where it is missing."""

from pathlib import Path

import pytest
import torch
from conftest import make_folder
from packed_layers import make

import litpeft.generate.cpu.fused_block
from litpeft.generate.cache import TokenCache
from litpeft.generate.cpu.fused_block import fuse_blocks
from litpeft.generate.cpu.native_weights import NativeLinears
from litpeft.generate.cpu.pack import pack_weights
from litpeft.generate.load import load_model
from litpeft.methods.ia3 import IA3
from litpeft.methods.lora import LoRA, LowRank
from litpeft.methods.qa_lora import QALoRA
from litpeft.methods.vera import VeRA
from litpeft.model import kernels as native
from litpeft.model.build import build
from litpeft.model.config import ModelConfig
from litpeft.model.delta import Method, trainable, without_delta
from litpeft.model.gpt import GPT
from litpeft.model.quantize import STORAGES, Storage
from litpeft.model.quantize.codes import BLOCK, CODES
from litpeft.model.quantize.four_bit import FourBit
from litpeft.model.quantize.grouped import Grouped
from litpeft.model.quantize.int8 import Int8
from litpeft.model.slots import Linear

needs_library = pytest.mark.skipif(native.library() is None, reason="this machine has no AVX-512 BF16 or no g++")


def linear(name: str | None, outputs: int, inputs: int, bias: bool) -> Linear:
    if name is not None:
        return make(name, True, torch.randn(outputs, inputs), torch.bfloat16, bias)
    return Linear(inputs, outputs, bias).bfloat16().requires_grad_(False)


@needs_library
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(16,), (208, 48, 48)])
@pytest.mark.parametrize("name", [None, *STORAGES])
def test_rows_multiply_as_their_weights_whatever_comes_with_a_row(name: str | None, sizes: tuple, bias: bool) -> None:
    torch.manual_seed(0)
    layers = [linear(name, size, 320, bias) for size in sizes]
    rows, held = NativeLinears(layers), torch.cat([layer.dense() for layer in layers])
    rounded = name is not None and name[:2] in ("nf", "fp")  # codes, to bfloat16
    assert (rows.dense() - held).abs().max() <= (2**-7 * held.abs().max() if rounded else 0)
    weight = torch.cat([exact(layer) for layer in layers])
    x = torch.randn(41, 320).bfloat16()
    want = x.double() @ weight.t() + (torch.cat([layer.bias for layer in layers]) if bias else 0)
    whole = rows.product(x)
    assert (whole - want).abs().max() <= 2**-8 * want.abs().max()
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17):
        assert torch.equal(rows.product(x[:count]), whole[:count])
    assert rows.product(x[:0]).shape == (0, sum(sizes))
    assert torch.equal(rows.product(x.view(1, 41, 320))[0], whole)


@needs_library
@pytest.mark.parametrize("names", [("nf2", "nf4", "nf3"), ("int4", "int2", "int3")])
def test_layers_whose_codes_differ_are_one_matrix(names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    layers = [linear(name, size, 192, False) for name, size in zip(names, (48, 16, 32), strict=True)]
    assert NativeLinears.joins(layers)
    assert not NativeLinears.joins([*layers[:2], linear("int8", 16, 192, False)])
    x, weight = torch.randn(9, 192).bfloat16(), torch.cat([exact(layer) for layer in layers])
    want = x.double() @ weight.t()
    assert (NativeLinears(layers).product(x) - want).abs().max() <= 2**-8 * want.abs().max()


@needs_library
@pytest.mark.parametrize(("quantize", "method"), [("int3", QALoRA(rank=3)), ("int4", IA3()), (None, VeRA(rank=64))])
@pytest.mark.parametrize("native", [True, False])
def test_deltas_that_are_in_the_weights_can_be_left_out(
    quantize: str | None, method: Method, native: bool, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "attention_bias": True}
    folder = make_folder(tmp_path / "model", seed=7, initializer_range=0.1, **sizes)
    storage = None if quantize is None else Storage(quantize)
    types = torch.bfloat16, torch.bfloat16, torch.float64
    model, plain, truth = (build(folder, dtype, method, storage=storage).eval() for dtype in types)
    torch.manual_seed(0)
    for name, tensor in trainable(model).items():
        tensor.data += 0.1 * torch.randn(tensor.shape)
        for other in (plain, truth):
            other.get_parameter(name).data.copy_(tensor)
    pack_weights(model.requires_grad_(False), native)
    fuse_blocks(model)
    packed = [layer.packed_in for layer in model.modules() if isinstance(layer, Linear) and layer.slot.deltas]
    assert all(one is not None and one.merged is not None for one in packed) or (quantize and not native)
    ids = torch.randint(200, (2, 12)).tolist()
    with without_delta(model), without_delta(plain), without_delta(truth):
        base = [TokenCache(one).logits(ids).double() for one in (model, plain, truth)]
    tuned = [TokenCache(one).logits(ids).double() for one in (model, plain, truth)]
    assert (tuned[2] - base[2]).norm() > 0.1 * base[2].norm()
    for got, by_modules, want in (base, tuned):
        assert (got - want).norm() <= 1.5 * (by_modules - want).norm()  # merging rounds the weights once more


def exact(layer: Linear) -> torch.Tensor:
    """Returns the weight (out, in) in float64: the scales are not rounded, and the values of four bits are."""
    if isinstance(layer, Int8):
        return layer.weight.double() * (layer.absmax / 127).double()[:, None]
    if isinstance(layer, Grouped):
        return layer.unpack(
            (layer.weight, layer.scale, layer.shift), (layer.out_features, layer.in_features), torch.float64
        )
    if not isinstance(layer, FourBit):
        return layer.dense().double()
    code = layer.codes().view(-1, BLOCK).int()
    weight = torch.tensor(CODES[layer.kind]).bfloat16()[code].double() * layer.blocks().double()[:, None]
    return weight.view(layer.out_features, -1)


SIZES = {"vocab_size": 64, "d_model": 96, "n_layers": 3, "d_ff": 160, "max_positions": 512}
HEADS = {"n_heads": 6, "n_kv_heads": 2, "head_dim": 32}


def random_model(**changes: object) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SIZES | HEADS | changes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.12)
    model.dtype = torch.bfloat16
    return model.bfloat16()


@needs_library
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 7},
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
        {"rotary_dim": 20, "tie_embeddings": True},
        {"head_dim": 64, "n_kv_heads": 6},
    ],
)
def test_a_block_in_one_call_is_as_near_to_the_truth_as_its_modules(changes: dict) -> None:
    model, fast, truth = (random_model(**changes) for _ in range(3))
    truth.double().dtype = torch.float64
    pack_weights(fast)
    fuse_blocks(fast)
    assert all(block.native is not None for block in fast.blocks)
    caches = [TokenCache(m) for m in (model, fast, truth)]
    rows = torch.randint(64, (3, 300)).tolist()
    for end in (2, 3, 4, 20, 150, 151, 300):  # prompts of other lengths, some tokens at once, and one by one
        texts = [row[: max(1, end - 5 * number)] for number, row in enumerate(rows)]
        plain, got, want = (cache.logits(texts).double() for cache in caches)
        assert (got - want).norm() <= 1.1 * (plain - want).norm() + 1e-3 * want.norm()
        assert (got - want).norm() < 0.03 * want.norm()


@needs_library
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_a_tokens_numbers_do_not_depend_on_how_many_come_with_it(quantize: str | None, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "vocab_size": 272}
    model = load_model(str(make_folder(tmp_path / "model", seed=7, **sizes)), None, "bf16-true", quantize).model
    assert all(block.native is not None for block in model.blocks)
    ids = torch.randint(272, (2, 60)).tolist()
    alone, together = TokenCache(model), TokenCache(model)
    one_by_one = [alone.logits([ids[0][:end]])[0] for end in range(1, 61)]
    at_once = together.logits([ids[0], ids[1][:31]], last=30)
    assert torch.equal(torch.stack(one_by_one[30:]), at_once[:30])


@needs_library
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_a_row_s_numbers_do_not_depend_on_the_rows_it_is_read_with(quantize: str | None, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "max_position_embeddings": 1024}
    model = load_model(str(make_folder(tmp_path / "m", **sizes)), precision="bf16-true", quantize=quantize).model
    torch.manual_seed(0)
    rows = [torch.randint(2, 300, (n,)).tolist() for n in (30, 400, 8, 700, 90, 513, 64, 64, 512, 3)]
    cache, alone = TokenCache(model), [TokenCache(model) for _ in rows]
    for _ in range(3):
        together = cache.logits(rows, last=2)
        for number, row in enumerate(rows):
            assert torch.equal(alone[number].logits([row], last=2), together[2 * number : 2 * number + 2]), number
        rows = [[*row, 7 + number] for number, row in enumerate(rows)]


@needs_library
def test_lora_is_part_of_a_call_and_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    folder = make_folder(tmp_path / "model", seed=7, initializer_range=0.1, **sizes)
    model = build(folder, torch.bfloat16, LoRA(rank=3, targets=("*.q", "*.v", "*.o", "*.up", "*.down"))).eval()
    torch.manual_seed(0)
    for delta in (m for m in model.modules() if isinstance(m, LowRank)):
        torch.nn.init.normal_(delta.B, std=0.05)
    pack_weights(model.requires_grad_(False))
    fuse_blocks(model)
    ids = torch.randint(200, (2, 12)).tolist()
    by_few = {few: few for few in (0, 512)}
    for few in by_few:
        monkeypatch.setattr(litpeft.generate.cpu.fused_block, "NATIVE_TOKENS", few)
        with without_delta(model):
            base = TokenCache(model).logits(ids)
        by_few[few] = base, TokenCache(model).logits(ids)
    (base, tuned), (got_base, got) = by_few.values()
    assert (tuned - base).norm() > 0.1 * base.norm()
    assert (got - tuned).norm() < 2e-2 * tuned.norm()
    assert (got_base - base).norm() < 2e-2 * base.norm()


def fresh(monkeypatch: pytest.MonkeyPatch, folder: Path, compiler: str) -> native.Library | None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("CXX", compiler)
    return native.library.__wrapped__()


@needs_library
def test_it_is_compiled_once_on_a_machine(tmp_path, monkeypatch, capsys) -> None:
    assert fresh(monkeypatch, tmp_path, "g++") is not None
    assert "once" in capsys.readouterr().err
    file, *rest = (tmp_path / "litpeft").iterdir()
    assert rest == []
    written = file.stat().st_mtime_ns
    assert fresh(monkeypatch, tmp_path, "g++") is not None
    assert capsys.readouterr().err == ""
    assert file.stat().st_mtime_ns == written


@needs_library
def test_without_a_compiler_or_with_a_wrong_one_other_code_does_the_work(tmp_path, monkeypatch, capsys) -> None:
    assert fresh(monkeypatch, tmp_path, "no-such-compiler") is None
    assert capsys.readouterr().err == ""
    assert fresh(monkeypatch, tmp_path, "false") is None
    assert "does not compile here" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert fresh(monkeypatch, tmp_path / "file", "g++") is None
    assert "litpeft is slower than it could be" in capsys.readouterr().err
