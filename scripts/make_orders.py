"""Write the quickstart's task: bakery orders in plain words, each answered by one line of strict JSON.

    python scripts/make_orders.py OUT_DIR

makes OUT_DIR/train.jsonl and OUT_DIR/validation.jsonl, the same bytes on every run. The answer always has the keys
name, item, qty, day, time, gift: the item in the singular, the number as an integer, the weekday as three letters, the
time as 24-hour HH:MM, gift true only if asked for, and null for a name, day or time that the sentence does not say.
No sentence, answer or skeleton (opening, order of clauses, ending) of the validation file occurs in the training file.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = 20
SIZES = {"validation": 48, "train": 360}  # the held-out rows are drawn first, the training rows then avoid them
ASK = "Order to JSON: "
SHORTEST, LONGEST = 12, 26  # words of a sentence

# fmt: off
NAMES = (
    "Maria", "Tom", "Anna", "Leo", "Sara", "Omar", "Julia", "Ben", "Nina", "Paul",
    "Clara", "David", "Emma", "Hugo", "Rosa", "Adam", "Lucy", "Ivan", "Grace", "Sam",
    "Alice", "Victor", "Eva", "Daniel", "Laura", "Peter", "Helen", "Frank",
)
# fmt: on
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ITEMS = {  # singular: plural
    "waffle": "waffles",
    "muffin": "muffins",
    "croissant": "croissants",
    "brownie": "brownies",
    "cupcake": "cupcakes",
    "pretzel": "pretzels",
    "baguette": "baguettes",
    "cheesecake": "cheesecakes",
    "cookie": "cookies",
    "rye loaf": "rye loaves",
    "plum cake": "plum cakes",
    "peach pie": "peach pies",
    "lemon tart": "lemon tarts",
    "cherry pastry": "cherry pastries",
}
QUANTITIES = {
    "one": 1,
    "a couple of": 2,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "half a dozen": 6,
    "eight": 8,
    "ten": 10,
    "a dozen": 12,
    "fifteen": 15,
    "twenty": 20,
    "two dozen": 24,
}
TIMES = {
    "10am": "10:00",
    "ten in the morning": "10:00",
    "half past ten in the morning": "10:30",
    "11am": "11:00",
    "eleven in the morning": "11:00",
    "half past eleven in the morning": "11:30",
    "12 o'clock": "12:00",
    "half past twelve": "12:30",
    "3pm": "15:00",
    "three in the afternoon": "15:00",
    "half past three in the afternoon": "15:30",
    "six in the evening": "18:00",
    "half past six in the evening": "18:30",
}

GREETINGS = ("", "", "hi, ", "hello, ", "hey, ", "hi there, ")
OPENINGS = (  # the part before "?" opens a question
    "could I get ?",
    "can you put aside ?",
    "could you please keep ?",
    "may I order ?",
    "would you set aside ?",
    "can we have ?",
    "is it possible to get ?",
    "please reserve",
    "I'd like to order",
    "I need",
    "we would like",
    "please put me down for",
    "I want to book",
    "we'll take",
    "please bake",
)
ENDINGS = {
    "?": ("?", ", please?", "? Thanks!", "? Many thanks.", "? That would be lovely.", "? Thank you so much."),
    ".": (".", ", please.", ". Thanks!", ". Thank you so much.", ", if you can.", ". That would be great."),
}
# A phrase that starts with a comma is closed by one as well when more words follow it.
CLAUSES = {
    "name": (" for {}", " under the name {}", " in the name of {}", ", the name is {}"),
    "day": (" on {}", " this {}", " for {}"),
    "time": (" at {}", " by {}", " ready at {}", ", pickup at {}"),
    "gift": (", gift wrapped", " in gift wrap", " wrapped as a gift", ", with gift wrapping", ", it is a present"),
    "plain": (", no gift wrap", " without gift wrap", ", not gift wrapped"),
}
LEADS = {"name": ("{} here, ", "this is {}, ", "for {}: "), "day": ("on {}, ", "for {}: ", "this {}, ")}


@dataclass(frozen=True)
class Row:
    """One order: its words, its answer, and the skeleton that the words were hung on."""

    sentence: str
    answer: str
    skeleton: tuple[str, ...]

    def line(self) -> str:
        """Returns the row as one line of the JSONL file."""
        return json.dumps({"instruction": ASK + self.sentence, "output": self.answer}) + "\n"


class Deck:
    """Cards drawn without replacement and shuffled again when used up: every value comes about equally often."""

    def __init__(self, cards: Sequence, rng: random.Random):
        self.cards, self.rng, self.left = cards, rng, []

    def draw(self):
        """Returns the next card."""
        if not self.left:
            self.left = self.rng.sample(self.cards, len(self.cards))
        return self.left.pop()


def make_decks(rng: random.Random) -> dict[str, Deck]:
    """Returns a deck for each thing that an order says; "missing" holds the fields that it leaves out."""
    gaps = [("name",), ("day",), ("time",), ("name", "day"), ("name", "time"), ("day", "time")]
    cards = {
        "missing": [()] * 10 + gaps,
        "gift": ["gift", "gift", "plain", None],
        "name": NAMES,
        "day": DAYS,
        "time": list(TIMES),
        "item": list(ITEMS.items()),
        "quantity": list(QUANTITIES.items()),
    }
    return {key: Deck(values, rng) for key, values in cards.items()}


def phrase(order: str, said: dict[str, str], rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """Returns one wording of an `order` ("two waffles") with the fields in `said`, and its skeleton."""
    opening = rng.choice(OPENINGS)
    ending = rng.choice(ENDINGS["?" if opening.endswith("?") else "."])
    lead = rng.choice(["", "", *(key for key in LEADS if key in said)])
    fields = [key for key in said if key != lead]
    rng.shuffle(fields)
    text = rng.choice(GREETINGS)
    if lead:
        text += rng.choice(LEADS[lead]).format(said[lead])
    text += opening.removesuffix("?").strip() + f" {order}"
    for key in fields:
        clause = rng.choice(CLAUSES[key]).format(said[key])
        # After a clause closed by a comma, the next one's own comma would be the second.
        text = text.removesuffix(",") + clause if clause.startswith(",") else text + clause
        text += "," if clause.startswith(",") else ""
    text = text.removesuffix(",") + ending
    return text[0].upper() + text[1:], (opening, lead, *fields, ending)


def make_row(decks: dict[str, Deck], rng: random.Random, taken: list[Row], held_out: list[Row]) -> Row:
    """Returns a row whose sentence is not in the `taken` ones and whose skeleton is not in the `held_out` ones."""
    missing, gift, (item, items), (amount, qty) = (decks[key].draw() for key in ("missing", "gift", "item", "quantity"))
    said = {key: decks[key].draw() for key in ("name", "day", "time") if key not in missing}
    answer = {
        "name": said.get("name"),
        "item": item,
        "qty": qty,
        "day": said["day"][:3].lower() if "day" in said else None,
        "time": TIMES[said["time"]] if "time" in said else None,
        "gift": gift == "gift",
    }
    if gift:
        said[gift] = ""
    order = f"{amount} {item if qty == 1 else items}"
    sentences, skeletons = {row.sentence for row in taken}, {row.skeleton for row in held_out}
    while True:
        sentence, skeleton = phrase(order, said, rng)
        if SHORTEST <= len(sentence.split()) <= LONGEST and sentence not in sentences and skeleton not in skeletons:
            return Row(sentence, json.dumps(answer), skeleton)


def make_rows() -> dict[str, list[Row]]:
    """Returns the rows of each file."""
    rng = random.Random(SEED)
    rows: dict[str, list[Row]] = {}
    for name, size in SIZES.items():
        decks, held_out = make_decks(rng), rows.get("validation", [])
        known = {row.answer for row in held_out}
        rows[name] = []
        while len(rows[name]) < size:
            row = make_row(decks, rng, rows[name], held_out)
            if row.answer not in known:
                rows[name].append(row)
    return rows


def main(out_dir: str) -> None:
    """Writes the two files."""
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make_rows().items():
        # As bytes: the same line ends on every system.
        (folder / f"{name}.jsonl").write_bytes("".join(row.line() for row in rows).encode())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/make_orders.py OUT_DIR")
    main(sys.argv[1])
