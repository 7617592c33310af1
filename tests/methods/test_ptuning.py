"""P-tuning against peft's encoders, and its templates against the words that they stand for."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, finetune, in_float64
from peft import PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from litpeft.data.batches import framed
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.run import find_run
from litpeft.generate.load import load_model
from litpeft.methods.prompt import Prompt
from litpeft.methods.ptuning import Encoded, PTuning
from litpeft.model.build import build
from litpeft.model.context import Context
from litpeft.model.delta import load_delta, trainable
from litpeft.model.gpt import GPT
from litpeft.train.checkpoints import Checkpoints

N, HIDDEN, ENCODERS = 5, 12, ("lstm", "mlp")
TEXT = torch.randint(0, TINY["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))


def encoded(model: GPT) -> Encoded:
    return model.after_embed.deltas["ptuning"]


def asked(model: GPT, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Returns the logits of rows (B, T) whose first tokens are a prompt, with those of the frame."""
    rows = torch.tensor([framed(row, prompt, *model.frame) for row in ids.tolist()])
    ctx = Context.rows(rows)
    ctx.prompt_lengths = torch.full((len(rows), 1), prompt + sum(model.frame))
    return model(rows, ctx)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_vectors_logits_and_gradients_equal_peft(tiny_folder, encoder: str) -> None:
    torch.manual_seed(0)
    method = PTuning(before=(N,), after=(), encoder=encoder, hidden=HIDDEN)
    ours = build(tiny_folder, torch.float64, method).eval()
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64))
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=N,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=HIDDEN,
        encoder_num_layers=2,
        encoder_dropout=0.0,
    )
    theirs = get_peft_model(theirs, config, autocast_adapter_dtype=False).eval()
    other = theirs.prompt_encoder["default"].double()
    linears = [layer for layer in other.mlp_head if isinstance(layer, torch.nn.Linear)]
    pairs = {"vectors": other.embedding.weight}
    pairs |= {f"W_{i}": layer.weight for i, layer in enumerate(linears, 1)}
    pairs |= {f"b_{i}": layer.bias for i, layer in enumerate(linears, 1)}
    pairs |= dict(other.lstm_head.named_parameters()) if encoder == "lstm" else {}
    own = dict(encoded(ours).named_parameters())
    assert own.keys() == pairs.keys()
    for name, parameter in pairs.items():
        parameter.data = own[name].detach().clone()
    assert (encoded(ours).table() - other(torch.arange(N)[None])[0]).abs().max() <= 1e-12
    want = theirs(TEXT, attention_mask=torch.ones_like(TEXT)).logits[:, N:]
    got = ours(torch.nn.functional.pad(TEXT, (N, 0)))[:, N:]
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    for logits in (want, got):
        logits.square().sum().backward()
    assert all((own[name].grad - p.grad).abs().max() <= 1e-8 * p.grad.abs().max() for name, p in pairs.items())


@torch.no_grad()
def test_a_template_of_vectors_and_words_is_the_text_that_they_stand_for(tiny_folder) -> None:
    tokenizer = Tokenizer.load(tiny_folder)
    method = PTuning(before=(2, "ab", 1), after=("to JSON:", 1), encoder=None)
    method.read(tokenizer)
    ours, base = (build(tiny_folder, torch.bfloat16, one).eval() for one in (method, None))
    assert ours.frame == (5, 9)
    encoded(ours).vectors.copy_(base.embed(torch.tensor([7, 99, 250, 31])))
    before = [7, 99, *tokenizer.encode("ab"), 250]
    after = [*tokenizer.encode("to JSON:"), 31]
    real = torch.tensor([[*before, *row[:6], *after, *row[6:]] for row in TEXT.tolist()])
    assert torch.equal(asked(ours, TEXT, 6), base(real))


@torch.no_grad()
def test_a_template_of_vectors_alone_is_prompt_tuning_with_what_the_network_computes(tiny_folder) -> None:
    ours = build(tiny_folder, torch.float32, PTuning(before=(2, 3), after=(), encoder="lstm", hidden=HIDDEN)).eval()
    other = build(tiny_folder, torch.float32, Prompt(prompt_length=5)).eval()
    other.after_embed.deltas["prompt"].vectors.copy_(encoded(ours).table())
    assert torch.equal(asked(ours, TEXT, 6), asked(other, TEXT, 6))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_result_holds_the_vectors_and_not_the_network_and_answers_with_the_same_bits(
    tiny_folder, tmp_path: Path, encoder: str
) -> None:
    settings = {"before": '[2, "ab", 1]', "after": "[1]", "hidden": HIDDEN, "encoder": encoder}
    argv = [str(word) for key, value in settings.items() for word in (f"--method.{key}", value)]
    run = finetune(tiny_folder, tmp_path, *argv, "--train.lr", "1e-2", method="ptuning")
    final = load_file(run / "final" / "delta.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in final.items()} == {"after_embed.ptuning.vectors": (6, 64)}
    assert find_run(run).method() == PTuning(before=(5,), after=(1,), encoder=None, hidden=HIDDEN)
    method = PTuning(before=(2, "ab", 1), after=(1,), encoder=encoder, hidden=HIDDEN)
    method.read(Tokenizer.load(tiny_folder))
    trained = build(tiny_folder, torch.float32, method).eval()
    load_delta(trained, Checkpoints(run / "checkpoints").newest().tensors("delta"), "test")
    loaded = load_model(str(run), precision="32-true").model
    with torch.no_grad():
        assert torch.equal(encoded(loaded).table(), encoded(trained).table())
        want, got = asked(trained, TEXT, 6), asked(loaded, TEXT, 6)
    assert (want - got).abs().max() <= 5e-6 * want.abs().max()  # the loaded blocks are packed


def test_words_stay_as_they_are_and_do_not_train(tiny_folder, tmp_path: Path) -> None:
    run = finetune(tiny_folder, tmp_path, "--method.before", '["ab", 2]', "--train.lr", "1e-2", method="ptuning")
    ids = Tokenizer.load(tiny_folder).encode("ab")
    want = build(tiny_folder, torch.float32).embed.weight[ids]
    assert torch.equal(load_file(run / "final" / "delta.safetensors")["after_embed.ptuning.vectors"][:2], want)
    saved = Checkpoints(run / "checkpoints").newest().tensors("delta")
    assert torch.equal(saved["after_embed.ptuning.words"], want)
    method = PTuning(before=("ab", 2))
    method.read(Tokenizer.load(tiny_folder))
    assert "after_embed.ptuning.words" not in trainable(build(tiny_folder, torch.float32, method))


@pytest.mark.parametrize(
    "settings",
    [{"before": (), "after": ()}, {"before": ("a",), "after": ()}, {"before": (0,)}, {"hidden": 0}, {"encoder": "x"}],
)
def test_impossible_values_are_refused_by_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}"):
        PTuning(**settings)
