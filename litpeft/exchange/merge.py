"""Fold what a run learned into its base, and show that the files written compute what the run computes.

Everything is computed in float32, one layer at a time: the weights stay as their files hold them.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from litpeft.core.errors import ConfigError, ModelError
from litpeft.core.folders import alone, atomic_folder, check_place, refuse_existing, sync_files
from litpeft.core.json import read_json
from litpeft.core.safetensors import DTYPES, RESULT_DTYPES, Weights, copy_companions, write_safetensors
from litpeft.core.terminal import command_line, say
from litpeft.exchange.generation_config import write_stop_ids
from litpeft.exchange.run import Run, build_run, find_run, tell_standing, write_config
from litpeft.exchange.settings import Merge
from litpeft.model.build import build
from litpeft.model.context import Context
from litpeft.model.delta import folds, without_delta
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import config_of
from litpeft.model.gpt import GPT
from litpeft.model.kernels.ops import product
from litpeft.model.quantize import Storage
from litpeft.model.slots import Delta, Linear, Slot

COMPARED = 1 << 18  # weights whose rounding is looked at together: they stay in the processor's cache
PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "Once upon a time there was a",
    "Translate to German: Good morning, how are you?",
)
# Largest difference of a logit allowed, as a share of the largest logit: folding in float32, then rounding the weights.
FOLD_TOLERANCE = 5e-5
ROUND_TOLERANCE = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class Rounding:
    """What rounding the folded weights to the type of the files did."""

    changed: int = 0  # weights that differ from the base's, after rounding
    total: int = 0  # weights of the tensors that the method folds into
    lost: float = 0.0  # squared error of the update after rounding
    along: float = 0.0  # product of that error and the update
    update: float = 0.0  # squared size of the update

    def add(self, exact: Tensor, rounded: Tensor, base: Tensor) -> None:
        changed = lost = along = update = 0.0
        for e, r, b in zip(*(tensor.flatten().split(COMPARED) for tensor in (exact, rounded, base)), strict=True):
            changed += float(torch.ne(r, b.to(r.dtype), out=torch.empty(r.shape)).sum())  # far faster than booleans
            error, step = r - e, e - b
            lost += float(torch.linalg.vector_norm(error)) ** 2
            along += float(torch.dot(error, step))
            update += float(torch.linalg.vector_norm(step)) ** 2
        if update:
            self.changed, self.total = self.changed + int(changed), self.total + exact.numel()
            self.lost, self.along, self.update = self.lost + lost, self.along + along, self.update + update

    @property
    def error(self) -> float:
        """Error of the update, relative to its size."""
        return (self.lost / self.update) ** 0.5 if self.update else 0.0

    @property
    def kept(self) -> float:
        """How much of the update is kept along its own direction: 1 is all of it, and the error is noise beside it."""
        return 1 + self.along / self.update if self.update else 1.0

    def lines(self, dtype: str) -> list[str]:
        """Returns what the error is, and what it means for what was learned."""
        kept = f"kept along its own direction: {self.kept:.1%}"
        said = [f"relative error of the update, rounded to {dtype}: {self.error:.1%}; {kept}"]
        if self.kept < 0.9:
            said.append("  so a part of what was learned is lost: --dtype float32 keeps it")
        elif self.error > 0.1:
            said.append("  so what was learned is kept, and the error is noise beside it; --dtype float32 avoids it")
        return said


def merge(settings: Merge) -> None:
    """The command `litpeft merge`."""
    run = find_run(Path(settings.run))
    if run is None:
        what = "this is no run but a model folder (it has no final/delta.json): there is nothing to merge"
        raise ModelError(what, where=settings.run, hint="name the run: the `--out` of `litpeft finetune`")
    if run.is_model:
        what = f"there is nothing to merge: {run.folder} is an ordinary Hugging Face folder already"
        raise ModelError(what, where=settings.run)
    if settings.onto == "original" and run.storage is None:
        what = "the run saw the original weights (base.quantize null), so there are no others to choose"
        raise ConfigError(what, where="onto", hint="leave it out")
    out = Path(settings.out) if settings.out else Path(settings.run) / "merged"
    check_place(out)
    refuse_existing(out, settings.overwrite)
    tell_standing(run)
    base = run.base_folder(settings.base)
    tokenizer, template = run.text(base)
    for kept in (base, run.folder):
        if kept.resolve().is_relative_to(out.resolve()):
            what = f"the merged model would replace {kept}, from which it is made"
            raise ConfigError(what, where="out", hint="name another folder")
    storage = run.storage if settings.onto == "trained" else None
    sizes = _types(base)
    dtype = RESULT_DTYPES.get(settings.dtype) or max(sizes, key=sizes.__getitem__, default=torch.float32)
    model, names = _trained(run, base, storage), _names(run, base)
    prompts, rounding = [tokenizer.encode(text) for text in PROMPTS], Rounding()
    with alone(out), atomic_folder(out, settings.overwrite) as folder:
        try:
            write_safetensors(folder, _merged(model, names, dtype, rounding, settings.run))
        except TypeError as error:
            hint = "generate and chat take the run as it is"
            raise ModelError(f"this run cannot be merged: {error}", where=settings.run, hint=hint) from None
        copy_companions(base, folder)
        write_config(folder, dtype, run.method())
        write_stop_ids(folder, template.stop_ids)
        with ThreadPoolExecutor(1) as pool:
            written = pool.submit(sync_files, folder)  # the disk works while the model is compared
            want, before, fold = _three_ways(model, prompts)
            del model  # there is room for one in memory
            files = _logits(_in_float32(build(folder, dtype)), prompts)
            written.result()
        say(
            f"logits at {len(want)} positions of {len(PROMPTS)} prompts, "
            f"compared with base + delta (largest {float(want.abs().max()):.1f}):"
        )
        say(f"  {'the base without the delta':<32} differs by {float((before - want).abs().max()):.2e}")
        if storage != run.storage:
            _tell_of_original(run, base, prompts, want)
        _check(want, fold, files, dtype, rounding, settings.run)
    say(f"merged model in {out}; next: {command_line('chat', out)}")


def _trained(run: Run, base: Path, storage: Storage | None) -> GPT:
    """Returns the run's model, its linear layers with the very numbers that `storage` unpacked for it."""
    types = set(_types(base))
    held = types.pop() if len(types) == 1 else torch.float32
    return _in_float32(build_run(run, base, held if storage is None else run.dtype, storage=storage))


def _in_float32(model: GPT) -> GPT:
    """Returns `model`, computing in float32 whatever its weights are held in; it holds those of one block at a time."""
    model.dtype, files = torch.float32, model.files
    for block in model.blocks:
        block.register_forward_hook(lambda *_: files.drop_pages())
    return model.eval()


class _Scratch:
    """Copies in float32 or better, each in the place of the one before: new memory would take longer to get."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def __call__(self, tensor: Tensor) -> Tensor:
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        if self.memory.numel() < tensor.numel() or self.memory.dtype != dtype:
            self.memory = torch.empty(tensor.numel(), dtype=dtype)
        return self.memory[: tensor.numel()].view(tensor.shape).copy_(tensor)


class _ThreeWays(Delta):
    """What a slot makes of tokens that come three times: with its deltas, without, and with its deltas folded in."""

    def __init__(self, slot: Slot, widened: _Scratch):
        super().__init__()
        self.slot, self.widened = Slot(), widened
        self.slot.deltas = slot.deltas

    def forward(self, y: Tensor, x: Tensor, linear: Linear, ctx: Context | None) -> Tensor:
        (with_deltas, without, _), (first, _, third) = y.chunk(3, 1), x.chunk(3, 1)
        bias = None if linear.bias is None else linear.bias.to(x.dtype, copy=True)
        fold = product(third, *self.slot.frozen(linear).fold(self.widened(linear.dense()), bias))
        return torch.cat((self.slot(with_deltas, first, linear, ctx), without, fold), 1)


def _three_ways(model: GPT, prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logits of base + delta, of the base, and of the folded weights, and leaves the model like that.

    The three are computed side by side in one row, so that every weight is read once.
    """
    tokens, widened = sum(map(len, prompts)), _Scratch()
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.slot.deltas:
            layer.slot.deltas = {"three ways": _ThreeWays(layer.slot, widened)}
    want, before, fold = _logits(model, 3 * prompts).split(tokens)
    if model.base_values:
        with without_delta(model):
            before = _logits(model, 3 * prompts)[tokens : 2 * tokens]
    return want, before, fold


def _types(base: Path) -> dict[torch.dtype, int]:
    """Returns how many bytes of the base's weights are of each type; what is wider than float32 counts as that."""
    sizes: dict[torch.dtype, int] = {}
    for header in Weights(base).headers.values():
        for entry in header.values():
            first, last = entry["data_offsets"]
            if entry["dtype"] in DTYPES:  # not a mask of booleans, which some files hold beside the weights
                dtype = torch.float32 if entry["dtype"] == "F64" else DTYPES[entry["dtype"]]
                sizes[dtype] = sizes.get(dtype, 0) + last - first
    return sizes


def _names(run: Run, base: Path) -> NameMap:
    """Returns the names of the merged model's tensors: the base's, and those that the method adds."""
    config = read_json(base / "config.json", "config.json of the base")
    run.method().configure(config)
    return NameMap(*config_of(config, str(base)))


def _merged(
    model: GPT, names: NameMap, dtype: torch.dtype, rounding: Rounding, where: str
) -> Iterator[tuple[str, Tensor]]:
    """Yields the folded weights under their Hugging Face names, rounded once to the type of the files."""

    def rounded() -> Iterator[tuple[str, Tensor]]:
        left = {ours: shape for ours, shape in names.ours.items() if ours not in model.base_keys}
        for ours, exact, before in folds(model, widened=_Scratch()):
            after = exact.to(dtype, copy=exact is not before)
            before = model.base_values.get(ours, torch.zeros_like(exact) if before is None else before)
            if before is not exact:
                rounding.add(exact, after, before)
            yield ours, after
            left.pop(ours, None)
            model.files.drop_pages(after.nbytes)
        yield from ((ours, torch.zeros(shape, dtype=dtype)) for ours, shape in left.items())  # biases of other layers

    with torch.no_grad():
        yield from names.written(rounded(), where=where)


@torch.inference_mode()
def _logits(model: GPT, prompts: list[list[int]]) -> Tensor:
    ids = torch.tensor([[i for prompt in prompts for i in prompt]])
    return model(ids, Context.packed(tuple(map(len, prompts)), ids.device, None))[0]


def _check(want: Tensor, fold: Tensor, files: Tensor, dtype: torch.dtype, rounding: Rounding, where: str) -> None:
    """Compares logits of base + delta, of the folded weights, and of the files read back; raises if they differ."""
    size = float(want.abs().max())
    names = {"folded in float32": fold, f"files read back, {str(dtype).removeprefix('torch.')}": files}
    for name, logits in names.items():
        same = float((logits.argmax(-1) == want.argmax(-1)).float().mean())
        say(f"  {name:<32} differs by {float((logits - want).abs().max()):.2e}, same next token at {same:.0%}")
    say(f"weights changed: {rounding.changed:,} of {rounding.total:,}")
    say("\n".join(rounding.lines(str(dtype).removeprefix("torch."))))
    if rounding.changed == 0:
        hint = "train longer, or write float32 with --dtype float32"
        raise ModelError("no weight changed: the merged model would be the base", where=where, hint=hint)
    for (name, logits), limit in zip(names.items(), (FOLD_TOLERANCE, ROUND_TOLERANCE[dtype]), strict=True):
        off = float((logits - want).abs().max()) / size
        if not off <= limit:
            what = (
                f"logits of the {name} are off by {off:.1e} of the largest, more than {limit:.0e}: nothing was written"
            )
            raise ModelError(what, where=where, hint="try --dtype float32")


def _tell_of_original(run: Run, base: Path, prompts: list[list[int]], want: Tensor) -> None:
    """Says how far the model that is written is from the one that was trained, on a base that it has never seen."""
    trained = _logits(_trained(run, base, run.storage), prompts)
    off = float((want - trained).norm() / trained.norm())
    same = float((want.argmax(-1) == trained.argmax(-1)).float().mean())
    say(
        f"warning: --onto original: the delta was trained on weights in {run.storage.name}, and is merged into others: "
        f"logits differ from the run's by {off:.1%} (relative norm), same next token at {same:.0%}"
    )
