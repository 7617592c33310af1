"""What a run can be written as for another program: a row for each, with the function that writes it and its files."""

from dataclasses import dataclass

from litpeft.core.recognise import ADAPTER


@dataclass(frozen=True)
class Export:
    write: str  # module:function, which takes a folder, a run and its base's folder, and returns a line to print
    files: tuple[str, ...]  # beside *.safetensors: what a folder of it holds


EXPORTS = {
    "peft": Export("litpeft.exchange.exports.peft:write", (ADAPTER,)),
}
