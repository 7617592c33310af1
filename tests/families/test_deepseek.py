"""DeepSeek: methods act on the layers of latent attention and on shared experts; what cannot be is refused."""

import pytest
import torch
from conftest import TINY, folded
from safetensors.torch import load_file, save_file
from test_model import FAMILY_CASES
from tiny_families import make_family

from litpeft.core.errors import ConfigError
from litpeft.methods.adapter import Adapter
from litpeft.methods.lora import LoRA
from litpeft.methods.prefix import Prefix
from litpeft.model.build import build
from litpeft.model.config import Experts
from litpeft.model.context import Context
from litpeft.model.delta import trainable
from litpeft.model.families import deepseek_v2, deepseek_v3
from litpeft.model.mixture import Router

IDS = torch.randint(2, 257, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("deepseek")
    make_family(made, "deepseek_v3", torch.float64)
    return made


@torch.no_grad()
def test_lora_acts_on_every_linear_layer_and_folds_into_it(folder) -> None:
    model = build(folder, torch.float64, LoRA(rank=2)).eval()
    slots = [key for key in trainable(model) if key.endswith("slot.lora.B")]
    leaves = {key.removesuffix(".slot.lora.B").split(".", 2)[2] for key in slots if ".experts." not in key}
    attention = {f"attn.{leaf}" for leaf in ("q_a", "q_b", "kv_a", "kv_b", "o")}
    assert leaves == attention | {f"mlp.{kind}{leaf}" for kind in ("", "shared.") for leaf in ("gate", "up", "down")}
    base = model(IDS)
    for key in slots:
        torch.nn.init.normal_(model.get_parameter(key), std=0.1)
    want = model(IDS)
    plain = build(folder, torch.float64)
    plain.load_state_dict(folded(model))
    assert (plain(IDS) - want).abs().max() <= 1e-10
    assert (base - want).abs().max() > 1e-2


def test_activation_checkpointing_changes_no_gradient(folder) -> None:
    model, grads = build(folder, torch.float64, LoRA(rank=2)), []
    for recompute in ("none", "cheap", "block", "offload"):
        model.recompute = recompute
        model.zero_grad()
        model(IDS, Context.packed((15, 25), IDS.device, None), at=torch.arange(39), targets=IDS[0, 1:]).backward()
        grads.append([parameter.grad.clone() for parameter in trainable(model).values()])
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


@torch.no_grad()
def test_the_layer_that_predicts_further_tokens_is_left_out(folder, tmp_path) -> None:
    tensors = load_file(folder / "model.safetensors")
    further = {"model.layers.61.eh_proj.weight": torch.ones(3, 3), "model.layers.61.enorm.weight": torch.ones(3)}
    save_file(tensors | further, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert torch.equal(build(tmp_path, torch.float64)(IDS), build(folder, torch.float64)(IDS))


@pytest.mark.parametrize("method", [Prefix(prompt_length=2), Adapter(prompt_length=2)])
def test_methods_that_need_keys_and_values_of_linear_layers_are_refused(method, folder) -> None:
    with pytest.raises(ConfigError, match="keys and values"):
        build(folder, torch.float64, method)


@torch.no_grad()
def test_a_router_chooses_only_experts_of_the_chosen_groups(folder) -> None:
    router: Router = build(folder, torch.float64).blocks[1].mlp.router
    x = torch.randn(50, TINY["hidden_size"], dtype=torch.float64)
    shares, chosen = router(x)
    scores = (x @ router.weight.T).sigmoid()
    corrected = scores + router.e_score_correction_bias
    for row in range(50):  # four groups of two, of which two are chosen
        best = sorted(range(4), key=lambda group: -corrected[row, 2 * group : 2 * group + 2].sum())[:2]
        allowed = [2 * group + one for group in best for one in (0, 1)]
        want = sorted(allowed, key=lambda expert: -corrected[row, expert])[:3]
        assert chosen[row].tolist() == want
        assert torch.allclose(shares[row], 2.5 * scores[row, want] / scores[row, want].sum())


@pytest.mark.parametrize(
    ("module", "change", "message"),
    [
        (deepseek_v3, {"num_key_value_heads": 2}, "num_key_value_heads 2 is not supported; it must be num_attention"),
        (deepseek_v3, {"v_head_dim": 30}, "v_head_dim 30 is not supported; it must be at most qk_nope_head_dim"),
        (deepseek_v3, {"n_group": 3}, r"n_group 3 must divide the 8 experts \(n_routed_experts\), so that"),
        (deepseek_v3, {"topk_group": 1}, "topk_group 1 of n_group 4 is not supported: they must hold num_experts_per"),
        (deepseek_v3, {"topk_group": None}, "topk_group null is not supported"),
        (deepseek_v2, {"norm_topk_prob": True}, "norm_topk_prob true is not supported"),
        (deepseek_v2, {"topk_method": "noaux_tc"}, 'topk_method "noaux_tc" is not supported; it must be "greedy" or'),
        (deepseek_v2, {"num_experts_per_tok": None}, "num_experts_per_tok null is not supported"),
    ],
)
def test_what_cannot_be_built_is_refused_by_its_key(module, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.config(TINY | FAMILY_CASES[module.__name__.rpartition(".")[2]] | change)


def test_more_active_experts_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok 9 is more than the 8 experts .*n_routed_experts"):
        Experts(8, 9, 16)
