"""Full finetuning against transformers: the same optimizer steps on the same batch."""

import pytest
import torch
from conftest import TINY, folded, in_float64, make_folder
from transformers import AutoConfig, AutoModelForCausalLM

from litpeft.core.errors import ConfigError
from litpeft.methods.full import Full
from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.config import ModelConfig
from litpeft.model.delta import attach, delta_state, load_delta, trainable, without_delta
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.model.gpt import GPT

IDS = torch.randint(0, TINY["vocab_size"], (1, 32), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("tied", [False, True])
def test_three_steps_equal_those_of_transformers(tied: bool, tmp_path) -> None:
    folder = make_folder(tmp_path / "model", tie_word_embeddings=tied)
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    ours, losses = build(folder, torch.float64, Full()), []
    optimizers = [
        torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
        for parameters in (trainable(ours).values(), theirs.parameters())
    ]
    for _ in range(3):
        own = ours(IDS, at=torch.arange(31), targets=IDS[0, 1:]) / 31
        other = torch.nn.functional.cross_entropy(theirs(IDS).logits[0, :-1], IDS[0, 1:])
        for loss, optimizer in zip((own, other), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append((own.item(), other.item()))
    assert losses[2][0] < losses[0][0]
    assert all(abs(a - b) <= 1e-10 * b for a, b in losses)
    names = NameMap(*read_config(folder))
    for name, own in trainable(ours).items():
        want = theirs.get_parameter(names.file_name(name))
        assert (own - want).abs().max() <= 1e-10 * want.abs().max(), name


@pytest.mark.parametrize("tied", [False, True])
def test_it_trains_every_parameter_and_a_shared_one_once(tied: bool, tmp_path) -> None:
    folder = make_folder(tmp_path / "model", tie_word_embeddings=tied)
    with torch.device("meta"):
        model = GPT(read_config(folder)[1])
        attach(model, Full())
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert sum(p.numel() for p in trainable(model).values()) == theirs.num_parameters()
    assert model.delta_keys == model.base_keys == set(trainable(model))


SMOLLM2_135M = ModelConfig(
    vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536, max_positions=8192,
    tie_embeddings=True,
)  # fmt: skip


def test_it_trains_the_134_515_008_parameters_of_smollm2_135m() -> None:
    with torch.device("meta"):
        model = GPT(SMOLLM2_135M)
        attach(model, Full())
    assert sum(p.numel() for p in trainable(model).values()) == 134_515_008


def test_globs_say_what_trains_and_what_is_saved(tiny_folder) -> None:
    model = build(tiny_folder, torch.bfloat16, Full(unfreeze=("blocks.1.*", "norm.weight")))
    assert set(trainable(model)) == {name for name in model.base_keys if name.startswith(("blocks.1.", "norm."))}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert set(delta_state(model)) == set(trainable(model))


def test_a_glob_that_matches_nothing_is_an_error(tiny_folder) -> None:
    with pytest.raises(ConfigError, match=r'"\*.atn.\*" matches no parameter; the model has .*\*.q.weight'):
        build(tiny_folder, torch.float32, Full(unfreeze=("*.atn.*",)))


def test_the_fold_is_what_was_learned_and_switched_off_it_is_the_base(tiny_folder) -> None:
    state = {name: tensor + 0.01 for name, tensor in build(tiny_folder, torch.float32, Full()).state_dict().items()}
    model, base = build(tiny_folder, torch.float32, Full()), build(tiny_folder, torch.float32)
    load_delta(model, state, "test")
    plain = folded(model)
    assert plain.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.items())
    with without_delta(model):
        assert torch.equal(model(IDS), base(IDS))
    assert not torch.equal(model(IDS), base(IDS))


@pytest.mark.parametrize(
    ("method", "base", "trained"),
    [
        (Full(), torch.bfloat16, torch.float32),
        (Full(), torch.float64, torch.float64),
        (Full(master_weights=False), torch.bfloat16, torch.bfloat16),
        (Full(master_weights=False), torch.float32, torch.float32),
        (LoRA(), torch.bfloat16, torch.float32),
        (LoRA(), torch.float16, torch.float32),
    ],
)
def test_what_trains_is_float32_or_better_unless_full_is_told_otherwise(method, base, trained) -> None:
    assert method.trained_dtype(base) == trained


@pytest.mark.parametrize("master_weights", [True, False])
def test_only_master_weights_keep_a_step_that_is_smaller_than_the_rounding(tiny_folder, master_weights: bool) -> None:
    model = build(tiny_folder, torch.bfloat16, Full(master_weights=master_weights))
    weight = model.blocks[0].norm1.weight  # ones, to which bfloat16 can add 1/128 and not less
    assert weight.dtype == (torch.float32 if master_weights else torch.bfloat16)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(IDS, at=torch.arange(31), targets=IDS[0, 1:])
        (loss * (1e-3 / torch.autograd.grad(loss, weight, retain_graph=True)[0].abs().max())).backward()
        optimizer.step()
    assert bool((weight != 1).any()) == master_weights
