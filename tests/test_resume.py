"""A run that was stopped, killed or out of luck goes on as if nothing had been; or says why it does not."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHATML, COLOURS, make_folder, read_metrics
from safetensors.torch import save_file
from short_runs import QUIET, UNPACKED, Settings, assert_same, cut, delta, newest, resume, train

from litpeft.core.checksums import file_sha256
from litpeft.exchange.identity import checksum
from litpeft.exchange.run import find_run
from litpeft.generate.load import load_model
from litpeft.methods import METHODS, method_class
from litpeft.train.checkpoints import Checkpoints

SMALL: dict[str, Settings] = {"adapter": {"method.prompt_length": 3}, "adapter_v2": {"method.prompt_length": 3}}


def settings_of(method: str) -> Settings:
    """Returns settings of a method with all that is random in it."""
    names = {field.name for field in dataclasses.fields(method_class(method))}
    return SMALL.get(method, {}) | ({"method.dropout": 0.2} if "dropout" in names else {})


# After step 1, within an epoch, or 2, between two: the methods take turns, `-m full` runs the rest.
CUTS = [
    pytest.param(method, step, marks=() if i % 2 == step - 1 else pytest.mark.full)
    for i, method in enumerate(METHODS)
    for step in (1, 2)
]


@pytest.mark.parametrize(("method", "step"), CUTS)
def test_a_run_resumed_after_any_step_is_the_same_run(method: str, step: int, tiny_folder, tmp_path) -> None:
    settings = settings_of(method)
    whole = train(tiny_folder, tmp_path / "whole", settings, method)
    assert_same(resume(tiny_folder, cut(whole, step, tmp_path / "run"), settings, method), whole)


def as_format_3(run: Path) -> Path:
    """Renames the tensors of a run, in place, as it was when a slot held one Delta and had no name for it."""
    names = {name: re.sub(rf"\.(slot|core)\.({'|'.join(METHODS)})\.", r".\1.", name) for name in delta(run)}
    assert all(old != name for name, old in names.items())

    def renamed(saved: dict) -> dict:
        parts = {name: name.split("/") for name in saved}
        return {"/".join([names[first], *rest]): saved[name] for name, (first, *rest) in parts.items()}

    checkpoints = Checkpoints(run / "checkpoints", 99, tell=print, clear=False)
    kept = [checkpoints.at(step) for step in checkpoints.steps()]
    tensors = [{stem: renamed(one.tensors(stem)) for stem in ("delta", "optimizer")} for one in kept]
    for one, held in zip(kept, tensors, strict=True):  # in rising order: each removes the later ones
        state = one.state | {"optimizer": renamed(one.state["optimizer"])}
        checkpoints.save(one.step, held, state, one.facts)
    save_file({names[name]: tensor for name, tensor in delta(run).items()}, run / "final" / "delta.safetensors")
    record = json.loads((run / "final" / "delta.json").read_text())
    del record["checksum"]
    record |= {"format": 3, "files": {"delta.safetensors": file_sha256(run / "final" / "delta.safetensors")}}
    (run / "final" / "delta.json").write_text(json.dumps(record | {"checksum": checksum(record)}))
    return run


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_run_of_format_3_answers_and_resumes_though_its_tensors_have_other_names(
    method: str, tiny_folder, tmp_path
) -> None:
    settings = settings_of(method)
    whole = train(tiny_folder, tmp_path / "whole", settings, method)
    old = as_format_3(shutil.copytree(whole, tmp_path / "old"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(load_model(str(old)).model(ids), load_model(str(whole)).model(ids))
    assert_same(resume(tiny_folder, cut(old, 2, tmp_path / "run"), settings, method), whole)


KINDS = {
    "8 bits": {"train.optimizer": "bitsandbytes.AdamW8bit", "method.rank": 64},  # smaller tensors keep 32 bits
    "SGD": {"train.optimizer": "SGD", "train.optimizer_args": '{"momentum": 0.9}'},
    "Adafactor": {"train.optimizer": "Adafactor"},
    "bf16-true": {"base.precision": "bf16-true"},
    "not packed": UNPACKED,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_with_other_settings(kind: str, tiny_folder, tmp_path) -> None:
    whole = train(tiny_folder, tmp_path / "whole", KINDS[kind])
    assert_same(resume(tiny_folder, cut(whole, 3, tmp_path / "run"), KINDS[kind]), whole)


def test_full_in_the_type_of_the_base_resumes(tiny_folder, tmp_path) -> None:
    settings = {"method.master_weights": False, "base.precision": "bf16-true"}
    whole = train(tiny_folder, tmp_path / "whole", settings, "full")
    assert_same(resume(tiny_folder, cut(whole, 3, tmp_path / "run"), settings, "full"), whole)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory) -> Path:
    """A finished run, with a checkpoint of each of its four steps. Tests must not change it."""
    return train(tiny_folder, tmp_path_factory.mktemp("finished") / "run")


def test_a_run_that_is_to_end_earlier_than_it_is_ends_there_with_a_result_that_is_read(
    finished, tiny_folder, tmp_path, capsys
) -> None:
    settings = {"train.max_steps": 2, "resume_changed": "train.max_steps"}
    run = resume(tiny_folder, cut(finished, 3, tmp_path / "run"), settings)
    assert "nothing is left to train: step 3 of 2" in capsys.readouterr().out
    assert find_run(run).facts["step"] == 3
    assert find_run(run).progress() is None


def content(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def refusal(capsys, base: Path, out: Path, settings: Settings | None = None, method: str = "lora") -> tuple[int, str]:
    """Returns the exit code of a resume and its last words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        resume(base, out, settings, method)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"train.lr": 2e-2}, "train.lr: 0.01 -> 0.02"),
        ({"method.rank": 4}, "method.rank: 8 -> 4"),
        ({"data.seed": 1}, "data.seed: 0 -> 1"),
        ({"train.epochs": 3, "train.lr": 2e-2, "resume_changed": '["train.l*"]'}, "settings: train.epochs: 2 -> 3\n"),
        ({"train.optimizer_args": '{"eps": 0.5}'}, "train.optimizer_args.eps: not set -> 0.5"),
        ({"base.precision": "bf16-true"}, 'base.precision: "32-true" -> "bf16-true"'),
    ],
)
def test_a_changed_setting_is_refused_by_its_name(settings, line: str, finished, tiny_folder, capsys) -> None:
    before = content(finished)
    code, said = refusal(capsys, tiny_folder, finished, settings)
    assert code == 2
    assert line in said
    assert "--resume_changed" in said
    assert content(finished) == before


def test_another_method_base_or_rows_are_refused(finished, tiny_folder, tmp_path, capsys) -> None:
    before = content(finished)
    other = make_folder(tmp_path / "other", seed=1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": k, "output": v}) + "\n" for k, v in COLOURS.items()))
    assert "another method: lora then, adapter now" in refusal(capsys, tiny_folder, finished, method="adapter")[1]
    said = refusal(capsys, other, finished)[1]
    assert f"other base weights: those of {tiny_folder} then, of {other} now" in said
    said = refusal(capsys, tiny_folder, finished, {"data.path": rows})[1]
    assert f'other rows: data.path: "{finished.parent / "data"}" -> "{rows}"' in said
    assert re.search(r"held-out rows: 2 rows, \d+ tokens, \d+ trained -> 1 row, \d+ tokens", said)
    assert content(finished) == before


def test_rows_that_a_setting_or_an_edit_changed_are_told_in_words(tiny_folder, tmp_path, capsys) -> None:
    run = train(tiny_folder, tmp_path / "run", QUIET)
    assert (
        "other rows: data.mask_prompt: true -> false; rows to train on: 6 rows,"
        in (refusal(capsys, tiny_folder, run, QUIET | {"data.mask_prompt": False})[1])
    )
    file = tmp_path / "data" / "train.jsonl"
    edited = shutil.copytree(tmp_path / "data", tmp_path / "edited") / file.name
    edited.write_text(file.read_text().replace("blue", "lube"))
    said = refusal(capsys, tiny_folder, run, QUIET | {"data.path": edited.parent})[1]
    assert f'other rows: data.path: "{file.parent}" -> "{edited.parent}"\n' in said
    assert not re.search("[0-9a-f]{12}", said.replace(str(tmp_path), ""))


def test_what_does_not_change_the_run_may_be_another(finished, tiny_folder, tmp_path, capsys) -> None:
    moved = shutil.copytree(tiny_folder, tmp_path / "moved")
    free = {"checkpoint.keep_last": 1, "train.max_time": 9, "validation.sample_tokens": 0, "timeout": 5}
    capsys.readouterr()
    run = resume(moved, cut(finished, 2, tmp_path / "run"), free)
    said = capsys.readouterr().out
    assert not [line for line in said.splitlines() if "changed" in line or "differ" in line]
    assert (run / "final/delta.safetensors").read_bytes() == (finished / "final/delta.safetensors").read_bytes()
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_other_threads_are_told_in_one_line(finished, tiny_folder, capsys) -> None:
    torch.set_num_threads(2)
    try:
        resume(tiny_folder, finished)
    finally:
        torch.set_num_threads(1)
    said = [line for line in capsys.readouterr().out.splitlines() if "last bits" in line]
    assert said == ["the last bits may differ from those of an uninterrupted run: threads 1 then, 2 now"]


def test_a_setting_that_may_change_is_taken_from_there_on(finished, tiny_folder, tmp_path, capsys) -> None:
    changed = {"train.lr": 2e-2, "train.schedule": "constant"}
    run = cut(finished, 2, tmp_path / "run")
    resume(tiny_folder, run, changed | {"resume_changed": '["train.*"]'})
    assert "changed since the run began: train.lr: 0.01 -> 0.02" in capsys.readouterr().out
    rates = [row["lr"] for row in read_metrics(run) if row["lr"] is not None]
    assert rates[:2] == [row["lr"] for row in read_metrics(finished) if row["lr"] is not None][:2]
    assert rates[2:] == [0.02, 0.02]
    resume(tiny_folder, run, changed)  # now they are the run's own
    assert "is finished: step 4" in capsys.readouterr().out


def test_a_finished_run_is_left_as_it_is_or_trains_on(finished, tiny_folder, tmp_path, capsys) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = content(run)
    resume(tiny_folder, run)
    assert "is finished: step 4; nothing is left to do" in capsys.readouterr().out
    assert content(run) == before
    resume(tiny_folder, run, {"train.epochs": 4, "resume_changed": '["train.epochs"]'})
    assert json.loads((run / "final/delta.json").read_text())["step"] == newest(run).step == 8
    assert [row["step"] for row in read_metrics(run) if row["loss"] is not None] == list(range(1, 9))
    assert any(not torch.equal(tensor, delta(finished)[name]) for name, tensor in delta(run).items())


def test_a_run_is_finished_only_when_all_of_it_is_written(finished, tiny_folder, tmp_path, capsys) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "report.md").unlink()  # killed after final/ was there
    assert_same(resume(tiny_folder, run), finished)
    more: Settings = {"train.epochs": 4, "resume_changed": '["train.epochs"]'}
    whole = resume(tiny_folder, shutil.copytree(finished, tmp_path / "whole"), more)
    shutil.copytree(whole, tmp_path / "again", ignore=shutil.ignore_patterns("step-00000008", "report.md", "final"))
    shutil.copytree(finished / "final", tmp_path / "again" / "final")  # killed while it trained on
    capsys.readouterr()
    assert_same(resume(tiny_folder, tmp_path / "again", {"train.epochs": 4}), whole)
    assert "going on after step 7 of 8" in capsys.readouterr().out


def test_what_a_kill_left_half_written_does_not_hold_up_an_overwrite(finished, tiny_folder, tmp_path) -> None:
    run = cut(finished, 2, tmp_path / "run")
    (run / ".tmp-final-4194305").mkdir()
    (run / "metrics.csv.part").write_text("step")
    assert_same(train(tiny_folder, run, {"overwrite": True}), finished)


def test_where_there_is_no_checkpoint_the_run_begins(finished, tiny_folder, tmp_path, capsys) -> None:
    killed = cut(finished, 0, tmp_path / "killed")
    (killed / "metrics.csv").write_text((killed / "metrics.csv").read_text()[:300])
    (tmp_path / "empty").mkdir()
    for out in (killed, tmp_path / "empty", tmp_path / "missing"):
        capsys.readouterr()
        resume(tiny_folder, out)
        assert "holds no checkpoint: the run begins" in capsys.readouterr().out
        assert_same(out, finished)


def test_a_resume_never_replaces_what_is_whole_or_damaged(finished, tiny_folder, tmp_path, capsys) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    result = shutil.copytree(finished, tmp_path / "result", ignore=shutil.ignore_patterns("checkpoints"))
    broken = cut(finished, 2, tmp_path / "broken")
    for path in broken.rglob("state.json"):
        path.write_text("{")
    none = "it holds a result but no checkpoint to continue from"
    for out, why in ((model, none), (result, none), (broken, "none of the run's checkpoints is whole")):
        before = content(out)
        code, said = refusal(capsys, tiny_folder, out)
        assert (code, why in said) == (4, True)
        assert content(out) == before


def test_a_template_that_prints_the_time_gives_the_tokens_of_the_first_day(tmp_path) -> None:
    base = make_folder(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ strftime_now('%H:%M:%S.%f') }}" + CHATML)
    short = {"train.micro_tokens": 70}
    whole = train(base, tmp_path / "whole", short)
    assert_same(resume(base, cut(whole, 2, tmp_path / "run"), short), whole)


def test_a_setting_that_may_differ_and_does_not_exist_is_refused(tiny_folder, tmp_path, capsys) -> None:
    run = cut(train(tiny_folder, tmp_path / "whole"), 2, tmp_path / "run")
    capsys.readouterr()
    code, said = refusal(capsys, tiny_folder, run, {"resume_changed": '["train.*", "train.max_step"]'})
    assert code == 2
    assert "resume_changed: there is no setting 'train.max_step' (did you mean \"train.max_steps\"?)" in said
