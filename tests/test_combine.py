"""`combine`: what runs fold into, weighted and summed, comes back as one run of LoRA; peft's sum by SVD is the same."""

from pathlib import Path

import pytest
import torch
from conftest import finetune, folded
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from litpeft.cli import main
from litpeft.exchange.run import build_run, find_run
from litpeft.generate.load import load_model
from litpeft.methods.lora import LowRank
from litpeft.model.build import build
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.model.slots import Linear

FAST = ("--train.lr", "2e-2", "--train.epochs", "3", "--data.seed")
LAYERS = 14


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory) -> dict[str, Path]:
    """Runs of three methods on one base. Tests must not change them."""
    folder = tmp_path_factory.mktemp("runs")
    words = {"lora": ("--method.rank", "3"), "dora": ("--method.rank", "2"), "ia3": ()}
    return {name: finetune(tiny_folder, folder, *FAST, "1", *given, out=name, method=name)
            for name, given in words.items()}  # fmt: skip


@torch.no_grad()
def changes(base: Path, run: Path, storage: object = None) -> dict[str, torch.Tensor]:
    """Returns what a run adds to the weight of each linear layer."""
    plain, weights = build(base, torch.float32), folded(build_run(find_run(run), base, torch.float32))
    layers = [name for name, module in plain.named_modules() if isinstance(module, Linear)]
    return {name: (weights[f"{name}.weight"] - plain.get_submodule(name).weight).double() for name in layers}


def energy(said: str) -> float:
    return float(said.partition("keeps ")[2].partition("%")[0])


def test_a_weighted_sum_of_enough_rank_is_exact_and_peft_sums_the_same(runs, tiny_folder, tmp_path, capsys) -> None:
    out = tmp_path / "both"
    dora = runs["dora"]
    other = f'{{"{dora}": -0.5}}'
    main(["combine", str(runs["lora"]), str(out), "--weight", "2", "--also", other, "--rank", "64"])
    assert energy(capsys.readouterr().out) == 100.0
    one, two, got = (changes(tiny_folder, run) for run in (runs["lora"], runs["dora"], out))
    for name in one:
        want = 2 * one[name] - 0.5 * two[name]
        assert (got[name] - want).norm() <= 2e-6 * max(1.0, float(want.norm()))
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():  # the run answers as the sum of the weights does
        plain = build(tiny_folder, torch.float32)
        for name in one:
            plain.get_submodule(name).weight.data += (2 * one[name] - 0.5 * two[name]).float()
        assert torch.allclose(load_model(str(out), precision="32-true").model(ids), plain(ids), atol=1e-4)


def test_two_loras_sum_as_in_peft(runs, tiny_folder, tmp_path) -> None:
    """peft's combination "svd" of adapters of rank 3 and 5 to rank 4."""
    second = finetune(tiny_folder, tmp_path, *FAST, "2", "--method.rank", "5", out="second")
    main(["combine", str(runs["lora"]), str(tmp_path / "out"), "--also", f'{{"{second}": 0.25}}', "--rank", "4"])
    theirs, names = AutoModelForCausalLM.from_pretrained(tiny_folder), NameMap(*read_config(tiny_folder))
    config = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    theirs = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=6, **config), "a")
    theirs.add_adapter("b", LoraConfig(r=5, lora_alpha=10, **config))
    ours = {}
    for adapter, run in (("a", runs["lora"]), ("b", second), (None, tmp_path / "out")):
        for place, delta in build_run(find_run(run), tiny_folder, torch.float32).named_modules():
            if isinstance(delta, LowRank):
                linear = names.file_name(f"{place.removesuffix('.slot.lora')}.weight").removesuffix(".weight")
                layer = theirs.get_submodule(f"base_model.model.{linear}")
                if adapter is None:
                    ours[linear] = layer, delta.scale * delta.B @ delta.A
                else:
                    layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data = delta.A.data, delta.B.data
    theirs.add_weighted_adapter(["a", "b"], [1.0, 0.25], "sum", "svd", svd_rank=4)
    assert len(ours) == LAYERS
    for layer, change in ours.values():
        want = layer.get_delta_weight("sum")
        assert (change - want).norm() <= 1e-4 * want.norm()


def test_a_method_as_lora_of_a_small_rank_keeps_the_energy_that_is_told(runs, tiny_folder, tmp_path, capsys) -> None:
    main(["combine", str(runs["ia3"]), str(tmp_path / "out"), "--rank", "4"])
    told = energy(capsys.readouterr().out)
    all_of_it = changes(tiny_folder, runs["ia3"])
    values = [torch.linalg.svdvals(change).square() for change in all_of_it.values()]
    want = 100 * sum(float(v[:4].sum()) for v in values) / sum(float(v.sum()) for v in values)
    assert told == pytest.approx(want, abs=0.01)
    assert 0 < told < 100
    got = changes(tiny_folder, tmp_path / "out")
    assert {name for name, change in got.items() if change.any()} == {n for n, c in all_of_it.items() if c.any()}
    for name, change in got.items():
        left = all_of_it[name] - change
        assert float(left.square().sum()) <= float(torch.linalg.svdvals(all_of_it[name])[4:].square().sum()) * 1.001


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_a_part_that_was_taken_out_of_the_weight_is_no_change(tiny_folder, tmp_path, method: str, capsys) -> None:
    run = finetune(tiny_folder, tmp_path, *FAST, "1", "--method.rank", "2", out="run", method=method)
    main(["combine", str(run), str(tmp_path / "out"), "--rank", "64"])
    assert energy(capsys.readouterr().out) == 100.0
    ids = torch.arange(5, 30)[None]
    storage = find_run(run).storage
    with torch.no_grad():
        want = build_run(find_run(run), tiny_folder, torch.float32, storage=storage)(ids)
        got = build_run(find_run(tmp_path / "out"), tiny_folder, torch.float32, storage=storage)(ids)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize(
    ("method", "words", "why"),
    [
        ("prefix", (), "acts on activations"),
        ("lora", ("--method.unfreeze", '["*norm1*"]'), "it trained blocks.0.norm1.weight"),
        ("bitfit", ("--method.add_missing", "true"), "it changes the bias of blocks.0.attn.q"),
        ("full", (), "this is a model, not a run"),
    ],
)
def test_what_lora_cannot_hold_is_refused(method, words, why, tiny_folder, tmp_path, capsys) -> None:
    run = finetune(tiny_folder, tmp_path, *FAST, "1", *words, out="run", method=method)
    with pytest.raises(SystemExit) as stop:
        main(["combine", str(run), str(tmp_path / "out")])
    assert stop.value.code == 4
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_of_different_bases_are_refused(runs, tiny_folder, tmp_path, capsys) -> None:
    coded = finetune(tiny_folder, tmp_path, *FAST, "1", out="coded", method="qlora")
    with pytest.raises(SystemExit):
        main(["combine", str(runs["lora"]), str(tmp_path / "out"), "--also", f'{{"{coded}": 1}}'])
    assert "another storage" in capsys.readouterr().err
