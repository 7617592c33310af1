"""`litpeft new`: random weights as transformers' classes begin with them, for every family."""

import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import in_float64
from test_model import GPT2, TINY
from tiny_families import MODELS, write_plain_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from litpeft.cli import main
from litpeft.core.safetensors import Weights
from litpeft.exchange.new import new
from litpeft.exchange.settings import New
from litpeft.model.build import build
from litpeft.model.context import Context

CERTAIN = 6  # standard errors: chance exceeds them once in 500 million


def theirs(name: str, folder: Path, **changes: object) -> torch.nn.Module:
    """Writes config.json and the tokenizer; returns transformers' model as its class begins."""
    case = MODELS[name] | changes
    sizes = {**GPT2, "bos_token_id": 1, "eos_token_id": 1} if case.get("model_type") == "gpt2" else TINY
    config = AutoConfig.for_model(**{"model_type": "llama", **sizes} | case)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder.mkdir()
    config.save_pretrained(folder)
    write_plain_tokenizer(folder)
    return model


def by_module(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the numbers of all layers and experts together, by the name of the module."""
    groups = defaultdict(list)
    for name, tensor in tensors.items():
        groups[".".join("N" if part.isdigit() else part for part in name.split("."))].append(tensor.float().flatten())
    return {name: torch.cat(parts) for name, parts in groups.items()}


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_distributed_as_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = theirs(name, tmp_path / "source")
    model.save_pretrained(tmp_path / "theirs")
    new(New(str(tmp_path / "source"), str(tmp_path / "out")))
    files = [Weights(tmp_path / folder) for folder in ("out", "theirs")]
    ours, expected = (by_module({one: weights.read(one) for one in weights.file_of}) for weights in files)
    assert ours.keys() == expected.keys()
    for module, numbers in ours.items():
        want = expected[module]
        assert numbers.shape == want.shape, module
        if name == "nemotron" and module.endswith("norm.weight"):
            want = want - 1  # theirs multiplies by 1 + 1
        if want.unique().numel() == 1:
            torch.testing.assert_close(numbers, want, rtol=1e-6, atol=0)
            continue
        n, deviation = len(want), float(want.std())
        assert abs(float(numbers.mean() - want.mean())) < CERTAIN * deviation * math.sqrt(2 / n), module
        spread = 2 if module.endswith("A_log") else 1  # the logarithm of equally likely numbers has long tails
        assert abs(math.log(float(numbers.std()) / deviation)) < spread * CERTAIN * math.sqrt(1 / (n - 1)), module


@pytest.mark.parametrize("name", ["llama", "starcoder2", "nemotron"])
def test_the_deviation_is_what_config_json_says_or_the_familys(name: str, tmp_path: Path) -> None:
    own = AutoConfig.for_model(MODELS[name].get("model_type", "llama")).initializer_range
    theirs(name, tmp_path / "source")
    path = tmp_path / "source/config.json"
    config = json.loads(path.read_text())
    for said, want in ((None, own), (0.3, 0.3)):
        path.write_text(json.dumps({key: value for key, value in config.items() if key != "initializer_range"}))
        changes = {} if said is None else {"initializer_range": said}
        new(New(str(tmp_path / "source"), str(tmp_path / "out"), changes, overwrite=True))
        numbers = Weights(tmp_path / "out").read("model.embed_tokens.weight")
        assert abs(float(numbers.std()) / want - 1) < CERTAIN / math.sqrt(2 * numbers.numel())


def test_a_changed_shape_is_read_by_transformers_and_is_the_same_again_with_the_seed(tmp_path: Path) -> None:
    theirs("llama", tmp_path / "source")
    (tmp_path / "source/model.safetensors").write_bytes(b"not read")
    changes = '{"num_hidden_layers": 5, "num_key_value_heads": 1}'
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        main(["new", str(tmp_path / "source"), str(tmp_path / out), "--changes", changes, "--seed", seed])
    a, b, c = (Weights(tmp_path / out).fingerprint() for out in "abc")
    assert a == b != c
    ours, ids = build(tmp_path / "a", torch.float64), torch.randint(0, 256, (1, 20))
    assert len(ours.blocks) == 5
    reference = in_float64(AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float64))
    logits = ours(ids, Context.packed((20,), ids.device, None))
    torch.testing.assert_close(logits, reference(ids).logits, rtol=0, atol=1e-10)
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert abs(float(losses) - math.log(TINY["vocab_size"])) < 0.5  # it knows nothing


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ('{"num_layers": 2}', "no key 'num_layers' (did you mean \"num_hidden_layers\"?)"),
        ('{"num_attention_heads": 5}', "num_attention_heads 5 is no multiple of num_key_value_heads 2"),
        ('{"initializer_range": 0}', "initializer_range 0 is not supported; it must be a number above 0"),
        ('{"model_type": "mamba"}', "model_type 'mamba' is not supported"),
        ('{"vocab_size": 7}', "the tokenizer"),
    ],
)
def test_a_change_that_makes_no_model_is_refused_and_nothing_is_written(
    changes: str, says: str, tmp_path: Path, capsys
) -> None:
    theirs("llama", tmp_path / "source")
    with pytest.raises(SystemExit):
        main(["new", str(tmp_path / "source"), str(tmp_path / "out"), "--changes", changes])
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
