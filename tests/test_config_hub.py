"""Every file of config_hub is a command that parses, says only what differs, and leaves its run where it should."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from litpeft.cli import COMMANDS, parse
from litpeft.methods import METHODS, PRESETS

ROOT = Path(__file__).parent.parent
COMPARISON = "config_hub/smollm2-135m/compare.yaml"
FILES = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "config_hub").glob("*/*.yaml"))]
PREFERENCES = "config_hub/smollm2-135m/preferences.yaml"
FILES.remove(COMPARISON)
FILES.remove(PREFERENCES)
BASES = {
    "smollm2-135m": "checkpoints/SmolLM2-135M-Instruct",
    "pythia-160m": "checkpoints/EleutherAI/pythia-160m",
    "llama-3.2-1b": "checkpoints/meta-llama/Llama-3.2-1B",
    "llama-3.1-8b": "checkpoints/meta-llama/Llama-3.1-8B",
}
SMALLEST = "smollm2-135m"  # has a file for every method
CARD = ("lora", "qlora", "adapter", "adapter_v2", "full")  # the methods for which the other models have one, too
REQUIRED = {"base.dir": "b", "data.path": "d", "out": "o"}


def settings(method: str, *argv: str) -> dict[str, Any]:
    """Returns all keys of a finetuning command with their values, by dotted name."""
    parsed, method_settings, _ = parse(f"finetune {method}", COMMANDS[f"finetune {method}"], list(argv))
    return dict(leaves(asdict(parsed) | {"method": asdict(method_settings)}))


def leaves(keys: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in keys.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_the_smallest_model_has_a_file_for_every_method_and_the_others_for_those_of_the_card() -> None:
    methods = {folder: tuple(METHODS) if folder == SMALLEST else CARD for folder in BASES}
    assert set(FILES) == {f"config_hub/{folder}/{method}.yaml" for folder in BASES for method in methods[folder]}


@pytest.mark.parametrize("file", FILES)
def test_a_file_parses_with_its_method_and_sets_nothing_to_its_default(file: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    method = Path(file).stem
    defaults = settings(method, *(word for key, value in REQUIRED.items() for word in (f"--{key}", value)))
    values = settings(method, "--config", file)
    said = dict(leaves(yaml.safe_load(Path(file).read_text())))
    assert REQUIRED.keys() <= said.keys()
    assert [key for key in said if values[key] == defaults[key]] == []
    assert {key for key in values if values[key] != defaults[key]} == said.keys()
    assert values["base.quantize"] == PRESETS.get(method, {}).get("base.quantize")


@pytest.mark.parametrize("file", FILES)
def test_a_file_begins_with_its_command_and_names_the_models_folder_and_its_own(file: str) -> None:
    folder, method = Path(file).parent.name, Path(file).stem
    text = (ROOT / file).read_text()
    keys = yaml.safe_load(text)
    assert text.splitlines()[0] == f"# litpeft finetune {method} --config {file}"
    assert keys["base"] == {"dir": BASES[folder]}
    assert keys["out"] == f"out/{folder}/{method}"
    assert (ROOT / keys["data"]["path"] / "train.jsonl").is_file()


def test_the_comparison_is_of_every_method_as_its_own_file_says_it() -> None:
    settings, *_ = parse("compare", COMMANDS["compare"], ["--config", str(ROOT / COMPARISON)])
    assert list(settings.runs) == list(METHODS)
    own = {name: yaml.safe_load((ROOT / f"config_hub/{SMALLEST}/{name}.yaml").read_text()) for name in METHODS}
    for name, keys in own.items():
        assert {key: keys[key] for key in ("base", "data")} == {key: settings.common[key] for key in ("base", "data")}
        assert keys["train"] == settings.common["train"]
        assert keys.get("method", {}) == settings.runs[name].get("method", {})


def test_the_file_for_pairs_of_answers_parses_and_says_only_what_differs(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    defaults = settings("lora", *(word for key, value in REQUIRED.items() for word in (f"--{key}", value)))
    values, said = (
        settings("lora", "--config", PREFERENCES),
        dict(leaves(yaml.safe_load(Path(PREFERENCES).read_text()))),
    )
    assert {key for key in values if values[key] != defaults[key]} == said.keys()
    assert Path(PREFERENCES).read_text().startswith(f"# litpeft finetune lora --config {PREFERENCES}\n")
    assert (Path(said["data.path"]) / "train.jsonl").is_file()
