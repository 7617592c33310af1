"""What only a GPU can show: its kernels, its types and its recorded steps against the same on the processor."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import document_mask, finetune, make_folder, method_of, read_metrics, storage_of, write_rows
from lightning.fabric import Fabric
from saved_runs import base_reads, save_run
from short_runs import assert_same, cut, delta, resume, same_tensors, train
from test_generate import assert_recorded_steps_agree

from litpeft.cli import main
from litpeft.data.batches import Batch, collate
from litpeft.data.rows import Row
from litpeft.generate.cache import TokenCache
from litpeft.generate.gpu.fused_block import FusedBlock, fuse_blocks
from litpeft.generate.load import load_model
from litpeft.generate.served import load_served
from litpeft.generate.settings import Serve
from litpeft.methods import METHODS
from litpeft.methods.lora import LoRA
from litpeft.model.attention import Documents, attend
from litpeft.model.build import build
from litpeft.model.delta import delta_state, load_delta, trainable
from litpeft.model.gpt import GPT
from litpeft.model.objective import summed_loss
from litpeft.model.quantize import STORAGES, Storage
from litpeft.model.quantize.codes import dequantize_in_torch, has_product, product_4bit
from litpeft.train.compiled import compile_blocks
from litpeft.train.fused_block import use_fused_step
from litpeft.train.micro_tokens import MOST, fitting_tokens
from litpeft.train.recorded_pass import RecordedPasses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32 numbers and rows of 128: sizes that every kernel for GPUs takes."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
    return make_folder(tmp_path_factory.mktemp("models") / "wide-llama", **sizes)


def rows(count: int) -> list[Row]:
    torch.manual_seed(0)
    lengths = [5 + 7 * n for n in range(count)]
    return [Row(torch.randint(2, 300, (n,)).tolist(), [i >= 3 for i in range(n)], 3, f"r:{n}", []) for n in lengths]


def made(
    folder: Path,
    dtype: torch.dtype,
    method: str,
    device: torch.device | str,
    storage: Storage | None = None,
    saved: dict[str, torch.Tensor] | None = None,
) -> GPT:
    """Returns a model with what a run has saved, or whose method draws the same start on every device."""
    torch.manual_seed(3)
    model = build(folder, dtype, method_of(method), device, storage, delta=saved)
    if saved is not None:
        load_delta(model, saved, "the CPU's")
    use_fused_step(model, torch.device(device))
    return model


def learned(model: GPT, device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
    """Returns the summed loss of some rows, and every gradient, on the CPU in float64."""
    model.train()
    torch.manual_seed(1)
    for parameter in trainable(model).values():  # what starts at zero would have no gradient behind it
        parameter.data += 0.02 * torch.randn(parameter.shape).to(parameter)
    loss = summed_loss(model, collate(rows(5)).to(device))
    loss.backward()
    return loss.item(), {name: p.grad.double().cpu() for name, p in trainable(model).items() if p.grad is not None}


def away(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Returns the largest relative difference of gradients by name."""
    assert some.keys() == others.keys()
    assert some
    return max(float((some[k] - others[k]).norm() / others[k].norm().clamp(min=1e-12)) for k in some)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("lengths", [(7, 40, 1, 130), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_of_documents(lengths: tuple[int, ...], window: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    documents, tokens = Documents(lengths), sum(lengths)
    given = [torch.randn(1, heads, tokens, 64, device=CUDA).to(dtype).requires_grad_() for heads in (6, 2, 2)]
    exact = [x.detach().double().requires_grad_() for x in given]
    mask = document_mask(lengths, window, CUDA)
    want = F.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True)
    got = attend(*given, mask=None, documents=documents, window=window)
    dy = torch.randn_like(want)
    gradients = torch.autograd.grad(got, given, dy.to(dtype)), torch.autograd.grad(want, exact, dy)
    limit = 2e-5 if dtype == torch.float32 else 2e-2
    for x, y in zip((got, *gradients[0]), (want, *gradients[1]), strict=True):
        assert (x.double() - y).norm() <= limit * (1 + y.norm())  # with a window of 1 a gradient is zero


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-6), (torch.float32, 1e-4), (torch.bfloat16, 6e-2)])
def test_every_method_learns_as_on_the_cpu(wide_folder: Path, name: str, dtype: torch.dtype, limit: float) -> None:
    # without double quantisation: the mean that it takes off may be summed in another order
    storage = None if storage_of(name) is None else Storage(storage_of(name).name, double_quantize=False)
    there = made(wide_folder, torch.float64, name, "cpu", storage)
    # singular parts and codes that are chosen in turn show no less than the rounding of float64 to be the same start
    saved = None if dtype == torch.float64 else {key: tensor.clone() for key, tensor in delta_state(there).items()}
    here = made(wide_folder, dtype, name, CUDA, storage, saved)
    (want, gradients), (loss, own) = learned(there, torch.device("cpu")), learned(here, CUDA)
    assert loss == pytest.approx(want, rel=limit)
    assert away(own, gradients) < limit


@pytest.mark.parametrize("method", [LoRA(), LoRA(dropout=0.2)], ids=["lora, fused blocks", "dropout"])
def test_what_is_kept_changes_nothing(wide_folder: Path, method: LoRA) -> None:
    model = build(wide_folder, torch.bfloat16, method, CUDA).train()
    use_fused_step(model, CUDA)
    for parameter in trainable(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape).to(parameter)
    batch, found = collate(rows(6)).to(CUDA), []
    for mode in ("none", "cheap", "block", "offload", "offload"):  # the second time the host memory is there
        model.recompute = mode
        model.zero_grad()
        torch.manual_seed(5)
        loss = summed_loss(model, batch)
        loss.backward()
        found.append((loss.item(), {name: p.grad.double().cpu() for name, p in trainable(model).items()}))
    for loss, own in found[1:]:
        assert loss == found[0][0]
        assert away(own, found[0][1]) < 1e-2  # kernels of attention add in an order that changes


def test_less_is_held_on_the_gpu_from_mode_to_mode(wide_folder: Path) -> None:
    model = build(wide_folder, torch.bfloat16, LoRA(dropout=0.2), CUDA).train()
    batch, held = collate([Row([5] * 512, [False] + [True] * 511, 1, "r", [])] * 8).to(CUDA), []
    for mode in ("none", "cheap", "block", "offload"):
        model.recompute = mode
        before = torch.cuda.memory_allocated()
        loss = summed_loss(model, batch)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        model.zero_grad()
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == 4


@pytest.mark.parametrize("recompute", ["none", "cheap", "block", "offload"])
def test_compiled_blocks_and_checkpointing(wide_folder: Path, recompute: str) -> None:
    want, gradients = learned(made(wide_folder, torch.float32, "lora", CUDA), CUDA)
    model = made(wide_folder, torch.float32, "lora", CUDA)
    model.recompute = recompute
    compile_blocks(model, CUDA)
    loss, own = learned(model, CUDA)
    assert loss == pytest.approx(want, rel=1e-4)
    assert away(own, gradients) < 1e-4


@pytest.mark.parametrize("name", STORAGES)
def test_a_packed_base_has_the_same_bytes_and_gradients(wide_folder: Path, name: str) -> None:
    models = [made(wide_folder, torch.float32, "lora", device, Storage(name)) for device in ("cpu", CUDA)]
    for layers in zip(*(model.modules() for model in models), strict=True):
        if hasattr(layers[0], "packed_names"):
            here, there = (layer.packed() for layer in layers)
            for key, tensor in here.items():
                gap = (tensor.double() - there[key].cpu().double()).abs().max()
                assert gap <= 1e-6 * tensor.double().abs().max(), key  # a mean may be summed in another order
    (want, gradients), (loss, own) = learned(models[0], torch.device("cpu")), learned(models[1], CUDA)
    assert loss == pytest.approx(want, rel=1e-4)
    assert away(own, gradients) < 1e-3


@pytest.mark.parametrize("tokens", [1, 3, 16, 200])
@pytest.mark.parametrize("double_quantize", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_products_with_four_bits(wide_folder: Path, name: str, double_quantize: bool, tokens: int) -> None:
    model = build(wide_folder, torch.bfloat16, device=CUDA, storage=Storage(name, double_quantize))
    layer = model.blocks[0].mlp.down
    x = torch.randn(1, tokens, layer.in_features, device=CUDA, dtype=torch.bfloat16)
    shape = [layer.out_features, layer.in_features]
    weight = dequantize_in_torch(layer.weight, layer.blocks(), shape, name, torch.float64)
    assert has_product(x)
    got = product_4bit(x, tuple(layer.packed().values()), layer.out_features, name, None)
    want = x.double() @ weight.T
    assert (got.double() - want).norm() <= 1e-2 * want.norm()
    with torch.no_grad():
        assert torch.equal(layer(x), got)


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_recorded_steps_write_what_the_others_write(wide_folder: Path, quantize: str | None) -> None:
    assert_recorded_steps_agree(load_model(str(wide_folder), precision="32-true", quantize=quantize).model, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_blocks_write_what_the_others_write(wide_folder: Path, dtype: torch.dtype) -> None:
    """Recorded steps of one new token and of guessed ones, beyond the cache's first length, against the modules'."""
    plain, fused = (build(wide_folder, dtype, device=CUDA).eval().requires_grad_(False) for _ in range(2))
    fuse_blocks(fused)
    assert all(type(block) is FusedBlock for block in fused.blocks)
    caches, rows = (TokenCache(fused), TokenCache(plain)), [list(range(5, 5 + n)) for n in (9, 30, 220)]
    caches[1].records, shapes = False, set()
    for number in range(52):
        new = 1 if number <= 40 else 4
        logits, want = (cache.logits(rows, new).double() for cache in caches)
        assert (logits - want).norm() <= 2e-2 * want.norm()
        two = want.topk(2).values
        clear = two[:, 0] - two[:, 1] > 2 * (logits - want).abs().max()
        assert torch.equal(logits.argmax(-1)[clear], want.argmax(-1)[clear])
        shapes |= {shape for shape, step in caches[0].recorded.items() if step is not None}
        if number == 40:
            rows = rows[2:]
            for cache in caches:
                cache.swap(0, 2)
        tokens = want[new - 1 :: new].argmax(-1).tolist()[-len(rows) :]
        rows = [row + [token] * (1 if number < 40 else 4) for row, token in zip(rows, tokens, strict=True)]
    assert shapes == {(3, 1), (1, 16)}


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_rows_of_several_runs_get_in_one_pass_what_each_gets_alone(
    wide_folder: Path, kind: str, tmp_path: Path
) -> None:
    reads, names = base_reads(wide_folder), ["lora", "dora", "ia3", "vera"]
    for name in names:
        save_run(tmp_path / name, name, kind, wide_folder, reads)
    first, *others = [str(tmp_path / name) for name in names]
    models, _ = load_served(Serve(first, also=tuple(others), precision="bf16-true"))
    cache, rows = TokenCache(models["lora"].batch.model), [list(range(5, 5 + n)) for n in (9, 30, 220, 4)]
    cache.adapters = [models[name].adapter for name in names]
    assert sorted(cache.adapters) == [1, 2, 3, 4]
    alone = [TokenCache(load_model(str(tmp_path / name), precision="bf16-true").model) for name in names]
    for step in range(4):
        got = cache.logits(rows).double()
        want = torch.cat([one.logits([row]) for one, row in zip(alone, rows, strict=True)]).double()
        assert ((got - want).norm(dim=1) <= 6e-2 * want.norm(dim=1)).all()
        rows = [[*row, 7 + step] for row in rows]
    assert any(step is not None for step in cache.recorded.values())


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recorded_passes_learn_what_the_others_learn(wide_folder: Path, dtype: torch.dtype, recompute: str) -> None:
    model = made(wide_folder, dtype, "lora", CUDA)
    model.recompute = recompute
    batches = [collate(rows(count)).to(CUDA) for count in (5, 3, 5, 7)]
    learned(model, CUDA)  # so that no factor is zero
    passes = RecordedPasses.of(model)
    assert passes is not None

    def gradients(step: Callable[[Batch], torch.Tensor]) -> tuple[list[float], dict[str, torch.Tensor]]:
        model.zero_grad()
        losses = [float(step(one)) for one in batches]
        return losses, {name: p.grad.double().cpu() for name, p in trainable(model).items()}

    def eagerly(one: Batch) -> torch.Tensor:
        loss = summed_loss(model, one)
        (loss * 0.1).backward()
        return loss.detach()

    losses, want = gradients(eagerly)
    for _ in range(3):
        again, got = gradients(lambda one: passes(one, 0.1))
        assert again == pytest.approx(losses, rel=1e-2)
        assert away(got, want) < 6e-2
    assert any(one.replay is not None for one in passes.sizes.values())


def test_other_models_are_not_recorded(wide_folder: Path) -> None:
    for dtype, method in ((torch.float32, "lora"), (torch.bfloat16, "adapter"), (torch.bfloat16, "full")):
        assert RecordedPasses.of(made(wide_folder, dtype, method, CUDA)) is None
    model = made(wide_folder, torch.bfloat16, "lora", CUDA)
    model.recompute = "offload"
    assert RecordedPasses.of(model) is None


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_small_model_takes_the_most_tokens(wide_folder: Path, name: str) -> None:
    fabric = Fabric(accelerator="cuda", devices=1, precision="32-true")
    model = made(wide_folder, torch.bfloat16, name, CUDA)
    wrapped = fabric.setup_module(model, move_to_device=False)
    assert fitting_tokens(wrapped, fabric) == MOST
    assert all(parameter.grad is None for parameter in model.parameters())


def assert_learns(run: Path) -> float:
    """Returns the loss at the run's end, which must be well below that at its start."""
    losses = [row["val_loss"] for row in read_metrics(run) if row["val_loss"] is not None]
    assert losses[-1] < 0.8 * losses[0]
    return losses[-1]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed", "32-true"])
def test_a_run_learns_in_every_precision_and_is_loaded_so(
    tiny_folder: Path, tmp_path: Path, capsys, precision: str
) -> None:
    run = finetune(tiny_folder, tmp_path, "--base.precision", precision, "--train.epochs", "60", "--train.lr", "2e-2")
    learned = assert_learns(run)
    assert "cuda" in (run / "report.md").read_text()
    assert load_model(str(run)).model.embed.weight.is_cuda
    capsys.readouterr()
    rows = str(tmp_path / "data" / "validation.jsonl")
    main(["evaluate", str(run), rows, "--precision", "32-true", "--max_new_tokens", "2"])
    base, loaded = re.search(r"loss, nats per token +([\d.]+) +([\d.]+)", capsys.readouterr().out).groups()
    assert float(loaded) == pytest.approx(learned, rel=2e-2)
    assert float(loaded) < float(base)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_killed_run_goes_on_bit_for_bit(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    whole = train(tiny_folder, tmp_path / "whole", {"base.precision": "bf16-true"}, method)
    again = cut(whole, 2, tmp_path / "again")
    resume(tiny_folder, again, {"base.precision": "bf16-true"}, method)
    assert_same(again, whole)


@pytest.mark.parametrize("name", STORAGES)
def test_a_kept_base_gives_the_same_run(tmp_path: Path, name: str) -> None:
    base = make_folder(tmp_path / "base")
    words = ("--base.quantize", name, "--base.cache", "true", "--base.precision", "bf16-true")
    runs = [finetune(base, tmp_path, *words, out=out, method="qlora") for out in "ab"]
    assert same_tensors(*(delta(run) for run in runs))


@pytest.mark.parametrize("optimizer", ["AdamW", "bitsandbytes.AdamW8bit", "bitsandbytes.PagedAdamW8bit"])
def test_a_run_learns_with_every_optimizer(tiny_folder: Path, tmp_path: Path, optimizer: str) -> None:
    words = ["--train.optimizer", optimizer, "--train.epochs", "20", "--train.lr", "1e-2"]
    assert_learns(finetune(tiny_folder, tmp_path, *words))


def test_fsdp_of_one_gpu_learns_what_the_gpu_learns_without_it(tiny_folder: Path, tmp_path: Path) -> None:
    base, data = ["--base.dir", str(tiny_folder)], ["--data.path", str(write_rows(tmp_path))]
    for name in ("fsdp", "auto"):
        words = ["--out", str(tmp_path / name), "--strategy", name, "--base.precision", "64-true", *base, *data]
        subprocess.run([sys.executable, "-m", "litpeft", "finetune", "lora", *words], check=True)
    learned, want = ({name: t.double() for name, t in delta(tmp_path / run).items()} for run in ("fsdp", "auto"))
    assert away(learned, want) < 1e-6
