"""Training on two processes is training on one: the same losses, the same delta, and checkpoints that change hands."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import make_folder, needed, write_rows
from ranks import Hook, Result, run
from torch.distributed.tensor import DTensor

from litpeft.cli import main
from litpeft.methods import METHODS
from litpeft.model.quantize.codes import bitsandbytes
from litpeft.model.quantize.quantized import Quantized
from litpeft.train import fit
from litpeft.train.checkpoints import Checkpoints
from litpeft.train.step import Stepper

bitsandbytes()  # imported once, not in each rank anew

# Six rows in steps of five: the second step has one row, so that a rank is idle in it. Of two rows that are packed a
# micro-batch takes one, so that a rank has several. The gradient is cut down and what trains decays.
ARGUMENTS = {
    "--train.warmup_steps": 0,
    "--train.batch_size": 5,
    "--train.epochs": 2,
    "--train.lr": 1e-2,
    "--train.weight_decay": 0.1,
    "--train.max_norm": 0.5,
    "--train.micro_tokens": 70,
    "--validation.sample_tokens": 3,
    "--checkpoint.interval": 4,
    "--base.precision": "64-true",
}
STRATEGIES = ("ddp", "fsdp")
Train = Callable[..., Result]


@pytest.fixture(autouse=True, scope="module")
def _environment(monkeypatch_module: pytest.MonkeyPatch) -> None:
    monkeypatch_module.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in `base`, one with a tied head in `tied`, rows in `data`, some with weights, and pairs."""
    folder = tmp_path_factory.mktemp("distributed")
    make_folder(folder / "base")
    make_folder(folder / "tied", tie_word_embeddings=True)
    data = write_rows(folder)
    rows = [json.loads(line) | {"weight": 0.3 + n} for n, line in enumerate((data / "train.jsonl").open())]
    (folder / "weighted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"prompt": row["instruction"], "chosen": row["output"], "rejected": f"not {row['output']}", "weight": 0.3 + n}
        for n, row in enumerate(rows)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


@pytest.fixture
def train(folder: Path, tmp_path: Path) -> Train:
    """Trains with a strategy on two ranks, or with "one" on one; returns what the run left."""

    def train(
        name: str,
        strategy: str,
        *argv: object,
        out: str = "",
        base: str = "base",
        code: int = 0,
        hook: Hook | None = None,
    ) -> Result | str:
        out = tmp_path / (out or strategy)
        given = {**needed(name), "--base.dir": folder / base, "--data.path": folder / "data", "--out": out, **ARGUMENTS}
        if "--data.packing" in argv:
            del given["--train.micro_tokens"]
        spread = () if strategy == "one" else ("--strategy", strategy)
        words = [word for pair in given.items() for word in pair]
        if strategy == "one" and not code and hook is None:
            main(["finetune", name, *map(str, (*words, *argv))])  # in this process
            return Result.of(out)
        world = 1 if strategy == "one" else 2
        ended, said = run(tmp_path / "log", "finetune", name, *words, *argv, *spread, world=world, hook=hook)
        assert ended == code, said
        return Result.of(out) if code == 0 else said

    return train


# Each method is shown in float64 with one strategy and in bf16-true with the other, and every third one in another
# precision with the first; they take turns, and `-m full` runs the rest.
ROUNDING = {"32-true": 1e-4, "bf16-true": 0.02, "bf16-mixed": 0.1}  # what it may change
EXACT, ROUNDED = set(), set()
for _i, _name in enumerate(METHODS):
    _first, _other = (STRATEGIES[(_i + n) % 2] for n in range(2))
    EXACT |= {(_name, _first)}
    ROUNDED |= {(_name, "bf16-true", _other)}
    ROUNDED |= {(_name, ("32-true", "bf16-mixed")[_i % 2], _first)} if _i % 3 == 0 else set()


def cases(shown: set[tuple[str, ...]], *axes: Iterable[str], marks: pytest.MarkDecorator | tuple = ()) -> list:
    """Returns the product for parametrize: with `marks` the cells that are shown."""
    return [pytest.param(*cell, marks=marks if cell in shown else pytest.mark.full) for cell in product(*axes)]


@pytest.mark.parametrize(("name", "strategy"), cases(EXACT, METHODS, STRATEGIES))
def test_every_method_learns_the_same_on_two_ranks_in_float64(name: str, strategy: str, train: Train) -> None:
    one = train(name, "one")
    assert one.validations[-1] < one.validations[0]
    assert train(name, strategy).apart(one) <= 1e-10


@pytest.mark.parametrize(
    ("name", "precision", "strategy"), cases(ROUNDED, METHODS, ROUNDING, STRATEGIES, marks=pytest.mark.slow)
)
def test_every_method_learns_the_same_on_two_ranks_but_for_rounding(
    name: str, precision: str, strategy: str, train: Train, tmp_path: Path
) -> None:
    one = train(name, "one", "--base.precision", precision)
    assert train(name, strategy, "--base.precision", precision).apart(one) <= ROUNDING[precision]
    trained = Checkpoints(tmp_path / strategy / "checkpoints").newest().tensors("delta")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}


CASES = {
    "unpacked, checkpointing, norms": (
        *("--data.packing", "false", "--train.micro_batch_size", 2, "--train.activation_checkpointing", "cheap"),
        *("--method.unfreeze", '["*norm*"]'),
    ),
    "one row a step": ("--train.batch_size", 1, "--train.max_steps", 3, "--validation.max_rows", 1),
    "many held-out rows": ("--train.micro_tokens", 40, "--data.validation_path", "{data}/train.jsonl"),
    "pairs": (
        *("--preference.loss", "dpo", "--data.path", "{data}/../pairs.jsonl", "--data.validation_split", 0.4),
        *("--preference.likelihood", 0.5, "--train.micro_tokens", 130, "--train.batch_size", 2),
    ),
    "momentum, weights": (
        *("--train.optimizer", "SGD", "--train.optimizer_args", '{"momentum": 0.9}', "--train.max_norm", "null"),
        *("--data.path", "{data}/../weighted.jsonl", "--data.validation_split", 0.4),
        *("--train.activation_checkpointing", "true"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_agree_with_one_whatever_the_settings(case: str, train: Train, folder: Path) -> None:
    argv = [word.format(data=folder / "data") if "{data}" in str(word) else word for word in CASES[case]]
    one = train("lora", "one", *argv)
    assert all(train("lora", strategy, *argv).apart(one) <= 1e-10 for strategy in STRATEGIES)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch needs a C++ compiler")
def test_two_ranks_agree_with_one_where_the_blocks_are_compiled(train: Train) -> None:
    one = train("lora", "one")
    for strategy in ("one", *STRATEGIES):
        assert train("lora", strategy, "--train.compile", "true", out=f"compiled-{strategy}").apart(one) <= 1e-9


@pytest.mark.slow
def test_two_ranks_agree_with_one_on_pairs_where_the_head_trains_too(train: Train, folder: Path) -> None:
    argv = "--preference.loss", "orpo", "--data.path", folder / "pairs.jsonl", "--data.validation_split", 0.4
    one = train("full", "one", *argv, "--train.micro_tokens", 130, "--train.lr", 1e-3, base="tied")
    for strategy in STRATEGIES:
        again = train("full", strategy, *argv, "--train.micro_tokens", 130, "--train.lr", 1e-3, base="tied")
        assert again.apart(one) <= 1e-10


def test_an_embedding_that_is_the_head_trains_in_shares(train: Train) -> None:
    argv = "--method.unfreeze", '["embed*"]'
    one = train("lora", "one", *argv, base="tied")
    assert all(train("lora", strategy, *argv, base="tied").apart(one) <= 1e-10 for strategy in STRATEGIES)


def test_each_rank_holds_half_of_a_quantised_base(train: Train) -> None:
    def hook(rank: int) -> None:
        before = fit.Trainer.fit

        def look(trainer: fit.Trainer) -> fit.Progress:
            layers = [layer for layer in trainer.gpt.modules() if isinstance(layer, Quantized)]
            packed = [(name, tensor) for layer in layers for name, tensor in layer.packed().items()]
            assert len(layers) == 14
            assert all(isinstance(tensor, DTensor) for _, tensor in packed)
            codes = [tensor for name, tensor in packed if name == layers[0].packed_names[0]]
            assert all(2 * tensor.to_local().numel() == tensor.numel() for tensor in codes)
            return before(trainer)

        fit.Trainer.fit = look

    train("qlora", "fsdp", hook=hook)


def test_shares_in_the_machines_memory_and_a_kept_base_change_nothing(train: Train, folder: Path) -> None:
    one = train("qlora", "one")
    assert train("qlora", "fsdp", "--cpu_offload", "true", out="offload").apart(one) <= 1e-10
    make_folder(folder / "kept")
    writes = [
        train("qlora", strategy, "--base.cache", "true", base="kept", out=f"kept-{i}")
        for i, strategy in enumerate(("fsdp", "ddp", "one"))
    ]
    assert all(result.apart(one) <= 1e-10 for result in writes)
    assert sorted(p.name for p in folder.joinpath("kept").glob("*litpeft*")) == ["litpeft-nf4-dq"]


def leaving_before(step: int) -> Hook:
    """Every rank leaves, without a word, where this optimizer step would be."""

    def hook(rank: int) -> None:
        real = Stepper.step
        Stepper.step = lambda *args: os._exit(3) if args[4] == step else real(*args)

    return hook


EACH_STEP = "--checkpoint.interval", 1, "--train.epochs", 3, "--validation.interval", 2


@pytest.mark.parametrize(("first", "then"), [("one", "fsdp"), ("ddp", "one"), ("fsdp", "ddp")])
def test_a_run_goes_on_with_another_number_of_ranks(first: str, then: str, train: Train) -> None:
    whole = train("lora", "one", *EACH_STEP, out="whole")
    train("lora", first, *EACH_STEP, out="run", code=3, hook=leaving_before(4))
    assert train("lora", then, *EACH_STEP, "--resume", "true", out="run").apart(whole) <= 1e-10


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("name", "argv"), [("lora", ("--method.dropout", 0.3)), ("full", ())])
def test_a_run_that_goes_on_as_it_was_ends_with_the_same_bits(
    name: str, argv: tuple, strategy: str, train: Train
) -> None:
    whole = train(name, strategy, *EACH_STEP, *argv, out="whole")
    train(name, strategy, *EACH_STEP, *argv, out="run", code=3, hook=leaving_before(4))
    assert train(name, strategy, *EACH_STEP, *argv, "--resume", "true", out="run").apart(whole) == 0


ELEMENTWISE = ("Adam", "Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ELEMENTWISE)
def test_optimisers_that_work_element_by_element_work_on_shares(optimizer: str, train: Train) -> None:
    argv = "--train.optimizer", optimizer
    assert train("lora", "fsdp", *argv).apart(train("lora", "one", *argv)) <= 1e-10


def test_muon_computes_the_same_on_shares(train: Train) -> None:
    def in_float64(rank: int) -> None:  # its iteration is in bfloat16, whose rounding it makes large
        torch.Tensor.bfloat16 = torch.Tensor.clone

    argv = "--train.optimizer", "Muon", "--train.lr", "1e-3"
    one = train("lora", "one", *argv, hook=in_float64)
    assert train("lora", "fsdp", *argv, hook=in_float64).apart(one) <= 1e-10


@pytest.mark.parametrize("optimizer", ["Adafactor", "bitsandbytes.AdamW8bit"])
def test_an_optimiser_that_cannot_work_on_shares_is_refused(optimizer: str, train: Train) -> None:
    said = train("lora", "fsdp", "--train.optimizer", optimizer, "--base.precision", "32-true", code=2)
    assert said.count(f"litpeft: error: train.optimizer: {optimizer.split('.')[-1]} cannot step on ") == 1
    assert "hint: take AdamW, or another of torch.optim, or strategy ddp" in said
