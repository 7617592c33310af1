"""Learning from pairs of answers: values and gradients are those of the papers' formulas, however pairs are spread."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import read_metrics
from short_runs import Settings, assert_same, cut, newest, resume, train
from torch import Tensor

from litpeft.cli import main
from litpeft.data.batches import collate_pairs, idle_pairs
from litpeft.data.preference import Preference
from litpeft.data.rows import Row
from litpeft.data.settings import Data
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import DataSet, load_dataset
from litpeft.data.tokenizer import Tokenizer
from litpeft.methods.full import Full
from litpeft.methods.lora import LoRA
from litpeft.methods.prompt import Prompt
from litpeft.model.build import build
from litpeft.model.delta import copy_into, delta_state, trainable
from litpeft.model.gpt import GPT
from litpeft.model.objective import answer_sums, summed_pair_loss
from litpeft.train.objective import PairObjective

CPU = torch.device("cpu")
LOSSES = {
    "dpo": Preference("dpo"),
    "dpo, smoothed": Preference("dpo", beta=0.4, smoothing=0.2, likelihood=0.3),
    "ipo": Preference("ipo", beta=0.7),
    "simpo": Preference("simpo"),
    "simpo, smoothed": Preference("simpo", beta=3.0, margin=0.4, smoothing=0.1, likelihood=2.0),
    "orpo": Preference("orpo", beta=0.5),
}


def pair_rows(number: int = 4) -> list[Row]:
    """Returns pairs of answers of different lengths, with weights and references."""
    chance, rows = torch.Generator().manual_seed(3), []
    for at in range(number):
        prompt, *answers = (torch.randint(2, 250, (4 + n * at,), generator=chance).tolist() for n in (1, 2, 3))
        chosen, rejected = (
            Row(prompt + answer, [False] * len(prompt) + [True] * len(answer), len(prompt), f"row {at}", [])
            for answer in answers
        )
        weights = None if at == 1 else [0.5 * (at + 1) * trained for trained in chosen.trained]
        rows.append(replace(chosen, weights=weights, rejected=rejected, references=(-20.0 - at, -21.5 + at)))
    return rows


def log_p(model: GPT, row: Row) -> Tensor:
    """Returns log p of the answer, from all logits."""
    found = model(torch.tensor([row.ids]))[0].log_softmax(-1)
    return torch.stack([found[t - 1, row.ids[t]] for t in range(len(row.ids)) if row.trained[t]])


def by_the_papers(model: GPT, rows: list[Row], p: Preference) -> Tensor:
    """Returns the weighted mean of the pairs' losses, each written down as its paper has it."""
    total, weights = 0.0, 0.0
    for row in rows:
        c, r = log_p(model, row), log_p(model, row.rejected)
        beta, e = p.beta or (2.0 if p.loss == "simpo" else 0.1), p.smoothing
        ratio_c, ratio_r = c.sum() - row.references[0], r.sum() - row.references[1]
        if p.loss == "dpo":
            loss = -(1 - e) * torch.sigmoid(beta * (ratio_c - ratio_r)).log()
            loss = loss - e * torch.sigmoid(beta * (ratio_r - ratio_c)).log()
        elif p.loss == "ipo":
            loss = (ratio_c / len(c) - ratio_r / len(r) - 1 / (2 * beta)) ** 2
        elif p.loss == "simpo":
            m = beta * (c.mean() - r.mean()) - (1.0 if p.margin is None else p.margin)
            loss = -(1 - e) * torch.sigmoid(m).log() - e * torch.sigmoid(-m).log()
        else:
            odds = [y.mean().exp() / (1 - y.mean().exp()) for y in (c, r)]
            loss = -c.mean() - beta * torch.sigmoid((odds[0] / odds[1]).log()).log()
        weight = 1.0 if row.weights is None else max(row.weights)
        total, weights = total + weight * (loss - p.likelihood * c.mean()), weights + weight
    return total / weights


def gradients(model: GPT) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    return found


def moved(model: GPT) -> GPT:
    """Returns a model whose deltas are not at their start."""
    torch.manual_seed(1)
    for module in model.modules():
        if hasattr(module, "B"):
            torch.nn.init.normal_(module.B, std=0.1)
    return model


@pytest.fixture(scope="module")
def models(tiny_folder: Path) -> dict[str, GPT]:
    methods = {"lora": LoRA(rank=4), "full": Full(), "slot": LoRA(rank=2, targets=("head", "*.attn.q"))}
    return {name: moved(build(tiny_folder, torch.float64, method)) for name, method in methods.items()}


CASES = [*((kind, name) for kind in LOSSES for name in ("lora", "full")), ("dpo, smoothed", "slot")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_value_and_gradients_are_those_of_the_papers_however_pairs_are_spread(
    kind: str, name: str, models: dict[str, GPT], monkeypatch
) -> None:
    monkeypatch.setattr("litpeft.model.loss.CHUNK", 7)  # an answer is in several chunks
    model, rows, preference = models[name], pair_rows(), LOSSES[kind]
    want = by_the_papers(model, rows, preference)
    want.backward()
    slopes, total = gradients(model), sum(PairObjective.totals(None, rows)[1:])
    for split, mode in (([[0, 1, 2, 3]], "none"), ([[3], [], [1, 0], [2]], "block")):
        model.recompute, found = mode, 0.0
        for numbers in split:
            batch = collate_pairs([rows[i] for i in numbers]) if numbers else idle_pairs(rows[0])
            loss = summed_pair_loss(model, batch, preference) / total
            loss.backward()
            found += float(loss.detach())
        assert abs(found - float(want.detach())) <= 1e-11
        assert all((slope - slopes[key]).abs().max() <= 1e-10 for key, slope in gradients(model).items())
    model.recompute = "none"
    assert max(slope.abs().max() for slope in slopes.values()) > 1e-4


@pytest.mark.parametrize("name", ["lora", "full"])
def test_in_half_precision_the_fused_path_learns_what_the_plain_one_learns(name: str, tiny_folder: Path) -> None:
    method = {"lora": LoRA(rank=4), "full": Full()}[name]
    half, exact = (moved(build(tiny_folder, dtype, method)) for dtype in (torch.bfloat16, torch.float64))
    copy_into(exact, delta_state(half))
    batch, found = collate_pairs(pair_rows()), []
    for model in (half, exact):
        summed_pair_loss(model, batch, Preference("simpo")).backward()
        found.append(torch.cat([slope.double().flatten() for slope in gradients(model).values()]))
    assert (found[0] - found[1]).norm() <= 0.05 * found[1].norm()


def test_the_odds_of_an_answer_that_is_certain_are_finite() -> None:
    from litpeft.model.preference import losses_of

    sums = torch.tensor([[0.0, -1.0], [-1e-30, -1e-30], [-1e-9, -700.0]], dtype=torch.float64, requires_grad=True)
    found = losses_of(Preference("orpo"), sums, torch.ones(3, 2), None)
    assert found.isfinite().all()
    assert torch.autograd.grad(found.sum(), sums)[0].isfinite().all()


def test_sums_of_answers_are_those_of_transformers_packed_or_not(tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder).double()
    rows = pair_rows()
    want = [
        [
            -F.cross_entropy(
                theirs(torch.tensor([one.ids])).logits[0, :-1],
                torch.tensor([i if t else -100 for i, t in zip(one.ids, one.trained, strict=True)][1:]),
                reduction="sum",
            )
            for one in row.documents
        ]
        for row in rows
    ]
    ours = build(tiny_folder, torch.float64, LoRA())
    for tokens in (2048, 1):
        assert (answer_sums(ours, rows, tokens, CPU) - torch.tensor(want)).abs().max() < 1e-4


def test_placeholders_stand_before_each_of_the_two_answers(tiny_folder: Path) -> None:
    rows, model = pair_rows(2), build(tiny_folder, torch.float64, Prompt(prompt_length=3))
    framed = [[replace(d, ids=[0] * 3 + d.ids, trained=[False] * 3 + d.trained) for d in row.documents] for row in rows]
    want = torch.tensor([[log_p(model, one).sum() for one in documents] for documents in framed])
    assert (answer_sums(model, rows, 2048, CPU) - want).abs().max() < 1e-10


PAIRS = [
    {"prompt": f"Colour of {thing}?", "chosen": colour, "rejected": f"{other}, I guess"}
    for thing, colour, other in (
        *(("sky", "blue", "red"), ("grass", "green", "black"), ("snow", "white", "green")),
        *(("coal", "black", "pink"), ("blood", "red", "yellow"), ("lemon", "yellow", "white")),
    )
]
RUN = {"preference.loss": "dpo", "preference.beta": 0.5, "train.micro_tokens": 130}


def write_pairs(folder: Path, rows: list[dict] = PAIRS) -> Path:
    data = folder / "pairs"
    data.mkdir(exist_ok=True)
    for name, part in (("train", rows), ("validation", PAIRS[4:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return data


def run(base: Path, folder: Path, settings: Settings | None = None, method: str = "lora", out: str = "run") -> Path:
    return train(base, folder / out, RUN | {"data.path": write_pairs(folder)} | (settings or {}), method)


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny_folder, tmp_path_factory.mktemp("whole"), {"method.dropout": 0.1})


def test_a_run_learns_to_prefer_and_says_so(whole: Path) -> None:
    measured = [row for row in read_metrics(whole) if row["val_loss"] is not None]
    assert measured[0]["val_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert (measured[0]["val_preferred"], measured[0]["val_margin"]) == (0.5, 0)
    assert measured[-1]["val_loss"] < 0.5
    assert measured[-1]["val_preferred"] == 1
    report = (whole / "report.md").read_text()
    assert "0.693 → " in report
    assert "50.0% → 100.0% of the held\\-pairs" in report.replace("held-out pairs", "held\\-pairs")
    assert not (whole / "rows.csv").exists()
    assert json.loads((whole / "report.json").read_text())["neutral"][0] > 0


def test_a_resumed_run_is_the_uninterrupted_one(whole: Path, tiny_folder: Path, tmp_path: Path) -> None:
    half = cut(whole, 2, tmp_path / "half")
    settings = RUN | {"data.path": write_pairs(tmp_path), "method.dropout": 0.1}
    assert_same(resume(tiny_folder, half, settings), whole)
    saved, want = newest(half), newest(whole)
    assert torch.equal(saved.tensors("references")["train"], want.tensors("references")["train"])
    assert saved.state["progress"]["preferred"] == want.state["progress"]["preferred"]


def loaded(base: Path, path: Path, **settings: object) -> DataSet:
    tokenizer = Tokenizer.load(base)
    return load_dataset(Data(str(path), **settings), tokenizer, ChatTemplate(tokenizer), 512, pairs=True)


def test_what_the_loss_refers_to_is_the_base(whole: Path, tiny_folder: Path) -> None:
    data = loaded(tiny_folder, whole.parent / "pairs")
    want = answer_sums(build(tiny_folder, torch.float32), data.train, 1, CPU)
    assert (newest(whole).tensors("references")["train"] - want).abs().max() < 1e-4


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_a_reference_keep_none(loss: str, tiny_folder: Path, tmp_path: Path) -> None:
    settings = {"preference.loss": loss, "train.max_steps": 2, "validation.metric": "preferred", "train.epochs": 1}
    left = run(tiny_folder, tmp_path, settings | {"preference.beta": 0.5, "validation.final": "best"})
    assert not list(left.rglob("references.safetensors"))
    assert json.loads((left / "report.json").read_text())["preferred"][-1][0] == 2


def test_a_run_that_ends_within_an_epoch_measures_only_its_pairs_and_cannot_grow(tiny_folder, tmp_path) -> None:
    left = run(tiny_folder, tmp_path, {"train.max_steps": 1})
    assert len(newest(left).tensors("references")["train"]) == 4
    changed = {"train.max_steps": 2, "resume_changed": '["train.max_steps"]'}
    with pytest.raises(SystemExit) as ended:
        resume(tiny_folder, left, RUN | {"data.path": write_pairs(tmp_path)} | changed)
    assert ended.value.code == 2


@pytest.mark.parametrize("method", ["full", "prefix"])
def test_every_kind_of_method_learns_from_pairs(method: str, tiny_folder: Path, tmp_path: Path) -> None:
    left = run(tiny_folder, tmp_path, {"train.lr": 1e-3 if method == "full" else 2e-2}, method)
    losses = json.loads((left / "report.json").read_text())["validation"]
    assert losses[0][1] == pytest.approx(0.693147, abs=1e-6)
    assert losses[-1][1] < 0.69


BAD = {
    "alike": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are alike"),
    "empty": ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected is empty"),
    "another format": ({"instruction": "a", "output": "b"}, "all rows have to be pairs of answers"),
    "no prompt": (
        {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
        "chosen and rejected share no prompt",
    ),
    "thoughts": ({"prompt": "a", "chosen": "b", "rejected": "c", "reasoning": "d"}, "reasoning is not supported"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_is_no_pair_is_named_with_its_reason(name: str, tiny_folder, tmp_path, capsys) -> None:
    row, reason = BAD[name]
    data = write_pairs(tmp_path, [PAIRS[0], row])
    with pytest.raises(SystemExit) as ended:
        train(tiny_folder, tmp_path / "run", RUN | {"data.path": data})
    assert ended.value.code == 3
    assert f"train.jsonl:2: {reason}" in capsys.readouterr().err


def test_a_pair_with_an_answer_that_is_too_long_is_left_out_whole_and_once(tiny_folder, tmp_path) -> None:
    path = tmp_path / "pairs.jsonl"
    long = (
        {"prompt": "a", "chosen": "b" * 80, "rejected": "c" * 90},
        {"prompt": "a", "chosen": "b", "rejected": "c" * 90},
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in [PAIRS[0], *long, PAIRS[1]]))
    data = loaded(tiny_folder, path, max_length=100, overlong="drop", validation_split=0.0)
    assert [row.source.rpartition(":")[2] for row in data.train] == ["1", "4"]
    assert [bad.where.rpartition(":")[2] for bad in data.rejected] == ["2", "3"]
    row = data.train[0]
    assert data.train.column("tokens")[0] == row.tokens == len(row.ids) + len(row.rejected.ids)
    assert data.train.column("longest")[0] == len(row.rejected.ids)
    assert row.ids[: row.prompt_length] == row.rejected.ids[: row.rejected.prompt_length]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_only_what_follows_the_common_messages_is_trained(tiny_folder, tmp_path, capsys) -> None:
    said = [
        {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Hello"), ("user", "1+1?"))
    ]
    row = {"chosen": [*said, {"role": "assistant", "content": "2"}], "weight": 2}
    row["rejected"] = [*said, {"role": "assistant", "content": "3"}]
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row) + "\n")
    main(["data", "show", str(file), "--model", str(tiny_folder), "--pairs"])
    out = capsys.readouterr().out
    assert out.count("Hello<|im_end|>") == 2
    assert "[2<|im_end|>]×2" in out
    assert "rejected:" in out
    assert "[3<|im_end|>]" in out
    main(["data", "check", str(file), "--model", str(tiny_folder), "--pairs"])
    assert "1 to train on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "key", ["data.mask_prompt=false", "data.overlong=split", "ending.rows=3", "data.format=alpaca"]
)
def test_settings_that_do_not_go_with_pairs_are_refused(key: str, tiny_folder, tmp_path, capsys) -> None:
    name, value = key.split("=")
    with pytest.raises(SystemExit) as ended:
        run(tiny_folder, tmp_path, {name: value})
    assert ended.value.code == 2
    assert "preference.loss dpo learns from pairs of answers" in capsys.readouterr().err


def test_evaluate_says_of_how_many_pairs_the_chosen_answer_is_more_likely(whole: Path, capsys) -> None:
    file = whole.parent / "pairs" / "validation.jsonl"
    main(["evaluate", str(whole), str(file), "--pairs", "--max_new_tokens", "4", "--precision", "32-true"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("preferred"))
    assert line.split()[-1] == "100.0%"
