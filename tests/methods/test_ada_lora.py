"""AdaLoRA against peft: the same triples learn the same, and the same ones are set to zero; and its budget."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, finetune, in_float64
from lightning.fabric import Fabric
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from litpeft.data.batches import collate
from litpeft.data.rows import Row
from litpeft.methods.ada_lora import AdaLoRA, Triples, budget_at
from litpeft.model.build import build
from litpeft.model.delta import delta_state, trainable, training_state
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.train.step import Stepper

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 20


def entropy(logits: torch.Tensor, labels: torch.Tensor, **_: object) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def pair(folder):
    """Returns our model and peft's, in float64, with the same triples, and ours and theirs (A, E, B) of each layer."""
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    theirs.loss_function = entropy  # transformers' own is computed in float32
    schedule = {"init_r": 6, "target_r": 3, "tinit": 4, "tfinal": 6, "deltaT": 2, "total_step": STEPS}
    config = AdaLoraConfig(target_modules=ALL, lora_alpha=9, orth_reg_weight=0.3, task_type="CAUSAL_LM", **schedule)
    theirs = get_peft_model(theirs, config, autocast_adapter_dtype=False).double().train()
    settings = {"rank": 6, "final_rank": 3, "begin": 0.2, "end": 0.3, "interval": 2, "orthogonality": 0.3}
    method = AdaLoRA(alpha=9 * 6 / (6 + 1e-5), **settings)  # peft divides by the rank and a little
    ours, names, tensors = build(folder, torch.float64, method), NameMap(*read_config(folder)), {}
    for name, delta in ours.named_modules():
        if isinstance(delta, Triples):
            linear = names.file_name(f"{name.removesuffix('.slot.ada_lora')}.weight").removesuffix(".weight")
            layer = theirs.get_submodule(f"base_model.model.{linear}")
            layer.ranknum["default"].requires_grad_(False)  # get_peft_model has it train
            others = [getattr(layer, f"lora_{key}")["default"] for key in "AEB"]
            for own, other in zip((delta.A, delta.E, delta.B), others, strict=True):
                other.data.copy_(own.data.view_as(other))
            tensors[name] = (delta.A, delta.E, delta.B), others
    return method, ours, theirs, tensors


def test_every_step_learns_and_keeps_what_it_does_in_peft(tiny_folder) -> None:
    method, ours, theirs, tensors = pair(tiny_folder)
    assert len(tensors) == 14
    optimizers = [torch.optim.AdamW(m.values(), lr=1e-2) for m in (trainable(ours), trainable(theirs))]
    ids = torch.randint(0, TINY["vocab_size"], (STEPS, 2, 24), generator=torch.Generator().manual_seed(3))
    kept = []
    for step in range(1, STEPS + 1):
        loss = entropy(ours(ids[step - 1]), ids[step - 1]) + method.penalty(ours)
        wanted = theirs(ids[step - 1], labels=ids[step - 1]).loss
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
        for value, optimizer in ((loss, optimizers[0]), (wanted, optimizers[1])):
            value.backward()
            optimizer.step()
        method.after_step(ours, step, STEPS)
        theirs.base_model.update_and_allocate(step)
        for own, other in tensors.values():
            for a, b in zip(own, other, strict=True):
                assert torch.allclose(a, b.view_as(a), rtol=1e-6, atol=1e-9)
            assert torch.equal(own[1] == 0, other[1].flatten() == 0)
        for optimizer in optimizers:
            optimizer.zero_grad()
        kept.append(sum(int((own[1] != 0).sum()) for own, _ in tensors.values()))
    assert kept[3] == kept[4] == 84
    assert kept[5] == budget_at(6, STEPS, 84, 42, 4, 6) == 63
    assert kept[13:] == [42] * 7
    assert len(Counter(int((own[1] != 0).sum()) for own, _ in tensors.values())) > 1  # ranks differ between layers


def test_the_budget_falls_with_the_cube_of_what_is_left() -> None:
    steps = (0, 10, 20, 45, 80, 81, 100)
    assert [budget_at(step, 100, 768, 512, 10, 20) for step in steps] == [768, 768, 673, 544, 512, 512, 512]


@pytest.mark.parametrize("micro", [1, 3])
def test_the_penalty_counts_once_however_the_rows_of_a_step_are_spread(tiny_folder, micro: int) -> None:
    method = AdaLoRA(rank=4, final_rank=2)
    model = build(tiny_folder, torch.float64, method)
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(trainable(model).values(), lr=0.0))
    ids = torch.randint(2, 300, (3, 12), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Row(row, [False] * 4 + [True] * 8, 4, str(number), []) for number, row in enumerate(ids)]
    batches = [collate(rows)] if micro == 1 else [collate([row]) for row in rows]
    found = Stepper(fabric, wrapped, optimizer, method=method, steps=9).gradient(batches, 24, 1)
    got = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    losses = [F.cross_entropy(model(torch.tensor([row]))[0, 3:-1], torch.tensor(row[4:])) for row in ids]
    assert found.loss == pytest.approx(sum(losses).item() / 3)  # the penalty is not told
    deltas = [module for module in model.modules() if isinstance(module, Triples)]
    one = torch.eye(4, dtype=torch.float64)
    norms = [((m @ m.T) - one).norm() for d in deltas for m in (d.A, d.B.T)]
    (sum(losses) / 3 + 0.5 * sum(norms) / len(norms)).backward()
    assert all(torch.allclose(got[name], p.grad, rtol=1e-8, atol=1e-12) for name, p in trainable(model).items())


def test_a_run_ends_with_the_final_ranks_and_saves_triples_alone(tiny_folder, tmp_path) -> None:
    words = "--method.rank", "6", "--method.final_rank", "2", "--train.epochs", "6"
    saved = load_file(finetune(tiny_folder, tmp_path, *words, method="ada_lora") / "final" / "delta.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"A", "E", "B"}
    assert sum(int((tensor != 0).sum()) for name, tensor in saved.items() if name.endswith(".E")) == 2 * 14


def test_nothing_is_taken_away_where_nothing_is_known(tiny_folder) -> None:
    method = AdaLoRA(rank=4, final_rank=1)
    model = build(tiny_folder, torch.float32, method)
    for parameter in trainable(model).values():
        parameter.data.normal_()
    before = {name: tensor.clone() for name, tensor in delta_state(model).items()}
    method.after_step(model, 1, 1)  # the only step of a run: it has no gradient of an earlier one
    assert all(torch.equal(tensor, before[name]) for name, tensor in delta_state(model).items())
    assert not any(tensor.any() for tensor in training_state(model).values())


def test_only_the_values_have_a_gradient_at_the_start(tiny_folder) -> None:
    model = build(tiny_folder, torch.float32, AdaLoRA())
    model(torch.arange(20)[None]).square().sum().backward()
    assert all(parameter.grad.any() == (name[-1] == "E") for name, parameter in trainable(model).items())
    stds = [float(delta.A.std()) for delta in model.modules() if isinstance(delta, Triples)]
    assert all(abs(std / 0.02 - 1) < 0.15 for std in stds)


@pytest.mark.parametrize(
    "settings",
    [{"final_rank": 13}, {"final_rank": 0}, {"begin": 0.5, "end": 0.5}, {"begin": -0.1}, {"interval": 0},
     {"orthogonality": -1.0}, {"rank": 0}, {"alpha": 0.0}],
)  # fmt: skip
def test_impossible_values_are_refused_by_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}"):
        AdaLoRA(**settings)
