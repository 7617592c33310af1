"""GLoRA against its formula and against peft: every path, merged and not; and the search."""

import itertools
from random import Random

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, finetune, folded, in_float64, make_folder
from peft import GloraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from litpeft.core.errors import UserError
from litpeft.exchange.run import find_run
from litpeft.methods.combo import Combo
from litpeft.methods.evolution import evolve
from litpeft.methods.glora import TERMS, Generalized, GLoRA
from litpeft.model.build import build
from litpeft.model.delta import deltas_of, trainable
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.model.slots import Linear

IDS = torch.randint(0, TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))
PATHS = list(itertools.product(*TERMS.values()))
LOW_RANK = {"A": ("low_rank",), "B": ("low_rank",), "C": ("low_rank",), "D": ("vector",), "E": ("vector",)}


def layer(inputs: int = 6, outputs: int = 5, rank: int = 2) -> Linear:
    """Returns a layer with a bias and a GLoRA, in float64, whose tensors are random but for what starts at zero."""
    torch.manual_seed(0)
    linear = Linear(inputs, outputs, bias=True).double().requires_grad_(False)
    delta = Generalized(linear, rank, dict(TERMS)).double()
    delta.reset_parameters()
    linear.slot.add("glora", delta)
    return linear


def by_formula(linear: Linear, path: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weight and the bias of a path: the bias from the weight of before."""
    delta, weight, bias = linear.slot.glora, linear.weight, linear.bias

    def term(name: str, form: str) -> torch.Tensor:
        d = getattr(delta, f"{name}d")
        first = d[:, :1] if d.ndim == 2 else d
        forms = {"vector": lambda: first, "scalar": lambda: first.flatten()[0], "none": lambda: torch.zeros(())}
        return forms.get(form, lambda: d @ getattr(delta, f"{name}u"))()

    a, b, c, d, e = (term(name, form) for name, form in zip(TERMS, path, strict=True))
    shift = (weight @ c)[:, 0] if c.ndim else 0.0
    return weight + weight * a + b, bias + bias * d + e + shift


def test_all_432_paths_are_the_formula_and_merge_exactly_and_start_at_nothing() -> None:
    linear, x = layer(), torch.randn(4, 6, dtype=torch.float64)
    assert len(PATHS) == 432
    with torch.no_grad():
        for path in PATHS:
            linear.slot.glora.take(path)
            assert torch.equal(linear(x), linear.base(x))
        for name, parameter in linear.slot.glora.named_parameters():
            torch.nn.init.normal_(parameter)
        for path in PATHS:
            linear.slot.glora.take(path)
            weight, bias = by_formula(linear, path)
            want = F.linear(x, weight, bias)
            assert (linear(x) - want).abs().max() <= 1e-12 * want.abs().max()
            merged = linear.slot.frozen(linear).fold(linear.weight.clone(), linear.bias)
            assert torch.allclose(merged[0], weight, rtol=1e-12, atol=1e-12)
            assert torch.allclose(merged[1], bias, rtol=1e-12, atol=1e-12)


def test_a_bias_from_the_weight_of_after_is_another_one() -> None:
    linear = layer()
    for parameter in linear.slot.glora.parameters():
        torch.nn.init.normal_(parameter)
    left, right = linear.slot.glora.factors_of("C")
    weight, bias = linear.slot.frozen(linear).fold(linear.weight.clone(), linear.bias)
    d, e = linear.slot.glora.vector("D"), linear.slot.glora.vector("E")
    wrong = linear.bias + linear.bias * d + e + (weight @ left @ right)[:, 0]
    assert (wrong - bias).abs().max() > 0.1


@pytest.mark.parametrize("biases", [False, True])
def test_logits_and_gradients_equal_peft(biases: bool, tmp_path) -> None:
    """peft leaves C, D and E out where the base has no bias: there only A and B are compared."""
    folder = make_folder(tmp_path / "model", attention_bias=biases, mlp_bias=biases)
    theirs = in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    for name, parameter in theirs.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(folder)
    forms = LOW_RANK if biases else LOW_RANK | dict.fromkeys("CDE", ("none",))
    ours, names = build(folder, torch.float64, GLoRA(rank=3, forms=forms)), NameMap(*read_config(folder))
    config = GloraConfig(r=3, target_modules="all-linear", config_D_E="vector", task_type="CAUSAL_LM")
    theirs, pairs = get_peft_model(theirs, config, autocast_adapter_dtype=False).double().eval(), []
    for name, delta in ours.named_modules():
        if isinstance(delta, Generalized):
            linear = names.file_name(f"{name.removesuffix('.slot.glora')}.weight").removesuffix(".weight")
            other = theirs.get_submodule(f"base_model.model.{linear}")
            for key, own in delta.named_parameters():
                path = getattr(other, f"glora_{key[0]}")["default"]
                pairs.append((own, getattr(path, {"d": "Xd", "u": "Xu"}[key[1]] if key[0] in "ABC" else "X")))
                torch.nn.init.normal_(own, std=0.1)
                pairs[-1][1].data.copy_(own.data)
    assert len(pairs) == 14 * (8 if biases else 4)
    want, got = theirs(IDS).logits, ours(IDS)
    assert (want - got).abs().max() <= 1e-10 * want.abs().max()
    for logits in (want, got):
        logits.square().sum().backward()
    assert all(torch.allclose(own.grad, other.grad, rtol=1e-8, atol=1e-9) for own, other in pairs)


def test_what_a_path_counts_is_what_it_needs() -> None:
    delta = layer().slot.glora
    for path in PATHS:
        delta.take(path)
        used = sum({"low_rank": (n[0] + n[-1]) * 2, "vector": n[0], "scalar": 1, "none": 0}[form]
                   for n, form in zip(((5, 6), (5, 6), (6, 1), (5,), (5,)), path, strict=True))  # fmt: skip
        assert delta.count(path) == used
    assert delta.count(("low_rank", "low_rank", "low_rank", "vector", "vector")) == sum(
        p.numel() for p in delta.parameters()
    )


def test_a_search_finds_the_least_loss_within_its_limit_and_again_the_same() -> None:
    choices = [("a", "b", "c")] * 12
    loss = lambda genes: sum((gene != "b") * (at + 1) for at, gene in enumerate(genes))  # noqa: E731
    fits = lambda genes: sum(gene != "c" for gene in genes) <= 5  # noqa: E731
    found = [evolve(choices, loss, fits, 20, 15, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert all(fits(genes) for genes in found[0])
    best = min(found[0], key=found[0].__getitem__)
    start = min(list(found[0].values())[:20])
    assert found[0][best] < start
    assert found[0][best] <= sum(range(1, 8)) + 6  # at best the five dearest genes are b


def test_each_step_trains_a_path_of_its_own_and_between_steps_the_largest_acts(tiny_folder) -> None:
    method = GLoRA(rank=2)
    model = build(tiny_folder, torch.float32, method)
    deltas, seen = deltas_of(model, Generalized), []
    for step in (1, 2, 1):
        with method.training_step(model, Random(step)):
            seen.append(torch.stack([delta.path for delta in deltas]))
        assert (seen[-1].sum(2) == 1).all()
        assert all(delta.path[:3, 0].all() for delta in deltas)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert len({tuple(path.flatten().tolist()) for path in seen[0]}) > 1


def test_a_run_saves_the_path_that_its_search_found(tiny_folder, tmp_path, capsys) -> None:
    words = "--method.limit", "9000", "--method.rank", "2", "--method.population", "4", "--train.lr", "1e-2"
    run = finetune(tiny_folder, tmp_path, *words, method="glora")
    assert "is the least loss on the held-out rows of" in capsys.readouterr().err
    saved = load_file(run / "final" / "delta.safetensors")
    model = build(tiny_folder, torch.float32, find_run(run).method())
    count = 0
    for name, delta in model.named_modules():
        if isinstance(delta, Generalized):
            path = saved[f"{name}.path"]
            assert (path.sum(1) == 1).all()
            forms = [("low_rank", "vector", "scalar", "none")[int(row.argmax())] for row in path]
            count += delta.count(tuple(forms))
    assert 0 < count <= 9000


def test_steps_after_the_search_train_the_path_that_it_found_alone(tiny_folder, tmp_path) -> None:
    words = "--method.rank", "2", "--method.population", "4", "--train.lr", "1e-2"
    saves = "--checkpoint.interval", "1", "--checkpoint.keep_last", "9"
    run = finetune(tiny_folder, tmp_path, *words, *saves, "--method.search_after", "0.5", method="glora")
    states = [load_file(file) for file in sorted(run.glob("checkpoints/*/delta.safetensors"))]
    assert len(states) == 4
    for name in [name for name in states[0] if name.endswith(".path")]:
        assert [float(state[name.replace(".path", ".chosen")]) for state in states] == [0, 0, 1, 1]
        assert all(torch.equal(state[name], states[0][name]) for state in states[:2])
        assert all(torch.equal(state[name], states[3][name]) for state in states[2:])
    final = load_file(run / "final" / "delta.safetensors")
    assert not [name for name in final if name.endswith(".chosen")]
    assert all(torch.equal(final[name], states[3][name]) for name in final)


def test_a_search_wants_held_out_rows_and_a_single_path_none(tiny_folder, tmp_path) -> None:
    words = "--data.path", str(tmp_path / "rows.jsonl"), "--data.validation_split", "0"
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Colour of coal?", "output": "black"}\n' * 6)
    with pytest.raises(SystemExit):
        finetune(tiny_folder, tmp_path, *words, method="glora")
    assert not GLoRA(forms=LOW_RANK).searches
    assert GLoRA().searches


def test_a_merged_layer_has_a_bias_that_it_had_not(tiny_folder) -> None:
    model = build(tiny_folder, torch.float64, GLoRA(rank=2))
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        state = folded(model)
    assert "blocks.0.attn.q.bias" in state
    config: dict = {}
    GLoRA().configure(config)
    assert config == {"attention_bias": True, "mlp_bias": True}
    GLoRA(forms=dict.fromkeys("CE", ("none",))).configure(none := {})
    assert none == {}


def test_dora_and_glora_on_one_weight_are_refused(tiny_folder) -> None:
    with pytest.raises(UserError, match="want the same place"):
        build(tiny_folder, torch.float32, Combo({"dora": {}, "glora": {}}))


@pytest.mark.parametrize(
    "settings",
    [{"rank": 0}, {"forms": {"F": ("low_rank",)}}, {"forms": {"D": ("low_rank",)}}, {"forms": {"A": ()}},
     {"population": 1}, {"generations": 0}, {"limit": -1}, {"seed": -1},
     {"search_after": 0.0}, {"search_after": 1.1}],
)  # fmt: skip
def test_impossible_values_are_refused_by_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(settings))}"):
        GLoRA(**settings)


def test_a_limit_below_the_smallest_path_is_refused(tiny_folder) -> None:
    forms = {"B": ("low_rank", "vector")}
    with pytest.raises(UserError, match="are fewer than the"):
        build(tiny_folder, torch.float32, GLoRA(forms=forms, limit=5))
