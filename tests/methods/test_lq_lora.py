"""LQ-LoRA: falling errors, an exact choice of bits within a budget, Fisher weights against autograd by hand."""

import re
from itertools import product

import pytest
import torch
from conftest import TINY, finetune, make_folder
from packed_layers import make

from litpeft.core.errors import ConfigError, ModelError
from litpeft.data.batches import collate
from litpeft.data.rows import Row
from litpeft.exchange.run import build_run, find_run
from litpeft.methods.lq_lora import LQLoRA
from litpeft.model.build import build
from litpeft.model.delta import delta_state
from litpeft.model.quantize import Storage, storage_class
from litpeft.model.quantize.allocation import least_costly
from litpeft.model.quantize.quantized import Quantized

IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


def errors(weight: torch.Tensor, storage: str) -> list[float]:
    """Returns |W - Q - B A| / |W| after 1, 3 and 6 iterations, at rank 16."""
    layer, found = make(storage, False, weight), []
    for iterations in (1, 3, 6):
        method = LQLoRA(rank=16, iterations=iterations)
        (a, b), _ = method.parts("", weight, 16, lambda w: layer.unpacked(layer.pack(w)))
        found.append(float((weight - layer.unpacked(layer.pack(weight - b @ a)) - b @ a).norm() / weight.norm()))
    return found


@pytest.mark.parametrize(
    ("storage", "decays", "first", "last"),
    [
        *(("nf4", False, 0.0867, 0.0771), ("nf3", False, 0.1903, 0.1701), ("nf2", False, 0.5297, 0.4711)),
        *(("nf4", True, 0.0654, 0.0581), ("nf2", True, 0.3996, 0.3668)),
    ],
)
def test_errors_fall_as_in_the_formula(storage: str, decays: bool, first: float, last: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    if decays:  # singular values that fall as k ** -0.5
        u, _, v = torch.linalg.svd(weight)
        weight = u * torch.arange(1, 513) ** -0.5 @ v
    found = errors(weight, storage)
    assert (found[0], found[-1]) == pytest.approx((first, last), rel=0.02)
    assert found == sorted(found, reverse=True)


def test_the_best_pair_is_kept_and_not_the_last() -> None:
    torch.manual_seed(0)
    weight, held = torch.randn(48, 64), iter([0.1, 0.3, 0.2])

    def coarser(w: torch.Tensor) -> torch.Tensor:
        step = next(held)
        return (w / step).round() * step

    (a, b), start = LQLoRA(iterations=3).parts("", weight, 8, coarser)
    u, s, v = torch.linalg.svd(weight)
    assert torch.allclose(b @ a, u[:, :8] * s[:8] @ v[:8], atol=1e-4)  # the first pair, whose codes were finer
    assert start[0] is a
    assert next(held) == 0.2  # it stopped at the worse one


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("units", [1, 64])
def test_the_choice_is_that_of_trying_all(seed: int, units: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    costs = torch.rand(4, 6, generator=draw).tolist()
    sizes = (units * torch.randint(1, 40, (4, 6), generator=draw)).tolist()
    for budget in range(sum(map(min, sizes)), sum(map(max, sizes)) + units, 7 * units):
        chosen = least_costly(costs, sizes, budget)
        assert sum(row[c] for row, c in zip(sizes, chosen, strict=True)) <= budget
        fitting = (p for p in product(range(6), repeat=4) if sum(map(list.__getitem__, sizes, p)) <= budget)
        best = min(sum(map(list.__getitem__, costs, p)) for p in fitting)
        assert sum(map(list.__getitem__, costs, chosen)) == pytest.approx(best, rel=1e-12)


def test_choices_of_equal_cost_are_the_smallest_ones_and_large_tables_keep_to_the_budget(monkeypatch) -> None:
    assert least_costly([[1.0, 1.0, 1.0]] * 3, [[7, 2, 9]] * 3, 6) == [1, 1, 1]
    draw = torch.Generator().manual_seed(0)
    costs, sizes = torch.rand(9, 4, generator=draw), torch.randint(10**6, 10**7, (9, 4), generator=draw)
    costs, sizes, budget = costs.tolist(), sizes.tolist(), 3 * 10**7
    best = least_costly(costs, sizes, budget)
    monkeypatch.setattr("litpeft.model.quantize.allocation.LONGEST", 500)
    chosen = least_costly(costs, sizes, budget)
    assert sum(map(list.__getitem__, sizes, chosen)) <= budget
    least, found = (sum(map(list.__getitem__, costs, choices)) for choices in (best, chosen))
    assert least <= found <= 1.1 * least


def held_bits(model) -> tuple[dict[str, str], float]:
    """Returns the storage of each quantised layer, and their bits for each weight."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Quantized)}
    size = sum(8 * tensor.nbytes for layer in layers.values() for tensor in layer.packed().values())
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    return {name: type(layer).__name__ for name, layer in layers.items()}, size / weights


@pytest.mark.parametrize("bits", [2.5, 3.75])
def test_a_model_keeps_to_its_budget_and_spends_it(tmp_path, bits: float) -> None:
    folder = make_folder(tmp_path / "base", hidden_size=128, intermediate_size=256, num_attention_heads=4)
    model = build(folder, torch.float32, LQLoRA(bits=bits), storage=Storage("nf4"))
    kinds, used = held_bits(model)
    assert bits - 0.35 < used <= bits
    assert len({*kinds.values()}) >= 2
    uniform = build(folder, torch.float32, LQLoRA(storages=("nf2",), bits=bits), storage=Storage("nf4"))
    assert held_bits(uniform)[1] < 2.3
    dense, off = build(folder, torch.float32), []
    for one in (model, uniform):
        squares = 0.0
        for name in kinds:
            layer = one.get_submodule(name)
            a, b = layer.slot.factors()
            squares += float((layer.dense() + b @ a - dense.get_submodule(name).weight).square().sum())
        off.append(squares)
    assert off[0] < off[1]


def test_a_budget_below_the_smallest_storage_and_unknown_storages_are_refused(tiny_folder) -> None:
    with pytest.raises(ConfigError, match="must be at least 2.1") as error:
        build(tiny_folder, torch.float32, LQLoRA(bits=2.0), storage=Storage("nf4"))
    assert error.value.where == "method.bits"
    least = float(re.search(r"at least ([\d.]+)", error.value.what)[1])
    model = build(tiny_folder, torch.float32, LQLoRA(bits=least), storage=Storage("nf4"))
    assert {*held_bits(model)[0].values()} == {"NF2"}
    with pytest.raises(ValueError, match="method.storages must be of nf4, .*'nf5'"):
        LQLoRA(storages=("nf4", "nf5"))
    with pytest.raises(ValueError, match="method.storages must be of nf4, .*'none'"):
        LQLoRA(storages=())
    with pytest.raises(ValueError, match="method.bits must be at least 1 and at most 64"):
        LQLoRA(bits=float("nan"))
    with pytest.raises(ConfigError, match="not held in codes"):
        build(tiny_folder, torch.float32, LQLoRA())


def test_a_run_is_loaded_with_the_storages_it_was_trained_with(tiny_folder, tmp_path) -> None:
    argv = ("--method.bits", "2.8", "--base.cache", "true")
    base = make_folder(tmp_path / "base")
    run = find_run(finetune(base, tmp_path, *argv, method="lq_lora"))
    assert not (base / "litpeft-nf4-dq").exists()  # a cache is of one storage
    twice = [build_run(run, base, torch.float32, storage=run.storage) for _ in range(2)]
    kinds, used = held_bits(twice[0])
    assert used <= 2.8
    assert len({*kinds.values()}) >= 2
    assert torch.equal(twice[0](IDS), twice[1](IDS))
    numbers = run.delta()["banks.lq_lora.storages"].int().tolist()
    names, layers = LQLoRA().storages, [layer for layer, _ in LQLoRA().shapes(twice[0]).values()]
    assert [storage_class(names[number]) for number in numbers] == [type(layer) for layer in layers]
    delta = run.delta() | {"banks.lq_lora.storages": torch.full((14,), 3.0)}
    with pytest.raises(ModelError, match="does not say which of nf2, nf3, nf4"):
        build(base, torch.float32, run.method(), storage=run.storage, delta=delta)


def rows(count: int) -> list[Row]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, TINY["vocab_size"], (count, 12), generator=draw).tolist()
    return [Row(row, [False] * 4 + [True] * 8, 4, "a row", []) for row in ids]


def test_fisher_weights_are_the_roots_of_mean_squared_gradients_of_single_rows(tiny_folder) -> None:
    method, model = LQLoRA(fisher_rows=3), build(tiny_folder, torch.float64)
    method.calibrate(model, (collate([row]) for row in rows(5)))
    plain = build(tiny_folder, torch.float64)
    layer = plain.blocks[1].mlp.down
    layer.weight.requires_grad_(True)
    fisher = torch.zeros_like(layer.weight)
    for row in rows(3):
        logits = plain(torch.tensor([row.ids]))[0, 3:11]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[4:]))
        fisher += torch.autograd.grad(loss, layer.weight)[0].square()
    w1, w2 = method.weights["blocks.1.mlp.down"]
    want1, want2 = fisher.mean(1, True).sqrt(), fisher.mean(0, True).sqrt()
    for got, want in ((w1, want1), (w2, want2)):
        ratio = got / want
        assert (ratio / ratio.median() - 1).abs()[want > 0.02 * want.mean()].max() <= 1e-6
    assert float((w1 * w2).square().mean() / fisher.mean()) == pytest.approx(1, rel=0.05)


def test_a_run_weights_its_errors_by_rows_that_it_trains_on(tiny_folder, tmp_path) -> None:
    plain, weighted = (
        find_run(finetune(tiny_folder, tmp_path, *argv, "--method.bits", "2.8", out=out, method="lq_lora"))
        for out, argv in (("plain", ()), ("weighted", ("--method.fisher_rows", "4")))
    )
    name = "blocks.1.mlp.down.slot.lq_lora.A0"
    assert not torch.allclose(plain.delta()[name], weighted.delta()[name], rtol=0.01)
    models = [build_run(weighted, tiny_folder, torch.float32, storage=weighted.storage) for _ in range(2)]
    assert torch.equal(models[0](IDS), models[1](IDS))
    assert held_bits(models[0])[1] <= 2.8


def test_weights_move_the_error_to_where_it_counts_less() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    w1, w2 = torch.rand(96, 1) + 0.05, torch.rand(1, 128) + 0.05
    layer = make("nf3", False, weight)
    held, off = lambda w: layer.unpacked(layer.pack(w)), []  # noqa: E731
    for weights in ({"x": (w1, w2)}, {}):
        method = LQLoRA(rank=8)
        method.weights = weights
        (a, b), _ = method.parts("x", weight, 8, held)
        off.append(float((w1 * (weight - held(weight - b @ a) - b @ a) * w2).norm()))
    assert off[0] < off[1]
    method.weights = {"x": (torch.ones(96, 1), torch.ones(1, 128))}
    torch.manual_seed(1)
    same, _ = method.parts("x", weight, 8, held)
    method.weights = {}
    torch.manual_seed(1)
    plain, _ = method.parts("x", weight, 8, held)
    assert all(torch.equal(one, other) for one, other in zip(same, plain, strict=True))


def test_what_is_saved_has_the_storages_in_one_tensor(tiny_folder) -> None:
    model = build(tiny_folder, torch.float32, LQLoRA(), storage=Storage("nf4"))
    names = {name for name in delta_state(model) if not name.startswith("blocks.")}
    assert names == {"banks.lq_lora.storages"}
