"""The parts of the benchmark that count: FLOPs and bytes from shapes, the same rows for every tool, the tables."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from peft import LoraConfig, get_peft_model
from tiny_gguf import digits, llama, write_gguf
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.bench import commands
from scripts.bench import rows as bench_rows
from scripts.bench.losses import from_peft
from scripts.bench.measure import find_rows, run, training_figures
from scripts.bench.observe import Observer
from scripts.bench.shapes import LLAMA_8B, RANK, Shapes, attention_flops, decode_bytes, step_flops
from scripts.bench.tables import TRAINING, Column, cell, table
from scripts.bench.write_gguf import rewrite

ALPACA = [{"instruction": f"Say {i}", "input": "twice" * (i % 2), "output": f"{i} {i}"} for i in range(9)]


@pytest.mark.parametrize("what", ["lora", "full"])
def test_the_flops_of_linears_are_those_that_torch_counts(tiny_folder: Path, what: str) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager").train()
    shapes, lengths, trained = Shapes.read(tiny_folder), [24], torch.tensor([3, 5, 6, 20])
    if what == "lora":
        get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    ids = torch.randint(0, shapes.vocab, (1, 24))
    with FlopCounterMode(display=False) as counter:
        logits = model.lm_head(model.model(ids).last_hidden_state[0, trained])
        torch.nn.functional.cross_entropy(logits, ids[0, trained + 1]).backward()
    counted = sum(v for op, v in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
    attention = attention_flops(shapes, lengths, 6)
    assert step_flops(shapes, lengths, len(trained), what) - attention == counted


def test_the_flops_of_attention_are_the_visible_half_of_what_torch_counts() -> None:
    shapes, n = Shapes(10, 8, 1, 2, 2, 4, 8, True), 16
    q, k, v = (torch.randn(2, n, 4, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        (torch.softmax(q @ k.mT, -1) @ v).sum().backward()
    assert attention_flops(shapes, [n], 6) == counter.get_total_flops() * (n + 1) / (2 * n)
    assert attention_flops(shapes, [n, n], 6) == 2 * attention_flops(shapes, [n], 6)


def test_llama_8b_has_the_parameters_of_its_model_card() -> None:
    assert LLAMA_8B.parameters() + 65 * 4096 == 8_030_261_248  # the norms, which Shapes leaves out
    assert LLAMA_8B.lora_parameters(8) == 20_971_520


def test_a_decoding_step_reads_every_weight_and_the_cache_once(tiny_folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    read = [p for n, p in model.named_parameters() if "norm" not in n and "embed" not in n]
    cache = 2 * 7 * 2 * 2 * 16 * 2  # k and v, 7 keys, 2 layers, 2 heads, 16 wide, 2 bytes
    assert decode_bytes(Shapes.read(tiny_folder), 16, 16, 7, 3) == 2 * sum(p.numel() for p in read) + 3 * cache


@pytest.fixture(scope="module")
def prepared(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of rows, made from alpaca rows for the tiny model."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "data.json").write_text(json.dumps(ALPACA))
    bench_rows.prepare(folder / "data.json", tiny_folder, folder / "rows", 6, 2, 300)
    return folder / "rows"


def test_trl_and_litgpt_read_the_same_tokens_as_litpeft(tiny_folder: Path, prepared: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    tokens = json.loads((prepared / "tokens.json").read_text())["train"]
    for line, row in zip((prepared / "prompts.jsonl").read_text().splitlines(), tokens, strict=True):  # as TRL reads
        parts = json.loads(line)
        assert tokenizer(parts["prompt"] + parts["completion"])["input_ids"] == row["ids"]
        assert len(tokenizer(parts["prompt"])["input_ids"]) == row["trained"].index(1)
    for record, row in zip(json.loads((prepared / "train.json").read_text()), tokens, strict=True):  # as Lit-GPT does
        ending = f"\n\n### Input:\n{record['input']}\n\n### Response:\n" if record["input"] else "\n\n### Response:\n"
        asked = f"request.\n\n### Instruction:\n{record['instruction']}{ending}"
        ids = tokenizer(asked)["input_ids"] + tokenizer(record["output"])["input_ids"] + [tokenizer.eos_token_id]
        assert row["ids"][-len(ids) :] == ids
        assert sum(row["trained"]) == len(tokenizer(record["output"])["input_ids"]) + 1


def test_rows_that_are_held_out_are_not_trained_on(prepared: Path) -> None:
    train, held_out = (json.loads((prepared / f"{name}.json").read_text()) for name in ("train", "val"))
    assert train == ALPACA[:6]
    assert held_out == ALPACA[-2:]


def test_rows_are_found_in_padded_and_in_packed_sequences() -> None:
    rows = [[5, 6], [5, 6, 7], [8]]
    assert find_rows([5, 6, 7, 0, 0], rows) == [1]
    assert find_rows([8, 5, 6, 5, 6, 7], rows) == [2, 0, 1]
    assert find_rows([9, 5, 6], rows) == []


def test_rates_are_those_of_the_steps_after_the_first() -> None:
    rows = [{"ids": [1, 2, 3], "trained": [0, 0, 1]}, {"ids": [4, 5], "trained": [0, 1]}]
    steps = [{"time": 10.0, "cpu_seconds": 8.0, "peak_bytes": 5}, {"time": 12.0, "cpu_seconds": 11.0, "peak_bytes": 6}]
    passes = [{"step": 0, "ids": [[1, 2, 3]]}, {"step": 1, "ids": [[4, 5, 0], [1, 2, 3]]}]
    record = {"started": 1.0, "first_forward": 4.0, "threads": 2, "steps": steps, "passes": passes}
    figures = training_figures(record, rows)
    assert figures["real_per_second"] == 5 / 2
    assert figures["trained_per_second"] == 2 / 2
    assert figures["cpu_seconds_per_1000"] == 1000 * 3 / 5
    assert (figures["computed"], figures["real"], figures["trained"]) == (9, 8, 3)
    assert (figures["first_step_seconds"], figures["peak_bytes"]) == (3.0, 6)


def test_an_optimizer_that_is_tried_before_there_is_a_row_takes_no_step() -> None:
    watching = Observer()
    watching.step()
    assert watching.steps == []
    watching.first = 1.0
    watching.step()
    assert len(watching.steps) == 1


def test_a_process_is_measured_with_its_memory_and_time(tmp_path: Path) -> None:
    work = "b = bytearray(200_000_000)\nwhile __import__('time').process_time() < 0.5: pass\nraise SystemExit(3)"
    done = run([sys.executable, "-c", work], tmp_path / "log")
    assert done.code == 3
    assert 200e6 < done.peak_bytes < 300e6
    assert 0.5 <= done.cpu_seconds < 0.9


def test_a_table_shows_medians_spread_and_what_failed() -> None:
    assert cell([1.0, 3.0, 2.0], Column("", "", digits=1)) == "2.0 (1.0–3.0)"
    results = {"a": [{"real_per_second": 1200.4}], "b": [{"failed": "exit code 1"}]}
    lines = table(results, TRAINING[:1], {"a": "defaults"}).splitlines()
    assert lines[2] == "| a | 1,200 | defaults |"
    assert lines[3] == "| b |  | ; 1 of 1 rounds failed: exit code 1 |"


def test_the_table_of_a_gpu_has_the_newest_of_each_row_beside_its_target() -> None:
    from scripts.bench.gpu import TARGETS, table  # here, as it loads torch's compiler

    row = {
        "row": "train litpeft",
        "tokens_per_second": 17260,
        "peak_gb": 41.6,
        "first_step_s": 1.5,
        "card": "NVIDIA H200",
    }
    rows = [
        {"row": "train litpeft", "failed": "exit code 1"},
        row | {"torch": "2.11"},
        {"row": "peft", "failed": "no liger"},
    ]
    card, _, _, _, first, second = table(rows).splitlines()
    assert card == "NVIDIA H200, torch 2.11"
    assert first == f"| train litpeft | 17,260 | 41.6 | first_step_s 1.5 | {TARGETS['train litpeft']} |"
    assert second == "| peft |  |  | failed no liger |  |"


@pytest.mark.parametrize(
    ("script", "figures"),
    [
        ("gpu_start.py load", {"row": "load bf16", "gb": 0.0}),
        ("gpu_start.py first_answer", {"row": "first_answer bf16", "tokens": 64}),
        ("gpu_documents.py", {"row": "documents tiny-llama", "auto": 2048}),
    ],
    ids=["load", "first_answer", "documents"],
)
def test_what_comes_before_the_first_step_is_a_row_of_figures(tiny_folder: Path, script: str, figures: dict) -> None:
    root, (name, *words) = Path(__file__).parents[1], script.split()
    own = {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "BEGAN": str(time.time())}
    command = [sys.executable, str(root / "scripts/bench" / name), *words, str(tiny_folder)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row | figures == row
    assert all(value > 0 for key, value in row.items() if key in ("imports_s", "answer_s", "tokens_per_second"))


def test_every_training_variant_becomes_a_command(prepared: Path, tmp_path: Path) -> None:
    names = [(v.what, v.name) for v in commands.VARIANTS]
    assert len(set(names)) == len(names)
    job = commands.Job(Path("m"), prepared, tmp_path, 1, 1e-4, 300, 6, 100, 0, "cpu")
    for variant in commands.VARIANTS:
        words = commands.command(variant, job, tmp_path / "record.json")
        assert words[4] == variant.tool
        assert commands.loss_arguments(variant, job)[2] in ("litpeft", "peft", "litgpt", "folder", "litgpt_full")


def test_a_gguf_written_anew_holds_the_same_weights(tmp_path: Path) -> None:
    tokenizer = digits()
    write_gguf(tmp_path / "a.gguf", llama(tokenizer), tokenizer)
    rewrite(tmp_path / "a.gguf", "F16", tmp_path / "b.gguf")
    before, after = (GGUFReader(tmp_path / f"{name}.gguf") for name in "ab")
    assert after.get_field("tokenizer.ggml.merges").contents() == before.get_field("tokenizer.ggml.merges").contents()
    for old, new in zip(before.tensors, after.tensors, strict=True):
        values = quants.dequantize(new.data, new.tensor_type)
        assert old.name == new.name
        np.testing.assert_allclose(values, quants.dequantize(old.data, old.tensor_type), rtol=1e-3, atol=1e-6)


def test_a_peft_adapter_gets_litpefts_names(tiny_folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path)
    state = from_peft(tmp_path, Shapes.read(tiny_folder))
    own = adapted.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    assert torch.equal(state["blocks.1.mlp.down.slot.lora.A"], own.lora_A["default"].weight)
    assert len(state) == 2 * 7 * 2


def test_a_tool_that_reads_other_tokens_gets_no_figures() -> None:
    step = {"time": 1.0, "cpu_seconds": 1.0, "peak_bytes": 1}
    passes = [{"step": 0, "ids": [[9, 1, 2]]}, {"step": 1, "ids": [[1, 2]]}]
    record = {"started": 0.0, "first_forward": 1.0, "threads": 1, "steps": [step, step], "passes": passes}
    with pytest.raises(ValueError, match="other tokens than those of the rows"):
        training_figures(record, [{"ids": [1, 2], "trained": [0, 1]}])
