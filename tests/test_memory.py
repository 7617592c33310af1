"""A lack of memory ends with 6 whichever library meets it, and a run tells what it needed and what would need less."""

import mmap
import multiprocessing
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folder, write_rows
from held import held
from safetensors.torch import load_file
from short_runs import assert_same, newest, poisoned, resume, told_and_run, train

import litpeft.generate.evaluate
import litpeft.generate.load
import litpeft.train.finetune
from litpeft.core.errors import ConfigError
from litpeft.core.memory import asked_for, memory_error, out_of_memory
from litpeft.core.precision import PRECISIONS
from litpeft.data.batches import collate
from litpeft.data.rows import Row
from litpeft.data.settings import Data
from litpeft.methods.full import Full
from litpeft.methods.lora import LoRA
from litpeft.model.build import build
from litpeft.model.delta import Method, trainable
from litpeft.model.objective import summed_loss
from litpeft.train.preparation import check_run
from litpeft.train.settings import Base, Finetune, Train
from litpeft.train.shortage import Shortage

HUGE = 1 << 50


def raised(action: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever the library has for it)
        action()
    return caught.value


def refused_by_another() -> None:
    try:
        torch.empty(HUGE)
    except RuntimeError as error:
        raise ConfigError(f"AdamW refuses: {error}", where="train.optimizer_args") from None


@pytest.mark.parametrize(
    ("action", "asked"),
    [
        (lambda: torch.empty(HUGE, dtype=torch.uint8), f" ({HUGE} bytes were asked for)"),
        (lambda: np.empty(HUGE, dtype=np.uint8), " (1.00 PiB were asked for)"),
        (lambda: mmap.mmap(-1, 1 << 46), ""),
        (lambda: bytearray(HUGE), ""),
        (refused_by_another, f" ({4 * HUGE} bytes were asked for)"),
    ],
    ids=["torch", "numpy", "mmap", "python", "told as another error"],
)
def test_what_libraries_raise_is_a_lack_of_memory_and_says_what_was_asked_for(action, asked: str) -> None:
    error = raised(action)
    assert out_of_memory(error)
    assert asked_for(error) == asked
    told = memory_error(error, "generate")
    assert told.exit_code == 6
    assert "lower batch_size" in told.hint


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("unable to mmap 8 bytes from file <model.safetensors>: Cannot allocate memory (12)"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (ImportError("libtorch.so: failed to map segment from shared object: Cannot allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (OSError(28, "No space left on device"), False),
        (ConfigError("there is no command 'out of memory'"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_lack_of_memory_is_told_from_other_errors(error: Exception, is_one: bool) -> None:
    assert out_of_memory(error) is is_one
    if "2.00 GiB" in str(error):
        assert asked_for(error) == " (2.00 GiB were asked for)"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_out_of_memory_keeps_its_checkpoint_and_says_what_it_held_and_what_helps(
    method: str, tiny_folder, tmp_path, monkeypatch, capsys
) -> None:
    whole, run = train(tiny_folder, tmp_path / "whole", method=method), tmp_path / "run"
    with monkeypatch.context() as patch:
        poisoned(patch, 8, lambda loss: torch.empty(HUGE))  # in step 3
        with pytest.raises(SystemExit) as stop:
            train(tiny_folder, run, method=method)
    assert stop.value.code == 6
    said = capsys.readouterr().err
    assert f"out of memory ({4 * HUGE} bytes were asked for); about what the run needs: " in said
    for part in ("what trains", "its gradients", "the optimiser", "activations of 50 tokens a pass"):
        assert f"{part} " in said
    weights = sum(tensor.nbytes for tensor in load_file(tiny_folder / "model.safetensors").values())
    assert (f"needs: weights {weights / 1000:.1f} kB" in said) == (method == "lora")
    assert (f"needs: what trains {weights / 1000:.1f} kB" in said) == (method == "full")
    options = re.search(r"hint: try (.+); checkpoints", said)[1].split("; ")
    assert len(options) == 3
    assert all(re.fullmatch(r".+ \(about [\d.]+ [kM]B less\)", option) for option in options)
    assert newest(run).step == 2
    assert_same(resume(tiny_folder, run, method=method), whole)


def with_little_memory(argv: list[str], log: Path) -> None:
    """What a process of its own does: the command, which from the time when it builds its model gets no more memory."""

    def limited(*args, **kwargs):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        now = pages * resource.getpagesize() + (16 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (now, now))
        return build(*args, **kwargs)

    for module in (litpeft.generate.load, litpeft.train.finetune):
        module.build = limited
    told_and_run(argv, log)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to RLIMIT_AS")
@pytest.mark.parametrize("command", ["finetune lora", "evaluate"])
def test_a_process_that_gets_no_more_memory_ends_with_its_code(command: str, tmp_path) -> None:
    base = make_folder(tmp_path / "base", hidden_size=512, intermediate_size=2048, vocab_size=16000)  # 80 MB
    data, said = write_rows(tmp_path), tmp_path / "said"
    argv = ["evaluate", str(base), str(data / "validation.jsonl")]
    if command != "evaluate":
        argv = [*command.split(), "--base.dir", str(base), "--data.path", str(data), "--out", str(tmp_path / "run")]
    server = multiprocessing.get_context("forkserver")
    process = server.Process(target=with_little_memory, args=(argv, said))
    process.start()
    process.join()
    assert process.exitcode == 6, said.read_text()
    assert "litpeft: error: " in said.read_text()
    assert "out of memory" in said.read_text()
    assert "a bug of litpeft" not in said.read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", [LoRA(), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_bytes_that_are_told_are_those_that_a_model_holds(
    precision: str, recompute: str, method: Method, tmp_path
) -> None:
    base = make_folder(tmp_path / "base", hidden_size=256, intermediate_size=512, num_hidden_layers=6)
    settings = Finetune(Base(str(base)), Data("d"), "o", Train(activation_checkpointing=recompute, micro_tokens=512))
    _, shapes = check_run(settings, method, PRECISIONS[precision], torch.device("cpu"))
    told = Shortage(settings, method, shapes, PRECISIONS[precision], longest=128)
    model = build(base, PRECISIONS[precision].weights, method).train()
    model.recompute = recompute
    assert told.trained() == sum(p.nbytes for p in trainable(model).values())
    assert told.frozen() == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    optimizer = torch.optim.AdamW(trainable(model).values())
    assert told.tokens() == 512
    batch = collate([Row([5] * 128, [False] + [True] * 127, 1, "rows.jsonl:1", [])] * 4)
    found, logits = held(model, batch), 2 * 256 * model.config.vocab_size * 4
    if recompute == "block":  # beside what it holds, the backward pass needs all that one block keeps
        model.recompute = "none"
        found += held(model, batch) / 6
    assert told.activations(512) - logits == pytest.approx(found, rel=0.05)
    summed_loss(model, batch).backward()
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert moments == told.moments() * told.trained()


def test_it_offers_to_keep_less_on_a_gpu(tmp_path) -> None:
    base, kept = make_folder(tmp_path / "base", num_hidden_layers=6), {}
    for method in (LoRA(), LoRA(dropout=0.1)):
        settings = Finetune(Base(str(base)), Data("d"), "o", Train(micro_tokens=512))
        _, shapes = check_run(settings, method, PRECISIONS["bf16-true"], torch.device("cpu"))
        told = Shortage(settings, method, shapes, PRECISIONS["bf16-true"], longest=128, gpu=True)
        kept[method.dropout] = {mode: told.activations(512, mode) for mode in ("none", "cheap", "block", "offload")}
        offered = {"none": {"cheap", "block"}, "cheap": {"block"}, "block": {"offload"}, "offload": set()}
        for mode, others in offered.items():
            settings.train.activation_checkpointing = mode
            texts = {text: saved for text, saved in told.savings().items() if "checkpointing" in text}
            assert {text.split()[1] for text in texts} == others
            for text, saved in texts.items():
                assert saved == kept[method.dropout][mode] - kept[method.dropout][text.split()[1]]
    assert kept[0.0]["none"] == kept[0.0]["cheap"] > kept[0.0]["block"] > kept[0.0]["offload"]  # its blocks are fused
    assert kept[0.1]["none"] > kept[0.1]["cheap"] > kept[0.1]["block"] > kept[0.1]["offload"]
