"""A model that changed since a run was trained on it is refused; one that only looks other is taken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CHATML, finetune, make_folder
from short_runs import cut, resume, train
from transformers import AutoModelForCausalLM

from litpeft.cli import main
from litpeft.core.json import read_json
from litpeft.exchange import identity
from litpeft.exchange.identity import checksum
from litpeft.generate.load import load_model

Change = Callable[[dict], object]


def edit(path: Path, change: Change, **layout: object) -> None:
    """Changes a JSON file in place."""
    value = json.loads(path.read_text()) if path.exists() else {}
    change(value)
    path.write_text(json.dumps(value, **layout))


def swap(value: dict) -> None:
    vocabulary = value["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def begin(value: dict) -> None:
    """Has plain text start with a token."""
    token, text = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [token, text, {"Sequence": {"id": "B", "type_id": 1}}]
    known = {"<|im_start|>": {"id": "<|im_start|>", "ids": [0], "tokens": ["<|im_start|>"]}}
    kind = {"type": "TemplateProcessing", "single": [token, text], "pair": pair, "special_tokens": known}
    value.update(post_processor=kind)


CHANGED: dict[str, tuple[str, Change, str]] = {
    "theta": ("config.json", lambda v: v["rope_parameters"].update(rope_theta=500.0), "rope_theta: 10000.0 -> 500.0"),
    "eps": ("config.json", lambda v: v.update(rms_norm_eps=0.1), "norm_eps: 1e-06 -> 0.1"),
    "reach": ("config.json", lambda v: v.update(max_position_embeddings=100), "max_positions: 512 -> 100"),
    "vocabulary": ("tokenizer.json", swap, "its file holds another one"),
    "normalizer": ("tokenizer.json", lambda v: v.update(normalizer={"type": "Lowercase"}), "becomes other ids"),
    "bos": ("tokenizer.json", begin, "adds_bos: false -> true"),
    "added": (
        "tokenizer_config.json",
        lambda v: v.update(added_tokens_decoder={"258": {"content": "sky", "special": False}}),
        "other tokens are added or special",
    ),
    "a word that takes the space before it": (
        "tokenizer_config.json",
        lambda v: v.update(added_tokens_decoder={"70": {"content": "a", "special": False, "lstrip": True}}),
        "the same text becomes other ids",
    ),
    "stop": ("generation_config.json", lambda v: v.update(eos_token_id=[1, 70]), "stop_ids: [1] -> [1, 70]"),
}
SAME: dict[str, tuple[str, Change, dict]] = {
    "order and spaces": ("config.json", lambda v: None, {"sort_keys": True, "indent": 7}),
    "a key that is not read": ("config.json", lambda v: v.update(transformers_version="9", use_cache=False), {}),
    "the default written out": ("config.json", lambda v: v.update(mlp_bias=False), {}),
    "tokenizer.json in another order": ("tokenizer.json", lambda v: None, {"sort_keys": True, "indent": 1}),
    "truncation": (
        "tokenizer.json",
        lambda v: v.update(truncation={"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}),
        {},
    ),
    "the length of the tokenizer": ("tokenizer_config.json", lambda v: v.update(model_max_length=7), {}),
    "the padding token": ("tokenizer_config.json", lambda v: v.update(pad_token="<|im_end|>"), {}),
    "the template at its other place": ("tokenizer_config.json", lambda v: v.update(chat_template=CHATML), {}),
    "sampling": ("generation_config.json", lambda v: v.update(temperature=0.3), {}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory) -> Path:
    return train(base, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def full(base: Path, tmp_path_factory) -> Path:
    return finetune(base, tmp_path_factory.mktemp("full"), method="full")


def said_by(capsys, *argv: object) -> tuple[int, str]:
    """Returns the exit code of a command and what it said of its failure."""
    capsys.readouterr()
    try:
        main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def commands(run: Path, base: Path, out: Path) -> dict[str, list[object]]:
    rows = run.parent / "data" / "validation.jsonl"
    return {
        "generate": ["generate", run, "--base", base, "--prompt", "x", "--sampling.max_new_tokens", 1],
        "evaluate": ["evaluate", run, rows, "--base", base, "--max_new_tokens", 1],
        "merge": ["merge", run, "--base", base, "--out", out],
        "chat": ["chat", run, "--base", base],
    }


@pytest.mark.parametrize("kind", CHANGED)
def test_a_base_that_changed_since_is_refused_by_what_changed(kind: str, run, base, tmp_path, capsys) -> None:
    file, change, what = CHANGED[kind]
    other = shutil.copytree(base, tmp_path / "other")
    edit(other / file, change)
    for name, argv in commands(run, other, tmp_path / "merged").items():
        code, said = said_by(capsys, *argv)
        assert (name, code) == (name, 4), said
        assert what in said
    assert not (tmp_path / "merged").exists()
    stopped = cut(run, 2, tmp_path / "run")
    shutil.copytree(run.parent / "data", tmp_path / "data", dirs_exist_ok=True)
    with pytest.raises(SystemExit) as stop:
        resume(other, stopped)
    assert (stop.value.code, what in capsys.readouterr().err) == (2, True)


def test_another_template_is_refused_unless_the_run_did_without_it(run, base, tmp_path, capsys) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    (other / "chat_template.jinja").write_text(CHATML.replace("assistant", "model"))
    for argv in commands(run, other, tmp_path / "merged").values():
        code, said = said_by(capsys, *argv)
        assert (code, "the base's chat template is not the one" in said) == (4, True)
    with pytest.raises(SystemExit):
        resume(other, cut(run, 2, tmp_path / "run"))
    assert "the run began with another chat template" in capsys.readouterr().err
    alpaca = finetune(base, tmp_path, "--data.template", "alpaca", out="alpaca")
    assert said_by(capsys, *commands(alpaca, other, tmp_path / "merged")["generate"])[0] == 0


@pytest.mark.parametrize("kind", SAME)
def test_a_base_that_only_looks_other_is_taken(kind: str, run, base, tmp_path, capsys) -> None:
    file, change, layout = SAME[kind]
    moved = shutil.copytree(base, tmp_path / "moved")
    edit(moved / file, change, **layout)
    if "chat_template" in json.loads((moved / "tokenizer_config.json").read_text()):
        (moved / "chat_template.jinja").unlink()
    argv = commands(run, moved, tmp_path / "merged")["generate"]
    code, said = said_by(capsys, *argv)
    assert code == 0, said
    resume(moved, cut(run, 2, tmp_path / "run"))
    assert (tmp_path / "run" / "final" / "delta.safetensors").read_bytes() == (
        run / "final" / "delta.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("kind", ["theta", "vocabulary", "stop"])
def test_a_result_that_is_a_model_is_held_to_its_own_config_and_tokenizer(kind: str, full, tmp_path, capsys) -> None:
    file, change, what = CHANGED[kind]
    run = shutil.copytree(full, tmp_path / "run")
    edit(run / "final" / file, change)
    code, said = said_by(capsys, "generate", run, "--prompt", "x")
    assert code == 4
    assert what in said


def test_what_a_config_changes_is_what_transformers_computes_otherwise(base, tmp_path) -> None:
    """The change of theta that is refused above is one of logits: both libraries see it."""
    other = shutil.copytree(base, tmp_path / "other")
    edit(other / "config.json", CHANGED["theta"][1])
    ids = torch.arange(60)[None]
    with torch.no_grad():
        theirs = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (base, other)]
        ours = [load_model(str(folder), precision="32-true").model(ids) for folder in (base, other)]
    assert (theirs[0] - theirs[1]).abs().max() > 1e-3
    for mine, their in zip(ours, theirs, strict=True):
        assert (mine - their).abs().max() <= 5e-6 * their.abs().max()


# delta.json as 204c3a8 wrote it, in format 2
OLD = {
    "format": 2,
    "litpeft": "0.1.0",
    "holds": "delta",
    "method": "lora",
    "settings": {
        "unfreeze": [],
        "rank": 8,
        "alpha": None,
        "dropout": 0.0,
        "rslora": False,
        "targets": ["*.attn.*", "*.mlp.*"],
        "ranks": {},
    },
    "precision": "32-true",
    "step": 4,
    "finished": True,
}


def test_a_run_of_format_2_opens_with_what_it_knows_checked(run, base, tmp_path, capsys) -> None:
    old = shutil.copytree(run, tmp_path / "run")
    facts = json.loads((run / "final" / "delta.json").read_text())
    known = {key: facts["base"][key] for key in ("path", "fingerprint", "storage")}
    record = OLD | {"files": facts["files"], "base": known, "template": facts["template"]}
    (old / "final" / "delta.json").write_text(json.dumps(record | {"checksum": checksum(record)}))
    prompt = "--prompt", "x", "--sampling.max_new_tokens", "4"
    assert said_by(capsys, "generate", old, *prompt)[0] == 0
    other = make_folder(tmp_path / "other", seed=3)
    assert "trained on other weights" in said_by(capsys, "generate", old, "--base", other, *prompt)[1]
    other = shutil.copytree(base, tmp_path / "template")
    (other / "chat_template.jinja").write_text(CHATML + " ")
    assert "chat template is not the one" in said_by(capsys, "generate", old, "--base", other, *prompt)[1]


def test_a_checkpoint_of_before_resumes(run, base, tmp_path) -> None:
    old = cut(run, 2, tmp_path / "run")
    for manifest in old.glob("checkpoints/*/MANIFEST.json"):
        record = json.loads(manifest.read_text())
        del record["checksum"], record["facts"]["reads"]
        manifest.write_text(json.dumps(record | {"checksum": checksum(record)}))
    resume(base, old)
    assert (old / "final" / "delta.safetensors").read_bytes() == (run / "final" / "delta.safetensors").read_bytes()


def test_what_a_tokenizer_holds_is_computed_once_for_each_content(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "KEPT_FROM", 0)
    path, parsed = tmp_path / "tokenizer.json", []
    shutil.copy(tiny_folder / "tokenizer.json", path)
    monkeypatch.setattr(identity, "read_json", lambda *given: parsed.append(given) or read_json(*given))
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in identity.UNUSED}
    assert [identity.content_sum(path) for _ in range(3)] == 3 * [checksum(content)]
    assert len(parsed) == 1
    edit(path, swap)
    assert identity.content_sum(path) != checksum(content)
    edit(path, swap, indent=4)
    assert identity.content_sum(path) == checksum(content)
    assert len(parsed) == 3
    for damaged in ("", "x", f"{'0' * 64} {'1' * 64}\n", "\N{SNOWMAN}"):
        for kept in (tmp_path / "cache" / "litpeft" / "tokenizers").iterdir():
            kept.write_text(damaged, encoding="utf-8")
        assert identity.content_sum(path) == checksum(content)
    assert len(parsed) == 7


def test_without_a_place_to_keep_it_what_a_tokenizer_holds_is_computed_each_time(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(identity, "KEPT_FROM", 0)
    path = tiny_folder / "tokenizer.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in identity.UNUSED}
    assert [identity.content_sum(path) for _ in range(2)] == 2 * [checksum(content)]
