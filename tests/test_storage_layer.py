"""A linear layer with a packed weight equals a dense one with the weight that it stands for, bit by bit."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from packed_layers import KEYS, make
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from litpeft.core.errors import ConfigError
from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.config import ModelConfig
from litpeft.model.delta import attach, trainable
from litpeft.model.families.read import read_config
from litpeft.model.gpt import GPT
from litpeft.model.kernels.ops import product
from litpeft.model.quantize import Storage, storage_class
from litpeft.model.quantize.quantized import Quantized, store

every_storage = pytest.mark.parametrize(("name", "double"), KEYS)


@every_storage
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_have_the_bits_of_a_dense_layer(
    name: str, double: bool, dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(0)
    layer = make(name, double, torch.randn(48, 100), dtype, bias)
    for shape in ((100,), (1, 100), (5, 100), (2, 37, 100)):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        twin, twin_bias = x.detach().clone().requires_grad_(), layer.bias.detach().to(dtype) if bias else None
        if bias:
            twin_bias.requires_grad_()
            layer.bias.grad = None
        got, want = layer(x), product(twin, layer.dense(), twin_bias)  # as slots.Linear
        torch.testing.assert_close(want, F.linear(twin, layer.dense(), twin_bias))
        grad = torch.randn_like(want)
        got.backward(grad), want.backward(grad)
        assert torch.equal(got, want)
        assert torch.equal(x.grad, twin.grad)
        assert not bias or torch.equal(layer.bias.grad, twin_bias.grad.float())


@every_storage
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_autocast_computes_as_with_a_dense_layer(name: str, double: bool, given: torch.dtype) -> None:
    layer = make(name, double, torch.randn(48, 100), bias=True)
    x = torch.randn(3, 7, 100, dtype=given, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = layer(x), F.linear(twin, layer.dense().to(given), layer.bias.to(given))
    got.float().square().sum().backward()
    want.float().square().sum().backward()
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    assert torch.equal(x.grad, twin.grad)


@every_storage
def test_no_dense_weight_is_kept_for_the_backward_pass(name: str, double: bool) -> None:
    layer, kept = make(name, double, torch.randn(300, 200)), []
    x = torch.randn(4, 200, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {tensor.data_ptr() for tensor in layer.packed().values()}
    assert kept
    assert all(tensor.data_ptr() in own for tensor in kept)


@every_storage
def test_gradients_flow_after_an_evaluation_pass(name: str, double: bool) -> None:
    layer = make(name, double, torch.randn(64, 64), torch.bfloat16)  # bitsandbytes' own layer loses them here
    before = {key: tensor.clone() for key, tensor in layer.packed().items()}
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            layer.eval()(torch.randn(1, 1, 64, dtype=torch.bfloat16))
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    layer.train()(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 64, dtype=torch.bfloat16) @ layer.dense())
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.packed().items())


@every_storage
def test_it_compiles_as_one_graph_and_recomputes(name: str, double: bool) -> None:
    torch._dynamo.reset()
    layer = make(name, double, torch.randn(64, 96), bias=True)
    want_x = torch.randn(2, 5, 96, requires_grad=True)
    want = layer(want_x)
    want.square().sum().backward()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (compiled, lambda x: checkpoint(layer, x, use_reentrant=False)):
        x = want_x.detach().clone().requires_grad_()
        got = run(x)
        got.square().sum().backward()
        assert torch.equal(got, want)
        assert torch.equal(x.grad, want_x.grad)


@every_storage
def test_shapes_are_known_without_any_numbers(name: str, double: bool) -> None:
    with FakeTensorMode():
        layer = storage_class(name)(96, 64)
        layer.convert(torch.bfloat16, double)
        for key, tensor in layer.packed().items():
            setattr(layer, key, torch.nn.Parameter(torch.empty_like(tensor, device="cpu"), requires_grad=False))
        x = torch.empty(2, 5, 96, dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()
        assert layer.dense().shape == (64, 96)
        assert (layer(x).shape, x.grad.shape, layer.dense().dtype) == ((2, 5, 64), x.shape, torch.bfloat16)


@every_storage
def test_it_runs_on_the_meta_device(name: str, double: bool) -> None:
    with torch.device("meta"):
        layer = storage_class(name)(96, 64)
        layer.convert(torch.bfloat16, double)
        assert layer(torch.empty(2, 5, 96)).shape == (2, 5, 64)


@every_storage
def test_casting_a_model_leaves_the_packed_tensors_as_they_are(name: str, double: bool) -> None:
    layer = make(name, double, torch.randn(64, 96), bias=True)
    before = {key: tensor.clone() for key, tensor in layer.packed().items()}
    layer.to(torch.bfloat16).half().double()
    assert layer.bias.dtype == torch.float64
    for key, tensor in layer.packed().items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, before[key])


def quantized(folder, name: str, double: bool, first: bool) -> tuple[GPT, GPT]:
    """Returns the model of a folder with LoRA on quantised weights, and on the dense weights that they stand for."""
    with torch.device("meta"):
        model = GPT(read_config(folder)[1])
    torch.manual_seed(1)
    dense = build(folder, torch.float32, LoRA())
    if first:
        layers = store(model, name, double, torch.float32)
    attach(model, LoRA())
    if not first:
        layers = store(model, name, double, torch.float32)
    assert all("blocks." in key and isinstance(model.get_submodule(key), Quantized) for key in layers)
    state = dense.state_dict()
    for key, layer in layers.items():
        state |= {f"{key}.{leaf}": tensor for leaf, tensor in layer.pack(state[f"{key}.weight"]).items()}
    model.load_state_dict(state, assign=True)
    for key, layer in layers.items():
        dense.get_submodule(key).weight.data = layer.dense()
    model.dtype = torch.float32
    return model, dense


@every_storage
@pytest.mark.parametrize("first", [True, False])
def test_a_finetuned_model_has_the_bits_of_one_with_the_unpacked_weights(tiny_folder, name, double, first) -> None:
    ids = torch.randint(0, TINY["vocab_size"], (2, 30))
    models = quantized(tiny_folder, name, double, first)
    losses = [model(ids, at=torch.arange(60), targets=ids.flatten()) for model in models]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    mine, theirs = ({k: p.grad for k, p in trainable(model).items()} for model in models)
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def llama(width: int, inner: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(32000, width, layers, heads, heads, width // heads, inner, 2048)


@pytest.mark.parametrize(
    ("config", "parameters", "held", "updates"),
    [  # figures of QLoRA's memory: linear layers in NF4 with double quantisation, the rest in bfloat16
        (llama(4096, 11008, 32, 32), 6_738_415_616, 3686.5 * 2**20, 159_907_840),
        (llama(8192, 22016, 80, 64), 65_285_660_672, 32.09 * 2**30, 799_539_200),
    ],
)
def test_large_models_take_the_memory_that_the_paper_says(
    config: ModelConfig, parameters: int, held: float, updates: int
) -> None:
    with torch.device("meta"):
        model = GPT(config).to(torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) == parameters
        store(model, "nf4", True, torch.bfloat16)
        base = sum(p.nbytes for p in model.parameters())
        attach(model, LoRA(rank=64))
    assert base == pytest.approx(held, rel=2e-4)
    assert sum(p.numel() for p in trainable(model).values()) == updates
    if config.n_layers == 80:
        assert 12 * parameters == pytest.approx(783.4e9, rel=1e-4)  # weights, gradients and moments of full finetuning
        assert (base + 12 * updates) / 2**30 == pytest.approx(41.0, abs=0.05)  # fits 48 GB


def test_a_quantised_weight_cannot_train(tiny_folder) -> None:
    with pytest.raises(ConfigError, match="blocks.0.mlp.up.weight, which base.quantize holds in codes"):
        build(tiny_folder, torch.float32, LoRA(unfreeze=("*.mlp.up.weight",)), storage=Storage("nf4"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(32, 64), (96, 32), (33, 64), (64, 31)])
@pytest.mark.parametrize("rows", [(), (1, 1), (3, 100), (2, 200)])
def test_int8_without_a_gradient_computes_what_it_computes_with_one(
    rows: tuple[int, ...], shape: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    layer = make("int8", False, torch.randn(shape), torch.bfloat16, bias)
    x = torch.randn(*rows, shape[1]).bfloat16()
    exact = F.linear(x.double(), layer.dense().double(), layer.bias.detach().double() if bias else None)
    with torch.no_grad():
        got = layer(x)
    with_gradient = layer(x).detach()
    assert got.dtype == torch.bfloat16
    assert got.shape == with_gradient.shape
    assert (got - exact).norm() < (with_gradient - exact).norm() + 4e-3 * exact.norm()  # the scale is rounded too
