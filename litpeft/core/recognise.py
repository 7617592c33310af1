"""Errors for paths that are not model folders: they say what the path is, and which command takes it."""

import os
from pathlib import Path

from litpeft.core.errors import ModelError, some
from litpeft.core.json import read_json
from litpeft.core.terminal import command_line

ADAPTER = "adapter_config.json"
ADAPTERS = (ADAPTER, "adapter*.safetensors", "adapter*.bin", "adapter*.pt")  # of peft, MLX, torchtune
FOLD = "fold it into its base with what made it (peft: PeftModel.from_pretrained, merge_and_unload, save_pretrained)"


def refuse_file(path: Path) -> None:
    """Raises unless `path` is a folder."""
    if not os.path.exists(path):  # false for a name that is too long, where Path.exists would raise
        hint = "give a model folder, a run, or a merged folder; `litpeft download` gets a model of the hub"
        raise ModelError("there is no such folder", where=str(path), hint=hint)
    if path.is_dir():
        return
    if path.suffix == ".gguf":
        what, hint = "this is a GGUF file", convert_hint(path)
    elif path.suffix in (".safetensors", ".bin", ".pth", ".pt", ".ckpt"):
        what, hint = "this is a file of weights; a model is the folder of them", "give the folder that holds it"
    else:
        what, hint = "this is a file; a model is a folder", "give the folder that holds it"
    raise ModelError(what, where=str(path), hint=hint)


def refuse_other(folder: Path) -> None:
    """Raises if `folder` is known to be something else than a model: a run, an adapter, quantised weights, ..."""
    refuse_file(folder)
    where = str(folder)
    adapter = sorted(path.name for pattern in ADAPTERS for path in folder.glob(pattern))
    weights = any(any(folder.glob(name)) for name in ("model*.safetensors", "pytorch_model*.bin"))
    if adapter and weights:
        what = f"the folder holds an adapter ({', '.join(adapter)}) beside full weights: which is meant is not clear"
        hint = f"take the adapter out of the folder, or {FOLD}"
        raise ModelError(what, where=where, hint=hint)
    if adapter:
        base = _said(folder / ADAPTER, "base_model_name_or_path")
        what = f"this is an adapter{f' of {base}' if base else ''} ({', '.join(adapter)}), which litpeft does not read"
        raise ModelError(what, where=where, hint=FOLD)
    if not (folder / "config.json").exists():
        _refuse_without_config(folder)
    quantised = _said(folder / "config.json", "quantization_config")
    kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if quantised is None and (folder / "quantize_config.json").exists():  # of older files
        quantised = kind = "gptq"
    if quantised is not None:
        what = f"the weights are already quantised ({kind or 'quantization_config in config.json'})"
        hint = "take the model's plain weights; `--base.quantize` of finetune holds them in 4 or 8 bits"
        raise ModelError(what, where=where, hint=hint)


def _refuse_without_config(folder: Path) -> None:
    """Raises if a folder without config.json is recognised."""
    where = str(folder)
    if (folder / "final" / "delta.json").exists() or (folder / "delta.json").exists() or (folder / "run.yaml").exists():
        run = folder.parent if folder.name == "final" else folder
        what, hint = (
            "this is a run, and a model folder is asked for",
            f"`{command_line('merge', run)}` makes a model of it",
        )
        if (run / "final" / "config.json").exists():
            hint = f"give {run / 'final'}"
        elif (run / "merged" / "config.json").exists():
            hint = f"give {run / 'merged'}"
        raise ModelError(what, where=where, hint=hint)
    if (folder / "MANIFEST.json").exists():
        what, hint = "this is a checkpoint of a run", "continue the run with --resume, or give its final/ or merged/"
        raise ModelError(what, where=where, hint=hint)
    if ggufs := sorted(folder.glob("*.gguf")):
        raise ModelError(
            f"this is a folder of GGUF files: {some([g.name for g in ggufs])}",
            where=where,
            hint=convert_hint(ggufs[0]),
        )
    inside = sorted({path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/config.json")})
    if inside:
        raise ModelError("the model lies in a folder of this one", where=where, hint=f"give {inside[-1]}")


def _said(path: Path, key: str) -> object:
    """Returns the value of a key in a JSON file; None if there is none."""
    return read_json(path, path.name).get(key) if path.is_file() else None


def convert_hint(path: Path) -> str:
    """Returns a hint with the command that converts a GGUF file, or a folder with pytorch_model*.bin."""
    out = path.with_suffix("") if path.suffix == ".gguf" else path.with_name(f"{path.name}-safetensors")
    return f"`{command_line('convert', path, out)}` makes a model folder of it"
