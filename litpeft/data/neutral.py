"""Text that has nothing to do with a task: its loss before and after training shows what a model has forgotten."""

from pathlib import Path

from litpeft.core.errors import ConfigError
from litpeft.data.readers import kind
from litpeft.data.rows import Row
from litpeft.data.settings import Data
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import load_dataset

OWN, NONE = "auto", "none"
LONGEST = 512  # tokens of a piece
FORGOT = (  # rise of the loss in nats per token, below which it is called so
    (0.0, "it forgot nothing"),
    (0.1, "it forgot little"),
    (0.5, "it forgot some of what it could"),
)


def neutral_rows(name: str, template: ChatTemplate, reach: int, key: str) -> list[Row]:
    """Returns the paragraphs of a text file as rows: litpeft's own page for `auto`, none for `none`.

    `key` is the setting that names the file.
    """
    if name == NONE:
        return []
    path = Path(__file__).with_name("neutral.txt") if name == OWN else Path(name)
    if kind(path)[0] != ".txt":
        raise ConfigError(f"must be {OWN}, {NONE}, or a file of plain text that ends in .txt, got {name!r}", where=key)
    whole = {"max_length": LONGEST, "overlong": "split", "bad_rows": "skip"}
    data = Data(str(path), None, 0.0, documents="paragraph", **whole)
    return load_dataset(data, template.tokenizer, template, reach).train


def forgetting(before: float, after: float) -> str:
    """Returns in words what became of the loss on neutral text."""
    much = "it forgot much: lower train.lr, train less, or mix in rows of other kinds"
    how = next((words for limit, words in FORGOT if after - before <= limit), much)
    return f"on neutral text the loss went from {before:.2f} to {after:.2f} nats per token: {how}"
