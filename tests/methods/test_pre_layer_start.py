"""Where PreLayer starts: at what the base computes of tokens in the learned vectors' places, in units of its size."""

import pytest
import torch
from conftest import calibrated, finetune
from safetensors.torch import load_file

from litpeft.data.batches import collate, framed
from litpeft.data.rows import Row
from litpeft.methods.pre_embed import PreEmbed
from litpeft.methods.pre_layer import Activations, PreLayer
from litpeft.model.build import build
from litpeft.model.context import Context
from litpeft.model.delta import deltas_of
from litpeft.model.gpt import GPT

N, M = 3, 2  # virtual tokens before the text and after its prompt
ROW = Row([*range(40, 60)], [False] * 6 + [True] * 14, 6, "here", [])


def answers(model: GPT, row: Row) -> torch.Tensor:
    """Returns the logits (T, V) of a row with its learned vectors."""
    ids = torch.tensor([framed(row.ids, row.prompt_length, *model.frame)])
    ctx = Context.rows(ids)
    ctx.prompt_lengths = torch.tensor([[row.prompt_length + sum(model.frame)]])
    return model(ids, ctx)[0]


def started(folder, rows: list[Row], before: int = N, after: int = M) -> tuple[GPT, GPT]:
    """Returns PreLayer at its start, measured on some rows, and PreEmbed with the embeddings that it starts with."""
    torch.manual_seed(0)
    method = PreLayer(prefix_length=before, infix_length=after)
    method.calibrate(build(folder, torch.float64), (collate([row]) for row in rows))
    ours = build(folder, torch.float64, method).eval()
    embed = build(folder, torch.float64, PreEmbed(prefix_length=before, infix_length=after)).eval()
    embed.after_embed.deltas["pre_embed"].vectors.copy_(deltas_of(ours, Activations)[0].table())
    return ours, embed


@torch.no_grad()
@pytest.mark.parametrize(("before", "after"), [(N, M), (0, M), (N, 0)])
def test_on_the_row_that_was_measured_it_starts_as_pre_embed(tiny_folder, before: int, after: int) -> None:
    ours, embed = started(tiny_folder, [ROW], before, after)
    want = answers(embed, ROW)
    assert (answers(ours, ROW) - want).abs().max() <= 1e-12 * want.abs().max()


@torch.no_grad()
def test_the_vectors_before_the_text_are_exact_for_every_row_those_after_the_prompt_are_means(tiny_folder) -> None:
    other = Row([*range(100, 120)], [False] * 9 + [True] * 11, 9, "here", [])
    ours, embed = started(tiny_folder, [ROW, other])
    seen: list[torch.Tensor] = []
    embed.blocks[0].register_forward_hook(lambda block, given, y: seen.append(y[0]))
    for row in (ROW, other):
        answers(embed, row)
    start = deltas_of(ours, Activations)[1].table()
    parts = [torch.cat((y[:N], y[N + p : N + p + M])) for y, p in zip(seen, (6, 9), strict=True)]
    assert (start[:N] - parts[0][:N]).abs().max() <= 1e-12
    assert (start - (parts[0] + parts[1]) / 2).abs().max() <= 1e-12
    assert (parts[0][N:] - parts[1][N:]).abs().max() > 1e-3  # the two rows do differ there


@torch.no_grad()
def test_what_is_learned_has_size_1_whatever_the_size_of_the_activations(tiny_folder) -> None:
    deltas = deltas_of(build(tiny_folder, torch.float64, calibrated(PreLayer(), tiny_folder)), Activations)
    for delta in deltas:
        assert torch.allclose(delta.vectors.square().mean(1), torch.ones(16, dtype=torch.float64))
    embedding, layer = (float(delta.unit.mean()) for delta in deltas)
    assert layer > 1.05 * embedding


def test_units_stay_in_training_and_are_saved(tiny_folder, tmp_path) -> None:
    run = finetune(tiny_folder, tmp_path, method="pre_layer")
    final = load_file(run / "final" / "delta.safetensors")
    first = load_file(sorted((run / "checkpoints").iterdir())[0] / "delta.safetensors")
    leaf = {"unit": (16, 1), "vectors": (16, 64)}
    places = ("after_embed.pre_layer", "blocks.0.after_block.pre_layer")
    shapes = {name: tuple(tensor.shape) for name, tensor in final.items()}
    assert shapes == {f"{place}.{key}": shape for place in places for key, shape in leaf.items()}
    assert all(torch.equal(final[f"{p}.unit"], first[f"{p}.unit"]) for p in places)
    assert not torch.equal(final[f"{places[1]}.vectors"], first[f"{places[1]}.vectors"])
    assert bool((final[f"{places[1]}.unit"] != 1).all())
