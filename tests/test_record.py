"""What a run wrote is not trusted for having the right sum: a forged value is refused by its name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import finetune
from safetensors.torch import load_file, save_file
from short_runs import assert_same, cut, resume, train

from litpeft.cli import main
from litpeft.core.checksums import file_sha256
from litpeft.exchange.identity import checksum
from litpeft.exchange.run import find_run

SUM = "0" * 64
GONE = object()
# The key that is forged, and a value that no run writes there.
FORGED: list[tuple[str, Any]] = [
    *(("format", value) for value in (None, "4", 4.0, True, 1, 5, [4], 10**30)),
    *(("litpeft", value) for value in (None, 1, ["0.1"], GONE)),
    *(("holds", value) for value in (None, "model", "", 1, ["delta"], GONE)),
    *(("method", value) for value in (None, "full", "adapter", "nothing", ["lora"], {}, 7, GONE)),
    *(("settings", value) for value in (None, [], {}, "rank", GONE)),
    *(("settings.rank", value) for value in (None, "8", 8.0, True, 0, -1, 10**9, 10**30, [8], GONE)),
    *(("settings.alpha", value) for value in ("16", -1.0, 0, float("nan"), float("inf"), [], 10**400)),
    *(("settings.dropout", value) for value in (None, 1, -0.1, "0.5", float("nan"))),
    *(("settings.rslora", value) for value in (None, 0, "false")),
    *(("settings.targets", value) for value in (None, "*", [1], [None], {"*": 1}, ["\ud800"], ["*.attn.*", "a\0"])),
    *(("settings.ranks", value) for value in (None, [], {"*.mlp.*": "4"}, {"*.mlp.*": 0}, {"*.mlp.*": 1.5})),
    *(("settings.unfreeze", value) for value in (None, "*norm*", [["*"]], ["*.nothing"])),
    *(("settings.targets", value) for value in (["*.nothing"], ["*.attn.q", "no"], ["lm_head"])),
    ("settings.ranks", {"*.nothing": 4}),
    ("settings.alpha", 1e308),
    *(("base.path", value) for value in ("", "relative", "../base")),
    ("settings.scale", 2),
    *(("files", value) for value in (None, {}, [], "delta.safetensors", {"model.safetensors": SUM}, GONE)),
    *(("files.delta.safetensors", value) for value in (None, "", 1, SUM[1:], SUM.upper()[:-1] + "G", [SUM], GONE)),
    *(("files", {"delta.safetensors": SUM, name: SUM}) for name in ("../../x.safetensors", "/etc/passwd", "other")),
    *(("base", value) for value in (None, [], "base", {}, GONE)),
    *(("base.path", value) for value in (None, 7, ["base"], "a\0b", "\ud800", GONE)),
    *(("base.fingerprint", value) for value in (None, 5, "", "abc", [SUM], GONE)),
    *(("base.storage", value) for value in ("nf4", [], {}, {"name": "nf4"}, {"name": "nf5", "double_quantize": True})),
    *(("base.storage", {"name": name, "double_quantize": flag}) for name, flag in (("nf4", 1), (None, True))),
    ("base.storage", {"name": "nf4", "double_quantize": True, "cache": "/tmp"}),
    *(("base.config", value) for value in (None, [], {}, {"model_type": "llama"}, GONE)),
    *(("base.config.model_type", value) for value in (None, "os", ["llama"], GONE)),
    *(("base.config.n_layers", value) for value in (None, "2", 2.0, 0, True, GONE)),
    *(("base.config.rope_scaling", value) for value in (1, "linear", {}, {"kind": "linear"})),
    *(("base.config.window", value) for value in ("16", -1, 1.5)),
    ("base.config.layers", 2),
    *(("base.tokenizer", value) for value in (None, [], {}, GONE)),
    *(("base.tokenizer.file", value) for value in (None, 1, "x", GONE)),
    *(("base.tokenizer.special_tokens", value) for value in (None, [], {"bos_token": 1})),
    *(("base.tokenizer.adds_bos", value) for value in (None, 1, "no")),
    *(("base.tokenizer.stop_ids", value) for value in (None, 1, ["1"], [True], {"1": 1})),
    *(("template", value) for value in (None, "model", {}, [], GONE)),
    *(("template.name", value) for value in (None, "auto", 3, ["model"], GONE)),
    *(("template.sha256", value) for value in (None, 3, "short", [], GONE)),
    *(("template.system", value) for value in (3, ["be brief"], {"a": 1}, "\ud800", GONE)),
    *(("precision", value) for value in (None, "auto", "16-true", "8-bit", 32, ["32-true"], GONE)),
    *(("step", value) for value in (None, "2", 2.5, -1, 0, True, 10**30, 3, GONE)),
    *(("steps_done", value) for value in (None, "2", 1, 10**6, GONE)),
    *(("steps_planned", value) for value in (None, 1, [], GONE)),
    *(("finished", value) for value in (None, "yes", 1, [], GONE)),
    ("more", 1),
]


def change(path: Path, key: str, value: Any) -> None:
    """Writes another value for a dotted key of a JSON file."""
    facts = json.loads(path.read_text())
    inner, names = facts, ["files", key[6:]] if key.startswith("files.") else key.split(".")
    for name in names[:-1]:
        inner = inner[name]
    if value is GONE:
        del inner[names[-1]]
    else:
        inner[names[-1]] = value
    path.write_text(json.dumps(facts))


def forge(record: Path, key: str, value: Any) -> None:
    """Writes another value for a dotted key into delta.json, with a sum that fits."""
    change(record, key, value)
    facts = json.loads(record.read_text())
    del facts["checksum"]
    record.write_text(json.dumps(facts | {"checksum": checksum(facts)}))


def refusal(capsys, *argv: object) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    return stop.value.code, capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {method: finetune(tiny_folder, folder, method=method, out=method) for method in ("lora", "full")}


def test_every_forged_value_is_refused_by_its_name(runs, tmp_path, capsys) -> None:
    written = (runs["lora"] / "final" / "delta.json").read_text()
    run = shutil.copytree(runs["lora"], tmp_path / "run")
    path, wrong = run / "final" / "delta.json", []
    for key, value in FORGED:
        path.write_text(written)
        forge(path, key, value)
        code, said = refusal(capsys, "generate", run, "--prompt", "x", "--sampling.max_new_tokens", 1)
        named = key.removeprefix("settings.").removeprefix("base.").split(".")[0]
        if code != 4 or (named not in said and key != "method") or "Traceback" in said or said.count("\n") > 2:
            wrong.append((key, value, code, said))
    assert wrong == []
    assert len(FORGED) > 150


def test_each_command_reads_the_same_checked_record(runs, tmp_path, capsys) -> None:
    run = shutil.copytree(runs["lora"], tmp_path / "run")
    forge(run / "final" / "delta.json", "settings.rank", "8")
    rows = runs["lora"].parent / "data" / "validation.jsonl"
    for argv in (["merge", run], ["chat", run], ["evaluate", run, rows], ["generate", run, "--prompt", "x"]):
        code, said = refusal(capsys, *argv)
        assert (code, "settings.rank must be a whole number, got '8'" in said) == (4, True)


def test_a_delta_is_checked_whatever_the_record_lists(runs, tmp_path, capsys) -> None:
    run = shutil.copytree(runs["lora"], tmp_path / "run")
    tensors = load_file(run / "final" / "delta.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, run / "final" / "delta.safetensors")
    assert "sha256 mismatch" in refusal(capsys, "generate", run, "--prompt", "x")[1]
    forge(run / "final" / "delta.json", "files", {})
    code, said = refusal(capsys, "generate", run, "--prompt", "x")
    what = "files must name delta.safetensors and, at most, adapter_model.safetensors beside it, got none"
    assert (code, what in said) == (4, True)


@pytest.mark.parametrize("value", ["half", 1, ["float32"], True])
def test_a_setting_with_named_values_takes_no_other(value: object, runs, tmp_path, capsys) -> None:
    run = shutil.copytree(runs["full"], tmp_path / "run")
    forge(run / "final" / "delta.json", "settings.save_dtype", value)
    code, said = refusal(capsys, "generate", run, "--prompt", "x")
    assert (code, "settings.save_dtype must be float32, bfloat16 or float16, got" in said) == (4, True)


@pytest.mark.parametrize("files", [{}, {"delta.safetensors": SUM}, {"model.safetensors": SUM, "more.safetensors": SUM}])
def test_a_model_is_held_to_the_files_that_its_folder_reads(files: dict, runs, tmp_path, capsys) -> None:
    run = shutil.copytree(runs["full"], tmp_path / "run")
    forge(run / "final" / "delta.json", "files", files)
    code, said = refusal(capsys, "generate", run, "--prompt", "x")
    assert (code, "delta.json and the folder differ in" in said) == (4, True)


def test_a_shard_that_was_put_beside_a_model_is_noticed(runs, tmp_path, capsys) -> None:
    run = shutil.copytree(runs["full"], tmp_path / "run")
    final = run / "final"
    tensors = load_file(final / "model.safetensors")
    save_file(tensors, final / "other.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "other.safetensors")}
    (final / "model.safetensors.index.json").write_text(json.dumps(index))
    code, said = refusal(capsys, "generate", run, "--prompt", "x")
    assert (code, "differ in model.safetensors, other.safetensors" in said) == (4, True)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"a": ' * 2000, "[" * 10**6, "\ufeff{}", "1" * 2**21])
def test_what_is_no_record_at_all_is_refused(text: str, runs, tmp_path, capsys) -> None:
    run = shutil.copytree(runs["lora"], tmp_path / "run")
    (run / "final" / "delta.json").write_text(text)
    code, said = refusal(capsys, "generate", run, "--prompt", "x")
    assert (code, "delta.json" in said) == (4, True)


def test_a_record_that_nests_deeply_is_refused(runs, tmp_path, capsys) -> None:
    run = shutil.copytree(runs["lora"], tmp_path / "run")
    path = run / "final" / "delta.json"
    facts = json.loads(path.read_text())
    for depth in (50, 400, 700, 900, 960, 980, 990):
        nested = json.dumps(facts)[:-1] + ', "more": ' + "[" * depth + "]" * depth + "}"
        path.write_text(nested)
        assert refusal(capsys, "generate", run, "--prompt", "x")[0] == 4


def test_what_was_written_is_read(runs) -> None:
    for run in runs.values():
        assert find_run(run).facts["steps_done"] == find_run(run / "final").facts["steps_planned"]


# Of a checkpoint: the file, the key that is forged, and a value that no run writes there.
FORGED_CHECKPOINT: list[tuple[str, str, Any]] = [
    *(("state.json", "progress", value) for value in (None, [], {}, "2", GONE)),
    *(("state.json", "progress.step", value) for value in (None, "2", 2.0, -1, 1, 10**30, GONE)),
    *(("state.json", "progress.losses", value) for value in (None, "1", [1.0], ["a", "b"], [None, None])),
    *(("state.json", "progress.validations", value) for value in (None, [[1]], [["a", 1.0]], {"1": 2})),
    *(("state.json", "progress.best", value) for value in ("2", [1], [2, "x"], {})),
    *(("state.json", "progress.samples", value) for value in (None, [{}], ["a"], [{"prompt": 1}])),
    *(("state.json", "progress.seconds", value) for value in (None, "1", 0, -5.0)),
    ("state.json", "progress.more", 1),
    *(("state.json", "progress.best", value) for value in ([99, 0.1], [1, -5.0])),
    *(("state.json", "progress.validations", value) for value in ([[2, 1.0], [1, 1.0]], [[9, 1.0]])),
    *(("state.json", f"progress.{key}", -1) for key in ("tokens", "trained_tokens", "epoch", "elapsed", "startup")),
    *(("state.json", f"progress.{key}", 99) for key in ("still", "waited")),
    ("state.json", "progress.losses", [1.0, -1.0]),
    *(("state.json", "optimizer", value) for value in (None, [], {}, {"x": 5}, {"x": None}, {"x": [1]}, GONE)),
    ("state.json", "scaler", torch.amp.GradScaler("cpu", init_scale=8.0).state_dict() | {"scale": -2.0}),
    *(("state.json", "scaler", value) for value in (1, "x", {}, {"scale": 2.0}, GONE)),
    *(("MANIFEST.json", "facts.method", value) for value in (None, 1, GONE)),
    *(("MANIFEST.json", "facts.settings", value) for value in (None, [], GONE)),
    *(("MANIFEST.json", "facts.settings.base", value) for value in (None, [], GONE)),
    *(("MANIFEST.json", "facts.settings.base.dir", value) for value in (None, 5, GONE)),
    *(("MANIFEST.json", "facts.settings.train.micro_tokens", value) for value in (-5, "many", GONE)),
    *(("MANIFEST.json", "facts.settings.train.lr", value) for value in (-1.0, "fast")),
    *(("MANIFEST.json", "facts.settings.method.rank", value) for value in ("8", 0)),
    *(("MANIFEST.json", f"facts.{key}", "abc") for key in ("method", "base", "rows")),
    ("MANIFEST.json", "facts.reads.config.n_layers", "2"),
    ("MANIFEST.json", "facts.reads.tokenizer.file", "x"),
    ("MANIFEST.json", "facts.circumstances.threads", [1]),
    *(("MANIFEST.json", "facts.began", value) for value in (None, 1, "yesterday", GONE)),
    *(("MANIFEST.json", "facts.rows", value) for value in (None, 1, GONE)),
    *(("MANIFEST.json", "facts.circumstances", value) for value in (None, [], GONE)),
    *(("MANIFEST.json", "facts.reads", value) for value in ([], {}, {"config": {}}, "x")),
    *(("MANIFEST.json", "facts.counts", value) for value in (None, [], {"rows": 1})),
]


def reseal(checkpoint: Path) -> None:
    """Makes a checkpoint's sums fit its files and its manifest."""
    record = json.loads((checkpoint / "MANIFEST.json").read_text())
    for name in record["files"]:
        path = checkpoint / name
        record["files"][name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    del record["checksum"]
    (checkpoint / "MANIFEST.json").write_text(json.dumps(record | {"checksum": checksum(record)}))


def test_every_forged_value_of_a_checkpoint_is_refused(tiny_folder, tmp_path, capsys) -> None:
    run = cut(train(tiny_folder, tmp_path / "whole"), 2, tmp_path / "run")
    checkpoint, wrong = run / "checkpoints" / "step-00000002", []
    written = {name: (checkpoint / name).read_text() for name in ("state.json", "MANIFEST.json")}
    for file, key, value in FORGED_CHECKPOINT:
        for name, text in written.items():
            (checkpoint / name).write_text(text)
        change(checkpoint / file, key, value)
        reseal(checkpoint)
        capsys.readouterr()
        try:
            resume(tiny_folder, run)
            code = 0
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr().err
        if code != 4 or key.split(".")[1 if "." in key else 0] not in said:
            wrong.append((key, value, code, said))
    assert wrong == []


def test_settings_of_an_older_version_are_taken_with_todays_defaults(tiny_folder, tmp_path) -> None:
    whole = train(tiny_folder, tmp_path / "whole")
    run = cut(whole, 2, tmp_path / "run")
    checkpoint = run / "checkpoints" / "step-00000002"
    change(checkpoint / "MANIFEST.json", "facts.settings.timeout", GONE)
    change(checkpoint / "MANIFEST.json", "facts.settings.validation.metric", GONE)
    change(checkpoint / "MANIFEST.json", "facts.settings.train.gone", 3)
    reseal(checkpoint)
    changes = {"resume_changed": '["validation.metric", "train.gone"]'}
    assert_same(resume(tiny_folder, run, changes), whole)


@pytest.mark.parametrize("line", ["1,,nan,,,nan,,,,,", "1,0,1.0,,,,1,9,9,9,9", "1,0,inf,,,0.1,1,9,9,9,9"])
def test_a_forged_row_of_the_metrics_is_refused_by_its_line(line: str, tiny_folder, tmp_path, capsys) -> None:
    run = cut(train(tiny_folder, tmp_path / "whole"), 2, tmp_path / "run")
    rows = (run / "metrics.csv").read_text().split("\n")
    (run / "metrics.csv").write_text("\n".join([rows[0], line, *rows[2:]]))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        resume(tiny_folder, run)
    assert (stop.value.code, "metrics.csv:2: " in capsys.readouterr().err) == (4, True)


def test_tensors_that_a_manifest_does_not_list_are_not_taken(tiny_folder, tmp_path, capsys) -> None:
    run = cut(train(tiny_folder, tmp_path / "whole"), 2, tmp_path / "run")
    checkpoint = run / "checkpoints" / "step-00000002"
    change(checkpoint / "MANIFEST.json", "files.delta.safetensors", GONE)
    reseal(checkpoint)
    tensors = load_file(checkpoint / "delta.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, checkpoint / "delta.safetensors")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        resume(tiny_folder, run)
    assert (stop.value.code, "holds no delta.safetensors" in capsys.readouterr().err) == (4, True)
    assert not (run / "final").exists()


def test_a_loss_scale_is_left_where_the_precision_has_none_any_more(tiny_folder, tmp_path) -> None:
    whole = train(tiny_folder, tmp_path / "whole")
    run = cut(whole, 2, tmp_path / "run")
    checkpoint = run / "checkpoints" / "step-00000002"
    change(checkpoint / "state.json", "scaler", torch.amp.GradScaler("cpu", init_scale=8.0).state_dict())
    reseal(checkpoint)
    assert_same(resume(tiny_folder, run), whole)
