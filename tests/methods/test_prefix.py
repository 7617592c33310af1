"""Prefix tuning against peft's, and against a real prompt whose keys and values are taken over."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, finetune, in_float64, make_folder
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

from litpeft.data.batches import collate
from litpeft.data.rows import Row
from litpeft.exchange.run import build_run, find_run
from litpeft.generate.cache import TokenCache
from litpeft.methods.prefix import Prefix
from litpeft.methods.ptuning_v2 import PTuningV2
from litpeft.model.build import build
from litpeft.model.context import Context
from litpeft.model.delta import load_delta, trainable
from litpeft.model.gpt import GPT
from litpeft.model.objective import summed_loss
from litpeft.train.checkpoints import Checkpoints

N = 3  # virtual tokens
TEXT = torch.randint(0, TINY["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))
LEAVES = (("W", "weight"), ("b", "bias"))
SMALL = {"vocab_size": 320, "initializer_range": 0.1}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **SMALL),  # learned positions
    "gpt_neox": GPTNeoXConfig(  # a part of each head rotates
        hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, **SMALL
    ),
}


def before(ids: torch.Tensor) -> torch.Tensor:
    """Returns ids (B, T) with placeholders before them."""
    return F.pad(ids, (N, 0))


def learnt(folder, dtype: torch.dtype = torch.float64) -> GPT:
    model = build(folder, dtype, Prefix(prompt_length=N)).eval()
    torch.manual_seed(1)
    for parameter in trainable(model).values():
        nn.init.normal_(parameter)
    return model


def tensors(model: GPT) -> list[nn.Parameter]:
    """Returns keys and values of block 0, then those of block 1."""
    return [linear.slot.deltas["prefix"].vectors for b in model.blocks for linear in (b.attn.k, b.attn.v)]


@pytest.fixture(scope="module", params=["llama", *CONFIGS])
def folder(request, tiny_folder, tmp_path_factory):
    if request.param == "llama":
        return tiny_folder
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(made)
    return made


def test_logits_and_gradients_equal_peft(folder) -> None:
    ours = learnt(folder)
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
    theirs = get_peft_model(theirs, config, autocast_adapter_dtype=False).eval()
    other = theirs.prompt_encoder["default"].embedding.weight  # (N, layers * 2 * heads * D)
    other.data = torch.cat([own.detach() for own in tensors(ours)], 1)
    want, got = theirs(TEXT, attention_mask=torch.ones_like(TEXT)).logits, ours(before(TEXT))[:, N:]
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    for logits in (want, got):
        logits.square().sum().backward()
    gradient = torch.cat([own.grad for own in tensors(ours)], 1)
    assert (gradient - other.grad).abs().max() <= 1e-9 * other.grad.abs().max()


@pytest.fixture(scope="module")
def many_heads(tmp_path_factory):
    """A Llama with as many key heads as query heads: for others peft's network is narrower than the model."""
    return make_folder(tmp_path_factory.mktemp("models") / "many-heads", num_key_value_heads=4)


def network(model: GPT) -> list[nn.Parameter]:
    """Returns E, W and b of the network."""
    return list(model.banks["prefix"].parameters())


def outputs(model: GPT, leaf: str) -> list[nn.Parameter]:
    """Returns W or b of the keys and values of block 0, then of block 1."""
    return [getattr(x.slot.deltas["prefix"], leaf) for b in model.blocks for x in (b.attn.k, b.attn.v)]


def test_with_a_network_keys_values_logits_and_gradients_equal_peft(many_heads) -> None:
    torch.manual_seed(0)
    ours = build(many_heads, torch.float64, Prefix(prompt_length=N, hidden=12)).eval()
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(many_heads, dtype=torch.float64))
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=12
    )
    theirs = get_peft_model(theirs, config, autocast_adapter_dtype=False).eval()
    other = theirs.prompt_encoder["default"].double()
    first, last = other.transform[0], other.transform[2]
    pairs = list(zip(network(ours), (other.embedding.weight, first.weight, first.bias), strict=True))
    for own, copy in pairs:
        copy.data = own.detach().clone()
    for leaf, whole in (("W", last.weight), ("b", last.bias)):
        whole.data = torch.cat([own.detach() for own in outputs(ours, leaf)])
    made = torch.cat([x.slot.deltas["prefix"].table() for b in ours.blocks for x in (b.attn.k, b.attn.v)], 1)
    assert (made - other(torch.arange(N)[None])[0]).abs().max() <= 1e-12
    want, got = theirs(TEXT, attention_mask=torch.ones_like(TEXT)).logits, ours(before(TEXT))[:, N:]
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    for logits in (want, got):
        logits.square().sum().backward()
    grads = [(torch.cat([own.grad for own in outputs(ours, leaf)]), getattr(last, name).grad) for leaf, name in LEAVES]
    grads += [(own.grad, copy.grad) for own, copy in pairs]
    assert all((own - copy).abs().max() <= 1e-8 * copy.abs().max() for own, copy in grads)


@pytest.mark.parametrize("groups", [2, 4])  # peft's sizes fit 4 key heads only, adapters' a query's heads
def test_the_result_holds_what_the_network_computes_and_answers_with_the_same_bits(groups: int, tmp_path) -> None:
    folder = make_folder(tmp_path / "base", num_key_value_heads=groups)
    argv = "--method.prompt_length", str(N), "--method.hidden", "12", "--train.lr", "1e-2"
    run = finetune(folder, tmp_path, *argv, method="prefix")
    final = load_file(run / "final" / "delta.safetensors")
    names = {f"blocks.{block}.attn.{kind}.slot.prefix.vectors" for block in (0, 1) for kind in "kv"}
    assert {name: tuple(tensor.shape) for name, tensor in final.items()} == dict.fromkeys(names, (N, groups * 16))
    assert find_run(run).method() == Prefix(prompt_length=N)
    trained = build(folder, torch.float32, Prefix(prompt_length=N, hidden=12)).eval()
    load_delta(trained, Checkpoints(run / "checkpoints").newest().tensors("delta"), "test")
    result = build_run(find_run(run), folder, torch.float32).eval()
    assert torch.equal(result(before(TEXT)), trained(before(TEXT)))
    E, W, b = (tensor.detach() for tensor in network(trained))
    for own, W_out, b_out in zip(tensors(result), outputs(trained, "W"), outputs(trained, "b"), strict=True):
        assert torch.allclose(own, torch.tanh(E @ W.T + b) @ W_out.T + b_out, atol=1e-6)


def test_ptuning_v2_is_prefix_tuning_with_another_start(tiny_folder) -> None:
    torch.manual_seed(0)
    ours = build(tiny_folder, torch.float32, PTuningV2(prompt_length=200)).eval()
    assert all(abs(float(own.detach().std()) - 1) < 0.05 for own in tensors(ours))
    prefix = build(tiny_folder, torch.float32, Prefix(prompt_length=200)).eval()
    prefix.load_state_dict(ours.state_dict())
    ids = F.pad(TEXT, (200, 0))
    assert torch.equal(ours(ids), prefix(ids))


def test_dropout_acts_in_training_on_each_document_anew_and_not_in_answers(tiny_folder) -> None:
    model = build(tiny_folder, torch.float64, Prefix(prompt_length=N, dropout=0.5))
    delta, ctx = model.blocks[0].attn.k.slot.deltas["prefix"], Context.rows(before(TEXT))
    y = torch.ones(2, 20 + N, 32, dtype=torch.float64)
    got = delta(y, None, None, ctx)
    assert torch.equal(got[:, N:], y[:, N:])
    kept = got[:, :N] != 0
    assert torch.equal(got[:, :N][kept], 2 * delta.vectors.expand(2, -1, -1)[kept])
    assert 60 < int((~kept).sum()) < 132  # of 192
    assert not torch.equal(kept[0], kept[1])
    delta.eval()
    assert torch.equal(delta(y, None, None, ctx)[:, :N], delta.vectors.expand(2, -1, -1))


@torch.no_grad()
def test_with_the_keys_and_values_of_a_real_prompt_it_is_that_prompt(folder) -> None:
    ours, prompt = learnt(folder), torch.tensor([[7, 99, 250]])
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)).eval()
    layers = theirs(prompt, use_cache=True).past_key_values.layers  # keys are rotated there
    held = [x[0].transpose(0, 1).flatten(1) for layer in layers for x in (layer.keys, layer.values)]
    for own, real in zip(tensors(ours), held, strict=True):
        own.copy_(real)
    want = theirs(torch.cat((prompt.expand(2, -1), TEXT), 1)).logits[:, N:]
    assert (ours(before(TEXT))[:, N:] - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_sees_the_very_numbers_that_are_learnt(tiny_folder, dtype: torch.dtype) -> None:
    model, seen = learnt(tiny_folder, dtype), []
    for block in model.blocks:
        block.attn.core.register_forward_hook(lambda module, args, y: seen.extend(args[1:3]))
    model(before(TEXT))
    for own, used in zip(tensors(model), seen, strict=True):
        assert torch.equal(used[1, :, :N].transpose(0, 1).flatten(1), own.to(dtype))


@torch.no_grad()
def test_packed_rows_and_answers_from_the_cache_equal_each_row_alone(folder) -> None:
    ours, rows = learnt(folder), [[5, 6, 7], TEXT[0].tolist(), [9, 8]]
    alone = [ours(before(torch.tensor([row])))[0] for row in rows]
    lengths = tuple(N + len(row) for row in rows)
    ids = torch.cat([before(torch.tensor([row])) for row in rows], 1)
    packed = ours(ids, Context.packed(lengths, ids.device, None))[0].split(lengths)
    for got, want in zip(packed, alone, strict=True):
        assert (got - want)[N:].abs().max() <= 1e-10
    cache = TokenCache(ours)
    for step, last in enumerate((1, 1, 4, 1)):  # 4: guessed tokens are checked
        got = cache.logits(rows, last)
        want = torch.cat([ours(before(torch.tensor([row])))[0, -last:] for row in rows])
        assert (got - want).abs().max() <= 1e-10 * want.abs().max()
        rows = [[*row, *range(30 + step, 30 + step + (4 if step == 1 else 1))] for row in rows]


def test_what_stands_at_the_placeholders_changes_nothing_and_learns_nothing_else(tiny_folder) -> None:
    ours = learnt(tiny_folder)
    other = before(TEXT)
    other[:, :N] = torch.tensor([3, 100, 300])
    assert torch.equal(ours(before(TEXT))[:, N:], ours(other)[:, N:])
    row = Row(TEXT[0].tolist(), [False] + [True] * 19, 1, "here", [])
    summed_loss(ours, collate([row, row], N)).backward()
    assert all(own.grad.any(1).all() for own in tensors(ours))


@pytest.mark.parametrize("count", [0, 65537])
def test_impossible_values_are_refused_by_key(count: int) -> None:
    with pytest.raises(ValueError, match="method.prompt_length"):
        Prefix(prompt_length=count)
