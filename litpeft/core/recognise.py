"""Errors for paths that are not model folders: they say what the path is, and which command takes it."""

import os
from pathlib import Path

from litpeft.core.errors import ModelError, some
from litpeft.core.json import read_optional
from litpeft.core.terminal import command_line

ADAPTER, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
ADAPTERS = (ADAPTER, "adapter*.safetensors", "adapter*.bin", "adapter*.pt")  # of peft, MLX, torchtune
FOLD = "fold it into its base with what made it (peft: PeftModel.from_pretrained, merge_and_unload, save_pretrained)"
# quant_method of weights that are read, beside bitsandbytes in four bits: see litpeft/model/families/packed
PACKED = ("mxfp4", "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "gptq", "awq")
FUSE = "fold it into its base with what made it (mlx-lm: `mlx_lm.fuse`)"


def refuse_file(path: Path) -> None:
    """Raises unless `path` is a folder."""
    if not os.path.exists(path):  # false for a name that is too long, where Path.exists would raise
        hint = "give a model folder, a run, or a merged folder; `litpeft download` gets a model of the hub"
        raise ModelError("there is no such folder", where=path, hint=hint)
    if path.is_dir():
        return
    if path.suffix == ".gguf":
        raise ModelError("this is a GGUF file", where=path, hint=convert_hint(path))
    weights = path.suffix in (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
    what = "of weights; a model is the folder of them" if weights else "; a model is a folder"
    raise ModelError(f"this is a file{' ' if weights else ''}{what}", where=path, hint="give the folder that holds it")


def refuse_other(folder: Path) -> None:
    """Raises if `folder` is known to be something else than a model: a run, an adapter, quantised weights, ..."""
    refuse_file(folder)
    adapter = sorted({path.name for pattern in ADAPTERS for path in folder.glob(pattern)})
    if (folder / "delta.json").exists():
        adapter = []  # a run's result, which is an adapter of peft, too
    weights = any(any(folder.glob(name)) for name in ("model*.safetensors", "pytorch_model*.bin"))
    if adapter and weights:
        what = f"the folder holds an adapter ({', '.join(adapter)}) beside full weights: which is meant is not clear"
        raise ModelError(what, where=folder, hint=f"take the adapter out of the folder, or {FOLD}")
    if adapter:
        base = read_optional(folder / ADAPTER).get("base_model_name_or_path")
        what, hint = f"this is an adapter{f' of {base}' if base else ''} ({', '.join(adapter)})", FOLD
        if is_peft(folder):
            what, hint = (
                f"{what}, and a model folder is asked for",
                f"`{command_line('merge', folder)}` makes one of it",
            )
        else:
            what += ", which litpeft does not read"
            hint = FUSE if (folder / "adapters.safetensors").exists() else hint
        raise ModelError(what, where=folder, hint=hint)
    if not (folder / "config.json").exists():
        _refuse_without_config(folder)
    quantised = read_optional(folder / "config.json").get("quantization_config")
    kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if quantised is None and (folder / "quantize_config.json").exists():  # of older files
        quantised = kind = "gptq"
    four_bits = isinstance(quantised, dict) and kind == "bitsandbytes" and quantised.get("load_in_4bit")
    if quantised is not None and kind not in PACKED and not four_bits:
        what = f"the weights are already quantised ({kind or 'quantization_config in config.json'})"
        if (folder / "config.json").exists() and kind:
            what += (
                f", says quantization_config of config.json; {', '.join(PACKED)} and bitsandbytes in 4 bits are read"
            )
        hint = "take the model's plain weights; `--base.quantize` of finetune holds them in 4 or 8 bits"
        raise ModelError(what, where=folder, hint=hint)


def is_peft(folder: Path) -> bool:
    """Returns whether a folder is an adapter of peft."""
    return "peft_type" in read_optional(folder / ADAPTER)


def _refuse_without_config(folder: Path) -> None:
    """Raises if a folder without config.json is recognised."""
    if any((folder / name).exists() for name in ("final/delta.json", "delta.json", "run.yaml")):
        run = folder.parent if folder.name == "final" else folder
        models = (run / name for name in ("final", "merged") if (run / name / "config.json").exists())
        model = next(models, None)
        hint = f"give {model}" if model else f"`{command_line('merge', run)}` makes a model of it"
        raise ModelError("this is a run, and a model folder is asked for", where=folder, hint=hint)
    if (folder / "MANIFEST.json").exists():
        hint = "continue the run with --resume, or give its final/ or merged/"
        raise ModelError("this is a checkpoint of a run", where=folder, hint=hint)
    if ggufs := sorted(folder.glob("*.gguf")):
        what = f"this is a folder of GGUF files: {some([file.name for file in ggufs])}"
        raise ModelError(what, where=folder, hint=convert_hint(ggufs[0]))
    inside = sorted({path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/config.json")})
    if inside:
        raise ModelError("the model lies in a folder of this one", where=folder, hint=f"give {inside[-1]}")


def convert_hint(path: Path) -> str:
    """Returns a hint with the command that converts a GGUF file, or a folder with pytorch_model*.bin."""
    out = path.with_suffix("") if path.suffix == ".gguf" else path.with_name(f"{path.name}-safetensors")
    return f"`{command_line('convert', path, out)}` makes a model folder of it"
