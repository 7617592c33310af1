"""How a model comes to be. Training, generation and merging all use this one order."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.checkpoint import Weights
from litpeft.config import read_config
from litpeft.data.templates import ChatTemplate
from litpeft.errors import UserError
from litpeft.families import family, inverse, renamed
from litpeft.methods.base import Method, attach, load_delta
from litpeft.model import GPT
from litpeft.precision import pick_device, pick_precision
from litpeft.run import Run, find_run
from litpeft.slots import Delta
from litpeft.tokenizer import Tokenizer


def build(folder: Path, dtype: torch.dtype, method: Method | None = None, device: torch.device | str = "cpu") -> GPT:
    """Returns the model of a Hugging Face folder in `dtype`, with a method attached at its start."""
    name, config = read_config(folder)
    weights = Weights(folder)
    if config.n_layers > len(weights.file_of):  # before so many layers are made
        what = f"config.json says {config.n_layers} layers, the files hold {len(weights.file_of)} tensors"
        raise UserError("MODEL-042", what, where=str(folder))
    with torch.device("meta"):  # 1. shapes
        model = GPT(config)
    if method is not None:  # 2. slots filled; names of the base stay as they are
        attach(model, method)
    names = {ours: renamed(ours, family(name).NAMES) for ours in model.state_dict()}
    base = {ours: theirs for ours, theirs in names.items() if not model.delta_keys or ours in model.base_keys}
    check_names(model, weights, base, inverse(family(name).NAMES))
    wide = torch.promote_types(dtype, torch.float32)
    for ours, theirs in base.items():  # 3. the base's weights, tensor by tensor
        trains = method is not None and model.get_parameter(ours).requires_grad
        tensor = weights.read(theirs).to(device, wide if trains else dtype)
        if not torch.isfinite(tensor).all():
            hint = "take the model's files again, or another precision"
            raise UserError("MODEL-041", f"{theirs} holds numbers that are not finite", where=str(folder), hint=hint)
        _place(model, ours, tensor.clone() if trains else tensor, trains)
    for module in model.modules():  # 4. the deltas at their start
        if isinstance(module, Delta):
            module.to_empty(device=device).reset_parameters()
            module.to(wide)
    for name, shared in model.bank.items():  # tensors of several deltas; Method.init gives them their start
        model.bank[name] = nn.Parameter(torch.zeros(shared.shape, dtype=wide, device=device), shared.requires_grad)
    model.dtype = dtype
    if method is not None:  # 5. starts that depend on the base's weights
        method.init(model, lambda ours: weights.read(names[ours]))
    return model


def check_names(model: GPT, weights: Weights, base: dict[str, str], ours_of: dict[str, str]) -> None:
    """Raises unless the files hold exactly the tensors that the config asks for, in those shapes."""
    shapes = {theirs: tuple(model.get_parameter(ours).shape) for ours, theirs in base.items()}
    wrong = [f"{name} is missing" for name in shapes if name not in weights.file_of]
    wrong += [
        f"{name} is {weights.shape(name)}, config.json says {shape}"
        for name, shape in shapes.items()
        if name in weights.file_of and weights.shape(name) != shape
    ]
    for name in weights.file_of:
        if weights.dtype(name) not in ("F64", "F32", "F16", "BF16"):
            wrong.append(f"{name} is {weights.dtype(name)}, expected F64, F32, F16 or BF16")
    for name in set(weights.file_of) - set(shapes):
        tied = model.config.tie_embeddings and renamed(name, ours_of) == "head.weight"  # a copy of the embedding
        if not tied and not name.endswith("rotary_emb.inv_freq"):
            wrong.append(f"{name} is not of this architecture")
        elif tied and not torch.equal(weights.read(name), weights.read(base["embed.weight"])):
            wrong.append(f"{name} is not the embedding, though config.json says tie_word_embeddings")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        what = f"the weights do not fit config.json: {'; '.join(sorted(wrong)[:5])}{more}"
        raise UserError("MODEL-040", what, where=str(weights.folder))


def _place(model: GPT, name: str, tensor: Tensor, trains: bool) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=trains))


@dataclass
class Loaded:
    """A model ready to answer, with what it needs to read and write text."""

    model: GPT
    tokenizer: Tokenizer
    template: ChatTemplate
    system: str | None  # the system message that it was trained with
    run: Run | None

    @property
    def has_delta(self) -> bool:
        return self.run is not None


def load(path: str, base: str | None = None, precision: str = "auto") -> Loaded:
    """Returns the model of a base folder, a merged folder or a run, in eval mode on the first device there is."""
    device = pick_device()
    dtype = pick_precision(precision, device).weights
    run = find_run(Path(path))
    if run is None:
        if base is not None:
            what = "base is for a run, and this is a model by itself"
            raise UserError("CONFIG-034", what, where="base")
        folder = Path(path)
        model = build(folder, dtype, device=device)
    else:
        folder = run.base_folder(base)
        model = build(folder, dtype, run.method(), device)
        load_delta(model, run.delta(), str(run.folder))
    tokenizer = Tokenizer.load(folder)
    tokenizer.check_vocabulary(model.config.vocab_size)
    template = ChatTemplate(tokenizer, run.template if run else "auto")
    return Loaded(model.eval().requires_grad_(False), tokenizer, template, run.system if run else None, run)
