"""The tensors of an adapter of peft as a method of ours with its delta."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from litpeft.core.errors import some
from litpeft.core.safetensors import Weights
from litpeft.exchange.exports.peft import SHARED, WRAPPED, as_lora, step_of_keys
from litpeft.exchange.exports.peft_tokens import TOKEN_ROWS
from litpeft.exchange.imports.peft_keys import Ia3Keys, Keys, LayerKeys, LoraKeys, NormKeys, PromptKeys, VeraKeys, fits
from litpeft.methods.dora import DoRA
from litpeft.methods.ia3 import IA3
from litpeft.methods.lora import LoRA
from litpeft.methods.prefix import Prefix
from litpeft.methods.prompt import Prompt
from litpeft.methods.selective import Selective
from litpeft.model.delta import Method, attach
from litpeft.model.families import split_name
from litpeft.model.families.names import NameMap, spelt
from litpeft.model.gpt import GPT
from litpeft.model.slots import Linear

Learned = tuple[Method, dict[str, Tensor]]
PAIR = {"lora_A.weight": "A", "lora_B.weight": "B"}  # peft's names -> those of a Delta
DIRECTIONS = PAIR | {"lora_magnitude_vector": "m"}
FACTORS = {"ia3_l": "g"}


def learned(keys: Keys, tensors: Mapping[str, Tensor], names: NameMap, weights: Weights) -> Learned:
    """Returns an adapter as a method with its delta; a ValueError says what does not fit."""
    if isinstance(keys, PromptKeys):
        return before_text(keys, tensors, names)
    shared = {f"base_model.{name}" for name in SHARED} if isinstance(keys, VeraKeys) else set()
    odd = sorted(name for name in tensors if not name.startswith(WRAPPED) and name not in shared)
    if odd:
        raise ValueError(f"the names of tensors must begin with {WRAPPED}, got {some(odd)}")
    return Reader(keys, tensors, names, weights).learned()


class Reader:
    """Reads an adapter of modules. `left` are its tensors that are not used yet, `of` our layers in each module."""

    def __init__(self, keys: LayerKeys, tensors: Mapping[str, Tensor], names: NameMap, weights: Weights):
        self.keys, self.names, self.weights = keys, names, weights
        self.left: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            plain = name.removeprefix(WRAPPED).replace(".base_layer.", ".").replace(".ln_tuning_layers.", ".")
            self.left[spelt(plain, names.modules)] = tensor  # as older versions of transformers say it
        self.of: dict[str, list[str]] = {}
        for part in (part for parts in names.parts.values() for part in parts):
            ours, _, leaf = part.rpartition(".")
            if leaf == "weight" and len(split_name(part)[1]) < 2:  # experts are no modules for transformers
                self.of.setdefault(names.module(ours), []).append(ours)
        with torch.device("meta"):
            model = GPT(names.config)
        self.embed, self.head = names.module("embed"), names.module("head")
        linear = {names.module(name) for name, module in model.named_modules() if isinstance(module, Linear)}
        self.linear = linear & {*self.of, self.head}

    def learned(self) -> Learned:
        keys, modules = self.keys, self.targeted()
        if isinstance(keys, LoraKeys):
            own = self.updates(modules, DIRECTIONS if keys.use_dora else PAIR)
            ranks = {part: keys.rank(module) for module in modules for part in self.of[module]}
            ranks = {part: rank for part, rank in ranks.items() if rank != keys.r}
            base = self.rows_of_tokens()
            base |= self.base_parameters()
            cls = DoRA if keys.use_dora else LoRA
            same = {"rank": keys.r, "alpha": keys.alpha, "rslora": keys.use_rslora}
            method = cls(**same, targets=(*own,), ranks=ranks, unfreeze=(*base,))
        elif isinstance(keys, VeraKeys):
            own = self.scaled(modules)
            base = self.base_parameters()
            method = LoRA(rank=keys.r, alpha=float(keys.r), targets=(*own,), unfreeze=(*base,))
        elif isinstance(keys, Ia3Keys):
            own = self.factors(modules)
            base = self.base_parameters()
            method = IA3(targets=(*own,), unfreeze=(*base,))
        else:
            self.expect(f"{module}.weight" for module in modules)
            own, base = {}, self.base_parameters()
            method = Selective(norms=False, unfreeze=(*base,))
        return method, base | in_slots(method, self.names, {f"{layer}.slot": parts for layer, parts in own.items()})

    def targeted(self) -> list[str]:
        """Returns the modules that the adapter acts on."""
        everywhere = {**self.of, self.head: []}  # a tied head is in no file
        inner = self.linear - {self.head}
        spelt = {module: {module, self.names.in_files(module)} for module in everywhere}
        found = [m for m in everywhere if any(self.keys.is_target(name, m in inner) for name in spelt[m])]
        if not found:
            raise ValueError(f"target_modules {self.keys.target_modules!r} names no module of the base")
        for module in found:
            if module not in self.of:
                what = f"target_modules names {module}, which is the embedding of this base (tie_word_embeddings)"
                raise ValueError(f"{what}: an update of the head alone would untie them")
            if module not in self.linear and not isinstance(self.keys, NormKeys):
                raise ValueError(f"target_modules names {module}, which is no linear layer: that is not supported")
        return found

    def updates(self, modules: list[str], leaves: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
        """Returns A, B and, with DoRA, m of each of our layers."""
        keys, own = self.keys, {}
        self.expect(f"{module}.{leaf}" for module in modules for leaf in leaves)
        for module in modules:
            rank, (outputs, inputs) = keys.rank(module), self.shape(module)
            shapes = {"A": (rank, inputs), "B": (outputs, rank), "m": (outputs,)}
            for leaf, ours in leaves.items():
                tensor = self.take(f"{module}.{leaf}", shapes[ours])
                if ours == "B":  # what the method's own scale is not
                    tensor = tensor * (keys.scale(module) / keys.over_rank(keys.alpha, rank))
                rows = dict.fromkeys(self.of[module], tensor) if ours == "A" else self.rows(module, tensor)
                for part, piece in rows.items():
                    own.setdefault(part, {})[ours] = piece
        return own

    def scaled(self, modules: list[str]) -> dict[str, dict[str, Tensor]]:
        """Returns A and B of each of our layers, from matrices that all share."""
        keys, own = self.keys, {}
        self.expect(["base_model.vera_A", "base_model.vera_B"])
        self.expect(f"{module}.vera_lambda_{leaf}" for module in modules for leaf in "bd")
        sizes = {module: self.shape(module) for module in modules}
        outputs, inputs = (max(size[at] for size in sizes.values()) for at in (0, 1))
        shared = {"vera_A": (keys.r, inputs), "vera_B": (outputs, keys.r)}
        shared = {name: self.take(f"base_model.{name}", shape) for name, shape in shared.items()}
        for module, size in sizes.items():
            leaves = {"vera_lambda_b": size[:1], "vera_lambda_d": (keys.r,)}
            said = shared | {leaf: self.take(f"{module}.{leaf}", shape) for leaf, shape in leaves.items()}
            pair = as_lora(said, *size)
            for part, b in self.rows(module, pair["lora_B"]).items():
                own[part] = {"A": pair["lora_A"], "B": b}
        return own

    def factors(self, modules: list[str]) -> dict[str, dict[str, Tensor]]:
        """Returns g of each of our layers. Those of the input of `down` are ours of the output of `up`."""
        own: dict[str, dict[str, Tensor]] = {}
        self.expect(f"{module}.ia3_l" for module in modules)
        for module in modules:
            outputs, inputs = self.shape(module)
            if not fits(module, self.keys.feedforward_modules or ()):
                rows = self.rows(module, self.take(f"{module}.ia3_l", (outputs, 1))[:, 0])
            else:
                block, _, leaf = self.of[module][0].rpartition(".")
                if leaf != "down" or not self.names.config.gated_mlp:
                    what = f"feedforward_modules names {module}; of inputs, factors of the last layer of a gated MLP"
                    raise ValueError(f"{what} are read, and no others")
                rows = {f"{block}.up": self.take(f"{module}.ia3_l", (1, inputs))[0]}
            for part, g in rows.items():
                own[part] = {"g": g * own[part]["g"] if part in own else g}
        return own

    def base_parameters(self) -> dict[str, Tensor]:
        """Returns the base's parameters that the adapter replaces, under our names: all tensors that are left."""
        keys, names = self.keys, self.names
        for saved in keys.modules_to_save or ():
            modules = [module for module in {**self.of, self.head: []} if module.endswith(saved)]
            if not modules:
                raise ValueError(f"modules_to_save names {saved}, which the base does not have")
            self.expect(f"{module}.weight" for module in modules if module in self.of)
        embed, head = f"{self.embed}.weight", f"{self.head}.weight"
        if names.config.tie_embeddings and (embed in self.left or head in self.left):
            both = embed in self.left and head in self.left and torch.equal(self.left[embed], self.left[head])
            if not both and not (embed in self.left and getattr(keys, "ensure_weight_tying", False)):
                what = f"{embed} and {head} are one tensor in this base (tie_word_embeddings), and two in the adapter"
                raise ValueError(f"{what}: modules_to_save must name both, or ensure_weight_tying be true")
            self.left.pop(head, None)
        found = {}
        for name in list(self.left):
            module, _, leaf = name.rpartition(".")
            theirs = f"{names.in_files(module)}.{leaf}"
            if theirs not in names.parts:
                raise ValueError(f"{name} is of no module that target_modules, modules_to_save or bias names")
            tensor = self.take(name, names.shapes[theirs])
            found |= names.rows(theirs, tensor.t() if names.transposed(theirs) and tensor.ndim == 2 else tensor)
        same = (ours for ours, t in found.items() if torch.equal(t, names.read(self.weights, ours).to(t.dtype)))
        for ours in () if isinstance(keys, NormKeys) else list(same):  # peft saves embeddings without need
            found.pop(ours)
        return {ours: tensor.contiguous() for ours, tensor in found.items()}

    def rows_of_tokens(self) -> dict[str, Tensor]:
        """Returns the tables of which the adapter replaces the rows of some tokens, under our names."""
        indices, found = self.keys.trainable_token_indices or {}, {}
        tied = self.names.config.tie_embeddings
        for layer, ids in (indices if isinstance(indices, dict) else {self.embed: indices}).items():
            table = next((ours for ours in ("embed", "head") if fits(self.names.module(ours), (layer,))), None)
            if table is None or (tied and table == "head"):
                what = "is the embedding of this base (tie_word_embeddings)" if table else "is no table of tokens"
                raise ValueError(f"trainable_token_indices names {layer[:60]}, which {what}")
            module, weight = self.names.module(table), self.names.read(self.weights, f"{table}.weight")
            if len({*ids}) < len(ids) or not {*ids} <= {*range(len(weight))}:
                what = f"different numbers below {len(weight)}, got {ids[:20]}"
                raise ValueError(f"trainable_token_indices must be {what}")
            self.expect([f"{module}.{TOKEN_ROWS}"])
            rows = self.take(f"{module}.{TOKEN_ROWS}", (len(ids), weight.size(1)))
            if f"{module}.weight" in self.left:
                raise ValueError(f"modules_to_save and trainable_token_indices name {layer}: one of them can count")
            found[f"{table}.weight"] = weight.to(rows.dtype, copy=True)
            found[f"{table}.weight"][list(ids)] = rows
        return found

    def shape(self, module: str) -> tuple[int, int]:
        """Returns how many outputs and inputs a module has."""
        shapes = [self.names.ours[f"{part}.weight"] for part in self.of[module]]
        return sum(outputs for outputs, _ in shapes), shapes[0][1]

    def rows(self, module: str, tensor: Tensor) -> dict[str, Tensor]:
        """Returns the rows of each of our layers, of a tensor with a row for each output of a module."""
        split = self.names.rows(self.names.file_name(f"{self.of[module][0]}.weight"), tensor)
        return {name.removesuffix(".weight"): rows for name, rows in split.items()}

    def expect(self, wanted: Iterable[str]) -> None:
        missing = [name for name in wanted if name not in self.left]
        if missing:
            raise ValueError(f"the file does not hold {some(missing)}, for which the config asks")

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.left.pop(name)
        check_shape(name, tensor, shape)
        return tensor


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}; by its config and base it must be {shape}")


def before_text(keys: PromptKeys, tensors: Mapping[str, Tensor], names: NameMap) -> Learned:
    """Returns vectors, or keys and values, that stand before the text."""
    if [*tensors] != ["prompt_embeddings"]:
        raise ValueError(f"there must be one tensor, prompt_embeddings, got {some(sorted(tensors))}")
    config, count, vectors = names.config, keys.num_virtual_tokens, tensors["prompt_embeddings"]
    if keys.peft_type == "PREFIX_TUNING":
        if not all(layer.by_keys for layer in config.layers):
            what = "some of its layers have no attention, or a state beside it"
            raise ValueError(f"peft_type PREFIX_TUNING is not read for this base: {what}")
        if (step := step_of_keys(config)) is not None:
            what = f"peft_type PREFIX_TUNING is not read for this base: keys and values go through {step} in it"
            raise ValueError(f"{what}, and those of peft come after it")
        method, width = Prefix(prompt_length=count), config.n_kv_heads * config.head_dim
        places = [f"blocks.{layer}.attn.{leaf}.slot" for layer in range(config.n_layers) for leaf in "kv"]
    else:
        method, width, places = Prompt(prompt_length=count, init="random"), config.d_model, ["after_embed"]
    check_shape("prompt_embeddings", vectors, (count, len(places) * width))
    parts = zip(places, vectors.split(width, 1), strict=True)
    return method, in_slots(method, names, {place: {"vectors": part.contiguous()} for place, part in parts})


def in_slots(method: Method, names: NameMap, own: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the tensors of each slot under the names that they have in the delta of a method."""
    with torch.device("meta"):
        attach(model := GPT(names.config), method)
    found = {}
    for place, parts in own.items():
        (delta,) = model.get_submodule(place).deltas
        found |= {f"{place}.{delta}.{leaf}": tensor for leaf, tensor in parts.items()}
    return found
