"""DoRA against peft: the same tensors give the same logits and the same gradients; and against its formula."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, folded, in_float64, make_folder
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from litpeft.core.errors import UserError
from litpeft.methods.dora import Decomposed, DoRA
from litpeft.model.build import build
from litpeft.model.delta import trainable
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.model.quantize import Storage
from litpeft.model.slots import Linear

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=[False, True], ids=["no biases", "biases"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "either"
    make_folder(folder, attention_bias=request.param, mlp_bias=request.param)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def moved(model) -> dict[str, Decomposed]:
    """Returns the deltas by the name of their layer, with random tensors in them."""
    deltas = {name.removesuffix(".slot.dora"): m for name, m in model.named_modules() if isinstance(m, Decomposed)}
    torch.manual_seed(4)
    for delta in deltas.values():
        torch.nn.init.normal_(delta.A, std=0.1)
        torch.nn.init.normal_(delta.B, std=0.1)
        delta.m.data *= 1 + 0.3 * torch.randn_like(delta.m)
    return deltas


@pytest.mark.parametrize("dropout", [0.0, 1e-12])  # so little drops nothing, and takes the way of what does
def test_logits_and_gradients_equal_peft(folder, dropout: float) -> None:
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    config = LoraConfig(r=4, lora_alpha=20, target_modules=ALL, use_dora=True, task_type="CAUSAL_LM")
    theirs = get_peft_model(theirs, config, autocast_adapter_dtype=False).eval()
    ours = build(folder, torch.float64, DoRA(rank=4, alpha=20, dropout=dropout)).train()
    names, pairs = NameMap(*read_config(folder)), []
    for name, delta in moved(ours).items():
        linear = names.file_name(f"{name}.weight").removesuffix(".weight")
        layer = theirs.get_submodule(f"base_model.model.{linear}")
        others = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
        for own, other in zip((delta.A, delta.B, delta.m), others, strict=True):
            other["default"].weight.data = own.data.clone()
            pairs.append((own, other["default"].weight))
    want, got = theirs(IDS).logits, ours(IDS)
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    weight = torch.randn(want.shape, dtype=torch.float64)
    for logits in (want, got):
        (logits * weight).sum().backward()
    assert len(pairs) == 3 * 14
    assert all(torch.allclose(own.grad, other.grad, rtol=1e-8, atol=1e-10) for own, other in pairs)


def test_with_dropout_what_is_left_of_x_is_scaled_and_the_rest_passes_as_in_peft(tiny_folder) -> None:
    linear = build(tiny_folder, torch.float64, DoRA(dropout=0.5)).train().blocks[0].attn.q
    delta, x = linear.slot.dora, torch.randn(8, 64, dtype=torch.float64)
    torch.nn.init.normal_(delta.B, std=0.1)
    delta.m.data *= 1.5
    torch.manual_seed(0)
    got = linear(x)
    torch.manual_seed(0)
    dropped, change = F.dropout(x, 0.5), delta.scale * delta.B @ delta.A
    n = delta.m / (linear.weight + change).norm(dim=1)
    want = linear.base(x) + (n - 1) * linear.base(dropped) + n * (dropped @ change.T)
    assert torch.allclose(got, want, rtol=1e-10)


def test_the_magnitudes_start_at_the_norms_of_what_the_storage_holds(tiny_folder) -> None:
    for storage in (None, Storage("nf4"), Storage("int8")):
        model = build(tiny_folder, torch.bfloat16, DoRA(), storage=storage)
        for layer in (m for m in model.blocks.modules() if isinstance(m, Linear)):
            assert torch.allclose(layer.slot.dora.m, layer.dense().float().norm(dim=1), rtol=1e-6)


@pytest.mark.parametrize("storage", [None, "nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_at_the_base_bit_for_bit_where_that_is_quantised(tiny_folder, dtype, storage: str | None) -> None:
    storage = storage and Storage(storage)
    want, model = build(tiny_folder, dtype, storage=storage)(IDS), build(tiny_folder, dtype, DoRA(), storage=storage)
    assert torch.equal(model(IDS), want)
    assert torch.equal(model.eval()(IDS), want)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
def test_the_norm_of_a_row_is_found_without_the_sum_of_the_matrices(tiny_folder, dtype, limit: float) -> None:
    model = build(tiny_folder, dtype, DoRA(rank=4))
    for name, delta in moved(model).items():
        linear = model.get_submodule(name)
        want = (linear.weight.double() + delta.scale * delta.B.double() @ delta.A.double()).norm(dim=1)
        assert (delta.norm(linear) / want - 1).abs().max() <= limit


def test_a_row_of_zeros_stays_one_and_gives_no_nan(tiny_folder) -> None:
    linear = Linear(6, 4)
    linear.slot.add("dora", Decomposed(6, 4, 2, 1.0, 0.0))
    torch.nn.init.zeros_(linear.weight)
    linear.slot.dora.reset_parameters()
    DoRA().start("", linear, linear.weight, lambda weight: weight, None)
    y = linear(torch.randn(3, 6))
    y.sum().backward()
    assert not y.any()
    assert all(p.grad.isfinite().all() for p in linear.slot.dora.parameters())


def test_the_rows_of_the_folded_weight_have_the_trained_norms(tiny_folder) -> None:
    model = build(tiny_folder, torch.float64, DoRA())
    deltas = moved(model)
    with torch.no_grad():
        weights = folded(model)
    for name, delta in deltas.items():
        assert torch.allclose(weights[f"{name}.weight"].norm(dim=1), delta.m.abs(), rtol=1e-10)


def test_no_gradient_goes_through_the_norm(tiny_folder) -> None:
    linear = build(tiny_folder, torch.float64, DoRA(rank=4)).blocks[1].mlp.up
    delta = linear.slot.dora
    torch.nn.init.normal_(delta.B, std=0.3)
    x, weight = torch.randn(30, 64, dtype=torch.float64), torch.randn(30, 112, dtype=torch.float64)
    (linear(x) * weight).sum().backward()
    for detached in (True, False):
        b = delta.B.detach().requires_grad_()
        updated = linear.weight + delta.scale * b @ delta.A.detach()
        norm = updated.norm(dim=1).detach() if detached else updated.norm(dim=1)
        (x @ (delta.m.detach()[:, None] * updated / norm[:, None]).T * weight).sum().backward()
        assert torch.allclose(b.grad, delta.B.grad, rtol=1e-9) == detached


def test_a_weight_that_trains_cannot_have_its_norm_held(tiny_folder) -> None:
    with pytest.raises(UserError, match=r"blocks.0.attn.q.weight .* magnitude"):
        build(tiny_folder, torch.float32, DoRA(unfreeze=("*.attn.q.*",)))
    model = build(tiny_folder, torch.float32, DoRA(targets=("*.attn.*",), unfreeze=("*.mlp.up.weight", "*norm*")))
    assert "blocks.0.mlp.up.weight" in trainable(model)
