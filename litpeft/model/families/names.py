"""The two-way name map between the parameters of the model and the tensors of a folder's files, with their layout."""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from litpeft.core.errors import ModelError, some
from litpeft.core.safetensors import DTYPES, Weights
from litpeft.model.config import ModelConfig
from litpeft.model.families import Place, family, split_name
from litpeft.model.families.packed import packed_parts, read_packed
from litpeft.model.families.read import left_out
from litpeft.model.gpt import GPT


@cache
def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter of the plain model."""
    with torch.device("meta"):
        return {ours: tuple(tensor.shape) for ours, tensor in GPT(config).state_dict().items()}


class NameMap:
    """Reads our parameters from a folder's tensors, checks that none is missing, and converts them back.

    `ours` maps each parameter of the plain model to its shape. `shapes` maps each tensor of the files to its shape.
    `parts` maps each tensor of the files to its parameters, in order: several if the tensor is fused, else one.
    """

    def __init__(self, name: str, config: ModelConfig):
        """`name` is the `model_type` of a family."""
        module = family(name)
        self.family, self.config = name, config
        self.buffers: tuple[str, ...] = getattr(module, "BUFFERS", ())
        self.modules: dict[str, str] = getattr(module, "MODULES", {})
        self.other_prefixes: dict[str, str] = getattr(module, "OTHER_PREFIXES", {})
        table = module.names(config) if hasattr(module, "names") else module.NAMES
        self._places = {ours: at if isinstance(at, Place) else Place(at) for ours, at in table.items()}
        self.ours = _shapes(config)
        order = list(self._places)
        self.parts: dict[str, list[str]] = {}
        for ours in sorted(self.ours, key=lambda ours: order.index(split_name(ours)[0])):
            self.parts.setdefault(self.file_name(ours), []).append(ours)
        self._fused: dict[str, list[str]] = {}  # the parts of a tensor of the files, or of an expert in it
        for ours in (ours for parts in self.parts.values() for ours in parts):
            self._fused.setdefault(self._piece(ours), []).append(ours)
        self.shapes = {theirs: self._shape(parts) for theirs, parts in self.parts.items()}

    def file_name(self, ours: str) -> str:
        """Returns the name of the file's tensor that is or contains a parameter, as we write it."""
        module, numbers, leaf = split_name(ours)
        place = self._places[module]
        name = place.module.format(*numbers)
        return f"{name}.{leaf}" if not place.stack else name if leaf == "weight" else f"{name}_{leaf}"

    def module(self, ours: str) -> str:
        """Returns the module of transformers' class that is or contains one of ours."""
        return spelt(self.file_name(f"{ours}.weight").removesuffix(".weight"), self.modules)

    def in_files(self, module: str) -> str:
        """Returns what the files call a module of transformers' class."""
        return spelt(module, {name: theirs for theirs, name in self.modules.items()})

    def read(self, weights: Weights, ours: str) -> Tensor:
        """Returns one parameter of the plain model."""
        place, parts = self._place(ours), self._fused[self._piece(ours)]
        name = self._spelt(weights, self.file_name(ours))
        expert = int(split_name(ours)[1][-1]) if place.stack else None
        tensor = read_packed(weights, name, expert)
        if tensor is None:
            tensor = weights.read(name) if expert is None else weights.read(name)[expert]
            tensor = tensor.t() if place.transposed else tensor
        return (self._rows(parts, tensor)[ours] if len(parts) > 1 else tensor).contiguous()

    def plain(self, weights: Weights, ours: Iterable[str]) -> list[str]:
        """Returns the name of each parameter's tensor in the files, without those that are packed there."""
        names = [self._spelt(weights, self.file_name(one)) for one in ours]
        return [name for name in names if name in weights.file_of and not packed_parts(weights, name, ())]

    def rows(self, theirs: str, tensor: Tensor) -> dict[str, Tensor]:
        """Returns the rows of each parameter of a tensor with a row for each output of a file's tensor."""
        return self._rows(self.parts[theirs], tensor)

    def joined_rows(self, theirs: str, given: dict[str, Tensor]) -> Tensor:
        """Returns the tensor whose `rows` are those given."""
        return self._joined_rows(self.parts[theirs], given)

    def groups(self, ours: str) -> int:
        """Returns how many groups of rows a fused tensor consists of, each with rows of every part."""
        return self._groups(self._place(ours))

    def transposed(self, theirs: str) -> bool:
        """Returns whether a file's tensor has a column for each output."""
        return self._place(self.parts[theirs][0]).transposed

    def found(self, weights: Weights, ours: str) -> tuple[Path, str]:
        """Returns the file that holds a parameter, and the name of its tensor there."""
        name = self._spelt(weights, self.file_name(ours))
        name = name if name in weights.file_of else f"{name}_blocks"
        return weights.folder / weights.file_of[name], name

    def written(self, pairs: Iterable[tuple[str, Tensor]], where: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yields name and tensor as in the files, from all our names and tensors in any order.

        Holds only the parts of fused tensors that are still incomplete.
        """
        waiting: dict[str, dict[str, Tensor]] = {}
        left = dict.fromkeys(self.parts)
        for ours, tensor in pairs:
            if ours not in self.ours:
                what = f"the method adds {ours}, which this family's files have no place for"
                raise ModelError(what, where=where)
            theirs = self.file_name(ours)
            given = waiting.setdefault(theirs, {})
            given[ours] = tensor
            if len(given) == len(self.parts[theirs]):
                yield theirs, self.joined(theirs, waiting.pop(theirs))
                left.pop(theirs, None)
        missing = [ours for theirs in left for ours in self.parts[theirs] if ours not in waiting.get(theirs, {})]
        if missing:
            what = f"the files would not be a whole model: {some(missing)} missing"
            raise ModelError(what, where=where)

    def check(self, weights: Weights) -> None:
        """Raises unless the files hold exactly the tensors that the config asks for, in those shapes."""
        shapes = {self._spelt(weights, theirs): shape for theirs, shape in self.shapes.items()}
        coded = {name: packed_parts(weights, name, shape) for name, shape in shapes.items()}
        codes = {part: shape for parts in coded.values() for part, shape in parts.items()}
        shapes = {name: shape for name, shape in shapes.items() if not coded[name]} | codes
        wrong = [f"{name} is missing" for name in shapes if name not in weights.file_of]
        wrong += [
            f"{name} is {weights.shape(name)}, config.json says {shape}"
            for name, shape in shapes.items()
            if name in weights.file_of and shape is not None and weights.shape(name) != shape
        ]
        packed = False
        embed, head = (self._spelt(weights, self.file_name(f"{name}.weight")) for name in ("embed", "head"))
        for name in weights.file_of:
            if name not in shapes and any(fnmatchcase(name, glob) for glob in self.buffers):
                continue
            if weights.dtype(name) not in DTYPES and name not in codes:
                packed = True
                wrong.append(f"{name} is {weights.dtype(name)}, expected F64, F32, F16 or BF16")
            if name == head and self.config.tie_embeddings:  # a copy of the embedding
                if embed in weights.file_of and not torch.equal(weights.read(name), weights.read(embed)):
                    wrong.append(f"{name} is not the embedding, though config.json says tie_word_embeddings")
            elif name not in shapes:
                wrong.append(f"{name} is not of this architecture")
        if wrong:
            what = f"the weights do not fit config.json{left_out(weights.folder)}: {some(sorted(wrong), '; ')}"
            hint = "they seem to be quantised: take the model's plain weights" if packed else ""
            raise ModelError(what, where=str(weights.folder), hint=hint)

    def _place(self, ours: str) -> Place:
        return self._places[split_name(ours)[0]]

    def _piece(self, ours: str) -> str:
        """Returns the name of the file's tensor that contains a parameter, with the expert if those are stacked."""
        return f"{self.file_name(ours)}[{split_name(ours)[1][-1] if self._place(ours).stack else ''}]"

    def _groups(self, place: Place) -> int:
        return getattr(self.config, place.per) if place.per else 1

    def _spelt(self, weights: Weights, theirs: str) -> str:
        """Returns a tensor's name as these files spell it."""
        for usual, other in self.other_prefixes.items():
            if theirs not in weights.file_of and theirs.startswith(usual):
                name = other + theirs.removeprefix(usual)
                return name if name in weights.file_of else theirs
        return theirs

    def _shape(self, parts: list[str]) -> tuple[int, ...]:
        """Returns the shape of the file's tensor that consists of these parameters."""
        pieces = list(dict.fromkeys(map(self._piece, parts)))
        fused, place = self._fused[pieces[0]], self._place(parts[0])
        first = self.ours[fused[0]]
        shape = (sum(self.ours[part][0] for part in fused), *first[1:]) if len(fused) > 1 else first
        shape = shape[::-1] if place.transposed else shape
        return (len(pieces), *shape) if place.stack else shape

    def joined(self, theirs: str, given: dict[str, Tensor]) -> Tensor:
        """Returns the file's tensor that consists of these parameters."""
        pieces = [self._joined_piece(piece, given) for piece in dict.fromkeys(map(self._piece, self.parts[theirs]))]
        return torch.stack(pieces) if self._place(self.parts[theirs][0]).stack else pieces[0]

    def _joined_piece(self, piece: str, given: dict[str, Tensor]) -> Tensor:
        parts = self._fused[piece]
        tensor = self._joined_rows(parts, given) if len(parts) > 1 else given[parts[0]]
        return (tensor.t() if self._place(parts[0]).transposed else tensor).contiguous()

    def _rows(self, parts: list[str], tensor: Tensor) -> dict[str, Tensor]:
        groups = self._groups(self._place(parts[0]))
        sizes = [self.ours[part][0] // groups for part in parts]
        split = tensor.unflatten(0, (groups, -1)).split(sizes, 1)
        return {part: rows.flatten(0, 1) for part, rows in zip(parts, split, strict=True)}

    def _joined_rows(self, parts: list[str], given: dict[str, Tensor]) -> Tensor:
        groups = self._groups(self._place(parts[0]))
        return torch.cat([given[part].unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)


def spelt(module: str, names: Mapping[str, str]) -> str:
    """Returns another name of a module, or of a tensor in it: `names` has its first parts."""
    for old, new in names.items():
        rest = f"{module}.".removeprefix(f"{old}.")
        if rest != f"{module}.":
            return f"{new}.{rest}".removesuffix(".")
    return module
