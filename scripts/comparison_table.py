"""Prints a table in Markdown of finished runs, for scripts/compare_commands.sh.

    python scripts/comparison_table.py RUN ANSWERS SECONDS [RUN ANSWERS SECONDS ...]

RUN is the folder of a run, ANSWERS what `litpeft evaluate RUN ... --output ANSWERS` wrote, SECONDS how long the whole
command took.
"""

import json
import sys
from pathlib import Path

HEAD = "| method | trains | result | in steps | whole command | peak memory | validation loss | exact answers |"


def row(run: Path, answers: Path, seconds: str) -> str:
    """Returns the line of one run; its own figures are those of its report.json."""
    facts = json.loads((run / "report.json").read_text(encoding="utf-8"))
    result = sum(file.stat().st_size for file in (run / "final").glob("*.safetensors"))
    exact = [json.loads(line)["finetuned"]["exact"] for line in answers.read_text(encoding="utf-8").splitlines()]
    losses = [loss for _, loss in facts["validation"]]
    memory = "" if facts["peak_memory"] is None else f"{facts['peak_memory'] / 1e9:.1f} GB"
    cells = [
        facts["method"],
        f"{facts['trainable']:,}",
        f"{result / 1e6:.1f} MB",
        f"{facts['seconds']:.0f} s",
        f"{seconds} s",
        memory,
        f"{losses[0]:.3f} → {losses[-1]:.3f}" if losses else "",
        f"{sum(exact)}/{len(exact)}",
    ]
    return f"| {' | '.join(cells)} |"


def main(words: list[str]) -> None:
    if not words or len(words) % 3:
        sys.exit(__doc__)
    print(HEAD)
    print("|---" * (HEAD.count("|") - 1) + "|")
    for run, answers, seconds in zip(*(words[i::3] for i in range(3)), strict=True):
        print(row(Path(run), Path(answers), seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
