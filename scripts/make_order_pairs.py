"""Write pairs of answers to the quickstart's orders: the right JSON, and the same with one mistake.

    python scripts/make_order_pairs.py OUT_DIR

makes OUT_DIR/train.jsonl of 240 orders of config_hub/data/orders/train.jsonl, and OUT_DIR/validation.jsonl of all that
are held out there, the same bytes on every run. A mistake is one that small models make: another number, a day or a
name that is left out or made up, morning for evening, a whole hour for a half one, a gift that is none.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

SEED = 21
SIZES = {"train": 240, "validation": 48}
ORDERS = Path(__file__).parents[1] / "config_hub" / "data" / "orders"


def mistaken(answer: dict[str, Any], others: list[dict[str, Any]], rng: random.Random) -> dict[str, Any]:
    """Returns the answer with another value of one key; `others` have the values that may be made up."""
    key = rng.choice(("name", "qty", "day", "time", "gift"))
    value = answer[key]
    if key == "gift":
        return answer | {key: not value}
    if key == "time" and value is not None:
        hour, minute = map(int, value.split(":"))
        other = f"{(hour + 12) % 24:02}:{minute:02}", f"{hour:02}:{30 - minute:02}"
        return answer | {key: rng.choice(other)}
    if key != "qty" and value is not None and rng.random() < 0.5:
        return answer | {key: None}
    return answer | {key: rng.choice(sorted({one[key] for one in others} - {value, None}))}


def main(out_dir: str) -> None:
    """Writes the two files."""
    folder, rng = Path(out_dir), random.Random(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        rows = [json.loads(line) for line in (ORDERS / f"{name}.jsonl").read_bytes().splitlines()][:size]
        answers = [json.loads(row["output"]) for row in rows]
        with open(folder / f"{name}.jsonl", "wb") as file:
            for row, answer in zip(rows, answers, strict=True):
                rejected = json.dumps(mistaken(answer, answers, rng))
                pair = {"prompt": row["instruction"], "chosen": row["output"], "rejected": rejected}
                file.write(json.dumps(pair).encode() + b"\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/make_order_pairs.py OUT_DIR")
    main(sys.argv[1])
