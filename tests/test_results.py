"""What a run of each kind leaves, and what generate, evaluate and merge make of it."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TINY, finetune, folded, make_folder, read_metrics, write_rows
from safetensors.torch import load_file
from test_methods import NOT_FOLDABLE
from transformers import AutoModelForCausalLM

from litpeft.cli import main
from litpeft.exchange.run import find_run
from litpeft.generate.load import load_model
from litpeft.methods import METHODS
from litpeft.model.build import build
from litpeft.model.delta import load_delta, without_delta
from litpeft.model.fold import unfoldable
from litpeft.model.quantize import STORAGES, Storage

IDS = torch.randint(0, TINY["vocab_size"], (2, 30), generator=torch.Generator().manual_seed(5))
LEARN = "--train.epochs", "3", "--train.lr", "1e-2", "--validation.max_rows", "100"  # all that are held out


def fails(capsys, *argv: str) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return stop.value.code, capsys.readouterr().err


@pytest.fixture(scope="module", params=METHODS)
def run(request, tiny_folder, tmp_path_factory) -> Path:
    rate = ("--train.lr", "2e-2") if request.param == "pre_layer" else ()  # the method's own rate
    return finetune(tiny_folder, tmp_path_factory.mktemp("run"), *LEARN, *rate, method=request.param)


@torch.no_grad()
def test_a_run_is_loaded_as_it_was_at_its_last_measurement(run: Path, capsys) -> None:
    last = [row["val_loss"] for row in read_metrics(run) if row["val_loss"] is not None][-1]
    out = run / ".." / "answers.jsonl"
    argv = "evaluate", str(run), str(run / ".." / "data" / "validation.jsonl"), "--precision", "32-true"
    main([*argv, "--max_new_tokens", "4", "--output", str(out)])
    found = re.search(r"loss, nats per token +([\d. ]+)", capsys.readouterr().out).group(1).split()
    assert float(found[-1]) == pytest.approx(last, abs=1e-4)
    assert len(found) == 2  # the base beside it, whatever the run holds
    assert float(found[0]) > last
    out.unlink()


def test_a_run_merges_or_says_why_not(run: Path, capsys) -> None:
    facts = json.loads((run / "final" / "delta.json").read_text())
    delta = unfoldable(load_model(str(run)).model)
    refused = f"cannot be merged: {delta} acts on activations" if delta else ""
    refused = "ordinary Hugging Face folder already" if facts["method"] == "full" else refused
    assert bool(delta) == (facts["method"] in NOT_FOLDABLE)
    if refused:
        code, said = fails(capsys, "merge", str(run))
        assert code == 4
        assert refused in said
        assert not (run / "merged").exists()
        return
    main(["merge", str(run), "--overwrite"])
    with torch.no_grad():
        want = load_model(str(run), precision="32-true").model(IDS)
        theirs = AutoModelForCausalLM.from_pretrained(run / "merged")(IDS).logits
    assert (theirs - want).abs().max() <= 5e-6 * want.abs().max()


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_the_result_of_full_is_a_folder_that_transformers_loads(tmp_path, saved: torch.dtype) -> None:
    base = make_folder(tmp_path / "base", tie_word_embeddings=True, dtype="bfloat16")
    choice = () if saved == torch.float32 else ("--method.save_dtype", "bfloat16")  # float32 is how it was held
    run = finetune(base, tmp_path, *LEARN, "--base.precision", "bf16-true", *choice, method="full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, info = AutoModelForCausalLM.from_pretrained(run / "final", output_loading_info=True)
    assert not any(info.values())
    assert theirs.dtype == saved
    with torch.no_grad():
        mine = load_model(str(run), precision="32-true").model(IDS)
        before = load_model(str(base), precision="32-true").model(IDS)
        assert (theirs.float()(IDS).logits - mine).abs().max() <= 5e-6 * mine.abs().max()
    assert (mine - before).abs().max() > 1e-2
    held = load_file(sorted((run / "checkpoints").iterdir())[-1] / "delta.safetensors")["blocks.0.mlp.up.weight"]
    final = load_file(run / "final" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(final, held.to(saved))
    assert load_model(str(run / "final"), precision="32-true").run.facts["holds"] == "model"


def test_globs_choose_what_full_trains(tiny_folder, tmp_path) -> None:
    run = finetune(tiny_folder, tmp_path, *LEARN, "--method.unfreeze", '["*.norm1.weight"]', method="full")
    before, after = load_file(tiny_folder / "model.safetensors"), load_file(run / "final" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.{i}.input_layernorm.weight" for i in range(2)}


def test_a_changed_file_of_a_full_result_is_noticed(tiny_folder, tmp_path, capsys) -> None:
    run = finetune(tiny_folder, tmp_path, method="full")
    with open(run / "final" / "model.safetensors", "r+b") as handle:
        handle.seek(-8, 2)
        handle.write(b"\1")
    code, said = fails(capsys, "generate", str(run), "--prompt", "x")
    assert code == 4
    assert "sha256 mismatch" in said


@pytest.fixture(scope="module")
def quantized_run(tmp_path_factory) -> Path:
    """A qlora run on a base whose outputs are large, so that what quantising does to them shows."""
    folder = tmp_path_factory.mktemp("qlora")
    base = make_folder(folder / "base", initializer_range=0.2)
    return finetune(base, folder, *LEARN, method="qlora")


@torch.no_grad()
def test_qlora_merges_onto_the_weights_that_it_was_trained_on(quantized_run: Path, capsys) -> None:
    main(["merge", str(quantized_run), "--overwrite"])
    assert "warning" not in capsys.readouterr().out
    delta, base = load_file(quantized_run / "final" / "delta.safetensors"), quantized_run.parent / "base"
    held = folded(build(base, torch.float32, storage=Storage("nf4")))
    merged = load_file(quantized_run / "merged" / "model.safetensors")
    a, b = (delta[f"blocks.1.mlp.up.slot.lora.{name}"] for name in "AB")
    assert torch.allclose(merged["model.layers.1.mlp.up_proj.weight"], held["blocks.1.mlp.up.weight"] + 2 * b @ a)
    assert not torch.equal(held["blocks.1.mlp.up.weight"], build(base, torch.float32).blocks[1].mlp.up.weight)


@torch.no_grad()
def test_merging_onto_the_original_is_measured_and_warned_of(quantized_run: Path, tmp_path, capsys) -> None:
    out = tmp_path / "merged"
    main(["merge", str(quantized_run), "--out", str(out), "--onto", "original"])
    said = re.search(r"warning: --onto original: .* differ from the run's by ([\d.]+)%", capsys.readouterr().out)
    run = find_run(quantized_run)
    model = build(quantized_run.parent / "base", torch.float32, run.method())
    load_delta(model, run.delta(), "test")
    onto = load_model(str(out), precision="32-true").model(IDS)
    assert (onto - model(IDS)).abs().max() <= 5e-5 * onto.abs().max()
    assert float(said.group(1)) > 1
    trained = load_model(str(quantized_run), precision="32-true").model(IDS)
    assert (onto - trained).norm() / trained.norm() > 0.01


def test_onto_original_is_for_quantised_runs(tiny_folder, tmp_path, capsys) -> None:
    code, said = fails(capsys, "merge", str(finetune(tiny_folder, tmp_path)), "--onto", "original")
    assert code == 2
    assert "the run's base was not quantised" in said


def test_the_report_says_how_the_base_was_held(quantized_run: Path) -> None:
    assert "parameters, 32-true, linear layers in nf4 |" in (quantized_run / "report.md").read_text()


@torch.no_grad()
def test_without_its_delta_a_qlora_run_is_its_quantised_base(quantized_run: Path) -> None:
    loaded = load_model(str(quantized_run), precision="32-true")
    held = build(quantized_run.parent / "base", torch.float32, storage=Storage("nf4")).eval()
    with without_delta(loaded.model):
        assert torch.equal(loaded.model(IDS), held(IDS))


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8"])
def test_the_cache_gives_the_same_run(tmp_path, storage: str, capsys) -> None:
    base = make_folder(tmp_path / "base")
    argv = *LEARN, "--base.quantize", storage, "--base.cache", "true"
    runs = [finetune(base, tmp_path, *argv, out=out, method="qlora") for out in "ab"]
    plain = finetune(base, tmp_path, *argv[:-1], "false", out="c", method="qlora")
    assert len(list(base.glob("litpeft-*/packed.safetensors"))) == 1
    states = [(run / "final" / "delta.safetensors").read_bytes() for run in (*runs, plain)]
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--base.quantize", "nf5"), f"base.quantize must be {', '.join(STORAGES)} or null, got 'nf5'"),
        (("--base.cache", "true"), "base.cache is used only with base.quantize"),
        (("--train.optimizer", "bitsandbytes.PagedAdamW8bit"), "pages its state between a GPU and"),
        (("--base.precision", "16-mixed"), "16-mixed needs a GPU"),
        (
            ("--base.precision", "16-true"),
            "bf16-mixed, 16-mixed, 32-true or 64-true, got '16-true'",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(tiny_folder, tmp_path, capsys, argv, message: str) -> None:
    write_rows(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        finetune(tiny_folder, tmp_path, *argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_full_cannot_train_what_is_held_in_codes(tiny_folder, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        finetune(tiny_folder, tmp_path, "--base.quantize", "nf4", method="full")
    assert stop.value.code == 2
    assert "which base.quantize holds in codes: those cannot train" in capsys.readouterr().err


def test_full_can_do_without_float32_master_weights(tiny_folder, tmp_path) -> None:
    argv = *LEARN, "--base.precision", "bf16-true", "--method.master_weights", "false", "--checkpoint.interval", "1"
    run = finetune(tiny_folder, tmp_path, *argv, method="full")
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    assert {t.dtype for t in load_file(checkpoint / "delta.safetensors").values()} == {torch.bfloat16}
    losses = [row["val_loss"] for row in read_metrics(run) if row["val_loss"] is not None]
    assert losses[-1] < losses[0]


def test_a_model_can_be_asked_in_four_bits_and_a_run_only_as_it_was_trained(tiny_folder, tmp_path, capsys) -> None:
    with torch.no_grad():
        held = load_model(str(tiny_folder), precision="32-true", quantize="nf4").model(IDS)
        assert torch.equal(held, build(tiny_folder, torch.float32, storage=Storage("nf4")).eval()(IDS))
    run = finetune(tiny_folder, tmp_path)
    code, said = fails(capsys, "generate", str(run), "--prompt", "x", "--quantize", "nf4")
    assert code == 2
    assert "trained on a base that was not quantised" in said
    assert (
        f"quantize must be {', '.join(STORAGES)} or null, got 'nf5'"
        in fails(capsys, "chat", str(tiny_folder), "--quantize", "nf5")[1]
    )
