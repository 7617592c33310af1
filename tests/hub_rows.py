"""What the tests of data sets of the hub share: a hub on this machine that they ask, and files of rows."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from loopback_hub import Hub

from litpeft.data.hub.fetch import listing_of


@contextmanager
def asked_hub(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Gives a hub that this process asks, with a cache in `folder`."""
    with Hub({}) as server:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        files = "{repo_id}/resolve/{revision}/{filename}"  # made of the endpoint when huggingface_hub is imported
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{files}")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "HF_HOME", str(folder / "hf"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hf" / "hub"))
        patch.delenv("HF_TOKEN", raising=False)
        listing_of.cache_clear()
        yield server
        listing_of.cache_clear()


def parquet(*rows: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), out)
    return out.getvalue()


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def qa(*questions: str) -> list[dict[str, str]]:
    return [{"question": question, "answer": "yes"} for question in questions]
