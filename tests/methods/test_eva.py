"""EVA against peft's principal components of the inputs of transformers' model, and against an SVD."""

import pytest
import torch
from conftest import TINY, calibrated, finetune, in_float64, random_rows
from peft.utils.incremental_pca import IncrementalPCA
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from litpeft.exchange.run import build_run, find_run
from litpeft.methods.eva import EVA
from litpeft.methods.lora import LowRank
from litpeft.methods.lora_ga import LoRAGA
from litpeft.model.build import build
from litpeft.model.delta import trainable
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.model.singular import Components

IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


def inputs(folder, rows: int) -> dict[str, list[torch.Tensor]]:
    """Returns what the linear layers of transformers' model read at the trained tokens of each row, by our names."""
    theirs, names = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)), {}
    ours, seen = NameMap(*read_config(folder)), {}
    for name in (name for name in ours.ours if "attn." in name or "mlp." in name):
        place = name.removesuffix(".weight")
        names[place] = theirs.get_submodule(ours.file_name(name).removesuffix(".weight"))
        keep = lambda module, args, place=place: seen.setdefault(place, []).append(args[0][0, 10:])  # noqa: E731
        names[place].register_forward_pre_hook(keep)
    with torch.no_grad():
        for row in random_rows(rows):
            theirs(torch.tensor([row.ids]))
    return seen


def deltas(model) -> dict[str, LowRank]:
    return {name.removesuffix(".slot.eva"): m for name, m in model.named_modules() if isinstance(m, LowRank)}


def test_a_starts_as_the_components_that_peft_finds_row_by_row(tiny_folder) -> None:
    model = build(tiny_folder, torch.float64, calibrated(EVA(rank=4, rho=1.0), tiny_folder, 5))
    found = deltas(model)
    assert len(found) == 14
    for name, rows in inputs(tiny_folder, 5).items():
        pca = IncrementalPCA(n_components=4)
        for x in rows:
            pca.partial_fit(x.clone())
        alike = (found[name].A * pca.components_).sum(1).abs()
        assert (alike - 1).abs().max() <= 1e-6, name  # signs are free


def test_the_components_of_one_part_are_those_of_an_svd_and_of_few_parts_near_them() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 12, dtype=torch.float64) * torch.linspace(4, 0.1, 12) + 3
    _, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    one, whole, parts = Components(12, 3), Components(12, 12), Components(12, 12)
    one.add(x)
    whole.add(x)
    for part in x.split(7):
        parts.add(part)
    assert torch.allclose((one.parts @ v[:3].T).abs(), torch.diag(s[:3]), atol=1e-9)
    for components in (whole, parts):  # which keep all components
        assert torch.allclose(components.shares(), s.square() / s.square().sum(), atol=1e-12)
        assert torch.allclose(components.mean, x.mean(0))


def test_ranks_go_where_a_component_explains_most(tiny_folder) -> None:
    method = calibrated(EVA(rank=4, rho=2.0, alpha=6.0), tiny_folder, 5)
    shares = []
    for name, rows in inputs(tiny_folder, 5).items():
        pca = IncrementalPCA(n_components=8)
        for x in rows:
            pca.partial_fit(x.clone())
        shares += [(float(share), name) for share in pca.explained_variance_ratio_]
    least = sorted(shares, reverse=True)[4 * 14 - 1][0]
    found = deltas(build(tiny_folder, torch.float32, method))
    ranks = {name: len(delta.A) for name, delta in found.items()}
    assert sum(ranks.values()) == 4 * 14
    for name in {name for _, name in shares}:  # layers that read the same input tie at the limit
        above = sum(share > least + 1e-9 for share, of in shares if of == name)
        assert above <= ranks.get(name, 0) <= sum(share >= least - 1e-9 for share, of in shares if of == name)
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    assert {delta.scale for delta in found.values()} == {6 / 4}  # of the rank that was asked for


@pytest.mark.parametrize("method", [EVA, LoRAGA])
def test_the_head_can_be_a_target(tiny_folder, method: type) -> None:
    model = build(tiny_folder, torch.float64, calibrated(method(rank=4, targets=("*.attn.q", "head")), tiny_folder))
    (delta,) = model.head.slot.deltas.values()
    assert torch.allclose(
        delta.A / delta.A.norm(dim=1)[:, None] @ delta.A.T, torch.diag(delta.A.norm(dim=1)), atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_at_the_base_bit_for_bit(tiny_folder, dtype: torch.dtype) -> None:
    model = build(tiny_folder, dtype, calibrated(EVA(), tiny_folder))
    assert torch.equal(model(IDS), build(tiny_folder, dtype)(IDS))
    model(IDS).square().sum().backward()
    assert all(parameter.grad.any() == (name[-1] == "B") for name, parameter in trainable(model).items())


def test_a_run_is_loaded_with_the_ranks_that_it_found(tiny_folder, tmp_path) -> None:
    run = find_run(finetune(tiny_folder, tmp_path, "--method.rank", "4", method="eva"))
    saved = load_file(run.folder / "delta.safetensors")
    model = build_run(run, tiny_folder, torch.float32)
    ranks = [len(tensor) for name, tensor in saved.items() if name.endswith(".A")]
    assert sum(ranks) == 4 * 14
    assert len(set(ranks)) > 1
    assert set(trainable(model)) == set(saved)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"rho": 0.5}, {"calibration_rows": 0}])
def test_impossible_values_are_refused_by_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}"):
        EVA(**settings)
