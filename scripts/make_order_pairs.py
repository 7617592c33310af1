"""Write pairs of answers to the quickstart's orders: the right JSON, and the same as people would write its values.

    python scripts/make_order_pairs.py OUT_DIR

makes OUT_DIR/train.jsonl of 240 orders of config_hub/data/orders/train.jsonl, and OUT_DIR/validation.jsonl of all that
are held out there, the same bytes on every run. In the rejected answers the day is spelt out, the time is am or pm, a
gift is yes or no, the number is a text, and what is not said is "none": {"qty": "24", "time": "3:30 pm"}.
"""

import json
import sys
from pathlib import Path
from typing import Any

SIZES = {"train": 240, "validation": 48}
ORDERS = Path(__file__).parents[1] / "config_hub" / "data" / "orders"
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def loosely(answer: dict[str, Any]) -> dict[str, str]:
    """Returns the answer with its values as people write them."""
    said = answer | {"qty": str(answer["qty"]), "gift": "yes" if answer["gift"] else "no"}
    if answer["day"] is not None:
        said["day"] = next(day for day in DAYS if day[:3].lower() == answer["day"])
    if answer["time"] is not None:
        hour, minute = answer["time"].split(":")
        said["time"] = f"{(int(hour) - 1) % 12 + 1}:{minute} {'am' if int(hour) < 12 else 'pm'}"
    return {key: "none" if value is None else value for key, value in said.items()}


def main(out_dir: str) -> None:
    """Writes the two files."""
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        rows = [json.loads(line) for line in (ORDERS / f"{name}.jsonl").read_bytes().splitlines()][:size]
        with open(folder / f"{name}.jsonl", "wb") as file:
            for row in rows:
                rejected = json.dumps(loosely(json.loads(row["output"])))
                pair = {"prompt": row["instruction"], "chosen": row["output"], "rejected": rejected}
                file.write(json.dumps(pair).encode() + b"\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/make_order_pairs.py OUT_DIR")
    main(sys.argv[1])
