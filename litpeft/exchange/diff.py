"""The command `diff`: in which settings, facts of the tokenizer and tensors two folders differ, and by how much."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from litpeft.core.checksums import read_header, tensor_sums
from litpeft.core.errors import ModelError, UserError
from litpeft.core.json import read_json
from litpeft.core.recognise import ADAPTER, ADAPTER_TENSORS, refuse_file
from litpeft.core.safetensors import Weights
from litpeft.core.terminal import command_line, say
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.identity import changed, tokenizer_changes, tokenizer_identity
from litpeft.exchange.inspect import RUN_MARKS, is_adapter
from litpeft.exchange.run import find_run
from litpeft.exchange.settings import Diff

SHOWN = 40  # tensors that the text lists; JSON has all


@dataclass
class Side:
    """One of the two folders."""

    kind: str
    settings: dict[str, Any]
    tokenizer: dict[str, Any] | None
    files: list[Path]

    def tensors(self) -> dict[str, tuple[Path, str, str, tuple[int, ...]]]:
        """Returns file, sha256, dtype and shape of each tensor by name."""
        found = {}
        for file in self.files:
            sums = tensor_sums(file)
            for name, entry in read_header(file).items():
                found[name] = file, sums[name], entry["dtype"], tuple(entry["shape"])
        return found


def opened(path: Path) -> Side:
    """Returns what is compared of a folder."""
    refuse_file(path)
    if any((path / mark).exists() for mark in RUN_MARKS) and not (run := find_run(path)).is_model:
        settings = {key: value for key, value in run.facts.items() if key not in ("files", "base", "checksum")}
        base = run.facts["base"]
        tokenizer = base.get("tokenizer")
        settings["base"] = {key: value for key, value in base.items() if key != "tokenizer"}
        return Side("a run", settings, tokenizer, run.tensors)
    if is_adapter(path):
        if not (file := path / ADAPTER_TENSORS).exists():
            hint = f"`{command_line('convert', path, '--to', 'peft')}` writes another format as that"
            raise ModelError(f"there is no {file.name}, and diff compares safetensors", where=path, hint=hint)
        return Side("a PEFT adapter", read_json(path / ADAPTER, ADAPTER), None, [file])
    folder = path / "final" if (path / "final" / "config.json").exists() else path
    files = [folder / file for file in Weights(folder).headers]
    return Side("a model", read_json(folder / "config.json", "config.json of a model"), tokenizer_of(folder), files)


def tokenizer_of(folder: Path) -> dict[str, Any] | None:
    """Returns the identity of a folder's tokenizer and its template's sha256; None without one that can be read."""
    try:
        tokenizer = Tokenizer.load(folder)
        return tokenizer_identity(ChatTemplate(tokenizer, is_setting=False)) | {"template": tokenizer.template_hash}
    except UserError:
        return None


def diff(settings: Diff) -> None:
    """Prints the differences as text, or as JSON."""
    found = differences(opened(Path(settings.a)), opened(Path(settings.b)), settings)
    say(json.dumps(found, indent=2) if settings.json else "\n".join(as_text(found, settings)))


def differences(a: Side, b: Side, settings: Diff) -> dict[str, Any]:
    """Returns what `--json` prints."""
    if a.kind != b.kind:
        run = settings.a if a.kind == "a run" else settings.b
        hint = f"`{command_line('merge', run)}` makes a model of a run" if "a run" in (a.kind, b.kind) else ""
        raise ModelError(f"{settings.a} is {a.kind}, {settings.b} is {b.kind}", where="b", hint=hint)
    tokenizer = tokenizer_changes(a.tokenizer, b.tokenizer) if a.tokenizer and b.tokenizer else []
    if (a.tokenizer is None) != (b.tokenizer is None):
        tokenizer = [f"only {settings.b if a.tokenizer is None else settings.a} has a tokenizer that can be read"]
    mine, theirs = a.tensors(), b.tensors()
    common = [name for name in mine if name in theirs]
    return {
        "a": settings.a,
        "b": settings.b,
        "settings": changed(a.settings, b.settings, ()),
        "tokenizer": tokenizer,
        "equal": sum(mine[name][1:] == theirs[name][1:] for name in common),
        "only_a": [name for name in mine if name not in theirs],
        "only_b": [name for name in theirs if name not in mine],
        "tensors": dict(sorted(changes(mine, theirs, common), key=lambda pair: -pair[1].get("share", 1e9))),
    }


def changes(mine: dict[str, Any], theirs: dict[str, Any], common: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each tensor of both sides whose shape, dtype or bytes differ, with the size of the difference."""
    with ExitStack() as stack:
        files = {file for side in (mine, theirs) for file, *_ in side.values()}
        handles = {file: stack.enter_context(safe_open(file, "pt")) for file in files}
        for name in common:
            (file, *facts), (other, *rest) = mine[name], theirs[name]
            if facts == rest:
                continue
            (_, dtype, shape), (_, dtype2, shape2) = facts, rest
            one: dict[str, Any] = {"dtype": [dtype, dtype2]} if dtype != dtype2 else {}
            if shape != shape2:
                yield name, one | {"shape": [list(shape), list(shape2)]}
            else:
                yield name, one | distance(handles[file].get_tensor(name), handles[other].get_tensor(name))


def distance(a: Tensor, b: Tensor) -> dict[str, float]:
    """Returns the largest difference of two tensors, and |a - b| / |a|."""
    a, b = a.to(torch.float64), b.to(torch.float64)
    norm = float(a.norm())
    return {"largest": float((a - b).abs().max()), "share": float((a - b).norm()) / norm if norm else float("inf")}


def as_text(found: dict[str, Any], settings: Diff) -> list[str]:
    """Returns the lines for a reader."""
    lines = [f"a {settings.a}", f"b {settings.b}"]
    lines += [f"settings: {line}" for line in found["settings"]] or ["settings: the same"]
    lines += [f"tokenizer: {line}" for line in found["tokenizer"]] or ["tokenizer: the same"]
    lines += [f"only in a: {name}" for name in found["only_a"]] + [f"only in b: {name}" for name in found["only_b"]]
    tensors = found["tensors"]
    lines.append(f"tensors: {found['equal']} the same, {len(tensors)} differ")
    width = max((len(name) for name in tensors), default=0)
    for name, one in list(tensors.items())[:SHOWN]:
        said = [f"{key} {values[0]} -> {values[1]}" for key, values in one.items() if isinstance(values, list)]
        if "share" in one:
            said.append(f"largest difference {one['largest']:.3g}, {one['share']:.3%} of the norm")
        lines.append(f"  {name:<{width}}  {'; '.join(said)}")
    if len(tensors) > SHOWN:
        lines.append(f"  and {len(tensors) - SHOWN} more, which --json lists")
    return lines
