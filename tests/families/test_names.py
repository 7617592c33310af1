"""The two-way name map: what is read and written again is what was there, and what does not fit is named."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import MODELS, make_family

from litpeft.core.errors import ModelError, UserError
from litpeft.core.safetensors import Weights
from litpeft.model.build import build
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def opened(folder: Path) -> tuple[NameMap, Weights]:
    return NameMap(*read_config(folder)), Weights(folder)


@pytest.mark.parametrize("name", MODELS)
def test_all_tensors_read_and_written_in_any_order_are_those_of_the_file(name: str, tmp_path) -> None:
    make_family(tmp_path, name)
    names, weights = opened(tmp_path)
    pairs = [(ours, names.read(weights, ours)) for ours in names.ours]
    assert all(tensor.is_contiguous() and tensor.shape == names.ours[ours] for ours, tensor in pairs)
    random.Random(0).shuffle(pairs)
    written, want = dict(names.written(pairs)), load_file(tmp_path / "model.safetensors")
    assert written.keys() == want.keys() == names.shapes.keys()
    assert all(torch.equal(written[name], tensor) and written[name].is_contiguous() for name, tensor in want.items())


def test_the_parts_of_a_fused_tensor_are_those_that_transformers_computes(tmp_path) -> None:
    x = torch.randn(1, 5, 64)
    for name, fused in (
        ("neox", "gpt_neox.layers.1.attention.query_key_value"),
        ("gpt2", "transformer.h.1.attn.c_attn"),
    ):
        y = make_family(tmp_path / name, name).get_submodule(fused)(x)
        if name == "neox":  # as GPTNeoXAttention cuts it: heads first
            parts = [part.flatten(2) for part in y.view(1, 5, 4, 48).chunk(3, dim=-1)]
        else:
            parts = y.split(64, dim=2)
        attn = build(tmp_path / name, torch.float32).blocks[1].attn
        for linear, part in zip((attn.q, attn.k, attn.v), parts, strict=True):
            assert torch.allclose(linear(x), part, atol=1e-5)


def test_no_more_is_held_than_the_parts_of_one_fused_tensor(tmp_path) -> None:
    make_family(tmp_path, "gpt2")
    names, weights = opened(tmp_path)
    given, most = 0, 0

    def pairs():
        nonlocal given
        for given, ours in enumerate(names.ours, 1):  # noqa: B007
            yield ours, names.read(weights, ours)

    done = 0
    for theirs, _ in names.written(pairs()):
        done += len(names.parts[theirs])
        most = max(most, given - done)
    assert most <= 4  # the weights and biases of q and k, until v comes


def test_files_of_gpt2_without_the_prefix_load_and_are_written_with_it(tmp_path) -> None:
    theirs = make_family(tmp_path, "gpt2")
    rewrite(tmp_path, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})
    names, weights = opened(tmp_path)
    assert "h.0.attn.c_attn.weight" in weights.file_of
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(build(tmp_path, torch.float32)(ids), theirs(ids).logits, atol=1e-4)
    written = dict(names.written((ours, names.read(weights, ours)) for ours in names.ours))
    assert written.keys() == {name for name, _ in theirs.named_parameters()}


@pytest.mark.parametrize("name", ["neox", "gpt2", "llama"])
def test_the_harmless_buffers_of_old_files_are_passed_over_and_other_extras_named(name: str, tmp_path) -> None:
    make_family(tmp_path, name)
    mask, number, wave = torch.ones(1, 1, 8, 8, dtype=torch.bool), torch.tensor(-1e9), torch.ones(4)
    neox, gpt2 = "gpt_neox.layers.0.attention", "transformer.h.0.attn"
    buffers = {
        "neox": {f"{neox}.bias": mask, f"{neox}.masked_bias": number, f"{neox}.rotary_emb.inv_freq": wave},
        "gpt2": {f"{gpt2}.bias": mask.float(), f"{gpt2}.masked_bias": number},
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": wave},
    }
    rewrite(tmp_path, lambda tensors: tensors | buffers[name])
    build(tmp_path, torch.float32)
    rewrite(tmp_path, lambda tensors: tensors | {"attention.extra": wave})
    with pytest.raises(ModelError, match=r"do not fit config\.json: .*attention\.extra is not of this architecture"):
        build(tmp_path, torch.float32)


def test_a_fused_tensor_that_is_missing_too_small_or_not_transposed_is_named(tmp_path) -> None:
    make_family(tmp_path, "gpt2")
    name = "transformer.h.1.attn.c_attn.weight"
    whole = load_file(tmp_path / "model.safetensors")
    for change, message in (
        ({}, f"{name} is missing"),
        ({name: whole[name][:, :128].contiguous()}, rf"{name} is \(64, 128\), config.json says \(64, 192\)"),
        ({name: whole[name].t().contiguous()}, rf"{name} is \(192, 64\), config.json says \(64, 192\)"),
    ):
        save_file({k: t for k, t in whole.items() if k != name} | change, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            build(tmp_path, torch.float32)


def test_a_part_that_is_never_given_or_that_no_file_has_is_an_error_that_names_it(tmp_path) -> None:
    make_family(tmp_path, "neox")
    names, weights = opened(tmp_path)
    pairs = [(ours, names.read(weights, ours)) for ours in names.ours]
    without = [pair for pair in pairs if pair[0] != "blocks.1.attn.k.bias"]
    with pytest.raises(ModelError, match=r"the files would not be a whole model: blocks.1.attn.k.bias missing"):
        list(names.written(without))
    with pytest.raises(ModelError, match=r"the method adds head.bias, which this family's files have no place for"):
        list(names.written([*pairs, ("head.bias", torch.zeros(320))]))


def test_a_stored_copy_of_the_tied_embedding_is_taken_only_if_it_is_one(tmp_path) -> None:
    make_family(tmp_path, "gpt2")
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()})
    assert "head.weight" not in build(tmp_path, torch.float32).state_dict()
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})
    with pytest.raises(UserError, match="lm_head.weight is not the embedding"):
        build(tmp_path, torch.float32)
