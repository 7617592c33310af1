"""Merging: the files compute what the run computes, and nothing wrong is ever written."""

import json
import os
import re
import resource
import shutil
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, finetune, make_folder
from llama_cpp import write_bpe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from litpeft.cli import main
from litpeft.core.errors import UserError
from litpeft.core.folders import locked
from litpeft.exchange.run import find_run
from litpeft.generate.load import load_model
from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.delta import load_delta
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config

IDS = torch.randint(0, TINY["vocab_size"], (2, 30), generator=torch.Generator().manual_seed(5))


def fails(capsys, *argv: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return stop.value.code, capsys.readouterr().err


def learnt(base, folder, *argv: str):
    return finetune(base, folder, "--train.epochs", "3", "--train.lr", "1e-2", *argv)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_the_merged_folder_and_computes_the_same(tmp_path, tied: bool) -> None:
    run = learnt(make_folder(tmp_path / "base", tie_word_embeddings=tied), tmp_path, "--method.ranks", '{"*.mlp.*": 3}')
    main(["merge", str(run)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, info = AutoModelForCausalLM.from_pretrained(run / "merged", output_loading_info=True)
    assert not any(info.values())
    assert AutoTokenizer.from_pretrained(run / "merged").chat_template
    with torch.no_grad():
        want = load_model(str(run), precision="32-true").model(IDS)
        base = load_model(str(tmp_path / "base"), precision="32-true").model(IDS)
        assert (theirs(IDS).logits - want).abs().max() <= 5e-6 * want.abs().max()
        got = load_model(str(run / "merged"), precision="32-true").model(IDS)
        assert (got - want).abs().max() <= 5e-6 * want.abs().max()
    assert (base - want).abs().max() > 1e-2


def test_weights_are_folded_in_float32_and_rounded_once(tmp_path, capsys) -> None:
    base = make_folder(tmp_path / "base", dtype="bfloat16")
    run = learnt(base, tmp_path)
    main(["merge", str(run)])
    delta = load_file(run / "final" / "delta.safetensors")
    plain, merged = (load_file(folder / "model.safetensors") for folder in (base, run / "merged"))
    names = NameMap(*read_config(base))
    for name in ("blocks.0.attn.q", "blocks.1.mlp.down"):
        theirs = names.file_name(f"{name}.weight")
        a, b = (delta[f"{name}.slot.lora.{x}"].double() for x in "AB")
        exact = plain[theirs].double() + 2 * b @ a
        assert merged[theirs].dtype == torch.bfloat16
        assert (merged[theirs] == exact.bfloat16()).float().mean() >= 0.9999
    assert torch.equal(merged["model.norm.weight"], plain["model.norm.weight"])
    said = capsys.readouterr().out
    assert "folded in float32" in said
    changed = total = lost = along = update = 0.0
    for key in {name.removesuffix(".slot.lora.A").removesuffix(".slot.lora.B") for name in delta}:
        before, after = (files[names.file_name(f"{key}.weight")].double() for files in (plain, merged))
        step = 2 * delta[f"{key}.slot.lora.B"].double() @ delta[f"{key}.slot.lora.A"].double()
        changed, total = changed + int((after != before).sum()), total + before.numel()
        lost, update = lost + (after - before - step).square().sum(), update + step.square().sum()
        along += ((after - before) * step).sum()
    assert f"weights changed: {changed:,.0f} of {total:,.0f}" in said
    error, kept = (lost / update) ** 0.5, along / update
    line = f"relative error of the update, rounded to bfloat16: {error:.1%}; kept along its own direction: {kept:.1%}"
    assert line in said


def test_a_merge_that_loses_what_was_learned_says_so_and_one_that_adds_noise_does_not(tmp_path, capsys) -> None:
    base = make_folder(tmp_path / "base", dtype="bfloat16")
    words = {
        "1e-5": "so a part of what was learned is lost",
        "3e-4": "so what was learned is kept, and the error is noise",
    }
    for lr, word in words.items():
        run = finetune(base, tmp_path, "--train.lr", lr, "--train.schedule", "constant", out=lr)
        (run / "run.yaml").rename(tmp_path / f"{lr}.yaml")  # without it no held-out rows tell
        capsys.readouterr()
        main(["merge", str(run)])
        said = capsys.readouterr().out
        found = re.search(r"relative error of the update, .*: ([\d.]+)%; kept along its own direction: ([\d.]+)%", said)
        assert word in said
        assert (float(found[2]) < 90) == ("lost" in word)
        assert float(found[1]) > 10
        (tmp_path / f"{lr}.yaml").rename(run / "run.yaml")  # with it the loss of those rows is the only verdict
        main(["merge", str(run), "--overwrite"])
        assert re.search("relative error of the update, .*\nloss on .*\n  so rounding costs", capsys.readouterr().out)
        main(["merge", str(run), "--dtype", "float32", "--overwrite"])
        said = capsys.readouterr().out
        assert "rounded to float32: 0.0%; kept along its own direction: 100.0%" in said
        assert "so " not in said.partition("relative error")[2]


def test_an_output_that_exists_is_refused_or_replaced(tiny_folder, tmp_path, capsys) -> None:
    run = learnt(tiny_folder, tmp_path)
    main(["merge", str(run)])
    (run / "merged" / "vocab.json").write_text("stale")
    code, said = fails(capsys, "merge", str(run))
    assert (code, "the output exists" in said) == (2, True)
    main(["merge", str(run), "--overwrite"])
    assert not (run / "merged" / "vocab.json").exists()
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == []


def test_a_merged_model_of_a_run_that_was_trained_further_is_told_to_be_old(tiny_folder, tmp_path, capsys) -> None:
    run = finetune(tiny_folder, tmp_path, "--train.max_steps", "1", "--train.lr", "1e-2")
    merged = run / "merged"
    main(["merge", str(run)])
    old = "the run was trained further since it was made"
    uses = [["generate", str(merged), "--prompt", "hi", "--sampling.max_new_tokens", "1"]]
    uses += [["data", "parity", str(run)]] if find_spec("transformers") else []
    for argv in uses:
        main(argv)
        assert old not in capsys.readouterr().err
    more = ["--resume", "--train.max_steps", "2", "--resume_changed", '["train.*"]']
    finetune(tiny_folder, tmp_path, "--train.lr", "1e-2", *more)
    for argv in uses:
        main(argv)
        said = capsys.readouterr().err
        assert f"warning: {merged}: {old}; `litpeft merge {run} --overwrite` makes it anew" in said
    assert (
        f"the output exists, and {old}\nhint: name another, or say --overwrite" in fails(capsys, "merge", str(run))[1]
    )
    main(["merge", str(run), "--overwrite"])
    assert old not in fails(capsys, "merge", str(run))[1]


@pytest.mark.parametrize("to", ["safetensors", "gguf"])
def test_a_disk_without_room_is_told_with_the_output_that_was_asked_for(to: str, tmp_path, capsys, monkeypatch) -> None:
    base, out = make_folder(tmp_path / "base"), tmp_path / "asked"
    write_bpe(base)
    run = learnt(base, tmp_path)
    argv = ["merge", str(run), "--to", to, "--out", str(out)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, before[1]))  # enough for the header
    try:
        code, said = fails(capsys, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 6
    assert f"error: {out}: the disk is full (File too large)\nhint: free some space" in said
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    code, said = fails(capsys, *argv)
    assert code == 6
    assert re.search(rf"error: {out}: the weights need [\d.]+ kB, the disk has 1.0 kB left.*\nhint: free some", said)
    assert sorted(path.name for path in tmp_path.iterdir() if "asked" in path.name) == []


def test_a_merge_that_changes_nothing_fails_and_leaves_nothing(tiny_folder, tmp_path, capsys) -> None:
    run = finetune(tiny_folder, tmp_path, "--train.lr", "1e-12", "--train.max_steps", "1")
    code, said = fails(capsys, "merge", str(run), "--dtype", "bfloat16")
    assert code == 4
    assert "no weight changed" in said
    assert not (run / "merged").exists()
    assert not list(run.glob(".tmp*"))


def test_another_base_of_the_same_shape_is_refused_with_both_fingerprints(tiny_folder, tmp_path, capsys) -> None:
    run = learnt(tiny_folder, tmp_path)
    other = make_folder(tmp_path / "other", seed=7)
    for command in (["merge"], ["generate", "--prompt", "x"]):
        code, said = fails(capsys, command[0], str(run), "--base", str(other), *command[1:])
        assert code == 4
        assert "the run was trained on other weights" in said
        assert json.loads((run / "final" / "delta.json").read_text())["base"]["fingerprint"][:12] in said


def test_a_base_that_moved_is_asked_for_and_taken(tmp_path, capsys) -> None:
    base = make_folder(tmp_path / "base")
    run = learnt(base, tmp_path)
    moved = shutil.move(base, tmp_path / "moved")
    code, said = fails(capsys, "merge", str(run))
    assert code == 4
    assert "--base" in said
    main(["merge", str(run), "--base", str(moved)])
    assert (run / "merged" / "model.safetensors").exists()


def test_a_changed_delta_is_refused(tiny_folder, tmp_path, capsys) -> None:
    run = learnt(tiny_folder, tmp_path)
    path = run / "final" / "delta.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "sha256 mismatch" in fails(capsys, "merge", str(run))[1]
    path.write_bytes(whole[:-100])
    assert "not a whole safetensors file" in fails(capsys, "chat", str(run))[1]
    save_file({"x": torch.ones(1)}, path)
    assert fails(capsys, "generate", str(run), "--prompt", "x")[0] == 4


def test_settings_that_were_changed_after_the_run_are_noticed(tiny_folder, tmp_path, capsys) -> None:
    run = learnt(tiny_folder, tmp_path)
    path = run / "final" / "delta.json"
    facts = json.loads(path.read_text())
    facts["settings"]["alpha"] = 999.0
    path.write_text(json.dumps(facts))
    code, said = fails(capsys, "merge", str(run))
    assert (code, "checksum mismatch" in said) == (4, True)
    model = build(tiny_folder, torch.float32, LoRA(rank=4))
    with pytest.raises(UserError, match=r"blocks.0.attn.k.slot.lora.A is \(8, 64\), expected \(4, 64\)"):
        load_delta(model, load_file(run / "final" / "delta.safetensors"), "run")


def test_one_process_at_a_time_merges_into_a_folder(tiny_folder, tmp_path, capsys):
    run = finetune(tiny_folder, tmp_path, "--train.epochs", "1")
    with locked(run / "merged"):
        code, error = fails(capsys, "merge", str(run))
    assert code == 6
    assert f"{run / 'merged'}: process {os.getpid()} on " in error
    assert not (run / "merged").exists()


def test_what_is_no_run_is_refused(tiny_folder, tmp_path, capsys) -> None:
    assert "this is no run but a model folder" in fails(capsys, "merge", str(tiny_folder))[1]
    assert "there is no such folder" in fails(capsys, "merge", str(tmp_path / "none"))[1]
    assert find_run(tiny_folder) is None
