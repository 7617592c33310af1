"""PreEmbed and PreLayer: learned vectors at two places, put into transformers' model."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, in_float64
from transformers import AutoModelForCausalLM

from litpeft.data.batches import collate, framed
from litpeft.data.rows import Row
from litpeft.generate.cache import TokenCache
from litpeft.methods.pre_embed import PreEmbed
from litpeft.methods.pre_layer import PreLayer
from litpeft.methods.prompt import VirtualTokens
from litpeft.model.build import build
from litpeft.model.context import Context
from litpeft.model.delta import trainable
from litpeft.model.gpt import GPT
from litpeft.model.objective import mean_loss, summed_loss

N, M, PROMPT = 3, 2, 6  # virtual tokens before the text and after its prompt; tokens of the prompt
TEXT = torch.randint(0, TINY["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))
SPECIAL = [*range(N), *range(N + PROMPT, N + PROMPT + M)]  # their positions
KINDS = [(PreEmbed, N, M), (PreEmbed, 0, M), (PreEmbed, N, 0), (PreLayer, N, M), (PreLayer, 0, M), (PreLayer, N, 0)]


def learnt(folder, method: type = PreEmbed, before: int = N, after: int = M) -> GPT:
    model = build(folder, torch.float64, method(prefix_length=before, infix_length=after)).eval()
    torch.manual_seed(1)
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.5)
    return model


def vectors(model: GPT) -> list[nn.Parameter]:
    """Returns the learned vectors, from the embedding upwards."""
    return [delta.vectors for delta in model.modules() if isinstance(delta, VirtualTokens)]


def asked(model: GPT, row: list[int], prompt: int) -> torch.Tensor:
    """Returns the logits (T, V) of a row of which the first tokens are a prompt, from the frame's first token on."""
    ids = torch.tensor([framed(row, prompt, *model.frame)])
    ctx = Context.rows(ids)
    ctx.prompt_lengths = torch.tensor([[prompt + sum(model.frame)]])
    return model(ids, ctx)[0]


@pytest.mark.parametrize(("method", "before", "after"), KINDS)
def test_logits_and_gradients_equal_vectors_put_into_transformers(tiny_folder, method, before: int, after: int) -> None:
    ours = learnt(tiny_folder, method, before, after)
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)).eval()
    copies = [p.detach().clone().requires_grad_() for p in vectors(ours)]
    assert len(copies) == (1 if method is PreEmbed else 2)  # of two blocks

    def placed(x: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
        prompt, answer = x[:, before : before + PROMPT], x[:, before + PROMPT + after :]
        return torch.cat((P[:before].expand(2, -1, -1), prompt, P[before:].expand(2, -1, -1), answer), 1)

    rows = torch.tensor([framed(row, PROMPT, before, after) for row in TEXT.tolist()])
    for layer, P in zip(theirs.model.layers, copies[1:], strict=False):
        layer.register_forward_hook(lambda module, args, y, P=P: placed(y, P))
    want = theirs(inputs_embeds=placed(theirs.get_input_embeddings()(rows), copies[0])).logits
    got = torch.stack([asked(ours, row, PROMPT) for row in TEXT.tolist()])
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    for logits in (want, got):
        logits.square().sum().backward()
    for own, copy in zip(vectors(ours), copies, strict=True):
        assert (own.grad - copy.grad).abs().max() <= 1e-9 * copy.grad.abs().max()


@torch.no_grad()
def test_pre_layer_with_what_the_layers_compute_of_learned_embeddings_is_pre_embed(tiny_folder) -> None:
    ours, embed, row, seen = learnt(tiny_folder, PreLayer), learnt(tiny_folder), TEXT[0].tolist(), []
    embed.blocks[0].register_forward_hook(lambda module, args, y: seen.append(y[0, SPECIAL]))
    want = asked(embed, row, PROMPT)
    for own, kept in zip(vectors(ours), (vectors(embed)[0], seen[0]), strict=True):
        own.copy_(kept)
    assert (asked(ours, row, PROMPT) - want).abs().max() <= 1e-12 * want.abs().max()


@torch.no_grad()
def test_infixes_of_real_tokens_are_those_tokens(tiny_folder) -> None:
    ours, base = learnt(tiny_folder), build(tiny_folder, torch.float64)
    real = [7, 99, 250, 31, 32]
    vectors(ours)[0].copy_(base.embed(torch.tensor(real)))
    row = TEXT[0].tolist()
    want = base(torch.tensor([[*real[:N], *row[:PROMPT], *real[N:], *row[PROMPT:]]]))[0]
    assert torch.equal(asked(ours, row, PROMPT), want)


SIZES = (9, 1), (20, 5), (2, 1), (14, 13)  # tokens of rows, and of their prompts
ROWS = [Row(TEXT[0, :n].tolist(), [False] * p + [True] * (n - p), p, "here", []) for n, p in SIZES]


@pytest.mark.parametrize("method", [PreEmbed, PreLayer])
def test_the_loss_of_packed_rows_is_that_of_each_alone_and_trains_the_same_tokens(tiny_folder, method: type) -> None:
    ours, want = learnt(tiny_folder, method), 0.0
    for row in ROWS:
        logits = asked(ours, row.ids, row.prompt_length)
        answer = torch.tensor(row.ids[row.prompt_length :])  # the first of them follows the last infix
        want += F.cross_entropy(logits[N + row.prompt_length + M - 1 : -1], answer, reduction="sum")
    batch = collate(ROWS, *ours.frame)
    assert batch.lengths == tuple(n + N + M for n, _ in SIZES)
    assert batch.prompt_lengths == tuple(p + N + M for _, p in SIZES)
    assert abs(summed_loss(ours, batch) - want) <= 1e-10 * want
    trained = sum(sum(row.trained) for row in ROWS)
    assert len(batch.targets) == trained
    assert abs(mean_loss(ours, ROWS, 30, torch.device("cpu")) - want / trained) <= 1e-10 * want


@torch.no_grad()
@pytest.mark.parametrize("method", [PreEmbed, PreLayer])
def test_answers_from_the_cache_are_those_of_the_whole_text(tiny_folder, method: type) -> None:
    ours, rows, prompts = learnt(tiny_folder, method), [[5, 6, 7], TEXT[0].tolist(), [9]], [3, 20, 1]
    cache = TokenCache(ours)
    for step, last in enumerate((1, 1, 4, 1)):  # 4: guessed tokens are checked
        got = cache.logits(rows, last, prompts)
        want = torch.cat([asked(ours, row, n)[-last:] for row, n in zip(rows, prompts, strict=True)])
        assert (got - want).abs().max() <= 1e-10 * want.abs().max()
        rows = [[*row, *range(30 + step, 30 + step + (4 if step == 1 else 1))] for row in rows]
    cache.swap(0, 1)
    for prompt in (20, 22):  # 22: the next turn of a chat, whose prompt is longer
        got, want = cache.logits(rows[1:2], 1, [prompt]), asked(ours, rows[1], prompt)[-1:]
        assert (got - want).abs().max() <= 1e-10 * want.abs().max()


def test_a_text_may_be_as_long_as_the_positions_that_are_left(tiny_folder) -> None:
    assert learnt(tiny_folder).reach == 512 - N - M


@pytest.mark.parametrize(
    "settings", [{"prefix_length": -1}, {"infix_length": -1}, {"prefix_length": 0, "infix_length": 0}]
)
@pytest.mark.parametrize("method", [PreEmbed, PreLayer])
def test_impossible_values_are_refused_by_key(method: type, settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}"):
        method(**settings)
