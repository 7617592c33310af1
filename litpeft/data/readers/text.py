"""Plain text: the file is one document, or each of its paragraphs or lines is one. A row is {"text": document}."""

from collections.abc import Iterator
from typing import BinaryIO, Literal

from litpeft.data.readers.bytes import not_utf8, refuse_binary
from litpeft.data.readers.record import Record

Documents = Literal["file", "paragraph", "line"]


def read(handle: BinaryIO, place: str, documents: Documents = "file") -> Iterator[Record]:
    """Yields the documents that are not blank; a blank line ends a paragraph."""
    refuse_binary(handle, place, "text")
    lines: list[str] = []
    first, problem = 1, ""
    for number, raw in enumerate(handle, 1):
        try:
            line = raw.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            line = "\N{REPLACEMENT CHARACTER}"
            problem = problem or not_utf8(error, number)
        blank = not line.strip()
        if documents == "line" or (documents == "paragraph" and blank):
            yield from _document(f"{place}:{first}", [*lines, *([] if blank else [line])], problem)
            lines, problem = [], ""
        elif lines or not blank:
            lines.append(line)
        if not lines:
            first = number + 1
    yield from _document(f"{place}:{first}", lines, problem)


def _document(where: str, lines: list[str], problem: str) -> Iterator[Record]:
    text = "\n".join(lines).rstrip("\n")
    if "\0" in text:
        problem = problem or "it holds a NUL character"
    if text.strip():
        yield Record(where, None if problem else {"text": text}, problem)
