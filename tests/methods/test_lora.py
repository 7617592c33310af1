"""LoRA against peft: the same tensors give the same logits and the same gradients."""

import re

import pytest
import torch
from conftest import TINY, in_float64
from lightning.fabric import Fabric
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from litpeft.core.errors import UserError
from litpeft.methods.combo import Combo
from litpeft.methods.lora import LoRA, LowRank
from litpeft.model.build import build
from litpeft.model.delta import Method, lr_factors, trainable
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.model.kernels.low_rank import add_updates
from litpeft.model.slots import Linear, project
from litpeft.train.optim import make_optimizer
from litpeft.train.settings import Train
from litpeft.train.step import Stepper

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


def pair(folder, rslora: bool):
    """Returns our model and peft's, in float64, with the same random A and B, rank 4 and alpha 20."""
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    config = LoraConfig(r=4, lora_alpha=20, target_modules=ALL, use_rslora=rslora, task_type="CAUSAL_LM")
    theirs = get_peft_model(theirs, config, autocast_adapter_dtype=False).eval()
    ours = build(folder, torch.float64, LoRA(rank=4, alpha=20, rslora=rslora)).eval()
    names = NameMap(*read_config(folder))
    torch.manual_seed(4)
    for name, module in ours.named_modules():
        if isinstance(module, LowRank):
            linear = names.file_name(f"{name.removesuffix('.slot.lora')}.weight").removesuffix(".weight")
            layer = theirs.get_submodule(f"base_model.model.{linear}")
            for own, other in ((module.A, layer.lora_A), (module.B, layer.lora_B)):
                torch.nn.init.normal_(own, std=0.1)
                other["default"].weight.data = own.data.clone()
    return ours, theirs


@pytest.mark.parametrize("rslora", [False, True])
def test_logits_and_gradients_equal_peft(tiny_folder, rslora: bool) -> None:
    ours, theirs = pair(tiny_folder, rslora)
    want, got = theirs(IDS).logits, ours(IDS)
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    weight = torch.randn(want.shape, dtype=torch.float64)
    (want * weight).sum().backward()
    (got * weight).sum().backward()
    layer = theirs.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    slot = ours.get_submodule("blocks.1.attn.v.slot.lora")
    for own, other in ((slot.A, layer.lora_A), (slot.B, layer.lora_B)):
        assert torch.allclose(own.grad, other["default"].weight.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", ["", "A", "B", "x", "Ax", "all but one"])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12)])
def test_layers_of_one_input_learn_as_by_the_formula(shape: tuple[int, ...], frozen: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = []
    for out, rank in ((7, 2), (9, 3), (4, 1)):
        linear = Linear(12, out).to(dtype).requires_grad_(False)
        linear.slot.add("lora", LowRank(12, out, rank, scale=1.5, dropout=0.0))
        torch.nn.init.normal_(linear.slot.lora.A), torch.nn.init.normal_(linear.slot.lora.B)
        linear.slot.lora.to(torch.promote_types(dtype, torch.float32))
        linear.slot.lora.A.requires_grad_("A" not in frozen and frozen != "all but one")
        linear.slot.lora.B.requires_grad_("B" not in frozen and (frozen != "all but one" or out == 9))
        layers.append(linear)
    x = torch.randn(shape).to(dtype)
    twin = x.double().requires_grad_("x" not in frozen)
    x.requires_grad_("x" not in frozen)
    slots = [layer.slot.lora for layer in layers]
    updates = [1.5 * slot.B.double() @ slot.A.double() for slot in slots]
    want = [twin @ (layer.weight.double() + update).T for layer, update in zip(layers, updates, strict=True)]
    leaves = [p for slot in slots for p in (slot.A, slot.B) if p.requires_grad]
    weights = [torch.randn(y.shape).to(dtype) for y in want]
    want_loss = sum((y * w.double()).sum() for y, w in zip(want, weights, strict=True))
    expected = torch.autograd.grad(want_loss, [*leaves, *([twin] if twin.requires_grad else [])])
    got = project(x, None, *layers)
    got_loss = sum((y * w).sum() for y, w in zip(got, weights, strict=True))
    grads = torch.autograd.grad(got_loss, [*leaves, *([x] if x.requires_grad else [])])
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, theirs in zip([*got, *grads], [*want, *expected], strict=True):
        assert (ours - theirs).norm() <= limit * theirs.norm()


def test_dropout_is_on_the_update_only_and_off_in_eval(tiny_folder) -> None:
    linear = build(tiny_folder, torch.float64, LoRA(dropout=0.5)).blocks[0].attn.q
    torch.nn.init.ones_(linear.slot.lora.B)
    x = torch.randn(4000, 64, dtype=torch.float64)
    base = linear.base(x)
    update = linear.eval()(x) - base
    dropped = linear.train()(x) - base
    assert not torch.allclose(dropped, update)
    assert abs(float((dropped * update).sum() / update.square().sum()) - 1) < 0.1  # unbiased: E[dropout(x)] = x
    linear.slot.lora.B.data.zero_()
    assert torch.equal(linear(x), base)


@pytest.mark.parametrize("rows", [(1, 1), (2, 40)])  # few are computed in float32 where nothing trains
def test_an_answer_gets_the_update_of_its_formula(rows: tuple[int, int]) -> None:
    torch.manual_seed(0)
    delta = LowRank(64, 96, rank=4, scale=3.0, dropout=0.5).eval()
    torch.nn.init.normal_(delta.A)
    torch.nn.init.normal_(delta.B)
    x, y = torch.randn(*rows, 64).bfloat16(), torch.randn(*rows, 96).bfloat16()
    want = y.double() + 3 * x.double() @ delta.A.double().T @ delta.B.double().T
    with torch.inference_mode():
        got = add_updates([y], x, [delta.factors()])[0]
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() < 2**-7 * want.norm()
    assert (delta(y, x, None, None) - want).norm() < 2**-7 * want.norm()


def test_a_starts_uniform_within_one_over_the_root_of_in(tiny_folder) -> None:
    slot = build(tiny_folder, torch.float32, LoRA(rank=64)).blocks[0].mlp.down.slot.lora
    bound = slot.A.size(1) ** -0.5
    assert slot.A.abs().max() <= bound
    assert abs(float(slot.A.std()) / (bound / 3**0.5) - 1) < 0.02
    assert not slot.B.any()


@pytest.mark.parametrize(("out", "inputs", "rank", "count"), [(200, 200, 2, 800), (512, 64, 8, 4608)])
def test_an_update_has_as_many_numbers_as_in_the_articles(out: int, inputs: int, rank: int, count: int) -> None:
    assert sum(p.numel() for p in LowRank(inputs, out, rank, 2.0, 0.0).parameters()) == count


def test_rslora_keeps_the_size_of_the_inner_activations_whatever_the_rank() -> None:
    """E (s ||A x||)^2 = alpha^2 ||x||^2 / (3 in) with s = alpha / sqrt(rank), and 1 / rank of it with alpha / rank."""
    torch.manual_seed(0)
    x = torch.randn(4096)
    theory = 16**2 * float(x.square().sum()) / (3 * 4096)
    for rank, plain in ((8, 8), (64, 64), (512, 512)):
        delta = LowRank(4096, 8, rank, 16 / rank**0.5, 0.0)
        delta.reset_parameters()
        inner = float((delta.A.detach() @ x).square().sum())
        assert delta.scale**2 * inner == pytest.approx(theory, rel=3 / rank**0.5)
        assert (16 / rank) ** 2 * inner == pytest.approx(theory / plain, rel=3 / rank**0.5)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("q_proj", "*.attn.q"), ("*.self_attn.o_proj", "*.attn.o"), ("down_proj", "*.mlp.down"), ("*.atn.q", "*.attn.q")],
)
def test_targets_as_other_programs_name_them_are_told_ours(given: str, meant: str, tiny_folder) -> None:
    with pytest.raises(UserError, match=re.escape(f'(did you mean "{meant}"?)')):
        build(tiny_folder, torch.float32, LoRA(targets=(given,)))


def test_ranks_and_scales_follow_the_last_glob_that_matches(tiny_folder) -> None:
    model = build(tiny_folder, torch.float32, LoRA(rank=4, ranks={"*.mlp.*": 16, "blocks.1.mlp.up": 2}))
    assert [model.blocks[i].attn.q.slot.lora.A.size(0) for i in (0, 1)] == [4, 4]
    assert [model.blocks[i].mlp.up.slot.lora.A.size(0) for i in (0, 1)] == [16, 2]
    assert {m.scale for m in model.modules() if isinstance(m, LowRank)} == {2.0}  # alpha is twice each rank


def test_unfreezing_norms_trains_them_in_float32(tiny_folder) -> None:
    model = build(tiny_folder, torch.bfloat16, LoRA(unfreeze=("*.norm1.weight",)))
    norms = {name for name in trainable(model) if "norm" in name}
    assert norms == {"blocks.0.norm1.weight", "blocks.1.norm1.weight"}
    assert norms <= model.delta_keys
    assert model.blocks[0].norm1.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("*.atn.q",)}, r'"\*.atn.q" matches no linear layer; the model has \*.attn.q'),
        ({"targets": ("*.attn.q",), "ranks": {"*.mlp.*": 2}}, "matches no target"),
        ({"unfreeze": ("*.nrm*",)}, "matches no parameter"),
    ],
)
def test_globs_that_match_nothing_are_errors(tiny_folder, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(tiny_folder, torch.float32, LoRA(**settings))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"ranks": {"*": 0}}])
def test_impossible_values_are_refused_by_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}"):
        LoRA(**settings)


@pytest.mark.parametrize("method", [LoRA(lr_ratio=16.0), Combo(methods={"lora": {"lr_ratio": 16.0}, "prefix": {}})])
def test_b_learns_at_a_rate_of_its_own(tiny_folder, method: Method) -> None:
    model = build(tiny_folder, torch.float64, method)
    parameters = trainable(model)
    optimizer = make_optimizer(Train(lr=2e-4, weight_decay=0.0), parameters, lr_factors=lr_factors(model))
    stepper = Stepper(Fabric(accelerator="cpu", devices=1), model, optimizer)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    model(IDS).square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    stepper.gradient = lambda *args: None
    stepper.step([], 1, 1e-4, 0)
    for name, parameter in parameters.items():  # Adam's first step is lr * sign(gradient)
        lr = 16e-4 if name.endswith(".B") else 1e-4
        moved = torch.where(gradients[name].abs() > 1e-3, (before[name] - parameter).detach(), 0.0)
        want = torch.where(gradients[name].abs() > 1e-3, lr * gradients[name].sign(), 0.0)
        assert torch.allclose(moved, want, atol=lr * 1e-4)
        assert name.endswith(".A") or moved.any()
