"""AdapterDrop: which adapters a step trains, what it computes below them, and what a run answers without some."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn as nn
from conftest import TINY, finetune, make_folder

from litpeft.core.errors import ConfigError, UserError
from litpeft.generate.load import load_model
from litpeft.methods.adapter_drop import AdapterDrop
from litpeft.methods.bottleneck import Bottleneck, BottleneckAdapter
from litpeft.model.build import build
from litpeft.model.delta import trainable, without_delta
from litpeft.model.gpt import GPT

IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(0))
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "deeper", num_hidden_layers=LAYERS)


def learnt(folder: Path, method: Bottleneck) -> GPT:
    model = build(folder, torch.float64, method).eval()
    torch.manual_seed(3)
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.3)
    return model


def on(model: GPT) -> list[bool]:
    """Returns for each block whether its adapter acts."""
    return [bool(block.after_mlp.deltas) for block in model.blocks]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "lin", "parallel"])
def test_without_the_first_adapters_the_first_blocks_are_the_bases(folder: Path, kind: str) -> None:
    model, base = (learnt(folder, AdapterDrop(kind=kind)), build(folder, torch.float64))
    whole = model(IDS)
    mixed = build(folder, torch.float64)
    for n in range(LAYERS + 1):
        mixed.blocks = nn.ModuleList([*base.blocks[:n], *model.blocks[n:]])
        want = mixed(IDS)
        with without_delta(model.blocks[:n], "bottleneck"):
            assert torch.equal(model(IDS), want)
    assert torch.equal(want, base(IDS))
    assert torch.equal(model(IDS), whole)


def test_each_number_of_blocks_is_drawn_as_often_and_a_step_leaves_all_on(folder: Path) -> None:
    counts = Counter()
    method = AdapterDrop(most_dropped=2)
    model = build(folder, torch.float32, method)
    for step in range(900):
        with method.training_step(model, Random(f"0 {step}")):
            n = on(model).index(True)
            assert on(model) == [False] * n + [True] * (LAYERS - n)
            counts[n] += 1
        assert all(on(model))
    assert counts.keys() == {0, 1, 2}
    assert all(abs(count - 300) < 60 for count in counts.values())  # four deviations
    method = AdapterDrop()
    model, drawn = build(folder, torch.float32, method), set()
    for step in range(60):
        with method.training_step(model, Random(step)):
            drawn.add(on(model).index(True))
    assert drawn == set(range(LAYERS))


@pytest.mark.parametrize("specialised", [True, False])
def test_nothing_is_differentiated_below_the_first_adapter(folder: Path, specialised: bool) -> None:
    n, seen = 2, []
    method = Bottleneck(skip_layers=n) if specialised else AdapterDrop()
    model = build(folder, torch.float32, method)
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, y: seen.append(y.requires_grad))
    draws = next(Random(seed) for seed in range(99) if Random(seed).randint(0, LAYERS - 1) == n)
    with method.training_step(model, draws):
        model(IDS).square().sum().backward()
    assert seen == [False] * n + [True] * (LAYERS - n)
    adapters = [[m for m in block.modules() if isinstance(m, BottleneckAdapter)] for block in model.blocks]
    assert [len(found) for found in adapters[:n]] == ([0] * n if specialised else [1] * n)
    assert all(adapter.up.grad is None for found in adapters[:n] for adapter in found)
    assert all(adapter.up.grad.any() for found in adapters[n:] for adapter in found)


def test_a_run_answers_with_any_number_of_adapters(folder: Path, tmp_path: Path) -> None:
    argv = "--train.lr", "1e-2", "--train.epochs", "3"
    run = finetune(folder, tmp_path, *argv, method="adapter_drop")
    models = [load_model(str(run), precision="32-true", method={"skip_layers": n}).model for n in range(LAYERS)]
    assert [on(model) for model in models] == [[False] * n + [True] * (LAYERS - n) for n in range(LAYERS)]
    whole = models[0]
    with torch.no_grad():
        for n, model in enumerate(models):
            with without_delta(whole.blocks[:n], "bottleneck"):
                want = whole(IDS)
            assert (model(IDS) - want).abs().max() <= 5e-6 * want.abs().max()  # blocks without a Delta are fused
            assert (model(IDS) - whole(IDS)).abs().max() > 0 or not n
    with pytest.raises(ConfigError, match="4 leaves none of the 4 blocks"):
        load_model(str(run), method={"skip_layers": 4})
    with pytest.raises(ConfigError, match="kind stays as it was in training; .* may change: skip_layers"):
        load_model(str(run), method={"kind": "houlsby"})
    with pytest.raises(ConfigError, match="method.skip_layers must be a whole number"):
        load_model(str(run), method={"skip_layers": "two"})
    with pytest.raises(ConfigError, match="this is a model by itself"):
        load_model(str(folder), method={"skip_layers": 1})


def test_a_run_without_the_first_adapters_cannot_answer_with_them(folder: Path, tmp_path: Path) -> None:
    argv = "--train.lr", "1e-2", "--method.skip_layers", "2"
    run = finetune(folder, tmp_path, *argv, method="bottleneck")
    assert on(load_model(str(run)).model) == [False, False, True, True]
    with pytest.raises(UserError, match=r"blocks\.1\.after_attn\.bottleneck\.down is missing"):
        load_model(str(run), method={"skip_layers": 1})


@pytest.mark.parametrize("settings", [{"most_dropped": 0}, {"skip_layers": -1}, {"inner": 0}])
def test_impossible_values_are_refused_by_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}"):
        AdapterDrop(**settings)


def test_more_blocks_than_the_model_has_are_refused(folder: Path) -> None:
    for settings, key in (({"most_dropped": LAYERS}, "most_dropped"), ({"skip_layers": LAYERS}, "skip_layers")):
        with pytest.raises(ConfigError, match=f"method.{key}: {LAYERS} leaves none"):
            build(folder, torch.float32, AdapterDrop(**settings))
