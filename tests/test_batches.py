"""Batches and plans against plain loops, and packing against the rows one by one."""

import random

import pytest
import torch

from litpeft.data.batches import bin_pack, collate, idle, lay_out, plan_epoch
from litpeft.data.rows import Row
from litpeft.model.build import build
from litpeft.model.config import ModelConfig
from litpeft.model.context import Context
from litpeft.model.gpt import GPT
from litpeft.model.objective import summed_loss


def make_rows(count: int, seed: int = 0, longest: int = 40) -> list[Row]:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        length = rng.randint(2, longest)
        trained = [False, *(rng.random() < 0.4 for _ in range(length - 2)), True]
        ids = [rng.randrange(50) for _ in range(length)]
        rows.append(Row(ids, trained, trained.index(True), f"rows.jsonl:{number + 1}", []))
    return rows


def test_positions_and_targets_equal_a_plain_loop_over_the_rows():
    for seed in range(50):
        rows = make_rows(7, seed)
        batch = collate(rows)
        at, targets, offset = [], [], 0
        for row in rows:
            for i in range(len(row.ids) - 1):
                if row.trained[i + 1]:
                    at.append(offset + i)
                    targets.append(row.ids[i + 1])
            offset += len(row.ids)
        assert (batch.at.tolist(), batch.targets.tolist()) == (at, targets)
        assert batch.ids.tolist() == [[i for row in rows for i in row.ids]]
        assert batch.ids.dtype == batch.at.dtype == batch.targets.dtype == torch.int64
        assert batch.lengths == tuple(len(row.ids) for row in rows)
        assert batch.prompt_lengths == tuple(row.prompt_length for row in rows)
        assert batch.sources == tuple(row.source for row in rows)
        assert batch.tokens == offset == batch.to("cpu").tokens


def test_the_loss_of_packed_rows_is_the_sum_of_the_rows_alone():
    torch.manual_seed(0)
    model = GPT(ModelConfig(50, 32, 2, 4, 2, 8, 48, 64)).double()
    rows = make_rows(9, 3)

    def loss(rows):
        batch = collate(rows)
        ctx = Context.packed(batch.lengths, batch.ids.device, batch.prompt_lengths)
        return model(batch.ids, ctx, at=batch.at, targets=batch.targets)

    def plain(row):
        ids = torch.tensor([row.ids])
        labels = torch.tensor([i if t else -100 for i, t in zip(row.ids, row.trained, strict=True)])
        logits = model(ids)[0]
        return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")

    with torch.no_grad():
        alone = sum(plain(row) for row in rows)
        torch.testing.assert_close(loss(rows), alone, rtol=1e-10, atol=0)


@pytest.mark.parametrize("seed", range(30))
def test_an_epoch_holds_every_row_once_in_steps_of_batch_size_rows(seed: int):
    rows = random.Random(seed).randint(1, 60)
    plan = plan_epoch(rows, 8, 0, seed)
    assert sorted(i for step in plan for i in step) == list(range(rows))
    assert [len(step) for step in plan] == [8] * (rows // 8) + ([rows % 8] if rows % 8 else [])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_a_layout_holds_every_row_of_a_step_once_and_no_rank_waits_for_another(ranks: int, micro_batch_size):
    lengths = [len(row.ids) for row in make_rows(40)]
    for count in (1, 2, 7, 16):
        step = random.Random(count).sample(range(40), count)
        layout = lay_out(step, lengths, ranks, 64, micro_batch_size)
        assert len(layout) == ranks
        assert len({len(micros) for micros in layout}) == 1
        micros = [micro for share in layout for micro in share]
        assert sorted(i for micro in micros for i in micro) == sorted(step)
        fits = (
            (lambda m: len(m) <= micro_batch_size) if micro_batch_size else (lambda m: sum(lengths[i] for i in m) <= 64)
        )
        assert all(len(micro) <= 1 or fits(micro) for micro in micros)
        tokens = [sum(lengths[i] for micro in share for i in micro) for share in layout]
        assert max(tokens) - min(tokens) <= max(lengths[i] for i in step)  # nobody has a row to give away


def test_an_idle_micro_batch_adds_no_loss_and_a_gradient_of_zeros(tiny_folder):
    model = build(tiny_folder, torch.float64).requires_grad_(True)
    loss = summed_loss(model, idle(make_rows(1)[0]))
    loss.backward()
    assert float(loss) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_plan_depends_on_epoch_and_seed_and_nothing_else():
    plans = {(e, s): plan_epoch(40, 8, e, s) for e in range(3) for s in range(3)}
    assert all(plan_epoch(40, 8, e, s) == plan for (e, s), plan in plans.items())
    assert len({str(plan) for plan in plans.values()}) == 9


def test_packing_is_first_fit_decreasing():
    lengths = [10, 60, 30, 40, 20, 50, 90]
    assert bin_pack(lengths, 70) == [[6], [1, 0], [5, 4], [3, 2]]
    assert bin_pack([], 70) == []
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 80))]
        bins = bin_pack(lengths, 100)
        assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
        fewest = -(
            -sum(lengths) // 100
        )  # no packing has fewer; first fit decreasing has at most 11/9 of the best, + 6/9
        assert len(bins) <= 11 / 9 * max(fewest, sum(n > 50 for n in lengths)) + 2


def first_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Returns bins found by trying one after the other, the longest row first."""
    bins: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (one for one in bins if sum(lengths[i] for i in one) + lengths[number] <= room)
        one = next(fits, None)
        bins.append([number]) if one is None else one.append(number)
    return bins


def test_packing_finds_the_first_bin_with_room_without_trying_them_all() -> None:
    rng = random.Random(0)
    for trial in range(200):
        lengths = [rng.randint(1, 130 if trial % 2 else 60) for _ in range(rng.randrange(40))]
        assert bin_pack(lengths, 100) == first_fit(lengths, 100)
