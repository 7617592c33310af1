"""PiSSA and LoftQ against torch's singular value decomposition and the figures of their formulas."""

import pytest
import torch
from conftest import TINY, finetune, folded, make_folder
from safetensors.torch import load_file

from litpeft.cli import main
from litpeft.core.errors import ConfigError
from litpeft.exchange.run import build_run, find_run
from litpeft.generate.cpu.fused_block import fuse_blocks
from litpeft.generate.cpu.pack import pack_weights
from litpeft.methods.combo import Combo
from litpeft.methods.loftq import LoftQ
from litpeft.methods.pissa import PiSSA, Split
from litpeft.model.build import build
from litpeft.model.delta import without_delta
from litpeft.model.quantize import Storage
from litpeft.model.quantize.four_bit import NF4
from litpeft.model.slots import Linear

IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


def splits(model) -> dict[str, tuple[Linear, Split]]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    pairs = {name: (m, next(iter(m.slot.deltas.values()), None)) for name, m in layers.items()}
    return {name: pair for name, pair in pairs.items() if pair[1] is not None}


@pytest.mark.parametrize(("alpha", "rslora"), [(None, False), (3.0, True)])
def test_the_update_starts_as_the_largest_singular_parts(tiny_folder, alpha: float | None, rslora: bool) -> None:
    base = build(tiny_folder, torch.float64)
    model = build(tiny_folder, torch.float64, PiSSA(rank=4, alpha=alpha, rslora=rslora))
    found = splits(model)
    assert len(found) == 14
    for name, (linear, delta) in found.items():
        weight = base.get_submodule(name).weight
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        want = u[:, :4] * s[:4] @ v[:4]
        update = delta.scale * delta.B @ delta.A
        assert (update - want).abs().max() <= 1e-6 * want.abs().max()
        assert (linear.weight + update - weight).abs().max() <= 1e-12
        assert torch.allclose(torch.linalg.svdvals(linear.weight)[0], s[4], rtol=1e-6)
        assert torch.allclose(delta.A.norm(), delta.B.norm(), rtol=1e-6)
    assert (model(IDS) - base(IDS)).abs().max() <= 1e-12
    with without_delta(model):
        assert (model(IDS) - base(IDS)).abs().max() <= 1e-12


def test_a_quantised_rest_is_nearer_to_the_base_than_quantised_weights(tmp_path) -> None:
    folder = make_folder(tmp_path / "base", hidden_size=128, intermediate_size=256, num_attention_heads=4)
    dense, codes = build(folder, torch.float32), build(folder, torch.float32, storage=Storage("nf4"))
    model = build(folder, torch.float32, PiSSA(rank=16), storage=Storage("nf4"))
    for name, (linear, delta) in splits(model).items():
        weight = dense.get_submodule(name).weight
        ours = (linear.dense() + delta.scale * delta.B @ delta.A - weight).norm()
        assert ours < (codes.get_submodule(name).dense() - weight).norm()


@pytest.mark.parametrize("storage", [None, "nf4"])
def test_a_run_makes_the_weight_again_that_it_was_trained_with(tiny_folder, tmp_path, storage: str | None) -> None:
    argv = () if storage is None else ("--base.quantize", storage)
    run = find_run(finetune(tiny_folder, tmp_path, *argv, method="pissa"))
    saved = load_file(run.folder / "delta.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"A", "B", "A0", "B0"}
    twice = [build_run(run, tiny_folder, torch.float32, storage=run.storage) for _ in range(2)]
    assert torch.equal(twice[0](IDS), twice[1](IDS))
    if storage is None:
        base, merged = build(tiny_folder, torch.float32), folded(twice[0])
        for name, (linear, delta) in splits(twice[0]).items():
            weight = base.get_submodule(name).weight
            rest = weight - delta.scale * saved[f"{name}.slot.pissa.B0"] @ saved[f"{name}.slot.pissa.A0"]
            assert (linear.weight - rest).abs().max() <= 1e-6
            want = rest + delta.scale * delta.B @ delta.A
            assert (merged[f"{name}.weight"] - want).abs().max() <= 1e-6


def relative_errors(weight: torch.Tensor, iterations: int) -> float:
    """Returns |W - Q - s B A| / |W| of a weight that LoftQ starts, at rank 16 and double quantisation off."""
    with torch.device("meta"):
        layer = Linear(*weight.shape[::-1])
        layer.__class__ = NF4
        layer.convert(torch.float32, False)
    layer.slot.add("loftq", Split(weight.size(1), len(weight), 16, 2.0, 0.0))
    held = lambda w: layer.unpacked(layer.pack(w))  # noqa: E731
    rest = LoftQ(rank=16, iterations=iterations).start("", layer, weight, held, None)
    delta = layer.slot.deltas["loftq"]
    return float((weight - held(rest) - delta.scale * delta.B @ delta.A).norm() / weight.norm())


def test_the_error_of_loftq_falls_as_in_the_formula() -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    errors = [relative_errors(weight, iterations) for iterations in range(1, 6)]
    assert errors == pytest.approx([0.0867, 0.0827, 0.0808, 0.0796, 0.0787], rel=0.01)


def test_one_iteration_of_loftq_keeps_the_codes_of_the_weight(tiny_folder) -> None:
    plain = build(tiny_folder, torch.float32, storage=Storage("nf4"))
    model = build(tiny_folder, torch.float32, LoftQ(iterations=1), storage=Storage("nf4"))
    for name, (linear, _) in splits(model).items():
        assert torch.equal(linear.dense(), plain.get_submodule(name).dense())


def test_loftq_wants_a_quantised_base(tiny_folder) -> None:
    with pytest.raises(ConfigError, match="not held in codes") as error:
        build(tiny_folder, torch.float32, LoftQ())
    assert error.value.where == "base.quantize"


def test_a_loftq_run_is_not_merged_onto_the_original(tiny_folder, tmp_path, capsys) -> None:
    run = finetune(tiny_folder, tmp_path, method="loftq")
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(run), "--onto", "original"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "error: onto: what was learned belongs to weights in nf4, not to others: loftq chooses the codes" in said
    assert said.endswith("hint: leave it out\n")


@pytest.mark.parametrize("iterations", [0, 1001])
def test_impossible_iterations_are_refused(iterations: int) -> None:
    with pytest.raises(ValueError, match="method.iterations must be at least 1 and at most 1000"):
        LoftQ(iterations=iterations)


def test_a_fused_model_is_the_base_again_where_only_some_layers_gave_a_part_away(tiny_folder) -> None:
    method = Combo(methods={"lora": {"targets": ["*.attn.*"]}, "pissa": {"targets": ["*.mlp.*"]}})
    model = build(tiny_folder, torch.float32, method).eval().requires_grad_(False)
    for _, delta in splits(model).values():
        delta.B.data += 0.1 * torch.randn(delta.B.shape, generator=torch.Generator().manual_seed(0))
    pack_weights(model)
    fuse_blocks(model)
    with torch.no_grad():
        want, on = build(tiny_folder, torch.float32)(IDS), model(IDS)
        with without_delta(model):
            assert (model(IDS) - want).norm() <= 5e-6 * want.norm()
        assert torch.equal(model(IDS), on)
        assert (on - want).norm() > 0.01 * want.norm()
