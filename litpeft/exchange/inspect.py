"""The command `inspect`: what a model folder, a run, a PEFT adapter or a GGUF file holds, and what it can become."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from litpeft.core.checksums import read_header
from litpeft.core.errors import ModelError, UserError, counted, scaled
from litpeft.core.exports import CannotExport
from litpeft.core.json import read_json
from litpeft.core.recognise import ADAPTER, ADAPTER_TENSORS, is_peft, refuse_file, refuse_other
from litpeft.core.safetensors import Weights
from litpeft.core.terminal import command_line, say
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.exports.low_rank import factors_in
from litpeft.exchange.exports.mlx import module_of
from litpeft.exchange.exports.peft import adapter_of
from litpeft.exchange.gguf.layout import known_family, of_expert
from litpeft.exchange.gguf.vocabulary import vocabulary
from litpeft.exchange.gguf.weights import BoundedReader, GgufFile
from litpeft.exchange.imports.peft import PeftRun, read_tensors
from litpeft.exchange.run import Run, build_run, find_run
from litpeft.exchange.settings import Inspect
from litpeft.exchange.updates import learned, low_rank_values, measured, trained
from litpeft.model.config import ModelConfig
from litpeft.model.families.names import NameMap
from litpeft.model.families.read import read_config
from litpeft.model.fold import unfoldable
from litpeft.model.gpt import GPT

RUN_MARKS = ("final/delta.json", "delta.json", "run.yaml")


def inspect(settings: Inspect) -> None:
    """Prints the facts as text, or as JSON."""
    path = Path(settings.path)
    found = facts(path, settings.base)
    say(json.dumps(found, indent=2) if settings.json else "\n".join(as_text(found)))


def facts(path: Path, base: str | None = None) -> dict[str, Any]:
    """Returns what `--json` prints."""
    if path.is_file() and path.suffix == ".gguf":
        return gguf_facts(path)
    refuse_file(path)
    if any((path / mark).exists() for mark in RUN_MARKS):
        return run_facts(find_run(path), base)
    return adapter_facts(path, base) if is_adapter(path) else model_facts(path)


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder holds an adapter that PEFT wrote, and no model; raises for another's adapter."""
    if not (folder / ADAPTER).is_file() or any(folder.glob("model*.safetensors")):
        return False
    if not is_peft(folder):
        refuse_other(folder)
    return True


def held(files: Iterable[Path]) -> dict[str, Any]:
    """Returns parameters, numbers of each dtype, bytes and every tensor of safetensors files, from their headers."""
    files = list(files)
    tensors = {name: entry for file in files for name, entry in read_header(file).items()}
    kinds: Counter[str] = Counter()
    for entry in tensors.values():
        kinds[entry["dtype"]] += math.prod(entry["shape"])
    size = sum(file.stat().st_size for file in files)
    shown = {name: {"dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in tensors.items()}
    return {"parameters": sum(kinds.values()), "dtypes": dict(kinds), "bytes": size, "files": len(files)} | {
        "tensors": shown
    }


def sizes(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a config that differ from their defaults, and all that have none."""
    default = {name: field.default for name, field in ModelConfig.__dataclass_fields__.items()}
    return {name: value for name, value in asdict(config).items() if value != default[name]}


def model_facts(folder: Path) -> dict[str, Any]:
    """Returns the facts of a model folder; one that litpeft does not read says why."""
    weights, plain = Weights(folder), {}
    found: dict[str, Any] = {"kind": "model", "path": str(folder)}
    try:
        name, config = read_config(folder)
        names = NameMap(name, config)
        names.check(weights)
        found |= {"family": name, "config": sizes(config)}
        plain = {"parameters": sum(map(math.prod, names.shapes.values()))}  # of packed weights, not their bytes
        found |= {"exports": as_gguf(folder, names, None, folder)}
    except ModelError as error:
        found |= {"family": read_json(folder / "config.json", "config.json").get("model_type"), "refused": error.what}
    found |= held(folder / file for file in weights.headers) | plain
    return found | {"fingerprint": weights.fingerprint()}


def run_facts(run: Run, base: str | None) -> dict[str, Any]:
    """Returns the facts of a run; those of its updates if its base is at hand."""
    record, place = run.facts, str(run.folder)
    found: dict[str, Any] = {"kind": "run", "path": place, "method": record["method"], "settings": record["settings"]}
    found |= {key: record[key] for key in ("precision", "step", "finished")}
    found |= {"base": {key: record["base"][key] for key in ("path", "fingerprint", "storage")}}
    found |= {"init_from": began} if (began := record.get("init_from")) else {}
    found |= held(run.tensors)
    try:
        folder = run.base_folder(base)
    except ModelError as error:
        return found | {"updates_unknown": error.what}
    names = NameMap(*read_config(folder))
    found |= {"family": names.family, "config": sizes(names.config)}
    if run.is_model:
        ways = {"safetensors": str(run.model_folder())} | as_gguf(run.place, names, run, run.model_folder())
        return found | {"updates": dict(trained(run, folder)), "exports": ways}
    with torch.no_grad():
        model = build_run(run, folder, run.dtype, storage=run.storage)
    if kind := unfoldable(model):
        found["updates_unknown"] = f"{kind} acts on activations: it is no update of weights"
        ways = {"safetensors": f"no: {kind} acts on activations", "gguf": "no, for that reason"}
        return found | {"exports": ways | as_adapter(run, folder)}
    lora = {"lora": command_line("combine", run.place, f"{run.place}-as-lora")}
    ways = as_weights(run, names, folder) | lora | as_factors(run, model, names) | as_adapter(run, folder)
    return found | {"updates": dict(learned(model)), "exports": ways}


def as_weights(run: Run, names: NameMap, base: Path) -> dict[str, str]:
    """Returns for each format of weights the command that writes a run which folds, or why there is none."""
    return {"safetensors": command_line("merge", run.place)} | as_gguf(run.place, names, run, base)


def as_gguf(place: Path, names: NameMap, run: Run | None, folder: Path) -> dict[str, str]:
    """Returns the command that writes a model or a run as GGUF, or why there is none."""
    try:
        known_family(names)
        tokenizer = run.tokenizer_and_template(folder)[0] if run else Tokenizer.load(folder)
        vocabulary(tokenizer, None, names.config.vocab_size, (), False)
    except UserError as error:
        return {"gguf": f"no: {error.what}"}
    return {"gguf": command_line("convert", place, "--to", "gguf")}


def as_factors(run: Run, model: GPT, names: NameMap) -> dict[str, str]:
    """Returns for each format of low-rank updates the command that writes a run, or why there is none."""
    try:
        layers = factors_in(model, run)
    except CannotExport as error:
        return dict.fromkeys(("gguf-adapter", "mlx"), f"no: {error}")
    ways = {to: command_line("convert", run.place, "--to", to) for to in ("gguf-adapter", "mlx")}
    try:
        known_family(names)
        if any(of_expert(f"{layer}.weight") for layer in layers):
            ways["gguf-adapter"] = "no: it changes experts, whose updates are not written as an adapter"
    except UserError as error:
        ways["gguf-adapter"] = f"no: {error.what}"
    try:
        for layer in layers:
            module_of(names, layer)
    except CannotExport as error:
        ways["mlx"] = f"no: {error}"
    return ways


def as_adapter(run: Run, base: Path) -> dict[str, str]:
    """Returns the command that writes a run as an adapter of PEFT, or why there is none."""
    try:
        adapter_of(run.method(), run.storage, run.delta(), base)
    except CannotExport as error:
        return {"peft": f"no: {error}"}
    return {"peft": command_line("convert", run.place, "--to", "peft")}


def adapter_facts(folder: Path, base: str | None) -> dict[str, Any]:
    """Returns the facts of a folder that PEFT wrote, and its updates: those of LoRA's factors need no base."""
    config = read_json(folder / ADAPTER, ADAPTER)
    found = {"kind": "PEFT adapter", "path": str(folder), "method": config.get("peft_type"), "settings": config}
    found |= {"base": {"path": config.get("base_model_name_or_path")}} | adapter_held(folder)
    try:
        run = PeftRun.read(folder)
    except ModelError as error:
        return found | {"refused": error.what, "updates": lora_updates(config, folder)}
    try:
        where = run.base_folder(base)
    except ModelError as error:
        return found | {"exports_unknown": error.what, "updates": lora_updates(config, folder)}
    names = NameMap(*read_config(where))
    found |= {"family": names.family}
    with torch.no_grad():
        model = build_run(run, where, run.dtype)
    if kind := unfoldable(model):
        return found | {"exports": {"safetensors": f"no: {kind} acts on activations"} | as_adapter(run, where)}
    ways = as_weights(run, names, where) | as_factors(run, model, names) | as_adapter(run, where)
    return found | {"exports": ways, "updates": lora_updates(config, folder) or dict(learned(model))}


def adapter_held(folder: Path) -> dict[str, Any]:
    """Returns `held` of an adapter's file, which may be a .bin."""
    if (folder / ADAPTER_TENSORS).exists() or not (file := folder / "adapter_model.bin").exists():
        return held([folder / ADAPTER_TENSORS])
    tensors = read_tensors(folder)
    shown = {name: {"dtype": "F32", "shape": list(tensor.shape)} for name, tensor in tensors.items()}
    count = sum(tensor.numel() for tensor in tensors.values())
    return {"parameters": count, "dtypes": {"F32": count}, "bytes": file.stat().st_size, "files": 1, "tensors": shown}


def lora_updates(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the size of each update B A; none with DoRA, whose updates depend on the base."""
    tensors, updates = {} if config.get("use_dora") else read_tensors(folder), {}
    for name, a in sorted(tensors.items()):
        b = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if ".lora_A." in name and b is not None and a.dim() == b.dim() == 2:
            layer = name.partition(".lora_A.")[0].removeprefix("base_model.model.")
            values = lora_scale(config, layer, len(a)) * low_rank_values(a, b)
            updates[layer] = {"shape": [len(b), a.size(1)], **measured(values, None)}
    return updates


def lora_scale(config: dict[str, Any], layer: str, rank: int) -> float:
    """Returns what PEFT multiplies B A with: alpha, of the layer's pattern if one matches, over r or its root."""
    patterns = (config.get("alpha_pattern") or {}).items()
    alpha = next((one for key, one in patterns if re.match(rf"(.*\.)?({key})$", layer)), config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def gguf_facts(path: Path) -> dict[str, Any]:
    """Returns the facts of a GGUF file from its header."""
    found: dict[str, Any] = {"kind": "GGUF file", "path": str(path)}
    try:
        file = GgufFile(path)
        reader, values = file.reader, file.values
        out = path.with_suffix("")
        found["exports"] = {"safetensors": command_line("convert", path, out)}
    except ModelError as error:
        try:
            reader = BoundedReader(path)
        except (ValueError, LookupError, ArithmeticError, TypeError, OSError):
            raise error from None
        values = {name: field.contents() for name, field in reader.fields.items()}
        found["refused"] = error.what
    family = values.get("general.architecture")
    config = {key.removeprefix(f"{family}."): v for key, v in values.items() if key.startswith(f"{family}.")}
    kinds: Counter[str] = Counter()
    for tensor in reader.tensors:
        kinds[tensor.tensor_type.name] += int(tensor.n_elements)
    found |= {"family": family, "config": config, "parameters": sum(kinds.values()), "dtypes": dict(kinds)}
    shapes = {t.name: {"dtype": t.tensor_type.name, "shape": [int(n) for n in t.shape[::-1]]} for t in reader.tensors}
    return found | {"bytes": path.stat().st_size, "files": 1, "tensors": shapes}


def as_text(found: dict[str, Any]) -> list[str]:
    """Returns the lines for a reader."""
    rows = {"family": found.get("family"), "refused": found.get("refused"), "method": found.get("method")}
    rows |= {key: pairs(found[key]) for key in ("settings", "config") if found.get(key)}
    rows["parameters"] = f"{scaled(found['parameters'])} in {counted(len(found['tensors']), 'tensor')}"
    rows["dtypes"] = ", ".join(f"{kind} {scaled(count)}" for kind, count in found["dtypes"].items())
    rows["size"] = f"{scaled(found['bytes'], 'B')} in {counted(found['files'], 'file')}"
    rows |= {key: found.get(key) for key in ("fingerprint", "precision", "step")}
    rows["base"] = pairs(found["base"]) if "base" in found else None
    rows["began with"] = pairs(found["init_from"]) if "init_from" in found else None
    lines = [f"{found['path']}: {found['kind']}"]
    rows |= {f"to {name}": way for name, way in found.get("exports", {}).items()}
    rows |= {"exports": found.get("exports_unknown"), "updates": found.get("updates_unknown")}
    lines += [f"{key:<16}{value}" for key, value in rows.items() if value is not None]
    if updates := found.get("updates"):
        lines += ["", *table(updates)]
    return lines


def pairs(values: dict[str, Any]) -> str:
    """Returns the keys that are set, with their values: `rank 8, alpha 16`."""
    shown = {key: value for key, value in values.items() if value not in (None, [], {}, (), "")}
    return ", ".join(f"{key} {json.dumps(value, default=str)}" for key, value in shown.items())


def table(updates: dict[str, dict[str, Any]]) -> list[str]:
    """Returns a row for each update, aligned."""
    width = max(len(name) for name in updates)
    lines = [f"{'update of':<{width}}  {'norm':>10}  {'share':>8}  effective rank"]
    for name, one in updates.items():
        share = f"{one['share']:.3%}" if "share" in one else "-"
        rank = "-" if one["effective_rank"] is None else f"{one['effective_rank']:.1f}"
        lines.append(f"{name:<{width}}  {one['norm']:>10.4g}  {share:>8}  {rank:>14}")
    return lines
