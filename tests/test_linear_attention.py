"""Layers without attention: chunks against the recurrence and transformers; documents and caches."""

from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import TINY, in_float64
from model_switches import CONFIG
from test_model import CASES, reference
from torch._subclasses.fake_tensor import FakeTensorMode

from litpeft.core.errors import ConfigError
from litpeft.data.tokenizer import Tokenizer
from litpeft.generate.batch import Batch
from litpeft.generate.cache import TokenCache
from litpeft.generate.engine import answer, stream
from litpeft.generate.settings import Sampling
from litpeft.methods.adapter import Adapter
from litpeft.methods.lora import LoRA
from litpeft.model import chunks
from litpeft.model.build import build
from litpeft.model.by_chunk import read
from litpeft.model.chunks import Chunks
from litpeft.model.context import Context
from litpeft.model.delta import attach
from litpeft.model.delta_rule import gated_delta_rule
from litpeft.model.gpt import GPT
from litpeft.model.parts import Layer, LinearAttention, Rope, StateSpace

CHUNK = 64  # tokens
LENGTHS = (70, 1, 2 * CHUNK, 3 * CHUNK + 5, 64, 33)  # tokens
HEADS, KEY, VALUE = 3, 5, 4


def token_by_token(q, k, v, fade, write, memory):
    """Returns what the rule says of one document, a token after the other, and S at its end."""
    ys = []
    for q_t, k_t, v_t, fade_t, write_t in zip(q, k, v, fade, write, strict=True):
        memory = memory * fade_t.exp()[:, None, None]
        known = torch.einsum("hkv,hk->hv", memory, k_t)
        memory = memory + torch.einsum("hk,hv->hkv", k_t, write_t[:, None] * (v_t - known))
        ys.append(torch.einsum("hkv,hk->hv", memory, q_t))
    return torch.stack(ys), memory


@pytest.mark.parametrize("at_once", [1, 4, 128])
def test_chunks_give_what_the_recurrence_gives_token_by_token_and_its_gradients(at_once: int, monkeypatch) -> None:
    monkeypatch.setitem(chunks.SIZES, "cpu", (CHUNK, at_once))
    torch.manual_seed(0)
    starts, documents = [0, *accumulate(LENGTHS)], len(LENGTHS)
    q, k = (torch.nn.functional.normalize(torch.randn(sum(LENGTHS), HEADS, KEY).double(), dim=-1) for _ in range(2))
    v, fade, write = torch.randn(len(q), HEADS, VALUE), -torch.rand(len(q), HEADS), torch.rand(len(q), HEADS)
    inputs = [x.double().requires_grad_(True) for x in (q, k, v, fade, write)]
    before = torch.randn(documents, HEADS, KEY, VALUE, dtype=torch.float64, requires_grad=True)
    cut = Chunks.of(starts, LENGTHS, 1, torch.device("cpu"))
    assert [len(batch.groups) for batch in cut.batches] == {1: [4, 2, 2, 1, 1, 1], 4: [1, 1, 1], 128: [1]}[at_once]

    def piece(tokens, _, group, memory):
        own = [x.where(group.real.view(*group.real.shape, *[1] * (x.dim() - 2)), 0).transpose(1, 2) for x in tokens]
        k, v, q, fade, write = own
        y, memory = gated_delta_rule(q, k, v, fade, write, group.counts, memory)
        return y.transpose(1, 2), memory

    q, k, v, fade, write = inputs
    got, after = read((k, v, q, fade, write), (), cut, before, piece)
    alone = zip(*(x.split(LENGTHS) for x in inputs), before, strict=True)
    parts = [token_by_token(*document) for document in alone]
    want, want_after = torch.cat([y for y, _ in parts]), torch.stack([memory for _, memory in parts])
    assert torch.allclose(got, want, atol=1e-12)
    assert torch.allclose(after, want_after, atol=1e-12)
    weights = torch.randn_like(want), torch.randn_like(want_after)
    grads = [torch.autograd.grad(ys, [*inputs, before], weights) for ys in ((got, after), (want, want_after))]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("at_once", [1, 3, 128])
def test_groups_of_chunks_change_no_gradient_but_by_rounding(at_once: int, both, monkeypatch) -> None:
    _, model = both
    model.requires_grad_(True)
    lengths, grads = (150, 30, 70), []
    ids = torch.randint(0, TINY["vocab_size"], (1, sum(lengths)))
    for size in ((32, 4), (CHUNK, at_once)):
        monkeypatch.setitem(chunks.SIZES, "cpu", size)
        model.zero_grad()
        model(ids, Context.packed(lengths, ids.device, None), at=torch.arange(249), targets=ids[0, 1:]).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(*grads, strict=True))


def made(name: str, folder: Path) -> tuple[torch.nn.Module, GPT]:
    """Returns transformers' tiny model of a family and ours, in float64."""
    theirs = reference(CASES[name], torch.float64)
    theirs.save_pretrained(folder)
    return in_float64(theirs), build(folder, torch.float64)


@pytest.fixture
def both(tmp_path):
    return made("qwen3_5_text", tmp_path)


@pytest.fixture(params=["qwen3_5_text", "lfm2", "falcon_h1"])
def model(request, tmp_path) -> GPT:
    return made(request.param, tmp_path)[1]


def test_a_text_of_several_chunks_has_the_logits_and_gradients_of_transformers(both) -> None:
    theirs, ours = both
    ours.requires_grad_(True)
    ids = torch.randint(0, TINY["vocab_size"], (2, 2 * CHUNK + 9))
    want, got = theirs(ids).logits, ours(ids)
    assert torch.allclose(got, want, atol=1e-10)
    weights = torch.randn_like(want)
    want.backward(weights), got.backward(weights)
    mixer, layer = ours.blocks[0].attn, theirs.model.layers[0].linear_attn
    qkv = torch.cat([part.weight.grad for part in (mixer.in_q, mixer.in_k, mixer.in_v)])
    for mine, grad in {
        qkv: layer.in_proj_qkv.weight.grad,
        mixer.conv.weight.grad: layer.conv1d.weight.grad,
        mixer.A_log.grad: layer.A_log.grad,
        mixer.dt_bias.grad: layer.dt_bias.grad,
        mixer.norm.weight.grad: layer.norm.weight.grad,
        ours.embed.weight.grad: theirs.model.embed_tokens.weight.grad,
    }.items():
        assert torch.allclose(mine, grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("only", ["in_z", "in_a", "in_b", "in_v", "norm", "conv", "A_log", "dt_bias", "out"])
def test_a_part_that_trains_alone_has_the_gradient_that_it_has_among_all(only: str, both) -> None:
    _, model = both
    ids, grads = torch.randint(0, TINY["vocab_size"], (1, 200)), []
    chosen = [name for name, _ in model.blocks[0].attn.named_parameters() if name.split(".")[0] == only]
    for whole in (True, False):
        model.requires_grad_(whole).zero_grad()
        for name in chosen:
            model.blocks[0].attn.get_parameter(name).requires_grad_(True)
        model(ids, Context.packed((130, 70), ids.device, None), at=torch.arange(199), targets=ids[0, 1:]).backward()
        grads.append([model.blocks[0].attn.get_parameter(name).grad.clone() for name in chosen])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_adapters_prompts_stand_in_the_layers_with_attention(tmp_path) -> None:
    base = made("qwen3_5_text", tmp_path)[1]
    model = build(tmp_path, torch.float64, Adapter(prompt_length=3)).eval()
    ids = torch.randint(0, TINY["vocab_size"], (1, 30))
    assert sorted(model.delta_keys) == [f"blocks.1.attn.core.adapter.{leaf}" for leaf in ("gate", "prompt")]
    with torch.no_grad():
        assert torch.equal(model(ids), base(ids))  # the gates are shut
        model.blocks[1].attn.core.deltas["adapter"].gate.fill_(0.5)
        assert (model(ids) - base(ids)).abs().max() > 1e-3
    made("qwen3_5_moe_text", tmp_path / "moe")  # whose second layer has none
    with pytest.raises(ConfigError, match="none of the top 1 blocks has attention"):
        build(tmp_path / "moe", torch.float64, Adapter(layers=1))


def test_no_pass_waits_for_a_number_of_the_device() -> None:
    """Fake tensors, which have shapes and types but no memory, refuse what needs a number of theirs."""
    layers = [Layer(linear=LinearAttention(2, 4, 8, 12, 4)), Layer(state_space=StateSpace(6, 3, 2, 5, 4))]
    config = replace(CONFIG, n_layers=3, gated_attention=True).with_layers([*layers, Layer(rope=Rope())])
    lengths = (150, 20, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = attached(GPT(config), LoRA())
        ids = torch.zeros(1, sum(lengths), dtype=torch.long)
        loss = model(ids, Context.packed(lengths, ids.device, None), at=ids[0, 1:], targets=ids[0, 1:])
        loss.backward()
        assert all(p.grad.shape == p.shape for name, p in model.named_parameters() if name in model.delta_keys)


def attached(model: GPT, method: LoRA) -> GPT:
    model.dtype = torch.float32
    attach(model, method)
    return model


def test_packed_documents_do_not_see_each_other(model) -> None:
    lengths = (7, 70, 1, 9, 2 * CHUNK, 64)
    ids = torch.randint(0, TINY["vocab_size"], (1, sum(lengths)))
    with torch.no_grad():
        packed = model(ids, Context.packed(lengths, ids.device, None))
        alone = torch.cat([model(part) for part in ids.split(lengths, dim=1)], dim=1)
        other = ids.clone()
        other[:, 7:77] = torch.randint(0, TINY["vocab_size"], (1, 70))
        changed = model(other, Context.packed(lengths, ids.device, None))
    assert (packed - alone).abs().max() <= 1e-10
    assert torch.equal(packed[:, :7], changed[:, :7])
    assert torch.equal(packed[:, 77:], changed[:, 77:])


@pytest.mark.parametrize("recompute", ["cheap", "block", "offload"])
def test_checkpointing_changes_no_gradient(model, recompute: str) -> None:
    model.requires_grad_(True)
    ids, grads = torch.randint(0, TINY["vocab_size"], (1, 150)), []
    for model.recompute in ("none", recompute):
        model.zero_grad()
        model(ids, Context.packed((80, 70), ids.device, None), at=torch.arange(149), targets=ids[0, 1:]).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_rows_in_a_cache_go_on_change_places_and_begin_anew(model) -> None:
    torch.manual_seed(1)
    draw = lambda n: torch.randint(0, TINY["vocab_size"], (n,)).tolist()
    whole = lambda rows: torch.cat([model(torch.tensor([row]))[:, -1] for row in rows])
    cache, rows = TokenCache(model, 3), [draw(150), draw(3), draw(65)]
    with torch.no_grad():
        for counts in ((0, 0, 0), (1, 1, 1), (1, 1, 1), (70, 2, 1), (1, 1, 300)):
            rows = [row + draw(n) for row, n in zip(rows, counts, strict=True)]
            assert torch.allclose(cache.logits(rows), whole(rows), atol=1e-10)
        cache.swap(0, 2)
        rows = [rows[2] + draw(1), rows[1][:-1] + draw(1), rows[0]]  # goes on; another last token; the same again
        assert [cache.known(old, new) for old, new in zip(cache.rows, rows, strict=True)] == [len(rows[0]) - 1, 0, 0]
        assert torch.allclose(cache.logits(rows), whole(rows), atol=1e-10)


def test_an_answer_that_was_interrupted_is_read_again(model) -> None:
    cache, row = TokenCache(model), list(range(1, 30))
    cache.logits([row])
    hook = model.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.logits([[*row, 40, 41]])
    hook.remove()
    with torch.no_grad():
        assert torch.allclose(cache.logits([[*row, 42]]), model(torch.tensor([[*row, 42]]))[:, -1], atol=1e-10)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_requests_that_come_and_go_have_the_answers_that_each_has_alone(model, tiny_folder) -> None:
    tokenizer = Tokenizer.load(tiny_folder)
    torch.manual_seed(2)
    prompts = [torch.randint(3, TINY["vocab_size"], (n,)).tolist() for n in (5, 80, 17, 1, 130, 9)]
    sampling = Sampling(max_new_tokens=12)
    alone = [answer(model, [prompt], tokenizer, sampling, ())[0].ids for prompt in prompts]
    for rows in (2, 4):
        together = answer(model, prompts, tokenizer, sampling, (), rows=rows)
        assert [one.ids for one in together] == alone
    batch = Batch(model, 2, part=16)  # a long prompt in parts, and a next turn that goes on
    for prompt, want in zip(prompts, alone, strict=True):
        for text in (prompt, prompt + want):
            found, pieces = stream(batch, text, tokenizer, sampling, ())
            assert list(pieces) is not None
            assert found.ids == (want if text is prompt else answer(model, [text], tokenizer, sampling, ())[0].ids)
