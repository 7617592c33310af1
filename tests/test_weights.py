"""Weights of rows and messages in the loss: sum(w_t * -log p_t) / sum(w_t), however the rows of a step are spread."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import finetune, read_metrics
from lightning.fabric import Fabric
from short_runs import QUIET, assert_same, cut, resume, train
from test_ops import Doubled, random, same
from test_row_store import written
from test_train import some_rows
from torch import Tensor

from litpeft.cli import main
from litpeft.data.batches import collate, idle
from litpeft.data.formats import FORMATS, detect
from litpeft.data.formats.columns import mapped
from litpeft.data.formats.turn import Turn
from litpeft.data.rows import Row, totals
from litpeft.data.rows import cut as cut_row
from litpeft.data.settings import Data
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import DataSet, load_dataset
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.held_out import HeldOut
from litpeft.methods.lora import LoRA
from litpeft.model import loss
from litpeft.model.build import build
from litpeft.model.delta import trainable
from litpeft.model.loss import summed_cross_entropy
from litpeft.model.objective import mean_loss, row_losses
from litpeft.model.slots import Linear
from litpeft.train.optim import make_optimizer
from litpeft.train.settings import Train
from litpeft.train.step import Stepper

CPU = torch.device("cpu")
ASKED = {"role": "user", "content": "q"}


def said(text: str, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **more}


CHAT = [ASKED, said("a"), ASKED, said("bb", weight=0.3), ASKED, said("ccc", weight=0)]
# a row, and the weights of what the assistant says in it
ROWS = {
    "messages": ({"messages": CHAT}, [1, 0.3, 0]),
    "a list alone": (CHAT, [1, 0.3, 0]),
    "a row and its messages": ({"messages": CHAT, "weight": 2.5}, [2.5, 0.75, 0]),
    "a switch beside": ({"messages": [ASKED, said("a", weight=4, train=True)], "loss": True, "weight": 0.5}, [2]),
    "alpaca": ({"instruction": "q", "output": "a", "history": [["x", "y"]], "weight": 0.5}, [0.5, 0.5]),
    "prompt_completion": ({"prompt": "q", "completion": [said("a", weight=3)], "weight": 0.5}, [1.5]),
    "a cell of a table": ({"question": "q", "answer": "a", "weight": "0.25"}, [0.25]),
    "an empty cell": ({"question": "q", "answer": "a", "weight": "", "train": "TRUE"}, [1]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 7}]}, [7]),
    "preference": ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": 0.1}, [0.1]),
    "chosen messages": ({"chosen": [ASKED, said("a", weight=2)], "rejected": [ASKED, said("b")], "weight": 3}, [6]),
    "text": ({"text": "ab", "weight": 0.1}, [0.1]),
}


def read(folder: Path, rows: list, tmp_path: Path, **settings: object) -> DataSet:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer.load(folder)
    given = {"validation_split": 0.0} | settings
    return load_dataset(Data(str(path), **given), tokenizer, ChatTemplate(tokenizer), 512)


@pytest.mark.parametrize("name", ROWS)
def test_every_token_of_an_answer_has_the_weight_of_its_message_times_that_of_its_row(name, tiny_folder, tmp_path):
    record, weights = ROWS[name]
    data = read(tiny_folder, [record], tmp_path)
    row, tokenizer = data.train[0], Tokenizer.load(tiny_folder)
    want, left = [], row.ids
    for turn, weight in zip((t for t in row.turns if t.role in ("assistant", "text")), weights, strict=True):
        answer = tokenizer.encode(f"{turn.content}<|im_end|>", [])
        at = next(i for i in range(len(left)) if left[i : i + len(answer)] == answer)
        want += [0.0] * at + [weight] * len(answer)
        left = left[at + len(answer) :]
    want += [0.0] * len(left)
    want[0] = 0.0  # nothing comes before the first token
    assert (row.weights or [float(one) for one in row.trained]) == pytest.approx(want, rel=1e-15)
    assert row.trained == [weight > 0 for weight in want]
    assert totals([row]) == (sum(row.trained), pytest.approx(sum(want)))
    assert (row.weights is None) == ({*weights} <= {0, 1})
    assert data.report.weights.rows == (row.weights is not None)


@pytest.mark.parametrize("value", [-1, -0.0001, 1e-9, 1001, True, "a lot", "0,5", [1], {"a": 1}, float("nan")])
def test_what_is_no_weight_is_refused_by_its_key_with_what_is_allowed(value):
    allowed = "weight must be 0, or a number from 0.000001 to 1000, got"
    rows = [one.example | {"weight": value} for one in FORMATS.values()]
    rows += [[ASKED, said("a", weight=value)]]
    for row in rows:
        with pytest.raises(ValueError, match=allowed):
            FORMATS[detect(row)].turns(row)
    columns = mapped({"user": "q", "assistant": "a", "weight": "quality"})
    with pytest.raises(ValueError, match="quality must be"):
        columns.turns({"q": "q", "a": "a", "quality": value})


def test_switches_that_contradict_a_weight_or_do_not_belong_there_are_refused():
    for more, told in (
        ({"weight": 0.5, "train": False}, r"messages\[1\].train and weight contradict each other"),
        ({"weight": 0, "loss": True}, r"messages\[1\].loss and weight contradict each other"),
    ):
        with pytest.raises(ValueError, match=told):
            FORMATS["messages"].turns({"messages": [ASKED, said("a", **more)]})
    with pytest.raises(ValueError, match=r"messages\[0\].weight can be above 0 for the assistant only, not for the us"):
        FORMATS["messages"].turns({"messages": [ASKED | {"weight": 0.5}, said("a")]})


def test_a_weight_is_named_with_its_file_and_line_and_counted(tiny_folder, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer,weight\nq,a,2\nq,b,much\nq,c,\n")
    argv = str(path), "--model", str(tiny_folder)
    main(["data", "show", *argv])
    told = capsys.readouterr().out
    assert f"{path}:2: 23 tokens, 2 trained, weight 2\n" in told
    assert "[a<|im_end|>]×2" in told
    assert "[c<|im_end|>]\n" in told
    assert f"{path}:3 cannot be used: weight must be 0, or a number from 0.000001 to 1000, got 'much'" in told
    main(["data", "show", *argv, "--html", str(tmp_path / "page.html")])
    assert '<span class="t s" title="weight 2">' in (tmp_path / "page.html").read_text()
    with pytest.raises(SystemExit):
        main(["data", "check", *argv, "--json", str(tmp_path / "found.json")])
    assert "weights     1 row with weights in the loss, 2\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["weights"] == {"rows": 1, "least": 2.0, "most": 2.0}
    with pytest.raises(SystemExit):
        finetune(tiny_folder, tmp_path, "--data.path", str(path))
    assert f"{path}:3: weight must be 0, or a number" in capsys.readouterr().err


def test_a_column_of_ones_own_is_mapped_to_the_weight():
    form = mapped({"user": "q", "assistant": "a", "weight": "quality"})
    row = {"q": "q", "a": "a", "quality": 0.5, "weight": 70}
    assert [turn.weight for turn in form.turns(row)] == [0.5, 0.5]
    assert form.unread(row) == {"weight"}
    assert [turn.weight for turn in form.turns(row | {"quality": None})] == [1, 1]
    assert form.asked({"q": "q"})
    assert form.fits({"q": "q"}, to_answer=True)
    assert mapped({"text": "t", "weight": "w"}).turns({"t": "x", "w": "3"})[0].weight == 3


def test_where_prompts_are_trained_they_have_the_weight_of_their_row(tiny_folder, tmp_path):
    rows = [{"messages": CHAT, "weight": 2}, {"text": "abc", "weight": 2}]
    chat, text = read(tiny_folder, rows, tmp_path, mask_prompt=False, system="Be brief.").train
    assert {w for w, t in zip(chat.weights, chat.trained, strict=True) if t} == {2, 0.6}
    assert chat.weights.count(0.6) == len("bb") + 1
    assert text.weights == [0.0 * (not t) or 2.0 * t for t in text.trained]


def weighted(rows: list[Row], seed: int = 0) -> list[Row]:
    """Returns the rows, of which all but the first have weights."""
    torch.manual_seed(seed)
    drawn = [[float(w) * t for w, t in zip(10 * torch.rand(len(r.ids)), r.trained, strict=True)] for r in rows]
    return [rows[0], *(replace(row, weights=own) for row, own in zip(rows[1:], drawn[1:], strict=True))]


def test_a_row_is_kept_with_its_weights_and_one_without_takes_no_more_room():
    rows = [replace(row, turns=[Turn("user", "q")]) for row in weighted(some_rows(6))]
    kept = written([[row] for row in rows])
    assert list(kept) == rows
    assert kept.column("weighted").tolist() == [False] + [True] * 5
    sizes = kept.column("bytes") - written([[replace(row, weights=None)] for row in rows]).column("bytes")
    assert sizes.tolist() == [0, *(8 * len(row.ids) for row in rows[1:])]
    assert rows[1].content != replace(rows[1], weights=None).content
    pieces = cut_row(rows[5], 10)
    assert [w for piece in pieces for w in piece.weights[1:]] == rows[5].weights[1:]
    assert sum(totals([piece])[1] for piece in pieces) == pytest.approx(totals([rows[5]])[1])


@pytest.mark.parametrize("piece", [8, 60])
@pytest.mark.parametrize(("bias", "filled"), [(False, False), (True, False), (False, True)])
def test_the_weighted_sum_equals_a_closed_formula_for_every_head(bias: bool, filled: bool, piece: int, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 5)
    monkeypatch.setattr(loss, "SOFTMAX_CHUNK", piece)
    head = Linear(6, 11, bias).double()
    if filled:
        head.slot.add("doubled", Doubled())
    x, weights = random(13, 6), random(13, seed=4).abs() * torch.arange(13)
    targets = torch.randint(0, 11, (13,), generator=torch.Generator().manual_seed(2))

    def of(function) -> list[Tensor]:
        rows = x.clone().requires_grad_()
        total = function(rows)
        return [total.detach(), *torch.autograd.grad(3 * total, [rows, *head.parameters()])]

    def closed(rows: Tensor) -> Tensor:
        p = (F.linear(rows, head.weight, head.bias) * (2 if filled else 1)).softmax(-1)
        return -(weights * p[range(13), targets].log()).sum()

    want = of(closed)
    assert same(of(lambda x: summed_cross_entropy(head, x, targets, weights=weights)), want)
    with torch.no_grad():
        assert same([summed_cross_entropy(head, x, targets, weights=weights)], want[:1])


@pytest.mark.parametrize("trained", [False, True])
def test_the_weighted_sum_in_bfloat16_is_as_near_as_the_plain_one(trained: bool):
    head = Linear(64, 1008)
    head.weight.data = random(1008, 64, seed=1).to(torch.float32 if trained else torch.bfloat16)
    head.requires_grad_(trained)
    x, targets = random(600, 64, dtype=torch.bfloat16), torch.arange(600)
    rows, leaves = x.clone().requires_grad_(), ([head.weight] if trained else [])
    weights = torch.full((600,), 0.3, dtype=torch.float64)

    def of(weights: Tensor | None) -> list[Tensor]:
        total = summed_cross_entropy(head, rows, targets, weights=weights)
        return [part.double() for part in (total.detach(), *torch.autograd.grad(total, [rows, *leaves]))]

    for got, plain in zip(of(weights), of(None), strict=True):  # no bias: 0.3 is not rounded to bfloat16
        assert float((got * plain).sum() / (plain * plain).sum()) == pytest.approx(0.3, rel=1e-4)
        assert (got - 0.3 * plain).norm() <= 4e-3 * got.norm()


def gradient(folder: Path, rows: list[Row], split: list[list[int]], dtype=torch.float64, precision="32-true"):
    """Returns the loss and the gradients of a step whose rows are split over micro-batches."""
    torch.manual_seed(1)
    model = build(folder, dtype, LoRA(rank=4))
    for name, parameter in trainable(model).items():
        torch.nn.init.normal_(parameter, std=0.05)
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    wrapped = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(make_optimizer(Train(), trainable(model)))
    batches = [collate([rows[i] for i in numbers]) for numbers in split]
    found = Stepper(fabric, wrapped, optimizer).gradient([*batches, idle(rows[0])], totals(rows)[1], 1)
    return found.loss, {name: p.grad.double() for name, p in trainable(model).items()}, model


@pytest.mark.parametrize("split", [[[*range(8)]], [[i] for i in range(8)], [[0, 7], [3, 4, 1], [2, 5, 6]]])
def test_a_step_equals_a_loop_over_its_tokens_however_the_rows_are_spread(split, tiny_folder):
    rows = weighted(some_rows())
    got, grads, model = gradient(tiny_folder, rows, split)
    total = weight = 0.0
    for row in rows:
        own = row.weights or [float(t) for t in row.trained]
        log_p = model(torch.tensor([row.ids]))[0].log_softmax(-1)
        for i in range(1, len(row.ids)):
            total, weight = total - own[i] * log_p[i - 1, row.ids[i]], weight + own[i]
    want = dict(zip(grads, torch.autograd.grad(total / weight, list(trainable(model).values())), strict=True))
    assert abs(got - float(total.detach()) / weight) <= 1e-12
    assert all((grads[name] - want[name]).abs().max() <= 1e-12 for name in want)


@pytest.mark.parametrize(("precision", "limit"), [("32-true", 1e-12), ("bf16-mixed", 2e-5)])
def test_one_weight_for_all_rows_is_none(precision, limit, tiny_folder):
    dtype = torch.float64 if precision == "32-true" else torch.float32
    rows = some_rows()
    alike = [replace(row, weights=[0.3 * t for t in row.trained]) for row in rows]
    runs = [gradient(tiny_folder, some, [[0, 1, 2, 3], [4, 5, 6, 7]], dtype, precision) for some in (rows, alike)]
    assert abs(runs[0][0] - runs[1][0]) <= limit * runs[0][0]
    if precision == "32-true":
        assert all((runs[0][1][name] - runs[1][1][name]).abs().max() <= limit for name in runs[0][1])


def test_measured_losses_are_weighted_the_same_packed_or_not(tiny_folder):
    model, rows = build(tiny_folder, torch.float64), weighted(some_rows())
    total = weight = 0.0
    for row in rows:
        own = torch.tensor(row.weights or row.trained, dtype=torch.float64)[1:]
        each = F.cross_entropy(model(torch.tensor([row.ids]))[0, :-1], torch.tensor(row.ids)[1:], reduction="none")
        total, weight = total + float((each * own).sum().detach()), weight + float(own.sum())
    assert [mean_loss(model, rows, tokens, CPU) for tokens in (2048, 1)] == pytest.approx([total / weight] * 2, 1e-12)
    alone = [mean_loss(model, [row], 2048, CPU) for row in rows]
    assert row_losses(model, rows, CPU) == pytest.approx(alone, abs=1e-12)

    def logits(prompts: list[list[int]]) -> Tensor:
        return torch.cat([model(torch.tensor([ids]))[0] for ids in prompts]).detach()

    assert HeldOut(rows, len(rows)).loss(logits) == pytest.approx(total / weight, rel=1e-6)


def write_weighted(folder: Path) -> Path:
    """Writes six rows with weights to learn, and two held-out ones; returns the folder."""
    folder.mkdir()
    rows = [[ASKED, said("ab" * i, weight=i / 2 or 5), ASKED, said("cd")] for i in range(1, 7)]
    records = [{"messages": chat, "weight": 1 + i % 2} for i, chat in enumerate(rows)]
    for name, part in (("train", records), ("validation", records[:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def test_a_run_learns_measures_and_resumes_by_the_weights(tiny_folder, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    data = write_weighted(tmp_path / "rows")
    settings = QUIET | {"data.path": data, "base.precision": "64-true", "train.batch_size": 6, "ending.rows": 6}
    whole = train(tiny_folder, tmp_path / "whole", settings)
    theirs, losses = AutoModelForCausalLM.from_pretrained(tiny_folder), {}
    tokenizer = Tokenizer.load(tiny_folder)
    rows = load_dataset(Data(str(data / "train.jsonl"), validation_split=0.0), tokenizer, ChatTemplate(tokenizer), 512)
    sums = []
    for row in rows.train:
        logits, own = theirs(torch.tensor([row.ids])).logits[0, :-1], torch.tensor(row.weights)[1:]
        each = F.cross_entropy(logits, torch.tensor(row.ids)[1:], reduction="none").detach()
        sums.append((float((each * own).sum()), float(own.sum())))
        losses[row.source.rpartition(":")[2]] = sums[-1][0] / sums[-1][1]

    def mean(pairs: list[tuple[float, float]]) -> float:
        return sum(a for a, _ in pairs) / sum(b for _, b in pairs)

    metrics = read_metrics(whole)
    assert next(row["loss"] for row in metrics if row["loss"]) == pytest.approx(mean(sums), rel=1e-5)
    assert next(row["val_loss"] for row in metrics if row["val_loss"]) == pytest.approx(mean(sums[:2]), rel=1e-5)
    with open(whole / "rows.csv", newline="") as file:
        assert {row["line"]: float(row["loss_before"]) for row in csv.DictReader(file)} == pytest.approx(
            losses, rel=1e-4
        )
    assert "weights     8 rows with weights in the loss, from 0.5 to 6\n" in capsys.readouterr().out
    assert_same(resume(tiny_folder, cut(whole, 1, tmp_path / "part"), settings), whole)
    text = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(text.replace('"weight": 2}', '"weight": 1}'))
    with pytest.raises(SystemExit):
        resume(tiny_folder, whole, settings | {"train.epochs": 3})
    assert "other rows: as many rows and tokens, but other text, weights or order" in capsys.readouterr().err
    train(tiny_folder, tmp_path / "alone", settings | {"train.batch_size": 1, "train.max_steps": 1})
    assert "warning: with train.batch_size 1 a step is one row, whose own weight cancels out" in capsys.readouterr().out
