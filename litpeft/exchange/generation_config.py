"""generation_config.json, which tells other programs the ids that end an answer."""

from collections.abc import Collection
from pathlib import Path

from litpeft.core.json import read_json, write_json
from litpeft.core.terminal import say
from litpeft.data.tokenizer import ids_of

NAME = "generation_config.json"
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")  # transformers takes them from config.json if it is missing


def write_stop_ids(folder: Path, stop_ids: Collection[int]) -> None:
    """Writes all ids that end an answer into a folder's generation_config.json; says so if it had others."""
    path, model = folder / NAME, read_json(folder / "config.json", "config.json of a model")
    known = read_json(path, NAME) if path.is_file() else {key: model[key] for key in KEPT if model.get(key) is not None}
    before = ids_of(known.get("eos_token_id"))
    same = set(before) == set(stop_ids)
    if same and path.is_file():
        return
    ids = list(dict.fromkeys((*before, *stop_ids)))  # the first stays first: transformers may pad with it
    known.pop("_from_model_config", None)  # else transformers may take config.json's ids instead
    write_json(path, known | {"eos_token_id": ids if len(ids) > 1 else ids[0]})
    if not same:
        now, then = (" and ".join(map(str, listed)) for listed in (ids, before))
        say(f"{NAME} now names the ids that end an answer, {now}; it named {then or 'none'}")
