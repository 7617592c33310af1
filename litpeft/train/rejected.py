"""The file of the rows that a run cannot use, each with the reason."""

import json
from dataclasses import asdict
from pathlib import Path

from litpeft.core.folders import atomic_file
from litpeft.train.preparation import Preparation


def add_rejected(run: Preparation) -> None:
    """Writes rejected.jsonl: the rows that were rejected, behind those that were before."""
    path = Path(run.settings.out) / "rejected.jsonl"
    if run.rows.rejected:
        written = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines = [json.dumps(asdict(row), ensure_ascii=False) for row in run.rows.rejected]
        with atomic_file(path) as handle:
            handle.writelines(f"{line}\n" for line in dict.fromkeys([*written, *lines]))
