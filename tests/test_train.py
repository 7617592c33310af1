"""The training loop: the loss of a step, the schedule, and whole runs through the command line."""

import json
import math
import os
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import finetune, make_folder, read_metrics, write_rows
from lightning.fabric import Fabric
from safetensors.torch import load_file, save_file
from short_runs import start, wait_for_step
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from litpeft.cli import COMMANDS, parse
from litpeft.core.errors import UserError
from litpeft.data.batches import collate, plan_epoch
from litpeft.data.rows import Row
from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.delta import delta_state, trainable
from litpeft.model.objective import mean_loss
from litpeft.train.learned import PART, check_learned, count_still, sums
from litpeft.train.optim import lr_at, make_optimizer
from litpeft.train.progress import Progress
from litpeft.train.settings import Train
from litpeft.train.step import Stepper


def some_rows(count: int = 8) -> list[Row]:
    """Returns rows of very different lengths and shares of trained tokens."""
    torch.manual_seed(0)
    rows = []
    for number in range(count):
        length, prompt = 6 + 9 * number, 2 + 3 * (number % 3)
        ids = torch.randint(0, 300, (length,)).tolist()
        rows.append(Row(ids, [i >= prompt for i in range(length)], prompt, f"rows.jsonl:{number + 1}", []))
    return rows


def one_step(folder: Path, dtype: torch.dtype, split: list[list[int]]) -> tuple[float, float, dict]:
    torch.manual_seed(1)
    model = build(folder, dtype, LoRA(rank=4))
    for module in model.modules():
        if hasattr(module, "B"):
            torch.nn.init.normal_(module.B, std=0.02)
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(
        make_optimizer(Train(optimizer="SGD", lr=1.0, weight_decay=0.0), trainable(model))
    )
    rows = some_rows()
    batches = [collate([rows[i] for i in numbers]) for numbers in split]
    trained = sum(len(batch.targets) for batch in batches)
    found = Stepper(fabric, wrapped, optimizer).step(batches, trained, 1.0, 1)
    return found.loss, found.norm, {key: value.clone() for key, value in delta_state(model).items()}


@pytest.mark.parametrize(
    "split", [[[i] for i in range(8)], [[0, 7], [3, 4, 1], [2, 5, 6]], [[7, 6, 5, 4], [3, 2, 1, 0]]]
)
def test_how_rows_are_spread_over_micro_batches_changes_nothing(tiny_folder, split: list[list[int]]) -> None:
    loss, norm, delta = one_step(tiny_folder, torch.float64, split)
    want_loss, want_norm, want = one_step(tiny_folder, torch.float64, [list(range(8))])
    assert abs(loss - want_loss) <= 1e-12
    assert abs(norm - want_norm) <= 1e-12
    assert all((delta[key] - want[key]).abs().max() <= 1e-12 for key in want)


def test_packed_and_unpacked_losses_agree_in_float32(tiny_folder) -> None:
    model = build(tiny_folder, torch.float32)
    rows = some_rows(24)
    packed, alone = (mean_loss(model, rows, tokens, torch.device("cpu")) for tokens in (2048, 1))
    assert abs(packed - alone) <= 2e-6


def test_the_loss_is_the_mean_over_trained_tokens_of_transformers_logits(tiny_folder) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder)
    total = count = 0.0
    for row in some_rows():
        logits = theirs(torch.tensor([row.ids])).logits[0, :-1]
        target = torch.tensor([i if t else -100 for i, t in zip(row.ids, row.trained, strict=True)][1:])
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum").detach())
        count += sum(row.trained)
    assert (
        abs(mean_loss(build(tiny_folder, torch.float32), some_rows(), 64, torch.device("cpu")) - total / count) < 1e-5
    )


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_the_learning_rate_follows_the_usual_formula_after_the_warmup(schedule: str, reference) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = reference(optimizer, 4, 20)
    want = []
    for _ in range(20):
        want.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    got = [lr_at(step, 20, Train(lr=0.5, warmup_steps=4, schedule=schedule)) for step in range(20)]
    assert got[:4] == [0.125, 0.25, 0.375, 0.5]  # theirs wastes the first step on a learning rate of 0
    assert got[4:] == pytest.approx(want[4:], abs=1e-12)


def test_the_learning_rate_has_no_edge_that_breaks() -> None:
    assert lr_at(0, 10, Train(lr=1.0, warmup_steps=0)) == 1.0
    assert [lr_at(s, 3, Train(lr=1.0, warmup_steps=100)) for s in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert lr_at(9, 10, Train(lr=1.0, warmup_steps=2, schedule="constant")) == 1.0
    low = [lr_at(s, 100, Train(lr=1.0, min_lr=0.1, warmup_steps=5)) for s in range(100)]
    assert low[5] == 1.0
    assert 0.1 < low[-1] < 0.101
    assert lr_at(100, 100, Train(lr=1.0, min_lr=0.1, warmup_steps=5)) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor", "bitsandbytes.AdamW8bit"])
def test_an_optimiser_is_made_by_name(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = make_optimizer(Train(lr=0.01, optimizer=name, weight_decay=0.1), {"weight": parameter})
    assert type(optimizer).__name__ == name.rpartition(".")[2]
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.01, 0.1)
    parameter.sum().backward()
    optimizer.step()
    assert float(parameter.detach().mean()) < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "AdamV"}, "torch.optim has no 'AdamV' \\(did you mean \"Adam"),
        ({"optimizer": "os.system"}, "neither a class of torch.optim"),
        ({"optimizer_args": {"betaz": 1}}, "AdamW takes no 'betaz'"),
        ({"optimizer_args": {"lr": 1}}, "lr has a key of its own"),
        ({"optimizer_args": {"betas": [2, 3]}}, "AdamW refuses"),
        ({"optimizer": "Rprop", "weight_decay": 0.1}, "Rprop has no weight decay"),
        ({"optimizer": "LBFGS"}, "torch.optim has no 'LBFGS'"),
        ({"optimizer_args": {"foreach": True, "fused": True}}, "AdamW refuses"),
    ],
)
def test_an_optimiser_that_cannot_be_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_optimizer(Train(**settings), {"weight": torch.nn.Parameter(torch.ones(1))})


@pytest.mark.usefixtures("drawn")
def test_a_run_learns_its_rows_and_leaves_what_it_promises(tiny_folder, tmp_path, capsys) -> None:
    trains = "--method.unfreeze", '["head.weight", "embed.weight"]'
    out = finetune(tiny_folder, tmp_path, "--train.epochs", "40", "--train.lr", "1e-2", "--tensorboard", *trains)
    rows = read_metrics(out)
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    validation = [row["val_loss"] for row in rows if row["val_loss"] is not None]
    assert losses[-1] < 0.1 * losses[0]
    assert len(losses) == 80
    assert len(validation) == 11
    facts = json.loads((out / "final" / "delta.json").read_text())
    assert facts["method"] == "lora"
    method = LoRA(unfreeze=("head.weight", "embed.weight"))
    assert set(load_file(out / "final" / "delta.safetensors")) == build(tiny_folder, torch.float32, method).delta_keys
    assert "## " in (out / "report.md").read_text()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((out / "tensorboard").iterdir())
    assert "all steps done" in (out / "report.md").read_text()


def test_the_same_command_twice_gives_the_same_bytes_and_run_yaml_repeats_it(tiny_folder, tmp_path) -> None:
    args = "--method.dropout", "0.2", "--train.batch_size", "3", "--base.precision", "bf16-true"
    a = finetune(tiny_folder, tmp_path, *args, out="a")
    b = finetune(tiny_folder, tmp_path, *args, out="b")
    command = COMMANDS["finetune lora"]
    settings, method, _ = parse("finetune lora", command, ["--config", str(a / "run.yaml"), "--out", "c"])
    assert (settings.train.batch_size, method.dropout, method.targets) == (3, 0.2, ("*.attn.*", "*.mlp.*"))
    bytes_of = [(run / "final" / "delta.safetensors").read_bytes() for run in (a, b)]
    assert bytes_of[0] == bytes_of[1]
    assert yaml.safe_load((a / "run.yaml").read_text())["method"]["rank"] == 8


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-true", torch.float32), ("bf16-mixed", torch.float32), ("64-true", torch.float64)],
)
def test_every_precision_of_the_cpu_learns_and_saves_what_trained(
    tiny_folder, tmp_path, precision: str, dtype: torch.dtype
) -> None:
    learn = "--train.epochs", "10", "--train.lr", "1e-2", "--method.unfreeze", '["head.weight"]'
    out = finetune(tiny_folder, tmp_path, *learn, "--base.precision", precision)
    losses = [row["val_loss"] for row in read_metrics(out) if row["val_loss"] is not None]
    assert losses[-1] < losses[0] - 1
    assert {tensor.dtype for tensor in load_file(out / "final" / "delta.safetensors").values()} == {dtype}


def test_a_dry_run_shows_the_data_and_writes_nothing(tiny_folder, tmp_path, capsys) -> None:
    out = finetune(tiny_folder, tmp_path, "--dry_run")
    said = capsys.readouterr().out
    assert not out.exists()
    assert "lora would train 15,616 of" in said  # 2 layers of rank 8: (in + out) of q, k, v, o, gate, up, down
    assert "[blue<|im_end|>]" in said


REFUSED = {
    "no such optimiser": ["--train.optimizer", "AdamV"],
    "no such argument": ["--train.optimizer_args", '{"betaz": 1}'],
    "an argument that the optimiser refuses": ["--train.optimizer_args", '{"betas": [2, 3]}'],
    "an optimiser that cannot step on all that trains": ["--train.optimizer", "Muon", "--method.unfreeze", "*norm*"],
    "an optimiser without decay": ["--train.optimizer", "Rprop", "--train.weight_decay", "0.1"],
    "a target that is not there": ["--method.targets", "*.atn.q"],
    "quantised weights that train": ["--base.quantize", "nf4", "--method.unfreeze", "*.attn.q.weight"],
    "a precision that shares cannot have": ["--base.precision", "16-true"],
    "tensorboard": ["--tensorboard"],
    "patience": ["--data.validation_split", "0", "--validation.patience", "3"],
    "metric": ["--data.validation_split", "0", "--validation.metric", "exact"],
    "final": ["--data.validation_split", "0", "--validation.final", "best"],
    "nothing to ask": ["--validation.metric", "exact", "--data.overlong", "split"],
    "nothing to resume from": ["--resume_changed", "train.lr"],
}


@pytest.mark.parametrize("argv", REFUSED.values(), ids=REFUSED)
def test_a_dry_run_refuses_what_the_run_refuses_and_neither_leaves_a_thing(
    tiny_folder, tmp_path, capsys, monkeypatch, argv: list[str]
) -> None:
    for module in ("tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    data = write_rows(tmp_path)
    if "--data.validation_split" in argv:
        (data / "validation.jsonl").unlink()
    elif "exact" in argv:
        row = {"instruction": "x" * 700, "output": "yes" * 50}  # its prompt is longer than the model reaches
        (data / "validation.jsonl").write_text(json.dumps(row))
    before = sorted(tmp_path.rglob("*"))
    told = []
    for dry in (["--dry_run"], []):
        with pytest.raises(SystemExit) as stop:
            finetune(tiny_folder, tmp_path, "--data.path", str(data), *argv, *dry)
        assert stop.value.code == 2
        told.append(capsys.readouterr().err)
        assert sorted(tmp_path.rglob("*")) == before
    assert told[0] == told[1]
    assert "litpeft: error: " in told[0]


def test_a_dry_run_refuses_an_output_that_exists_and_damaged_headers(tiny_folder, tmp_path, capsys) -> None:
    out = finetune(tiny_folder, tmp_path)
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    for folder, argv, code, message in (
        (tiny_folder, (), 2, "the output exists"),
        (base, ("--overwrite",), 4, "the weights do not fit config.json"),
        (tiny_folder, ("--resume", "--train.lr", "2e-3"), 2, "the run began with other settings: train.lr"),
    ):
        with pytest.raises(SystemExit) as stop:
            finetune(folder, tmp_path, "--dry_run", *argv)
        assert (stop.value.code, message in capsys.readouterr().err) == (code, True)
    assert (out / "report.md").exists()


def test_a_run_that_fails_before_its_first_step_leaves_no_folder_in_the_way(tmp_path, capsys) -> None:
    folder = make_folder(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 1e20  # finite, and the logits are not
    tensors["lm_head.weight"] *= 1e30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for existed in (False, True):
        if existed:
            (tmp_path / "run").mkdir()
        with pytest.raises(SystemExit) as stop:
            finetune(folder, tmp_path)
        assert (stop.value.code, (tmp_path / "run").exists()) == (5, existed), capsys.readouterr().err


@pytest.mark.parametrize(
    ("interval", "message"), [("1", "the validation loss is nan after step 1"), ("99", "train.jsonl:")]
)
def test_steps_that_diverge_stop_before_anything_is_saved(
    tiny_folder, tmp_path, capsys, interval: str, message: str
) -> None:
    diverge = "--train.lr", "1e30", "--train.epochs", "5", "--train.max_norm", "null"
    with pytest.raises(SystemExit) as stop:
        finetune(tiny_folder, tmp_path, *diverge, "--validation.interval", interval)
    assert stop.value.code == 5
    assert message in capsys.readouterr().err.splitlines()[-2]
    assert not (tmp_path / "run" / "final").exists()


def test_a_base_with_a_nan_is_refused_before_training(tmp_path, capsys) -> None:
    folder = make_folder(tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as stop:
        finetune(folder, tmp_path)
    assert stop.value.code == 4
    assert "model.norm.weight holds numbers that are not finite" in capsys.readouterr().err


def test_held_out_rows_that_cannot_be_asked_are_measured_all_the_same(tiny_folder, tmp_path) -> None:
    data = write_rows(tmp_path)
    row = json.dumps({"instruction": "x" * 700, "output": "yes" * 50})  # its prompt is longer than the model reaches
    (data / "validation.jsonl").write_text(row)
    out = finetune(tiny_folder, tmp_path, "--data.path", str(data), "--data.overlong", "split", out="run")
    assert any(metrics["val_loss"] is not None for metrics in read_metrics(out))


def refused_as_unlearned(base: Path, folder: Path, *argv: str, method: str = "lora") -> None:
    """Runs a training that must end with 5 and without a result."""
    with pytest.raises(SystemExit) as stop:
        finetune(base, folder, *argv, method=method)
    assert stop.value.code == 5
    assert not (folder / "run" / "final").exists()
    assert not (folder / "run" / "report.md").exists()


@pytest.mark.parametrize("epochs", [1, 2, 20])
def test_a_run_whose_gradient_vanished_ends_with_its_own_code(tiny_folder, tmp_path, capsys, epochs: int) -> None:
    few = "--train.lr", "1e9", "--train.batch_size", "2", "--validation.interval", "99", "--validation.max_rows", "1"
    refused_as_unlearned(tiny_folder, tmp_path, *few, "--train.epochs", str(epochs))
    said = capsys.readouterr().err
    assert "the gradient is exactly 0 after step 1 at a loss of 5.768 (as if each of the 320 tokens were as" in said
    assert "a lower train.lr" in said
    norms = [row["grad_norm"] for row in read_metrics(tmp_path / "run") if row["grad_norm"] is not None]
    assert norms[0] > 1
    assert norms[1:] == [0] * (2 if epochs == 1 else 5)


@pytest.mark.parametrize(("method", "epochs"), [("lora", 1), ("lora", 9), ("full", 1), ("adapter_v2", 1)])
def test_a_base_whose_activations_overflow_is_named(tmp_path, capsys, method: str, epochs: int) -> None:
    base = make_folder(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 1e25  # finite, and its squares are not
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    refused_as_unlearned(base, tmp_path, "--train.epochs", str(epochs), "--train.weight_decay", "0.1", method=method)
    said = capsys.readouterr().err
    assert "the gradient is exactly 0 from step 1 on at a loss of 5.768" in said
    assert "the base's activations overflow" in said


def test_steps_that_rounding_takes_whole_are_named(tiny_folder, tmp_path, capsys) -> None:
    lost = "--train.lr", "1e-9", "--base.precision", "bf16-true", "--method.master_weights", "false"
    refused_as_unlearned(tiny_folder, tmp_path, *lost, method="full")
    assert (
        "all that trains is after 2 steps what it was before the first: nothing was learned" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("method", "lr", "said"),
    [
        ("lora", 1e9, "the gradient is exactly 0 after step 1 at a loss of 5.768"),
        ("adapter_v2", 1e5, "the gradient is exactly 0 after step 1 at a loss of 5.768"),
        ("full", 10, "a guess among all 320 tokens is better"),
        ("adapter_v2", 1e3, "a guess among all 320 tokens is better"),
    ],
)
def test_a_single_step_that_ruins_the_model_is_no_result(tiny_folder, tmp_path, capsys, method, lr, said) -> None:
    one = "--train.lr", str(lr), "--train.max_steps", "1"
    refused_as_unlearned(tiny_folder, tmp_path, *one, method=method)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "full", "adapter", "adapter_v2"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("rate", [("1e-3", 0), ("1e-7", 50)])
def test_a_short_run_of_small_steps_is_a_result(tiny_folder, tmp_path, method: str, steps: int, rate) -> None:
    few = "--train.max_steps", str(steps), "--train.lr", rate[0], "--train.warmup_steps", str(rate[1])
    out = finetune(tiny_folder, tmp_path, *few, "--train.epochs", "2", method=method)
    assert (out / "final" / "delta.json").exists()


def test_a_gradient_of_0_on_rows_that_nothing_reaches_is_chance() -> None:
    check_learned(Progress(step=9, losses=[4.0] * 9), 4.0, 0.0, 320)
    for progress, loss in ((Progress(step=9, still=1, losses=[4.0] * 9), 4.0), (Progress(step=9, losses=[4.0] * 9), 5)):
        with pytest.raises(UserError, match="exactly 0 after step"):
            check_learned(progress, loss, 0.0, 320)


def test_a_small_step_is_a_step(tiny_folder, tmp_path) -> None:
    out = finetune(tiny_folder, tmp_path, "--train.lr", "1e-12")
    moved = [t.abs().max() for name, t in load_file(out / "final/delta.safetensors").items() if name.endswith(".B")]
    assert 0 < max(moved) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sums_of_a_tensor_tell_the_smallest_change_of_any_number(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, PART // 2 + 1, dtype=dtype)
    [(total, squares)] = sums([tensor])
    assert total == pytest.approx(tensor.double().sum().item())
    assert squares == pytest.approx(tensor.double().square().sum().item())
    for at in ((0, 0), (1, 7), (2, -1)):
        moved = tensor.clone()
        moved[at] = torch.nextafter(moved[at], torch.tensor(9, dtype=dtype))
        assert sums([moved]) != sums([tensor])
    assert sums([torch.empty(0, dtype=dtype)]) == [(0, 0)]


@pytest.mark.parametrize(("loss", "norm"), [(1e-4, 0.0), (0.0, 0.0), (2.0, math.inf), (2.0, math.nan), (2.0, 5e-324)])
def test_no_gradient_is_right_where_all_is_known_or_a_scaler_skips_the_step(loss: float, norm: float) -> None:
    progress = Progress()
    for step in range(1, 20):  # every third has none by chance
        progress.step = step
        count_still(progress, *((2.0, 0.0) if step % 3 == 0 else (loss, norm)), vocabulary=320)
    assert progress.still == 0


def test_packing_changes_the_layout_and_not_what_is_learnt(tiny_folder, tmp_path) -> None:
    common = "--base.precision", "64-true", "--train.epochs", "4", "--train.lr", "1e-2"
    packed = finetune(tiny_folder, tmp_path, *common, "--train.micro_tokens", "70", out="a")
    alone = finetune(
        tiny_folder, tmp_path, *common, "--data.packing", "false", "--train.micro_batch_size", "2", out="b"
    )
    states = [load_file(run / "final" / "delta.safetensors") for run in (packed, alone)]
    assert all((states[0][key] - states[1][key]).abs().max() < 1e-9 for key in states[0])
    assert any(tensor.abs().max() > 1e-3 for key, tensor in states[0].items() if key.endswith(".B"))


def test_a_run_out_of_time_ends_after_its_step_and_says_so(tiny_folder, tmp_path) -> None:
    out = finetune(tiny_folder, tmp_path, "--train.epochs", "1000", "--train.max_time", "1e-6")
    assert "reached at step 1 of 2000" in (out / "report.md").read_text()
    assert json.loads((out / "final" / "delta.json").read_text())["step"] == 1


def test_an_output_that_exists_is_refused_or_replaced_as_a_whole(tiny_folder, tmp_path, capsys) -> None:
    out = finetune(tiny_folder, tmp_path)
    (out / "rejected.jsonl").write_text("stale")

    def refused(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            finetune(tiny_folder, tmp_path, *argv)
        assert stop.value.code in (2, 5)
        return capsys.readouterr().err

    assert "the output exists" in refused()
    refused("--overwrite", "--train.lr", "1e30", "--checkpoint.interval", "0")  # diverges: what was there comes back
    assert (out / "rejected.jsonl").exists()
    finetune(tiny_folder, tmp_path, "--overwrite")
    assert not (out / "rejected.jsonl").exists()
    (out / "thesis.txt").write_text("precious")
    assert "holds thesis.txt, which litpeft did not write" in refused("--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "run"]


def start_long(base: Path, folder: Path, *argv: str) -> BaseProcess:
    """Starts a run that would take very long, in a process of its own."""
    data = write_rows(folder)
    common = ["--base.dir", base, "--data.path", data, "--out", folder / "run", "--train.epochs", 100000]
    return start(["finetune", "lora", *map(str, common), *argv], folder / "said")


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_ends_the_run_after_its_step_with_the_delta_saved(
    tiny_folder, tmp_path, number: signal.Signals, exit_code: int
) -> None:
    process, out = start_long(tiny_folder, tmp_path), tmp_path / "run"
    wait_for_step(out, 3, process)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == exit_code, (tmp_path / "said").read_text()
    assert json.loads((out / "final" / "delta.json").read_text())["step"] >= 3
    assert f"{number.name} at step" in (out / "report.md").read_text()


def test_a_run_that_was_killed_while_replacing_another_gives_that_one_back(tiny_folder, tmp_path) -> None:
    out = finetune(tiny_folder, tmp_path)
    whole = (out / "final" / "delta.safetensors").read_bytes()
    process = start_long(tiny_folder, tmp_path, "--overwrite")
    while process.is_alive() and not (list(tmp_path.glob(".tmp-run-*-old")) and (out / "metrics.csv").exists()):
        time.sleep(0.05)
    process.kill()
    process.join()
    assert not (out / "final").exists()
    with pytest.raises(SystemExit):
        finetune(tiny_folder, tmp_path)
    assert (out / "final" / "delta.safetensors").read_bytes() == whole
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_plan_of_an_epoch_holds_every_row_once_and_its_last_step_is_smaller() -> None:
    plan = plan_epoch(11, 4, 0, 0)
    assert [len(step) for step in plan] == [4, 4, 3]
    assert sorted(i for step in plan for i in step) == list(range(11))
