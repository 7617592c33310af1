"""A tiny Llama in a Hugging Face folder, made anew for the tests that want one. What has no device runs on the CPU."""

import csv
import dataclasses
import gc
import json
import os
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # ranks that are forked cannot use their parent's pool of compilers
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"  # plain C++: each process would try out four kinds of vectors, in 15 s
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for GPUs are computed on the processor; read when Triton is imported
torch.set_num_threads(1)

TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Writes a byte-level tokenizer with ChatML's two marks (ids 0 and 1), and its template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    (folder / "chat_template.jinja").write_text(CHATML)


def make_folder(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Writes a random Llama of transformers' making with a tokenizer; returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**{**TINY, "initializer_range": 0.05, "dtype": "float32"} | changes)
    LlamaForCausalLM(config).to(config.dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


class NoFloat32(TorchFunctionMode):
    """Keeps float64 where transformers casts to float32: in norms, in the softmax of eager attention, in rotations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            casts = func in (torch.Tensor.to, torch.Tensor.type) and torch.float32 in (*args, *kwargs.values())
            if func is torch.Tensor.float or casts:
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


class NoPolar(TorchFunctionMode):
    """Computes torch.polar by torch.cos and torch.sin, which round otherwise."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.polar:
            return torch.complex(args[0] * args[1].cos(), args[0] * args[1].sin())
        return func(*args, **(kwargs or {}))


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """Makes transformers compute norms, attention and routers in float64, which it does in float32 for any type."""
    for module in model.modules():
        if any(
            kind in type(module).__name__
            for kind in ("Norm", "Attention", "Router", "DeltaNet", "Mamba", "Mixer", "NemotronHFor")
        ):
            module.forward = in_mode(module.forward, NoFloat32)
        if "Rotary" in type(module).__name__:
            module.forward = in_mode(module.forward, NoPolar)
    return model


def in_mode(forward: Callable, mode: Callable[[], TorchFunctionMode]) -> Callable:
    def wide(*args, **kwargs):
        with mode():
            return forward(*args, **kwargs)

    return wide


NEEDED = {  # what a method has to be told for a model like the tiny one
    "bitfit": {"add_missing": True},
    "glora": {"population": 4, "generations": 2},  # its search, of 64 paths, would take longer than the run
}


ON_CODES_ONLY = {"loftq", "lq_lora", "qa_lora"}  # methods that want a quantised base


def method_of(name: str) -> Any:
    """Returns a method with its defaults, or with what the tiny Llama needs."""
    from litpeft.methods import method_class

    return method_class(name)(**NEEDED.get(name, {}))


def calibrated(method: Any, folder: Path, rows: int = 6) -> Any:
    """Returns the method after it has measured the base in a folder on random rows, as at the start of a run."""
    from litpeft.data.batches import collate
    from litpeft.model.build import build

    if method.defines("calibrate"):
        torch.manual_seed(0)
        base = build(folder, torch.float64)
        method.calibrate(base, (collate([row]) for row in random_rows(rows)))
    return method


def random_rows(number: int) -> list[Any]:
    """Returns rows of 30 tokens, of which the last 20 are trained."""
    from litpeft.data.rows import Row

    ids = torch.randint(2, 250, (number, 30), generator=torch.Generator().manual_seed(5)).tolist()
    return [Row(row, [False] * 10 + [True] * 20, 10, f"row {at}", []) for at, row in enumerate(ids)]


def storage_of(name: str) -> Any:
    """Returns how the base of a method is held by default."""
    from litpeft.methods import PRESETS
    from litpeft.model.quantize import Storage

    kind = PRESETS.get(name, {}).get("base.quantize")
    return None if kind is None else Storage(kind)


def needed(name: str) -> dict[str, str]:
    """Returns the options of the command line that the tiny Llama needs."""
    return {f"--method.{key}": str(value).lower() for key, value in NEEDED.get(name, {}).items()}


def folded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights of the plain model that computes the same without deltas, by name."""
    from litpeft.model.fold import folds

    return {name: tensor for name, tensor, _ in folds(model)}


def document_mask(lengths: tuple[int, ...], window: int | None, device: torch.device | str = "cpu") -> torch.Tensor:
    """Returns (T, T), True where a token of a packed row sees another: what packing means."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    distance = torch.arange(len(number), device=device)[:, None] - torch.arange(len(number), device=device)
    return (number[:, None] == number) & (distance >= 0) & (distance < (window or len(number)))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 Llama with grouped queries and an untied head. Tests must not change it."""
    return make_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "lemon": "yellow"}


class NoFigure:
    """Stands for matplotlib's Figure and all its parts, which may be set and called, and leaves an empty file."""

    def __init__(self, *args: object, **options: object):
        pass

    def __getattr__(self, name: str) -> "NoFigure":
        return self

    def __call__(self, *args: object, **options: object) -> "NoFigure":
        return self

    def __getitem__(self, key: object) -> "NoFigure":
        return self

    def subplots(self, number: int, **options: object) -> list["NoFigure"]:
        return [self] * number

    def savefig(self, file: Path) -> None:
        Path(file).touch()


@pytest.fixture(autouse=True, scope="session")
def _figure() -> Iterator[type]:
    """Runs leave an empty loss.png: drawing it takes as long as all else of a short run. Yields what draws."""
    from litpeft.train import loss_figure

    figure = loss_figure.Figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_figure, "Figure", NoFigure)
        yield figure


@pytest.fixture(autouse=True, scope="session")
def _kept_parsers() -> Iterator[None]:
    """The parser of a command is made once: making it takes as long as all steps of a short run."""
    from litpeft import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "parser_of", cache(cli.parser_of))
        yield


@pytest.fixture(autouse=True, scope="session")
def _kept_templates() -> Iterator[None]:
    """A chat template is compiled once in a process: the process that renders it takes as long to start as a run."""
    from litpeft.data import templates

    compiled, kept = templates.Template, {}

    def template(source: str, now: datetime, constants: dict[str, Any]) -> Any:
        key = (os.getpid(), source, now if "strftime_now" in source else None, repr(constants))
        if key not in kept:
            kept[key] = compiled(source, now, constants)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "Template", template)
        yield


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector of garbage need not look at it again and again."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture
def drawn(_figure: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has pictures drawn, for tests that look at them."""
    monkeypatch.setattr("litpeft.train.loss_figure.Figure", _figure)


def write_rows(folder: Path) -> Path:
    """Writes a folder with six rows to learn and two held-out ones; returns it."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    rows = [{"instruction": f"Colour of {thing}?", "output": colour} for thing, colour in COLOURS.items()]
    for name, part in (("train", rows), ("validation", rows[4:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return data


def read_metrics(folder: Path) -> list[dict[str, float | None]]:
    """Returns the rows of a run's metrics.csv by column; None for an empty cell."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: float(cell) if cell else None for name, cell in row.items()} for row in csv.DictReader(file)]


def finetune(base: Path, folder: Path, *argv: str, out: str = "run", method: str = "lora") -> Path:
    """Runs `litpeft finetune METHOD` on the small rows in batches of three, in float32; returns the run's folder."""
    from litpeft.cli import main

    data = [] if "--data.path" in argv else ["--data.path", write_rows(folder)]
    common = ["--base.dir", base, *data, "--out", folder / out, "--train.warmup_steps", 0]
    common += ["--train.batch_size", 3, "--base.precision", "32-true", "--validation.sample_tokens", 4]
    given = {word for word in argv if word.startswith("--")}
    pairs = zip(common[::2], common[1::2], strict=True)
    argv = (*(word for pair in needed(method).items() for word in pair), *argv)
    main(["finetune", method, *(str(w) for pair in pairs if pair[0] not in given for w in pair), *argv])
    return folder / out


def kinds(name: str) -> dict[str, object]:
    """Returns the types of a command's keys by their dotted names, read off the dataclasses."""
    from litpeft.cli import COMMANDS, called, load
    from litpeft.methods import method_class

    command = COMMANDS[name]
    settings = load(command.settings, called(name).capitalize())
    found = {field.name: field.type for field in dataclasses.fields(settings)}
    groups = {key: kind for key, kind in found.items() if dataclasses.is_dataclass(kind)}
    groups |= {"method": method_class(command.method)} if command.method else {}
    inner = {f"{key}.{field.name}": field.type for key, kind in groups.items() for field in dataclasses.fields(kind)}
    return {key: kind for key, kind in found.items() if key not in groups} | inner
