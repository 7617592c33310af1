"""The state of an optimiser goes through files and comes back bit for bit, whatever it keeps and wherever."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor

from litpeft.core.errors import ModelError, UserError
from litpeft.core.safetensors import save_tensors
from litpeft.train.optim import make_optimizer
from litpeft.train.optimizer_state import load_optimizer, optimizer_tensors
from litpeft.train.settings import Train

SHAPES = {"a.weight": (70, 64), "b.weight": (3, 5)}  # the first is large enough for 8 bits, with a half-full last block
KINDS = [
    ("AdamW", {}),
    ("AdamW", {"fused": False}),
    ("Adam", {"amsgrad": True}),
    ("SGD", {"fused": False}),  # torch's fused SGD leaves bfloat16 parameters on the CPU as they are
    ("SGD", {"fused": False, "momentum": 0.9}),
    ("Adagrad", {}),
    ("Adadelta", {}),
    ("Adafactor", {}),
    ("Adamax", {}),
    ("ASGD", {}),
    ("Muon", {}),
    ("NAdam", {}),
    ("RAdam", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Rprop", {}),
    ("bitsandbytes.AdamW8bit", {}),
    ("bitsandbytes.PagedAdamW32bit", {}),
    ("bitsandbytes.PagedAdamW8bit", {}),
    ("bitsandbytes.AdEMAMix8bit", {}),
    ("bitsandbytes.AdEMAMix", {"t_alpha": 10, "t_beta3": 10}),
    ("bitsandbytes.Adagrad", {}),
    ("bitsandbytes.LAMB", {}),
    ("bitsandbytes.LARS", {"momentum": 0.9}),
    ("bitsandbytes.Lion8bit", {}),
    ("bitsandbytes.RMSprop8bit", {}),
    ("bitsandbytes.SGD8bit", {"momentum": 0.9}),
]


def start(kind: str, arguments: dict, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], object]:
    """Returns seeded parameters and the optimiser over them."""
    chance = torch.Generator().manual_seed(0)
    parameters = {n: torch.nn.Parameter(torch.randn(s, generator=chance).to(dtype)) for n, s in SHAPES.items()}
    train = Train(lr=0.01, optimizer=kind, optimizer_args=arguments)
    # finetune refuses the paged ones without a GPU, though they work there without their pages: that is tried here
    return parameters, make_optimizer(train, parameters, "cuda" if "Paged" in kind else "cpu")


def steps(parameters: dict[str, Tensor], optimizer: object, numbers: range) -> None:
    """Takes the steps of these numbers with a gradient that each of them seeds."""
    for number in numbers:
        chance = torch.Generator().manual_seed(number)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=chance).to(parameter.dtype)
        optimizer.step()


def through_files(folder: Path, tensors: dict[str, Tensor], values: dict) -> tuple[dict[str, Tensor], dict]:
    save_tensors(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(values))
    return load_file(folder / "optimizer.safetensors"), json.loads((folder / "state.json").read_text())


def copied(parameters: dict[str, Tensor], fresh: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            fresh[name].copy_(parameter)


def same(one: object, other: object) -> bool:
    """Returns whether two states are bit-equal, in types, devices and values."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Tensor):
        return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "arguments"), KINDS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_three_steps_saved_and_three_more_are_six(kind: str, arguments: dict, dtype: torch.dtype, tmp_path) -> None:
    names = list(SHAPES)
    want, whole = start(kind, arguments, dtype)
    steps(want, whole, range(6))
    before, first = start(kind, arguments, dtype)
    steps(before, first, range(3))
    after, second = start(kind, arguments, dtype)
    copied(before, after)
    load_optimizer(second, names, *through_files(tmp_path, *optimizer_tensors(first, names)))
    for one, other in zip(before.values(), after.values(), strict=True):
        assert same(first.state.get(one, {}), second.state.get(other, {}))
    assert all(torch.equal(one, before[name]) for name, one in after.items())  # the places were made beside them
    steps(after, second, range(3, 6))
    assert all(torch.equal(want[name], after[name]) for name in names)
    assert not torch.equal(want["a.weight"], before["a.weight"])


def test_every_optimizer_that_finetune_takes_is_among_the_kinds_or_a_width_of_one() -> None:
    import bitsandbytes.optim

    unfit = {"Optimizer", "LBFGS", "SparseAdam"}
    tried = {name.rpartition(".")[2] for name, _ in KINDS}
    assert {n for n, c in vars(torch.optim).items() if isinstance(c, type)} - unfit <= tried
    ours = {n for n, c in vars(bitsandbytes.optim).items() if isinstance(c, type)} - {
        "PytorchLARS",
        "GlobalOptimManager",
    }
    bare = {name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit") for name in tried}
    assert {name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit") for name in ours} <= bare


def test_a_wrapped_optimizer_and_several_groups_are_read_in_their_order(tmp_path) -> None:
    def build() -> tuple[list[Tensor], object]:
        parameters = [torch.nn.Parameter(torch.full((3,), float(n))) for n in range(3)]
        groups = [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.2}]
        optimizer = torch.optim.AdamW(groups)
        return parameters, Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)

    parameters, optimizer = build()
    for parameter in parameters[:2]:  # the third got no gradient: it has no state
        parameter.grad = parameter.detach() + 1
    optimizer.step()
    tensors, values = through_files(tmp_path, *optimizer_tensors(optimizer, ["x", "y", "z"]))
    assert values == {"x": {}, "y": {}, "z": None}
    assert set(tensors) == {f"{name}/{key}" for name in "xy" for key in ("step", "exp_avg", "exp_avg_sq")}
    assert torch.equal(tensors["y/exp_avg"], torch.full((3,), (1 - 0.9) * 2.0))
    fresh, second = build()
    load_optimizer(second, ["x", "y", "z"], tensors, values)
    assert same(second.optimizer.state[fresh[1]], optimizer.optimizer.state[parameters[1]])
    assert fresh[2] not in second.optimizer.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, v: t.pop("b.weight/exp_avg"), "b.weight/exp_avg is missing"),
        (lambda t, v: t.update({"b.weight/max": torch.ones(3)}), "b.weight/max does not belong to it"),
        (lambda t, v: t.update({"b.weight/exp_avg": torch.ones(5, 3)}), r"b.weight/exp_avg is \(5, 3\) float32, expec"),
        (lambda t, v: t.update({"a.weight/step": t["a.weight/step"].double()}), "float64, expected .* float32"),
        (lambda t, v: v.pop("b.weight"), "b.weight is missing"),
        (lambda t, v: v.update({"c.weight": None}), "c.weight is not among what is trained"),
        (lambda t, v: v["a.weight"].update(step=3), "a.weight/step is both a tensor and a plain value"),
        (lambda t, v: t.clear(), "a.weight/exp_avg is missing; .*; b.weight/exp_avg_sq is missing and 1 more"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(change, message: str) -> None:
    parameters, optimizer = start("AdamW", {})
    steps(parameters, optimizer, range(2))
    tensors, values = optimizer_tensors(optimizer, list(SHAPES))
    change(tensors, values)
    _, fresh = start("AdamW", {})
    with pytest.raises(ModelError, match=f"not of this optimizer over these parameters: .*{message}"):
        load_optimizer(fresh, list(SHAPES), tensors, values)
    assert not fresh.state


def test_the_state_of_another_optimizer_is_refused() -> None:
    parameters, optimizer = start("SGD", {"momentum": 0.9})
    steps(parameters, optimizer, range(1))
    saved = optimizer_tensors(optimizer, list(SHAPES))
    with pytest.raises(UserError, match="a.weight/momentum_buffer does not belong to it"):
        load_optimizer(start("AdamW", {})[1], list(SHAPES), *saved)


def sharded(rank: int, folder: Path, kind: str, arguments: dict) -> None:
    """Saves on two ranks that hold shares, loads on the same, and compares with six steps of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    split = lambda tensor: distribute_tensor(tensor.detach(), mesh, [Shard(0)])
    train = Train(lr=0.01, optimizer=kind, optimizer_args=arguments)

    def take(numbers: range, parameters: dict[str, Tensor], optimizer: object) -> None:
        for number in numbers:
            chance = torch.Generator().manual_seed(number)
            for parameter in parameters.values():
                parameter.grad = split(torch.randn(parameter.shape, generator=chance))
            optimizer.step()

    def build(values: dict[str, Tensor]) -> tuple[dict[str, Tensor], object]:
        parameters = {name: torch.nn.Parameter(split(value)) for name, value in values.items()}
        return parameters, make_optimizer(train, parameters)

    begin = {name: value.detach() for name, value in start(kind, arguments)[0].items()}
    want, whole_run = build(begin)
    take(range(6), want, whole_run)
    before, first = build(begin)
    take(range(3), before, first)
    saved = optimizer_tensors(first, list(SHAPES))
    assert not any(isinstance(tensor, DTensor) for tensor in saved[0].values())
    if rank == 0:
        alone, one = start(kind, arguments)
        steps(alone, one, range(3))
        for name, tensor in optimizer_tensors(one, list(SHAPES))[0].items():
            torch.testing.assert_close(saved[0][name], tensor, rtol=1e-5, atol=1e-7)
    after, second = build({name: value.full_tensor() for name, value in before.items()})
    load_optimizer(second, list(SHAPES), *saved)
    take(range(3, 6), after, second)
    assert all(torch.equal(want[name].to_local(), after[name].to_local()) for name in SHAPES)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("kind", "arguments"), [("AdamW", {}), ("Adagrad", {"fused": False})])
def test_shares_of_two_processes_are_saved_whole_and_shared_out_again(kind: str, arguments: dict, tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=sharded, args=(rank, tmp_path, kind, arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
