"""ReFT against the paper's formula at the positions of pyreft, drawn into transformers' Llama."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn as nn
from conftest import TINY, in_float64
from transformers import AutoModelForCausalLM

from litpeft.core.errors import UserError
from litpeft.data.tokenizer import Tokenizer
from litpeft.generate.cache import TokenCache
from litpeft.generate.engine import answer
from litpeft.generate.settings import Sampling
from litpeft.methods.reft import Edit, ReFT
from litpeft.model.build import build
from litpeft.model.context import Context
from litpeft.model.delta import trainable
from litpeft.model.gpt import GPT

IDS = torch.randint(0, TINY["vocab_size"], (1, 40), generator=torch.Generator().manual_seed(0))


def edited(prompt: int, first: int, last: int) -> list[int]:
    """Returns the positions that pyreft edits in a prompt: at most half of it at each end."""
    first, last = min(first, prompt // 2), min(last, prompt // 2)
    return [*range(first), *range(prompt - last, prompt)]


def paper(t: dict[str, torch.Tensor], kind: str, h: torch.Tensor) -> torch.Tensor:
    """Returns what h (..., d) becomes. Rows are made orthonormal by Gram and Schmidt, one after the other."""
    rows = list(t["M"])
    if kind == "loreft":
        for i, row in enumerate(rows):
            row = row - sum((row @ earlier) * earlier for earlier in rows[:i])
            rows[i] = row / row.norm()
    R, source = torch.stack(rows), h @ t["W"].T + t["b"]
    return h + (source if kind == "direft" else source - h @ R.T) @ R


def learnt(folder, **settings: object) -> GPT:
    model = build(folder, torch.float64, ReFT(**settings)).eval()
    torch.manual_seed(3)
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.3)
    return model


def edits(model: GPT) -> list[list[Edit]]:
    return [list(block.after_block.deltas.values()) for block in model.blocks]


def asked(ids: torch.Tensor, prompts: Sequence[int]) -> Context:
    """Returns the context of rows (B, T) whose first tokens are their prompts."""
    ctx = Context.rows(ids)
    ctx.prompt_lengths = torch.tensor(prompts)[:, None]
    return ctx


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft"])
@pytest.mark.parametrize(("prompt", "first", "last"), [(20, 3, 4), (5, 7, 7), (1, 2, 2), (40, 5, 5)])
def test_logits_and_gradients_equal_the_papers_formula(
    tiny_folder, kind: str, tied: bool, prompt: int, first: int, last: int
) -> None:
    ours = learnt(tiny_folder, kind=kind, tied=tied, first=first, last=last, rank=3)
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)).eval()
    at, pairs = edited(prompt, first, last), []
    for own, layer in zip(edits(ours), theirs.model.layers, strict=True):
        copies = [{key: p.detach().clone().requires_grad_() for key, p in edit.named_parameters()} for edit in own]
        pairs += [(p, copy[key]) for edit, copy in zip(own, copies, strict=True) for key, p in edit.named_parameters()]

        def hook(module, args, y, copies=copies):
            parts = list(y.unbind(1))
            for number, pos in enumerate(at):
                parts[pos] = paper(copies[-1 if number >= min(first, prompt // 2) else 0], kind, parts[pos])
            return torch.stack(parts, 1)

        layer.register_forward_hook(hook)
    want, got = theirs(IDS).logits, ours(IDS, asked(IDS, [prompt]))
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    if at:
        for logits in (want, got):
            logits.square().sum().backward()
        assert all((own.grad - other.grad).abs().max() <= 1e-8 * other.grad.abs().max() for own, other in pairs)
    else:
        assert torch.equal(got, build(tiny_folder, torch.float64)(IDS))


def test_the_positions_are_those_that_pyreft_prints(tiny_folder) -> None:
    assert edited(20, 3, 3) == [0, 1, 2, 17, 18, 19]
    assert edited(5, 7, 7) == [0, 1, 3, 4]
    for prompt, first, last in ((20, 3, 3), (5, 7, 7)):
        (edit,) = edits(learnt(tiny_folder, first=first, last=last))[0]
        assert edit.edited(asked(IDS, [prompt]))[0].nonzero().flatten().tolist() == edited(prompt, first, last)


def test_rows_stay_orthonormal_and_the_rest_of_the_space_untouched(tiny_folder) -> None:
    (edit,), h = edits(learnt(tiny_folder))[0], torch.randn(1, 40, 64, dtype=torch.float64)
    R = edit.rows()
    assert (R @ R.T - torch.eye(4)).abs().max() <= 1e-12
    with torch.no_grad():
        edit.M[1] *= -1  # QR alone would give the other sign to some row
        assert torch.allclose(edit.rows()[1], -R[1])
        edit.M[1] *= -1
    out = edit(h, asked(IDS, [40]))
    at = edited(40, 5, 5)
    assert torch.allclose(out[0, at] @ R.T, h[0, at] @ edit.W.T + edit.b, atol=1e-12)
    outside = torch.eye(64) - R.T @ R
    assert torch.allclose(out @ outside, h @ outside, atol=1e-12)


@torch.no_grad()
def test_packed_documents_are_edited_as_each_alone(tiny_folder) -> None:
    model = learnt(tiny_folder)
    lengths, prompts = (9, 20, 1, 10), (4, 20, 1, 3)
    packed = model(IDS, Context.packed(lengths, IDS.device, prompts))
    parts = zip(IDS.split(lengths, 1), prompts, strict=True)
    alone = torch.cat([model(ids, asked(ids, [prompt])) for ids, prompt in parts], 1)
    assert (packed - alone).abs().max() <= 1e-10
    assert (packed - model(IDS, Context.packed(lengths, IDS.device, None))).abs().max() > 1e-3


@torch.no_grad()
def test_answers_from_the_cache_edit_the_prompt_and_nothing_after_it(tiny_folder) -> None:
    model, prompts = learnt(tiny_folder), [3, 20, 1]
    rows = [[5, 6, 7], IDS[0, :20].tolist(), [9]]
    cache = TokenCache(model)
    for step, last in enumerate((1, 1, 4, 1)):  # 4: guessed tokens are checked
        got = cache.logits(rows, last, prompts)
        want = [model(ids, asked(ids, [n]))[0, -last:] for ids, n in zip(map(row_of, rows), prompts, strict=True)]
        assert (got - torch.cat(want)).abs().max() <= 1e-10 * got.abs().max()
        rows = [[*row, *range(30 + step, 30 + step + (4 if step == 1 else 1))] for row in rows]
    cache.swap(0, 1)
    got, ids = cache.logits(rows[1:2], 1, [20]), row_of(rows[1])
    assert torch.allclose(got, model(ids, asked(ids, [20]))[0, -1:], atol=1e-10)
    got = cache.logits(rows[1:2], 1, [22])  # the prompt of the next turn of a chat: other tokens are edited
    assert torch.allclose(got, model(ids, asked(ids, [22]))[0, -1:], atol=1e-10)


def row_of(ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids])


@torch.no_grad()
@pytest.mark.parametrize("lookup", [0, 6])
def test_greedy_answers_in_a_batch_or_alone_are_those_of_whole_forward_passes(tiny_folder, lookup: int) -> None:
    model, tokenizer = learnt(tiny_folder), Tokenizer.load(tiny_folder)
    prompts = [[5, 6, 7, 5, 6, 7, 5, 6], IDS[0, :20].tolist(), [9, 8, 7]]
    want = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(row_of(ids), asked(row_of(ids), [len(prompt)]))[0, -1].argmax()))
        want.append(ids)
    sampling = Sampling(max_new_tokens=12, lookup=lookup)
    for batch in ([0, 1, 2], [0], [1]):
        answers = answer(model, [prompts[i] for i in batch], tokenizer, sampling, ())
        assert [prompts[i] + one.ids for i, one in zip(batch, answers, strict=True)] == [want[i] for i in batch]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft"])
def test_it_can_start_where_nothing_changes_and_learns_from_there(tiny_folder, kind: str, dtype: torch.dtype) -> None:
    model, base = build(tiny_folder, dtype, ReFT(kind=kind, init="identity")), build(tiny_folder, dtype)
    assert torch.equal(model(IDS, asked(IDS, [20])), base(IDS))
    model(IDS, asked(IDS, [20])).float().square().sum().backward()
    for edit in (edit for found in edits(model) for edit in found):
        assert edit.W.grad.any()
        assert edit.b.grad.any()
        assert edit.M.grad.any() == (kind != "direft")  # there R acts on W h + b alone, which is zero
        before = edit.M.clone()
        torch.nn.init.zeros_(edit.W)
        assert torch.equal(edit.M, before)


def test_dropout_acts_in_training_on_what_an_edit_adds_and_not_on_the_stream(tiny_folder) -> None:
    """In pyreft it acts on the edited stream as a whole."""
    (edit,), h = edits(learnt(tiny_folder, dropout=0.25))[0], torch.randn(1, 40, 64, dtype=torch.float64)
    ctx, at = asked(IDS, [20]), edited(20, 5, 5)
    change = (edit(h, ctx) - h)[0]
    rest = sorted({*range(40)} - {*at})
    assert not change[rest].any()
    edit.train()
    torch.manual_seed(0)
    got = (edit(h, ctx) - h)[0]
    assert not got[rest].any()
    kept = got[at] != 0
    assert torch.allclose(got[at][kept], change[at][kept] / 0.75, atol=1e-12)
    assert 100 < int((~kept).sum()) < 220  # of 640
    assert torch.equal(edit.eval()(h, ctx)[0] - h[0], change)


@pytest.mark.parametrize(
    "settings",
    [
        *({"rank": 0}, {"kind": "x"}, {"first": -1}, {"last": -1}, {"init": "x"}, {"dropout": 1.0}),
        *({"first": 0, "last": 0}, {"first": 0, "tied": False}),
    ],
)
def test_impossible_values_are_refused_by_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}"):
        ReFT(**settings)


@pytest.mark.parametrize(("settings", "what"), [({"rank": 65}, "65 is more than 64"), ({"layers": (2,)}, "no block 2")])
def test_what_the_model_has_not_is_refused(tiny_folder, settings: dict, what: str) -> None:
    with pytest.raises(UserError, match=what):
        build(tiny_folder, torch.float32, ReFT(**settings))
