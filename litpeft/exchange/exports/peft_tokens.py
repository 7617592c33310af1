"""The rows of tokens that a run added, for peft: trainable_token_indices of an adapter whose base has rows for them."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from litpeft.core.exports import CannotExport
from litpeft.core.safetensors import Weights
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.exports.peft_base import WRAPPED, Adapter
from litpeft.model.added_rows import AddedRows
from litpeft.model.added_tokens import note_tokens
from litpeft.model.delta import Method
from litpeft.model.families.names import NameMap
from litpeft.model.gpt import GPT

TOKEN_ROWS = "token_adapter.trainable_tokens_delta"  # peft's name for the rows themselves, not for a difference


def note_ids(method: Method, base: Path, rows: int) -> None:
    """Tells a method the ids of its tokens; raises CannotExport if one of them has no row in the base."""
    if method.add_tokens and not method.token_ids:
        note_tokens(method, Tokenizer.load(base))
    if method.token_ids and max(method.token_ids) >= rows:
        what = f"it adds tokens to the vocabulary of its base, whose embedding has {rows:,} rows and none for them"
        raise CannotExport(what)


def taken_out(model: GPT) -> dict[str, Tensor]:
    """Takes the rows of new tokens (n, d) out of the slots of a model; returns them by the name of their table."""
    found = {}
    for table in ("embed", "head"):
        deltas = model.get_submodule(table).slot.deltas
        for name in [name for name, delta in deltas.items() if isinstance(delta, AddedRows)]:
            delta = deltas.pop(name)
            if delta.of[0] is None:  # a tied head has none of its own
                found[table] = delta.learned()
    return found


def add_rows(
    adapter: Adapter, rows: dict[str, Tensor], ids: Sequence[int], weights: Weights, names: NameMap
) -> Adapter:
    """Adds the rows of new tokens to an adapter; `weights` are the base's, to which they are relative."""
    if not rows:
        return adapter
    if adapter.config["peft_type"] != "LORA":
        raise CannotExport(f"it adds tokens, which a folder of {adapter.config['peft_type']} does not hold")
    modules = {table: names.module(table) for table in rows}
    if {*modules.values()} & {*(adapter.config["modules_to_save"] or ())}:
        raise CannotExport("it trained the rows of new tokens beside the whole table, and peft has one of the two")
    for table, own in rows.items():
        before = names.read(weights, f"{table}.weight")[list(ids)]
        adapter.tensors[f"{WRAPPED}{modules[table]}.{TOKEN_ROWS}"] = own + before.to(own.dtype)
    every = {module.rpartition(".")[2]: list(ids) for module in modules.values()}
    adapter.config["trainable_token_indices"] = list(ids) if len(every) == 1 else every
    return adapter
