"""Mamba-2's layer: chunks against the recurrence token by token; what is kept for the backward pass."""

from dataclasses import replace
from functools import partial
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from model_switches import CONFIG

from litpeft.model import chunks
from litpeft.model.by_chunk import Core, _Read, read
from litpeft.model.chunks import Chunks
from litpeft.model.context import Context
from litpeft.model.parts import Layer, StateSpace
from litpeft.model.state_space import Mamba2, piece

SIZES = StateSpace(heads=6, head_size=3, groups=2, state=5, width=4, least=0.4, most=1.1)
LENGTHS = (21, 1, 16, 33, 8)  # tokens
EPS = 1e-5


def token_by_token(xbc, z, dt, conv, bias, A_log, dt_bias, D, norm, before, sizes):
    """Returns what the equations say of one document, a token after the other, and S at its end."""
    heads, per, ys = sizes.heads, sizes.heads // sizes.groups, []
    S = before.view(sizes.groups, sizes.state, per, -1).permute(0, 2, 1, 3).flatten(0, 1)  # (H, K, P)
    padded = torch.cat((xbc.new_zeros(sizes.width - 1, xbc.size(1)), xbc))
    for t in range(len(xbc)):
        row = (padded[t : t + sizes.width] * conv[:, 0].T).sum(0) + (0 if bias is None else bias)
        x, B, C = F.silu(row).split((sizes.inner, sizes.groups * sizes.state, sizes.groups * sizes.state))
        B, C = (one.view(sizes.groups, -1).repeat_interleave(per, 0) for one in (B, C))
        x, step = x.view(heads, -1), F.softplus(dt[t] + dt_bias).clamp(sizes.least, sizes.most)
        S = torch.exp(-A_log.exp() * step)[:, None, None] * S + torch.einsum("hk,hp->hkp", B, step[:, None] * x)
        y = (torch.einsum("hkp,hk->hp", S, C) + D[:, None] * x).view(sizes.groups, -1)
        gate = F.silu(z[t]).view(sizes.groups, -1)
        y = y if sizes.norm == "before" else y * gate
        if norm is not None:
            y = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.view(sizes.groups, -1)
        ys.append((y * gate if sizes.norm == "before" else y).flatten())
    return torch.stack(ys), S.unflatten(0, (sizes.groups, -1)).transpose(1, 2).flatten(2)


def drawn(sizes: StateSpace) -> list[torch.Tensor | None]:
    """Returns xbc, z, dt and the weights of a layer."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    tokens = [draw(sum(LENGTHS), width) for width in (sizes.channels, sizes.inner, sizes.heads)]
    conv, bias = draw(sizes.channels, 1, sizes.width), draw(sizes.channels) if sizes.conv_bias else None
    return [*tokens, conv, bias, *(draw(sizes.heads) for _ in range(3)), draw(sizes.inner) if sizes.norm else None]


@pytest.mark.parametrize("size", [(5, 1), (8, 3), (64, 128)])
@pytest.mark.parametrize("own", [{}, {"norm": "before", "groups": 1}, {"norm": None, "groups": 6, "conv_bias": False}])
def test_chunks_give_what_the_recurrence_gives_token_by_token_and_its_gradients(size, own, monkeypatch) -> None:
    monkeypatch.setitem(chunks.SIZES, "cpu", size)
    sizes = replace(SIZES, **own)
    inputs = drawn(sizes)
    given = [x for x in inputs if x is not None]
    cut = Chunks.of([0, *accumulate(LENGTHS)][:-1], LENGTHS, sizes.width, torch.device("cpu"))
    layer, empty = partial(piece, sizes=sizes, eps=EPS), torch.zeros(sizes.matrices, dtype=torch.float64)
    got = _Read.apply(cut, layer, sizes.matrices, 3, *inputs)
    alone = zip(*(x.split(LENGTHS) for x in inputs[:3]), strict=True)
    want = torch.cat([token_by_token(*tokens, *inputs[3:], empty, sizes)[0] for tokens in alone])
    assert torch.allclose(got, want, atol=1e-11)
    weights = torch.randn_like(want)
    grads = [torch.autograd.grad(y, given, weights) for y in (got, want)]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(*grads, strict=True))
    for at, (x, grad) in enumerate(zip(given, grads[0], strict=True)):  # one that trains alone
        others = [y if y is None or y is x else y.detach() for y in inputs]
        (single,) = torch.autograd.grad(_Read.apply(cut, layer, sizes.matrices, 3, *others), x, weights)
        assert torch.equal(single, grad), at


@torch.no_grad()
def test_documents_go_on_from_what_they_knew(monkeypatch) -> None:
    monkeypatch.setitem(chunks.SIZES, "cpu", (8, 3))
    inputs, lead = drawn(SIZES), SIZES.width - 1
    before = torch.randn(len(LENGTHS), *SIZES.matrices, dtype=torch.float64)
    rows = torch.cat([torch.cat((torch.zeros(lead, one.size(1)).double(), one)) for one in inputs[0].split(LENGTHS)])
    starts = [0, *accumulate(LENGTHS)][:-1]
    cut = Chunks.of(starts, LENGTHS, SIZES.width, torch.device("cpu"), lead)
    got = read([rows, *inputs[1:3]], inputs[3:], cut, before, partial(piece, sizes=SIZES, eps=EPS))
    alone = zip(*(x.split(LENGTHS) for x in inputs[:3]), before, strict=True)
    parts = [token_by_token(*tokens, *inputs[3:], memory, SIZES) for *tokens, memory in alone]
    assert torch.allclose(got[0], torch.cat([y for y, _ in parts]), atol=1e-12)
    assert torch.allclose(got[1], torch.stack([memory for _, memory in parts]), atol=1e-12)


@torch.no_grad()
def test_a_document_that_fills_groups_has_the_bits_that_it_has_alone() -> None:
    inputs, layer = drawn(SIZES), partial(piece, sizes=SIZES, eps=EPS)
    lengths = (150, 40, 300, 20)  # tokens; a group has 128
    tokens = [torch.cat([one] * 7)[: sum(lengths)] for one in inputs[:3]]
    cut = lambda *counts: Chunks.of([0, *accumulate(counts)][:-1], counts, SIZES.width, torch.device("cpu"))
    empty = torch.zeros(len(lengths), *SIZES.matrices, dtype=torch.float64)
    packed = read(tokens, inputs[3:], cut(*lengths), empty, layer)[0].split(lengths)
    for number, parts in enumerate(zip(*(one.split(lengths) for one in tokens), strict=True)):
        alone = read(parts, inputs[3:], cut(lengths[number]), empty[:1], layer)[0]
        assert torch.equal(packed[number], alone) if lengths[number] > 128 else torch.allclose(packed[number], alone)


def test_the_backward_pass_keeps_the_projections_and_a_matrix_for_each_group_of_chunks() -> None:
    tokens, kept = 1024, []
    config = replace(CONFIG, layers=(Layer(state_space=SIZES),))
    mixer, ctx = Mamba2(config, 0), Context.rows(torch.zeros(1, tokens, dtype=torch.long))
    ctx.cut(SIZES.width)
    rows = [torch.randn(1, tokens, n, requires_grad=True) for n in (SIZES.channels, SIZES.inner, SIZES.heads)]
    weights = mixer.conv.weight, mixer.conv.bias, mixer.A_log, mixer.dt_bias, mixer.D, mixer.norm.weight
    torch.nn.init.normal_(mixer.conv.weight), torch.nn.init.normal_(mixer.conv.bias)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda x: x):
        Core()(rows, weights, ctx, mixer)
    matrices, per_group = SIZES.inner * SIZES.state, chunks.SIZES["cpu"][0] * chunks.SIZES["cpu"][1]
    parts = sum(x.numel() for x in (*rows, *weights))
    assert sum(kept) == parts + (tokens // per_group - 1) * matrices  # none before the first
