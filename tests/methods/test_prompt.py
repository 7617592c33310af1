"""Prompt tuning against transformers' model with the vectors before its embeddings, and against peft."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, finetune, in_float64
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config

from litpeft.core.errors import UserError
from litpeft.data.batches import collate
from litpeft.data.rows import Row
from litpeft.data.tokenizer import Tokenizer
from litpeft.generate.cache import TokenCache
from litpeft.generate.engine import answer_budget
from litpeft.generate.settings import Sampling
from litpeft.methods.prompt import Prompt
from litpeft.model.build import build
from litpeft.model.delta import without_delta
from litpeft.model.gpt import GPT
from litpeft.model.objective import mean_loss, summed_loss

N = 3  # virtual tokens
TEXT = torch.randint(0, TINY["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))


def before(ids: torch.Tensor) -> torch.Tensor:
    """Returns ids (B, T) with placeholders before them."""
    return F.pad(ids, (N, 0))


def learnt(folder, dtype: torch.dtype = torch.float64) -> GPT:
    torch.manual_seed(1)
    model = build(folder, dtype, Prompt(prompt_length=N, init="random")).eval()
    nn.init.normal_(vectors(model), std=0.5)
    return model


def vectors(model: GPT) -> nn.Parameter:
    return model.after_embed.deltas["prompt"].vectors


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tiny_folder, tmp_path_factory):
    if request.param == "llama":
        return tiny_folder
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(made)
    return made


def test_logits_and_gradients_equal_vectors_before_transformers_embeddings(folder) -> None:
    ours = learnt(folder)
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)).eval()
    prompt = vectors(ours).detach().clone().requires_grad_()
    embedded = torch.cat((prompt.expand(2, -1, -1), theirs.get_input_embeddings()(TEXT)), 1)
    want, got = theirs(inputs_embeds=embedded).logits[:, N:], ours(before(TEXT))[:, N:]
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    for logits in (want, got):
        logits.square().sum().backward()
    assert (vectors(ours).grad - prompt.grad).abs().max() <= 1e-10 * prompt.grad.abs().max()


def test_logits_and_gradients_equal_peft(tiny_folder) -> None:
    ours = learnt(tiny_folder)
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64))
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
    theirs = get_peft_model(theirs, config, autocast_adapter_dtype=False).eval()
    other = theirs.prompt_encoder["default"].embedding.weight
    other.data = vectors(ours).detach().clone()
    want, got = theirs(TEXT, attention_mask=torch.ones_like(TEXT)).logits[:, N:], ours(before(TEXT))[:, N:]
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    for logits in (want, got):
        logits.square().sum().backward()
    assert torch.allclose(vectors(ours).grad, other.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_of_real_tokens_are_those_tokens_bit_for_bit(folder, dtype: torch.dtype) -> None:
    ours, base = learnt(folder, dtype), build(folder, dtype)
    ids = torch.tensor([[7, 99, 250]])
    vectors(ours).data = base.embed(ids[0]).detach().float()
    assert torch.equal(ours(before(TEXT)), base(torch.cat((ids.expand(2, -1), TEXT), 1)))
    with without_delta(ours):
        assert ours.virtual_tokens == 0
        assert torch.equal(ours(TEXT), base(TEXT))


SIZES = (9, 1), (20, 5), (2, 1), (14, 13)  # tokens of rows, and of their prompts
ROWS = [Row(TEXT[0, :n].tolist(), [False] * p + [True] * (n - p), p, "here", []) for n, p in SIZES]


def test_the_loss_of_packed_rows_is_that_of_each_alone_behind_the_vectors(folder) -> None:
    ours = learnt(folder)
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)).eval()
    want = 0.0
    for row in ROWS:
        ids = torch.tensor([row.ids])
        embedded = torch.cat((vectors(ours)[None], theirs.get_input_embeddings()(ids)), 1)
        labels = torch.where(torch.tensor([row.trained]), ids, -100)
        logits = theirs(inputs_embeds=embedded).logits[0, N:]
        want += F.cross_entropy(logits[:-1], labels[0, 1:], ignore_index=-100, reduction="sum")
    batch = collate(ROWS, ours.virtual_tokens)
    assert batch.lengths == (9 + N, 20 + N, 2 + N, 14 + N)
    assert batch.prompt_lengths == (1 + N, 5 + N, 1 + N, 13 + N)
    got = summed_loss(ours, batch)
    assert abs(got - want) <= 1e-10 * want
    trained = sum(sum(row.trained) for row in ROWS)
    assert abs(mean_loss(ours, ROWS, 30, torch.device("cpu")) - want / trained) <= 1e-10 * want


@torch.no_grad()
def test_answers_from_the_cache_are_those_of_the_whole_text(folder) -> None:
    ours, rows = learnt(folder), [[5, 6, 7], TEXT[0].tolist(), [9]]
    cache = TokenCache(ours)
    for step, last in enumerate((1, 1, 4, 1)):  # 4: guessed tokens are checked
        got = cache.logits(rows, last)
        want = torch.cat([ours(before(torch.tensor([row])))[0, -last:] for row in rows])
        assert (got - want).abs().max() <= 1e-10 * want.abs().max()
        rows = [[*row, *range(30 + step, 34 + step)][: len(row) + (4 if step == 1 else 1)] for row in rows]
    cache.swap(0, 2)
    got, want = cache.logits(rows[2:]), ours(before(torch.tensor(rows[2:])))[0, -1:]
    assert (got - want).abs().max() <= 1e-10 * want.abs().max()


def test_a_text_may_be_as_long_as_the_positions_that_are_left(tiny_folder) -> None:
    model = learnt(tiny_folder)
    assert model.reach == 512 - N
    assert answer_budget(model, [1] * (511 - N), Sampling()) == 1
    with pytest.raises(UserError, match=f"the model reaches {512 - N}"):
        answer_budget(model, [1] * (512 - N), Sampling())


def test_it_starts_from_common_tokens_or_as_random_numbers(tiny_folder) -> None:
    torch.manual_seed(0)
    model = build(tiny_folder, torch.float32, Prompt(prompt_length=30))
    same = (vectors(model)[:, None] == model.embed.weight).all(-1)
    assert (same.sum(1) == 1).all()
    assert (same.sum(0) <= 1).all()
    model = build(tiny_folder, torch.float32, Prompt(prompt_length=500, init="random"))
    assert abs(float(vectors(model).detach().std()) - 12**-0.5) < 0.01
    assert vectors(model).detach().abs().max() <= 0.5


def test_it_starts_from_a_text_that_is_repeated(tiny_folder, tmp_path) -> None:
    words = "--method.init", "text", "--method.text", "blue sky", "--method.prompt_length", "11"
    run = finetune(tiny_folder, tmp_path, *words, "--train.lr", "1e-5", method="prompt")
    ids = Tokenizer.load(tiny_folder).encode("blue sky")
    want = build(tiny_folder, torch.float32).embed.weight[[*ids, *ids][:11]]
    assert torch.allclose(load_file(run / "final" / "delta.safetensors")["after_embed.prompt.vectors"], want, atol=1e-4)


@pytest.mark.parametrize("length", [11, 5])  # the text has eight tokens
def test_it_starts_from_a_text_as_peft_does(tiny_folder, length: int) -> None:
    method = Prompt(prompt_length=length, init="text", text="blue sky")
    method.read(Tokenizer.load(tiny_folder))
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=length,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="blue sky",
        tokenizer_name_or_path=str(tiny_folder),
    )
    want = get_peft_model(theirs, config).prompt_encoder["default"].embedding.weight
    assert torch.equal(vectors(build(tiny_folder, torch.float32, method)), want)


@pytest.mark.parametrize("settings", [{"prompt_length": 0}, {"init": "x"}, {"text": "a"}, {"init": "text"}])
def test_impossible_values_are_refused_by_key(settings: dict) -> None:
    key = "text" if "text" in (*settings, *settings.values()) else next(iter(settings))
    with pytest.raises(ValueError, match=f"method.{key}"):
        Prompt(**settings)
