"""Several methods in one run: counts add up, and each alone is the combination with the others off."""

import json
from random import Random

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, finetune, folded
from safetensors.torch import load_file

from litpeft.core.errors import UserError
from litpeft.exchange.run import build_run, find_run
from litpeft.generate.cache import TokenCache
from litpeft.generate.load import load_model
from litpeft.methods.combo import Combo
from litpeft.methods.lora import LoRA
from litpeft.methods.prefix import Prefix
from litpeft.methods.reft import ReFT
from litpeft.model.build import build
from litpeft.model.config import ModelConfig
from litpeft.model.context import Context
from litpeft.model.delta import attach, delta_state, load_delta, trainable, without_delta
from litpeft.model.gpt import GPT

N = 3  # virtual tokens
TEXT = torch.randint(0, TINY["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))
METHODS = {"lora": {"rank": 4, "alpha": 12}, "prefix": {"prompt_length": N}}
ALONE = {"lora": LoRA(rank=4, alpha=12.0), "prefix": Prefix(prompt_length=N)}


def before(ids: torch.Tensor, count: int = N) -> torch.Tensor:
    """Returns ids (B, T) with placeholders before them."""
    return F.pad(ids, (count, 0))


def learnt(folder, dtype: torch.dtype = torch.float64, methods: dict | None = None) -> GPT:
    model = build(folder, dtype, Combo(METHODS if methods is None else methods)).eval()
    torch.manual_seed(1)
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.3)
    return model


def alone(folder, both: GPT, name: str, dtype: torch.dtype) -> GPT:
    """Returns a model with one of the methods, which has learnt what it has in the combination."""
    model = build(folder, dtype, ALONE[name]).eval()
    load_delta(model, {key: delta_state(both)[key] for key in model.delta_keys}, "test")
    return model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "other"), [("lora", "prefix"), ("prefix", "lora")])
def test_each_method_alone_is_the_combination_with_the_other_off(tiny_folder, name: str, other: str, dtype) -> None:
    both, one, rows = learnt(tiny_folder, dtype), None, [[5, 6, 7], TEXT[0].tolist()]
    one = alone(tiny_folder, both, name, dtype)
    with_both = both(before(TEXT))
    with without_delta(both, other):
        assert both.virtual_tokens == one.virtual_tokens == (N if name == "prefix" else 0)
        ids = before(TEXT, one.virtual_tokens)
        assert torch.equal(both(ids), one(ids))
        caches = TokenCache(both), TokenCache(one)
        for row in ([1], [1, 2]):
            assert torch.equal(*(cache.logits([ids + row for ids in rows]) for cache in caches))
    assert torch.equal(both(before(TEXT)), with_both)
    assert not torch.equal(one(ids)[:, -1], with_both[:, -1])


@torch.no_grad()
def test_lora_folded_into_the_base_below_the_prefix_is_both(tiny_folder) -> None:
    both = learnt(tiny_folder)
    lora, prefix = (alone(tiny_folder, both, name, torch.float64) for name in ALONE)
    want = both(before(TEXT))[:, N:]
    for name, tensor in folded(lora).items():
        prefix.get_parameter(name).copy_(tensor)
    assert (prefix(before(TEXT))[:, N:] - want).abs().max() <= 1e-10 * want.abs().max()


def test_learned_keys_are_left_alone_by_lora_in_whatever_order_they_are_named(tiny_folder) -> None:
    both = learnt(tiny_folder, methods={"prefix": {"prompt_length": N}, "lora": {"rank": 4, "alpha": 12}})
    assert list(both.blocks[0].attn.k.slot.deltas) == ["lora", "prefix"]
    assert torch.equal(both(before(TEXT)), learnt(tiny_folder)(before(TEXT)))
    both(before(TEXT))[:, N:].square().sum().backward()
    assert all(p.grad.any() for p in trainable(both).values())


@torch.no_grad()
def test_reft_counts_its_positions_from_the_text(tiny_folder) -> None:
    both = learnt(tiny_folder, methods={"prefix": {"prompt_length": N}, "reft": {"first": 2, "last": 3}})
    (edit,) = both.blocks[0].after_block.deltas.values()
    ctx = Context.packed((N + 12, N + 7), TEXT.device, (N + 8, N + 3))
    ctx.virtual_tokens = N
    where = edit.edited(ctx)[0].nonzero().flatten().tolist()
    assert [at - N for at in where[:5]] == [0, 1, 5, 6, 7]
    assert [at - 12 - 2 * N for at in where[5:]] == [0, 2]
    with without_delta(both, "prefix"):
        ids, ctx = TEXT, Context.rows(TEXT)
        ctx.prompt_lengths = torch.tensor([[8], [3]])
        one = build(tiny_folder, torch.float64, ReFT(first=2, last=3)).eval()
        load_delta(one, {key: delta_state(both)[key] for key in one.delta_keys}, "test")
        assert torch.equal(both(ids, ctx), one(ids, ctx))


def test_a_run_is_loaded_with_all_of_its_methods(tiny_folder, tmp_path) -> None:
    words = "--method.methods", '{"lora": {"rank": 2}, "bottleneck": {"kind": "parallel"}}', "--train.lr", "1e-2"
    run = finetune(tiny_folder, tmp_path, *words, method="combo")
    method = find_run(run).method()
    assert [type(one).__name__ for one in method.parts] == ["LoRA", "Bottleneck"]
    assert method.parts[0].rank == 2
    model = load_model(str(run), precision="32-true").model
    with torch.no_grad():
        logits = [model(TEXT)]
        for name in ("lora", "bottleneck"):
            with without_delta(model, name):
                logits.append(model(TEXT))
    assert not torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_what_its_methods_do_around_steps_and_before_and_after_a_run_is_done(tiny_folder, tmp_path, capsys) -> None:
    methods = {
        "ada_lora": {"rank": 4, "final_rank": 2, "targets": ["*.attn.*"]},
        "eva": {"rank": 3, "targets": ["*.mlp.*"]},
        "glora": {"rank": 2, "population": 2, "generations": 1, "targets": ["*.attn.o"]},
    }
    words = "--method.methods", json.dumps(methods), "--train.epochs", "6", "--train.lr", "1e-2"
    run = finetune(tiny_folder, tmp_path, *words, method="combo")
    saved = load_file(run / "final" / "delta.safetensors")
    triples = {name: tensor for name, tensor in saved.items() if name.endswith("ada_lora.E")}
    assert len(triples) == 8
    assert sum(int((tensor != 0).sum()) for tensor in triples.values()) == 2 * 8
    ranks = [len(tensor) for name, tensor in saved.items() if name.endswith("eva.A")]
    assert sum(ranks) == 3 * 6
    assert "is the least loss on the held-out rows of 2 paths" in capsys.readouterr().err
    with torch.no_grad():
        model = load_model(str(run), precision="32-true").model
        want = build_run(find_run(run), tiny_folder, torch.float32)(TEXT)
        assert torch.allclose(model(TEXT), want, atol=1e-4)


def test_a_result_leaves_out_what_only_training_needs_of_each_method(tiny_folder, tmp_path) -> None:
    argv = (
        "--method.methods",
        '{"lora": {}, "ptuning": {"hidden": 8, "before": [4], "after": []}}',
        "--train.lr",
        "1e-2",
    )
    run = find_run(finetune(tiny_folder, tmp_path, *argv, method="combo"))
    assert sorted({key.split(".")[-2] for key in run.delta()}) == ["lora", "ptuning"]
    assert run.delta()["after_embed.ptuning.vectors"].shape == (4, 64)
    assert run.method().methods["lora"] == {}
    assert run.method().methods["ptuning"]["encoder"] is None
    assert load_model(str(run.folder), precision="32-true").model.frame == (4, 0)


def test_a_step_leaves_out_adapters_alone(tiny_folder) -> None:
    combo = Combo({"lora": {}, "adapter_drop": {}})
    model, drawn = build(tiny_folder, torch.float32, combo), set()
    assert combo.idle_parts
    for step in range(20):
        with combo.training_step(model, Random(step)):
            drawn.add(tuple(len(block.after_mlp.deltas) for block in model.blocks))
            assert all(layer.slot.deltas for layer in (model.blocks[0].attn.q, model.blocks[1].mlp.down))
    assert drawn == {(1, 1), (0, 1)}


def test_parameter_counts_add_up() -> None:
    parts = {"lora": {"rank": 8, "targets": ["*.attn.q", "*.attn.v"]}, "prefix": {"prompt_length": 10}}
    with torch.device("meta"):
        model = GPT(ModelConfig(32000, 4096, 32, 32, 32, 128, 11008, 2048))
        attach(model, Combo(parts | {"bottleneck": {"kind": "pfeiffer", "reduction_factor": 256}}))
    assert sum(p.numel() for p in trainable(model).values()) == 4_194_304 + 2_621_440 + 32 * (2 * 4096 * 16 + 16 + 4096)


def test_what_a_method_unfreezes_trains_in_a_combination(tiny_folder) -> None:
    model = build(tiny_folder, torch.float32, Combo({"adapter_v2": {}, "prefix": {}}))
    assert model.norm.weight.requires_grad
    assert not model.embed.weight.requires_grad


@pytest.mark.parametrize(
    ("methods", "what"),
    [
        ({"lora": {}}, "must name two methods or more; there are lora, "),
        ({"lora": {}, "lroa": {}}, '"lroa" is no method'),
        ({"lora": {}, "full": {}}, "method.methods.full cannot be combined with others"),
        ({"prefix": {}, "qlora": {}}, "method.methods.qlora cannot be combined with others; name lora"),
        ({"lora": {}, "combo": {}}, "method.methods.combo cannot be combined"),
        ({"lora": {"rnk": 3}, "prefix": {}}, "method.methods.lora.rnk is not known; there are .*rank, "),
        ({"lora": {"rank": 0}, "prefix": {}}, "method.methods.lora: method.rank must be at least 1"),
        ({"lora": {"rank": "4"}, "prefix": {}}, "method.methods.lora.rank must be a whole number, got '4'"),
        ({"lora": 4, "prefix": {}}, "method.methods.lora must be keys and values"),
    ],
)
def test_impossible_combinations_are_refused_by_key(methods: dict, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Combo(methods)


def test_two_methods_that_want_the_same_place_are_refused(tiny_folder) -> None:
    with pytest.raises(UserError, match="two of the methods write the virtual tokens"):
        build(tiny_folder, torch.float32, Combo({"prefix": {}, "prompt": {}}))
    with pytest.raises(UserError, match="adapter_v2|adapter"):
        build(tiny_folder, torch.float32, Combo({"adapter": {}, "adapter_v2": {}}))
