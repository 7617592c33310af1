"""A sentencepiece model file (tokenizer.model): its pieces, and the BPE merges that they imply."""

from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type
SPACE = "\u2581"  # what sentencepiece writes for a space
BPE_MODEL = 2  # TrainerSpec.ModelType


def read_pieces(path: Path) -> tuple[list[tuple[str, int]], int]:
    """Returns the text and type (NORMAL, CONTROL, ...) of each piece in the order of their ids, and the model's kind.

    Raises ValueError if the file is not a tokenizer.model.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise ValueError("it is no sentencepiece model, or cut short") from None
    pieces = [(piece.piece, piece.type) for piece in model.pieces]
    if not pieces or len(dict(pieces)) < len(pieces):
        raise ValueError("it holds no pieces, or one of them twice")
    return pieces, model.trainer_spec.model_type


def merges_of(order: list[str]) -> list[tuple[str, str]]:
    """Returns the merges that make these pieces, in order: those that make the first piece come first."""
    known = set(order)
    return [
        (piece[:cut], piece[cut:])
        for piece in order
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
