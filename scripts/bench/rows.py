"""Writes the rows of the benchmark so that every tool gets the same ones, in the way it likes them.

    python -m scripts.bench.rows DATA MODEL FOLDER [ROWS HELD_OUT MAX_LENGTH]

DATA holds alpaca rows. The first ROWS of those with at most MAX_LENGTH tokens are trained on, the last HELD_OUT
measured. FOLDER gets train.json and val.json (instruction, input, output: litpeft and Lit-GPT), prompts.jsonl (prompt,
completion: TRL) and tokens.json: the ids of each row, and which are trained, to check what each tool was seen to read.
"""

import json
import sys
from pathlib import Path

from litpeft.data.rows import Row
from litpeft.data.settings import Data
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import load_dataset
from litpeft.data.tokenizer import Tokenizer
from litpeft.model.families.read import read_config


def prepare(data: Path, model: Path, folder: Path, rows: int = 48, held_out: int = 64, max_length: int = 512) -> None:
    """Writes the files; `model` is the Hugging Face folder whose tokenizer and reach count."""
    tokenizer = Tokenizer.load(model)
    template = ChatTemplate(tokenizer, "alpaca")
    settings = Data(
        str(data),
        validation_split=0.0,
        format="alpaca",
        template="alpaca",
        max_length=max_length,
        overlong="drop",
        bad_rows="skip",
    )
    usable = load_dataset(settings, tokenizer, template, read_config(model)[1].max_positions).train
    if len(usable) < rows + held_out:
        sys.exit(f"{data}: {len(usable)} rows of at most {max_length} tokens; {rows} + {held_out} are asked for")
    parts = {"train": usable[:rows], "val": usable[-held_out:]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        write_json(folder / f"{name}.json", [alpaca(row) for row in part])
    with open(folder / "prompts.jsonl", "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(prompt_completion(row, template)) + "\n" for row in parts["train"])
    tokens = {
        name: [{"ids": row.ids, "trained": list(map(int, row.trained))} for row in part] for name, part in parts.items()
    }
    write_json(folder / "tokens.json", tokens)


def alpaca(row: Row) -> dict[str, str]:
    """Returns a row as it was in the file."""
    return {"instruction": row.turns[-2].content, "input": row.turns[-2].input, "output": row.turns[-1].content}


def prompt_completion(row: Row, template: ChatTemplate) -> dict[str, str]:
    """Returns the same text in two parts; the answer's includes the token that ends it."""
    rendered = template.spans(row.turns)
    (start, end), *_ = rendered.trained
    return {"prompt": rendered.text[:start], "completion": rendered.text[start:end]}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    prepare(*map(Path, sys.argv[1:4]), *map(int, sys.argv[4:]))
