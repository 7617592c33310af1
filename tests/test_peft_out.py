"""Runs as peft's files: peft computes with them what the run computes, or the refusal says why not."""

import json
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from conftest import calibrated, finetune, make_folder, method_of, storage_of
from families.tiny_families import make_family
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from litpeft.cli import main
from litpeft.cli.methods import in_peft
from litpeft.core.checksums import write_checksums
from litpeft.core.errors import ConfigError, ModelError
from litpeft.core.exports import CannotExport
from litpeft.exchange.convert import convert
from litpeft.exchange.exports.peft import write_adapter
from litpeft.exchange.settings import Convert
from litpeft.generate.load import load_model
from litpeft.methods import METHODS, method_class
from litpeft.model.build import build
from litpeft.model.delta import delta_state, load_delta
from litpeft.model.gpt import GPT

IDS = torch.randint(0, 257, (2, 30), generator=torch.Generator().manual_seed(5))
OWN = ("is_gradient_checkpointing", "Unsupported layer type")  # warnings of transformers and of peft, about themselves


def make_base(folder: Path, family: str) -> Path:
    if family.startswith("tied"):
        return make_folder(folder, tie_word_embeddings=True)
    make_family(folder, family)
    return folder


def learnt(base: Path, name: str, settings: dict) -> tuple[GPT, object, dict[str, torch.Tensor]]:
    """Returns a model whose delta is random, and its method and delta as a run saves them."""
    torch.manual_seed(3)
    method = calibrated(method_class(name)(**settings), base)
    model = build(base, torch.float32, method, storage=storage_of(name))
    with torch.no_grad():
        for key, tensor in model.state_dict(keep_vars=True).items():
            if key in model.delta_keys and tensor.requires_grad:
                tensor += 0.1 * torch.randn_like(tensor) * (tensor.std() if tensor.std() > 0.01 else 1)
    kept, delta = method.result(model, {key: tensor.detach().clone() for key, tensor in delta_state(model).items()})
    again = build(base, torch.float32, kept, storage=storage_of(name), delta=delta)
    load_delta(again, delta, "")
    return again.eval(), kept, delta


def in_peft_s_hands(base: Path, folder: Path) -> torch.nn.Module:
    """Returns peft's model, whose loading warns of nothing that is ours to put right."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in OWN:
            warnings.filterwarnings("ignore", f".*{text}")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


@torch.no_grad()
def compare(model: GPT, base: Path, folder: Path, limit: float = 2e-6) -> None:
    """Raises unless peft's logits are the model's, and not the base's."""
    theirs, before = in_peft_s_hands(base, folder), sum(model.frame)
    want = model(torch.cat((torch.zeros(2, before, dtype=torch.long), IDS), 1))[:, before:]
    got = theirs(IDS).logits[:, -IDS.size(1) :]
    assert (got - want).abs().max() <= limit * want.abs().max()
    assert (got - AutoModelForCausalLM.from_pretrained(base)(IDS).logits).abs().max() > 1e-2


CASES = {
    "lora with ranks": ("llama", "lora", {"rank": 5, "alpha": 7.0, "ranks": {"*.attn.q": 3, "blocks.1.*": 2}}),
    "rslora, other targets in other blocks": (
        "llama", "lora", {"rslora": True, "alpha": 11.0, "targets": ("blocks.0.attn.q", "*.down", "head")},
    ),
    "dora": ("llama", "dora", {"rank": 3, "alpha": 5.0}),
    "lora_fa": ("llama", "lora_fa", {"rank": 3}),
    "pissa, twice the rank": ("llama", "pissa", {"rank": 3, "alpha": 5.0}),
    "eva, each layer its rank": ("llama", "eva", {"rank": 3}),
    "lora_ga": ("llama", "lora_ga", {"rank": 3}),
    "multi_lora": ("llama", "multi_lora", {"rank": 2}),
    "tied_lora": ("llama", "tied_lora", {"rank": 3}),
    "ada_lora": ("llama", "ada_lora", {"rank": 6, "final_rank": 4}),
    "vera": ("llama", "vera", {"rank": 16}),
    "fused vera, as lora": ("gpt2", "vera", {"rank": 16}),
    "ia3": ("llama", "ia3", {}),
    "prefix": ("llama", "prefix", {}),
    "prefix that a network computed": ("gpt2", "prefix", {"hidden": 8}),
    "ptuning_v2": ("llama", "ptuning_v2", {"prompt_length": 4}),
    "prompt": ("gpt2", "prompt", {}),
    "pre_embed before the text": ("llama", "pre_embed", {"infix_length": 0}),
    "ptuning before the text": ("llama", "ptuning", {"before": (3, 4), "after": ()}),
    "norms": ("neox", "selective", {}),
    "the last block": ("gpt2", "selective", {"last_blocks": 1}),
    "two LoRAs": ("llama", "combo", {"methods": {"lora": {"rank": 2}, "lora_fa": {"rank": 3, "alpha": 1.0}}}),
    "norms beside lora": ("llama", "lora", {"unfreeze": ("*norm*",)}),
    "a tied embedding": ("tied llama", "lora", {"unfreeze": ("embed.weight", "*norm*")}),
    "biases beside lora": ("gpt2", "lora", {"unfreeze": ("*bias",)}),
    "fused and transposed": ("gpt2", "lora", {"rank": 3, "ranks": {"*.attn.v": 2}}),
    "fused, a part of it": ("neox", "lora", {"targets": ("*.attn.k", "*.mlp.*")}),
    "fused dora": ("neox serial", "dora", {"rank": 3}),
    "fused ia3": ("gpt2", "ia3", {"targets": ("*.attn.k", "*.attn.v")}),
    "an untied head": ("neox", "lora", {"targets": ("*.attn.o", "head"), "unfreeze": ("embed.weight",)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_the_run_computes(case: str, tmp_path) -> None:
    family, name, settings = CASES[case]
    base = make_base(tmp_path / "base", family)
    model, method, delta = learnt(base, name, settings)
    (tmp_path / "peft").mkdir()
    write_adapter(tmp_path / "peft", method, None, delta, base)
    compare(model, base, tmp_path / "peft")


@pytest.mark.parametrize(
    ("family", "name", "settings", "told"),
    [
        ("llama", "adapter", {}, "peft's adaption prompt has one gate for all heads of a layer, without tanh"),
        ("llama", "bitfit", {"add_missing": True}, "it changes attention_bias, mlp_bias in config.json"),
        ("gpt2", "bitfit", {}, "peft has nothing like Shift at blocks.0.attn.q.slot"),
        ("llama", "bottleneck", {}, "peft has nothing like "),
        ("llama", "long_lora", {}, "it changes max_position_embeddings, rope_parameters, rope_scaling in config.json"),
        ("llama", "ptuning", {}, "8 of its vectors stand between prompt and answer, and peft has none there"),
        ("llama", "pre_embed", {}, "a run with method.infix_length 0 becomes prompt tuning of peft"),
        ("llama", "combo", {}, "lora and prefix act on the same layer, blocks.0.attn.k"),
        ("llama", "combo", {"methods": {"lora": {"targets": ["*.q"]}, "prefix": {}}}, "more than what stands before"),
        ("llama", "combo", {"methods": {"lora": {}, "ia3": {}}}, "lora and ia3 act on the same layer, blocks.0.attn.k"),
        ("llama", "combo", {"methods": {"lora": {"targets": ["*.q"]}, "ia3": {}}}, "more ways than one"),
        ("llama", "loftq", {}, "its base is held in nf4 with codes that were chosen for what it learned"),
        ("gpt2", "dora", {"targets": ("*.attn.q",)}, "it trained magnitudes of some of them"),
        ("gpt2", "lora", {"unfreeze": ("*attn.q.bias",)}, "attn.c_attn.bias in one, of which blocks.0.attn.k.bias"),
        ("llama", "lora", {"unfreeze": ("*.q.weight",)}, "it trained weight of model.layers.0.self_attn.q_proj"),
        ("llama", "ia3", {"unfreeze": ("embed.weight", "*.o.weight")}, None),
    ],
)  # fmt: skip
def test_what_peft_cannot_say_is_told_by_name(family, name, settings, told, tmp_path) -> None:
    base = make_base(tmp_path / "base", family)
    model, method, delta = learnt(base, name, settings)
    (tmp_path / "peft").mkdir()
    if told is None:
        write_adapter(tmp_path / "peft", method, storage_of(name), delta, base)
        return compare(model, base, tmp_path / "peft")
    with pytest.raises(CannotExport) as error:
        write_adapter(tmp_path / "peft", method, storage_of(name), delta, base)
    assert told in str(error.value)
    assert not list((tmp_path / "peft").iterdir())


def test_final_is_an_adapter_that_both_read_and_the_files_are_checked(tmp_path, capsys) -> None:
    base = make_folder(tmp_path / "base")
    run = finetune(base, tmp_path, "--train.lr", "1e-2", "--train.epochs", "3")
    config = json.loads((run / "final" / "adapter_config.json").read_text())
    leaves = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 16, leaves)
    assert (config["base_model_name_or_path"], config["inference_mode"]) == (str(base), True)
    model = load_model(str(run), precision="32-true").model
    compare(model, base, run / "final")
    with torch.no_grad():
        theirs = AutoPeftModelForCausalLM.from_pretrained(run / "final")(IDS).logits
        assert (theirs - model(IDS)).abs().max() <= 2e-6 * theirs.abs().max()
    ours = load_file(run / "final" / "delta.safetensors")["blocks.0.attn.q.slot.lora.B"]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert torch.equal(load_file(run / "final" / "adapter_model.safetensors")[name], ours)
    with open(run / "final" / "adapter_model.safetensors", "r+b") as handle:
        handle.seek(-1, 2)
        handle.write(b"\x01")
    with pytest.raises(SystemExit):
        main(["generate", str(run), "--prompt", "x"])
    assert "adapter_model.safetensors: the file is not the one that the run wrote" in capsys.readouterr().err


def test_convert_writes_the_same_from_an_earlier_run_and_reads_it_back(tmp_path, capsys) -> None:
    run = finetune(make_folder(tmp_path / "base"), tmp_path, "--base.quantize", "nf4", "--train.lr", "1e-2")
    for out in ([], [str(tmp_path / "named")], ["--out", str(tmp_path / "named"), "--overwrite"]):
        main(["convert", str(run), *out, "--to", "peft"])
        folder = tmp_path / "named" if out else run / "peft"
        printed = capsys.readouterr().out
        assert "read back: logits at " in printed
        assert f"wrote {folder}: LORA, 28 tensors\n" in printed
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (folder / name).read_bytes() == (run / "final" / name).read_bytes()
    with pytest.raises(ConfigError, match="the output exists"):
        convert(Convert(str(run), to="peft"))


def test_what_peft_cannot_say_comes_with_a_command_that_works_as_typed(tmp_path, capsys) -> None:
    base = make_folder(tmp_path / "base")
    run = finetune(base, tmp_path, "--train.lr", "1e-2", method="loftq")
    assert not (run / "final" / "adapter_config.json").exists()
    with pytest.raises(ModelError, match="this run is nothing that peft has: its base is held in nf4") as error:
        convert(Convert(str(run), to="peft"))
    first, second = error.value.hint.split("`")[1::2]
    main(shlex.split(first)[1:])
    assert "of the energy of the changes" in capsys.readouterr().out
    main(shlex.split(second)[1:])
    assert (tmp_path / "run-as-lora" / "peft" / "adapter_config.json").exists()
    other = finetune(base, tmp_path, out="other", method="adapter")
    with pytest.raises(ModelError) as error:
        convert(Convert(str(other), to="peft"))
    assert error.value.hint == f"generate and chat take the run as it is: litpeft chat {other}"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"to": "peft", "dtype": "float16"}, "dtype is not for --to peft"),
        ({"to": "onnx"}, "to must be peft, gguf, gguf-adapter, mlx or null, got 'onnx'"),
        ({}, "out must be given"),
        ({"out": "x", "base": "y"}, "base is not for a Hugging Face folder"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict, told: str) -> None:
    with pytest.raises(ValueError) as error:
        Convert("run", **settings)
    assert told in str(error.value)


def test_a_model_folder_is_not_exported(tiny_folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match="this is a model folder, and peft is for what a run learned"):
        convert(Convert(str(tiny_folder), str(tmp_path / "peft"), to="peft"))
    run = finetune(tiny_folder, tmp_path, "--train.max_steps", "1", method="full")
    with pytest.raises(ConfigError, match="this run trained the model itself") as error:
        convert(Convert(str(run), to="peft"))
    assert error.value.hint.startswith(f"{run / 'final'} is an ordinary Hugging Face folder")


def test_the_base_is_called_by_its_name_on_the_hub_if_it_came_from_there(tmp_path) -> None:
    base = make_folder(tmp_path / "base")
    _, method, delta = learnt(base, "ia3", {})
    write_checksums(base, {}, f"org/some-model@{'0a' * 20}")
    write_adapter(tmp_path, method, None, delta, base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/some-model", "0a" * 20)


@pytest.mark.parametrize("name", METHODS)
def test_the_table_of_methods_says_what_peft_has(name: str, tiny_folder, tmp_path) -> None:
    cls, method = method_class(name), calibrated(method_of(name), tiny_folder)
    if cls.writes_model:
        assert in_peft(name) == "no"
        return
    model = build(tiny_folder, torch.float32, method, storage=storage_of(name))
    kept, delta = method.result(model, {key: tensor.detach() for key, tensor in delta_state(model).items()})
    try:
        said = write_adapter(tmp_path, kept, storage_of(name), delta, tiny_folder)
        assert in_peft(name) == said.partition(",")[0]
    except CannotExport:
        assert in_peft(name) == "no"
