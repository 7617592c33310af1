"""One instruction, one answer, and perhaps earlier turns.

{"instruction": "Name the capital.", "input": "France", "output": "Paris.", "system": "Be brief.",
 "history": [["Do you know capitals?", "Yes."]]}

`input`, `system` and `history` may be missing or empty; `context` is another name of `input`, `response` of `output`.
Every answer is trained, those of the history too.
"""

from litpeft.data.formats.pair import ANSWERS, Pair

FORMAT = Pair("instruction", ANSWERS)
