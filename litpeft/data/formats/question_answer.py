"""One question, one answer.

{"question": "Capital of France?", "answer": "Paris."}
"""

from litpeft.data.formats.pair import ANSWERS, Pair

FORMAT = Pair("question", ("answer", *(key for key in ANSWERS if key != "answer")))
