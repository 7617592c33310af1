"""What a model or run can be written as for another program: a row for each, with the function that writes it."""

from dataclasses import dataclass

from litpeft.core.recognise import ADAPTER


class CannotExport(Exception):
    """Another program's files cannot hold what a run learned; the text says why."""


@dataclass(frozen=True)
class Export:
    write: str  # module:function; of an adapter it takes a folder, a run and its base's folder, and returns what to say
    files: tuple[str, ...]  # beside *.safetensors: what a folder of it holds
    keys: tuple[str, ...] = ("base", "no_verify")  # of the settings of `convert` that are not for every kind
    of_models: bool = False  # takes models too; then `write` takes the settings of `convert`


EXPORTS = {
    "peft": Export("litpeft.exchange.exports.peft:write", (ADAPTER,)),
    "gguf": Export(
        "litpeft.exchange.exports.gguf:export",
        ("model.gguf", "Modelfile"),
        ("base", "dtype", "type", "no_verify"),
        of_models=True,
    ),
    "gguf-adapter": Export("litpeft.exchange.exports.gguf_adapter:write", ("adapter.gguf", "Modelfile")),
    "mlx": Export("litpeft.exchange.exports.mlx:write", (ADAPTER,)),
}
