"""litpeft compare: runs side by side, each as `litpeft finetune` and `litpeft evaluate` make and measure it alone."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import finetune, write_rows

from litpeft.cli import COMMANDS, main, parse
from litpeft.core.errors import NumericError
from litpeft.generate.evaluate import measure
from litpeft.generate.settings import Evaluate


@pytest.fixture
def file(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A comparison of two runs with three steps each, and with the base."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    train = {"batch_size": 3, "warmup_steps": 0, "lr": 1e-2}
    common = {
        "base": {"dir": str(tiny_folder), "precision": "32-true"},
        "data": {"path": str(write_rows(tmp_path))},
        "train": train,
        "validation": {"sample_tokens": 4},
    }
    runs = {"lora": {}, "small": {"use": "lora", "method": {"rank": 2}, "train": {"lr": 3e-2}}}
    keys = {"common": common, "runs": runs, "steps": 3, "shots": 1, "max_new_tokens": 8, "out": str(tmp_path / "out")}
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def change(file: Path, **keys: object) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | keys))


@pytest.mark.usefixtures("drawn")
def test_a_comparison_has_the_figures_of_each_run_alone_and_trains_none_twice(file, tiny_folder, capfd) -> None:
    main(["compare", "--config", str(file)])
    said, folder = capfd.readouterr().out, file.parent
    table = json.loads((folder / "out" / "compare.json").read_text())
    assert list(table) == ["base", "base, 1 shot", "lora", "small"]
    options = "--train.epochs", "3", "--train.max_steps", "3", "--validation.sample_tokens", "4"
    alone = {
        "lora": finetune(tiny_folder, folder, *options, "--train.lr", "1e-2", out="a"),
        "small": finetune(tiny_folder, folder, *options, "--train.lr", "3e-2", "--method.rank", "2", out="b"),
    }
    rows = str(folder / "data" / "validation.jsonl")
    for name, run in {"base": tiny_folder, **alone}.items():
        (score,) = measure(Evaluate(str(run), rows, compare_base=False, max_new_tokens=8))[1]
        assert table[name]["loss"] == pytest.approx(score.loss, rel=1e-5)
        assert table[name]["score"] == score.share
        assert f"| {name} | " in said
        if name != "base":
            report = json.loads((run / "report.json").read_text())
            for key in ("trainable", "delta_bytes", "steps"):
                assert table[name][key] == report[key]
            for at, loss in zip(report["validation"], table[name]["validation"], strict=True):
                assert loss == pytest.approx(at, rel=1e-5)
    assert table["small"]["trainable"] * 4 == table["lora"]["trainable"]
    assert (folder / "out" / "compare.md").read_text() in said
    assert (folder / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    # once more, with a run of other keys
    before = (folder / "out" / "lora" / "final" / "delta.safetensors").stat().st_mtime_ns
    change(file, runs={"lora": {}, "small": {"use": "lora", "method": {"rank": 1}}})
    main(["compare", "--config", str(file)])
    assert "out/lora holds this run already" in capfd.readouterr().err
    assert (folder / "out" / "lora" / "final" / "delta.safetensors").stat().st_mtime_ns == before
    again = json.loads((folder / "out" / "compare.json").read_text())
    assert again["small"]["trainable"] * 8 == again["lora"]["trainable"]


def test_a_run_that_fails_does_not_keep_the_others_from_the_table(file, capfd) -> None:
    change(file, runs={"lora": {"train": {"lr": 1e30, "max_norm": None}}, "small": {"use": "lora"}}, shots=0)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--config", str(file)])
    assert stop.value.code == NumericError.exit_code
    assert "1 run failed: lora" in capfd.readouterr().err
    assert list(json.loads((file.parent / "out" / "compare.json").read_text())) == ["base", "small"]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "runs must name at least one run"),
        ({"mine": {}}, "runs.mine: its method must be one of lora, qlora"),
        ({"../lora": {"use": "lora"}}, "runs: '../lora' is no name of a folder"),
        ({"lora": 3}, "runs.lora must be keys and values"),
        ({"base": {"use": "lora"}}, "runs: base is the row of the model without a run"),
        ({"lora": {}, "small": {"use": "lora", "method": {"rnk": 2}}}, 'there is no key "method.rnk"'),
        ({"big": {"use": "lora", "method": {"rank": 10**6}}}, "runs.big: method.rank must be at least 1"),
    ],
)
def test_a_wrong_run_is_an_error_before_anything_is_trained(file, capsys, runs, message) -> None:
    change(file, runs=runs)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--config", str(file)])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(file.parent / "out") not in said  # the keys are in the user's file, not in one of ours
    assert not (file.parent / "out" / "lora").exists()


def test_a_comparison_needs_held_out_rows(file, capsys) -> None:
    keys = yaml.safe_load(file.read_text())
    keys["common"]["data"]["path"] += "/train.jsonl"
    change(file, **keys)
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(file)])
    assert "measured: there is no file of held-out rows" in capsys.readouterr().err
    assert parse("compare", COMMANDS["compare"], ["--config", str(file)])[0].measured is None
