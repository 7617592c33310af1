"""Adapters that peft wrote, read as runs: the same logits, and each key is honoured or refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import finetune, make_folder, write_rows
from families.tiny_families import make_family
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from litpeft.cli import main
from litpeft.core.errors import ModelError
from litpeft.generate.load import load_model

IDS = torch.randint(0, 257, (2, 30), generator=torch.Generator().manual_seed(5))
VIRTUAL = 5


def make_base(folder: Path, family: str) -> Path:
    if family == "tied llama":
        return make_folder(folder, tie_word_embeddings=True)
    make_family(folder, family)
    return folder


def write_adapter(base: Path, folder: Path, config: object, safe: bool = True) -> torch.Tensor:
    """Writes an adapter whose trained tensors are random, as peft does; returns peft's logits."""
    torch.manual_seed(7)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # a share of its own spread, or a little where it starts even
                parameter += 0.3 * max(float(parameter.std()), 0.1) * torch.randn_like(parameter)
        model.save_pretrained(folder, safe_serialization=safe)
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()(IDS).logits


@torch.no_grad()
def compare(want: torch.Tensor, base: Path, folder: Path, named: str | None = None, limit: float = 2e-6) -> None:
    """Raises unless the adapter's logits in litpeft are those of peft, and not the base's."""
    model = load_model(str(folder), base=named, precision="32-true").model
    before = sum(model.frame)
    got = model(torch.cat((torch.zeros(2, before, dtype=torch.long), IDS), 1))[:, before:]
    want = want[:, -IDS.size(1) :]
    assert (got - want).abs().max() <= limit * want.abs().max()
    assert (got - AutoModelForCausalLM.from_pretrained(base)(IDS).logits).abs().max() > 1e-2


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = {"target_modules": ["q_proj", "v_proj"]}
LORAS = {
    "patterns of rank and alpha": (
        "llama",
        {"target_modules": ALL, "r": 4, "lora_alpha": 7, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
         "alpha_pattern": {"v_proj": 1, r".*layers\.0.*down_proj": 40}},
    ),
    "rslora with a pattern": ("llama", QV | {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "lora_alpha": 5}),
    "dora": ("llama", {"target_modules": ALL, "use_dora": True, "r": 3, "lora_alpha": 9}),
    "some layers": ("llama", QV | {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "one layer, no pattern": ("llama", QV | {"layers_to_transform": 0}),
    "a regular expression": ("llama", {"target_modules": r".*\.(0\.self_attn\.(q|k)_proj|down_proj)"}),
    "all linear layers but some": ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "all but a regular expression": ("gpt2", {"target_modules": "all-linear", "exclude_modules": r".*\.h\.0\..*"}),
    "the head": ("llama", {"target_modules": ["lm_head", "o_proj"]}),
    "modules to save": ("llama", QV | {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "a tied embedding": ("tied llama", QV | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "rows of tokens": ("llama", QV | {"trainable_token_indices": {"embed_tokens": [3, 200, 17], "lm_head": [9, 8]}}),
    "rows of tokens of a tied embedding": ("tied llama", QV | {"trainable_token_indices": [250, 3]}),
    "fused, transposed, all biases": (
        "gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "all", "fan_in_fan_out": True},
    ),
    "biases of the layers alone": ("neox", {"target_modules": ["query_key_value"], "bias": "lora_only"}),
    "fused dora": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "fused by heads, and the head": ("neox serial", {"target_modules": ["query_key_value", "lm_head"], "r": 3}),
    "started with eva": ("llama", QV | {"init_lora_weights": "gaussian", "lora_dropout": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("case", LORAS)
def test_lora_computes_what_peft_computes(case: str, tmp_path) -> None:
    family, settings = LORAS[case]
    base = make_base(tmp_path / "base", family)
    want = write_adapter(base, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM", **settings))
    compare(want, base, tmp_path / "adapter")


KINDS = {
    "ia3": ("llama", IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False)),
    "fused ia3": ("gpt2", IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn"], feedforward_modules=[])),
    "vera": ("llama", VeraConfig(task_type="CAUSAL_LM", r=16, target_modules=["q_proj", "down_proj"])),
    "fused vera": ("gpt2", VeraConfig(task_type="CAUSAL_LM", r=16, target_modules=["c_attn"], fan_in_fan_out=True)),
    "norms": ("llama", LNTuningConfig(task_type="CAUSAL_LM")),
    "prefix": ("llama", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)),
    "prompt": ("gpt2", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)),
    "p-tuning": (
        "llama", PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
def test_other_kinds_compute_what_peft_computes(case: str, tmp_path) -> None:
    family, config = KINDS[case]
    base = make_base(tmp_path / "base", family)
    compare(write_adapter(base, tmp_path / "adapter", config), base, tmp_path / "adapter")


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> tuple[Path, Path, torch.Tensor]:
    """A base, an adapter of it, and peft's logits."""
    folder = tmp_path_factory.mktemp("peft")
    base = make_folder(folder / "base")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4)
    return base, folder / "adapter", write_adapter(base, folder / "adapter", config)


def changed(lora: tuple, tmp_path: Path, **keys: object) -> Path:
    """Returns a copy of the adapter with other keys in its config."""
    folder = shutil.copytree(lora[1], tmp_path / "changed")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | keys))
    return folder


REFUSED = {
    "peft_type": ("LOHA", "peft_type 'LOHA' is not read; LORA, VERA, IA3, LN_TUNING"),
    "task_type": ("SEQ_CLS", "task_type must be CAUSAL_LM, got 'SEQ_CLS'"),
    "r": ("4", "r must be a whole number, got '4'"),
    "rank_pattern": ({"q_proj": 0}, 'rank_pattern["q_proj"] must be at least 1'),
    "alpha_pattern": ({"(": 2.0}, "alpha_pattern '(' is no regular expression"),
    "lora_alpha": (None, "lora_alpha must be a finite number, got None"),
    "target_modules": (["q_proj"], "down_proj.lora_A.weight is of no module that target_modules"),
    "exclude_modules": (["q_proj"], "q_proj.lora_A.weight is of no module that target_modules"),
    "modules_to_save": (["lm_head"], "the file does not hold lm_head.weight, for which the config asks"),
    "bias": ("some", "bias must be none, all or lora_only, got 'some'"),
    "trainable_token_indices": ([3, 320], "trainable_token_indices must be different numbers below 320, got (3, 320)"),
    "use_rslora": ("yes", "use_rslora must be true or false, got 'yes'"),
    "use_dora": (True, "the file does not hold model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
    "init_lora_weights": ("pissa", "init_lora_weights 'pissa' changes the base's weights"),
    "layers_to_transform": ([0], "model.layers.1.mlp.down_proj.lora_A.weight is of no module"),
    "layers_pattern": ("[", "layers_pattern '[' is no regular expression"),
    "layer_replication": ([[0, 1]], "layer_replication"),
    "target_parameters": (["x"], "target_parameters"),
    "use_qalora": (True, "use_qalora"),
    "lora_bias": (True, "lora_bias"),
    "alora_invocation_tokens": ([1], "alora_invocation_tokens"),
    "a_key_of_tomorrow": (1, "a_key_of_tomorrow '1' is not supported"),
    "base_model_name_or_path": ("org/none", "hub, `litpeft download org/none` fetches it"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_is_not_honoured_is_refused_by_name(key: str, lora, tmp_path) -> None:
    value, told = REFUSED[key]
    folder = changed(lora, tmp_path, **{key: value})
    with pytest.raises(ModelError) as error:
        load_model(str(folder))
    assert told in str(error.value)
    assert str(folder) in error.value.where


def test_every_key_that_peft_writes_is_honoured_idle_or_off(lora) -> None:
    """A new key of a later peft would be refused, if it is on; so the default of each must pass, as it does here."""
    config = json.loads((lora[1] / "adapter_config.json").read_text())
    assert len(config) >= 40
    compare(lora[2], lora[0], lora[1])
    other = REFUSED.keys() | {"lora_dropout", "inference_mode", "fan_in_fan_out", "revision", "auto_mapping"}
    assert len(config.keys() & other) >= 20


def test_the_base_is_the_one_that_is_named_or_that_download_fetched(lora, tmp_path, monkeypatch) -> None:
    base, _, want = lora
    folder = changed(lora, tmp_path, base_model_name_or_path="org/tiny")
    compare(want, base, folder, str(base))
    shutil.copytree(base, tmp_path / "checkpoints" / "org" / "tiny")
    monkeypatch.chdir(tmp_path)
    compare(want, base, folder)
    with pytest.raises(ModelError, match=r"q_proj.lora_A.weight is \(4, 64\); by its config and base it must be"):
        load_model(str(folder), base=str(make_folder(tmp_path / "wide", hidden_size=128)))
    with pytest.raises(ModelError, match="base_model_name_or_path is not set"):
        load_model(str(changed(lora, tmp_path / "x", base_model_name_or_path=None)))


def test_half_precision_and_pickled_tensors_are_read(lora, tmp_path) -> None:
    base, adapter, want = lora
    folder = shutil.copytree(adapter, tmp_path / "bin")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    compare(want, base, folder)
    (folder / "adapter_model.bin").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="not a whole file of tensors"):
        load_model(str(folder))
    half = shutil.copytree(adapter, tmp_path / "half")
    tensors = {name: t.bfloat16() for name, t in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, half / "adapter_model.safetensors")
    with torch.no_grad():
        want = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), half).eval()(IDS).logits
    compare(want, base, half)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t | {"base_model.model.model.layers.0.mlp.act.weight": torch.ones(2)}, "act.weight is of no module"),
        (lambda t: {name.removeprefix("base_model."): x for name, x in t.items()}, "must begin with base_model.model."),
        (lambda t: {name: x[:3] if "lora_A" in name else x for name, x in t.items()}, "is (3, 64); by its config"),
        (lambda t: {name: x * float("nan") for name, x in t.items()}, "holds numbers that are not finite"),
        (lambda t: dict(list(t.items())[1:]), "the file does not hold model.layers.0."),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(change, told: str, lora, tmp_path) -> None:
    folder = shutil.copytree(lora[1], tmp_path / "adapter")
    save_file(change(load_file(lora[1] / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    with pytest.raises(ModelError) as error:
        load_model(str(folder))
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "target_modules names lm_head, which is the embedding of this base",
        ),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens, which is no linear layer"),
        (QV | {"modules_to_save": ["embed_tokens"]}, "are one tensor in this base (tie_word_embeddings), and two in"),
        (QV | {"modules_to_save": ["lm_head"]}, "are one tensor in this base (tie_word_embeddings), and two in"),
    ],
)
def test_what_would_untie_a_head_is_refused(settings: dict, told: str, tmp_path) -> None:
    base = make_base(tmp_path / "base", "tied llama")
    write_adapter(base, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM", **settings))
    with pytest.raises(ModelError) as error:
        load_model(str(tmp_path / "adapter"))
    assert told in str(error.value)


def test_every_command_takes_an_adapter_where_it_takes_a_run(lora, tmp_path, capsys) -> None:
    base, adapter, want = lora
    rows = write_rows(tmp_path) / "validation.jsonl"
    main(["generate", str(adapter), "--prompt", "x", "--sampling.max_new_tokens", "3"])
    main(["evaluate", str(adapter), str(rows), "--max_new_tokens", "3"])
    assert "finetuned" in capsys.readouterr().out
    main(["merge", str(adapter), "--out", str(tmp_path / "merged")])
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    assert (got - want).abs().max() <= 5e-6 * want.abs().max()
    main(["convert", str(adapter), str(tmp_path / "again"), "--to", "peft"])
    compare(want, base, tmp_path / "again")
    with pytest.raises(SystemExit):
        main(["combine", str(adapter), str(tmp_path / "combined")])
    assert "this is an adapter of peft, which does not record its base's weights" in capsys.readouterr().err


def test_a_tokenizer_beside_the_adapter_is_used_and_merged(lora, tmp_path) -> None:
    base, adapter, _ = lora
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    template = (base / "chat_template.jinja").read_text().replace("assistant", "helper")
    (folder / "chat_template.jinja").write_text(template)
    assert load_model(str(adapter)).template.source != template
    assert load_model(str(folder)).template.source == template
    main(["merge", str(folder)])
    assert (folder / "merged" / "chat_template.jinja").read_text() == template


def test_an_adapter_is_no_base(lora, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        finetune(lora[1], tmp_path)
    said = capsys.readouterr().err
    assert f"this is an adapter of {lora[0]} (adapter_config.json, adapter_model.safetensors), and a model" in said
    assert f"`litpeft merge {lora[1]}` makes one of it" in said
